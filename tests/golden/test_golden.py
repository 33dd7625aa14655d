"""The right numbers, from the published programs: one test per file, its id the file's stem.

`pytest tests/golden --golden DIR` runs the same tests over other files of the same kinds: all sizes are the file's.
"""

from pathlib import Path

import checks_beyond_masking  # noqa: F401 (its checks)
import checks_droppos  # noqa: F401 (its checks)
import checks_hpm  # noqa: F401 (its checks)
import checks_lomar  # noqa: F401 (its checks)
import checks_lut  # noqa: F401 (its checks)
import checks_mae  # noqa: F401 (its checks)
import checks_simmim  # noqa: F401 (its checks)
import pytest
from goldens import CHECKS, Golden, longest


def kind_of(path: Path) -> str | None:
    return longest(CHECKS, path)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--golden"))  # pyright: ignore
        files = [path for path in sorted(folder.glob("*.npz")) if kind_of(path)]
        metafunc.parametrize("golden_file", files, ids=[path.stem for path in files])


def test_golden(golden_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = kind_of(golden_file)
    assert kind is not None
    golden = Golden(golden_file)
    CHECKS[kind](golden, monkeypatch)
    assert golden.overlooked() == []


def test_every_kind_has_a_file_and_every_file_a_kind() -> None:
    files = list(Path(__file__).parent.glob("*.npz"))
    assert {kind_of(path) for path in files} == set(CHECKS)
