"""The settings of every preset of every recipe are those of `presets.json`: a change of one is a change of that file.

python tests/test_presets.py writes it anew.
"""

import importlib
import json
from pathlib import Path
from typing import Any

from common.config import to_json

import pytest

FROZEN = Path(__file__).parent / "presets.json"
RECIPES = (
    *("mae", "simmim", "beyond_masking", "beyond_masking_integrated", "droppos", "hpm", "lut", "lut_simmim", "lomar"),
    *("finetune", "linear_probe", "knn", "nonlinear_probe"),
)


def presets_of(recipe: str) -> dict[str, Any]:
    return {name: to_json(preset) for name, preset in importlib.import_module(recipe).PRESETS.items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_presets_of_a_recipe_are_those_that_were_agreed_on(recipe: str) -> None:
    assert json.loads(json.dumps(presets_of(recipe))) == json.loads(FROZEN.read_text())[recipe]


if __name__ == "__main__":
    text = json.dumps({recipe: presets_of(recipe) for recipe in RECIPES}, indent=1, sort_keys=True)
    FROZEN.write_text(text + "\n")
