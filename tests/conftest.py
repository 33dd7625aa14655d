from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("mimkit", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("mimkit")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder of golden files (*.npz with a .json each) of the same kinds as those in tests/golden",
    )
