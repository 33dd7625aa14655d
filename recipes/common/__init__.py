"""What the recipes share. It knows nothing of any paper."""

import os

# PyTorch reads these when it is loaded, so recipes import `common` first. On a CPU
# threads that wait for each other sleep instead of spinning: many times faster when other programs run, too,
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# and large buffers lie in large pages: fewer page faults in every step.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
