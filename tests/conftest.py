import os
from pathlib import Path

import hypothesis
import pytest

# Tensors are small and workers many: more than one thread each is slower. Read when torch is loaded, also by the
# programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

hypothesis.settings.register_profile("mimkit", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("mimkit")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder of golden files (*.npz with a .json each) of the same kinds as those in tests/golden",
    )
