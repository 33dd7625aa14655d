"""Code shared by the recipes, independent of any paper."""

import contextlib
import ctypes
import os

# These must come before PyTorch is loaded, so recipes import `common` first. On a CPU, waiting threads go to sleep
# early: slightly slower on an idle machine, many times faster on a shared one.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

# By default glibc returns freed buffers to the system, and the next step faults in all their pages again. Keep those
# below 1 GiB (older versions allow 32 MiB): M_MMAP_THRESHOLD is -3, M_TRIM_THRESHOLD -1. Elsewhere there is no mallopt.
with contextlib.suppress(AttributeError, OSError, TypeError):
    mallopt = ctypes.CDLL(None).mallopt
    _ = mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)
    mallopt(-1, 2**31 - 1)
