"""All forms of all recipes, in one interpreter without run-time type checks; see `forms.py`."""

import subprocess
import sys
from pathlib import Path

import forms


def test_every_form_of_every_recipe_and_the_classifier_are_one_graph_that_waits_for_nothing() -> None:
    script = Path(forms.__file__)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == sum(map(len, forms.FORMS.values())) + 1 == 44
    modules = [path.stem for path in (script.parents[1] / "recipes").glob("*.py") if "RECIPE = " in path.read_text()]
    assert sorted(modules) == sorted(recipe.__name__ for recipe in forms.FORMS)
