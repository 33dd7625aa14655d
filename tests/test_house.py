"""The rules of the house; `python tests/house.py` prints it in numbers."""

import ast
from pathlib import Path

import house
import pytest


def test_imports_point_one_way_and_form_no_circle() -> None:
    assert house.broken_imports() == []


def test_files_and_functions_are_short_and_recipes_do_not_repeat_each_other() -> None:
    assert house.broken_sizes() == []


@pytest.mark.parametrize("group", ["mimkit", "recipes/common"])
def test_public_names_are_annotated_and_documented(group: str) -> None:
    missing, total = house.undescribed(group)
    assert total > 50
    assert missing == []


def test_an_upward_import_a_hidden_one_and_a_circle_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(house, "ROOT", tmp_path)
    files = {
        "mimkit/a.py": "import mimkit.b\n",
        "mimkit/b.py": "",
        "recipes/common/data/a.py": "from common.data import b\nfrom mimkit import b as c\n",
        "recipes/common/data/b.py": "import common.data.a\n",
        "recipes/common/data/__init__.py": "",
        "recipes/common/recipe.py": "def f():\n    import common.pretraining\n",
        "recipes/common/pretraining.py": "",
        "recipes/mae.py": "",
        "recipes/lut.py": "import mae\n",
        "recipes/lut_mae.py": "import lut, mae\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert sorted(house.broken_imports()) == [
        "circle of imports: common.data.a → common.data.b → common.data.a",
        "common.data.a imports mimkit.b, which is above it",
        "common.recipe imports common.pretraining inside a function",
        "common.recipe imports common.pretraining, which is above it",
        "lut imports mae, another recipe that its name does not join",
        "mimkit.a imports mimkit.b: a file of mimkit works alone",
    ]


def test_lines_of_code_leave_out_docstring_comments_and_empty_lines() -> None:
    text: str = 'def f(x):\n    """One.\n\n    Two.\n    """\n    # why\n\n    return x\n'
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert house.code_lines(function, [*text.splitlines()]) == 2
