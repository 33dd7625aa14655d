"""Code shared by the recipes, independent of any paper."""

import os

# PyTorch reads these when it is loaded, so recipes import `common` first. On a CPU, waiting
# threads go to sleep early: slightly slower on an idle machine, many times faster on a shared one,
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# and large buffers use huge pages, which reduces page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
