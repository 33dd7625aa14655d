import os
from pathlib import Path

import hypothesis
import pytest
from hypothesis.database import DirectoryBasedExampleDatabase

# Tensors are small and workers many: more than one thread each is slower. Read when torch is loaded, also by the
# programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A failure prints how to reproduce it and comes first in the next run. Nothing asserts a time, so none is too slow.
for profile, max_examples in {"change": 25, "nightly": 1000}.items():
    hypothesis.settings.register_profile(
        profile,
        max_examples=max_examples,
        derandomize=False,
        database=DirectoryBasedExampleDatabase(Path(__file__).resolve().parent.parent / ".hypothesis" / "examples"),
        print_blob=True,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile("change")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder of golden files (*.npz with a .json each) of the same kinds as those in tests/golden",
    )
