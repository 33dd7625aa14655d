"""What the recipes share. It knows nothing of any paper."""

import os

# PyTorch reads these when it is loaded, so recipes import `common` first. On a CPU
# threads that wait for each other soon sleep: a little slower alone, many times faster beside other programs,
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# and large buffers lie in large pages: fewer page faults in every step.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
