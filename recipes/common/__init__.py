"""What the recipes share. It knows nothing of any paper."""

import os

# Threads of a CPU that wait for each other sleep instead of spinning: many times faster when other programs run, too.
# PyTorch reads this when it is loaded, so recipes import `common` first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
