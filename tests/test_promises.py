"""The promises that every file makes, checked on its source."""

import ast
import re
import subprocess
import sys

import pytest
from strategies import SOURCES, copied

every_file = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)


@every_file
def test_a_file_imports_only_torch_einops_jaxtyping_and_the_standard_library(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module or "")
    assert {name.split(".")[0] for name in imported} <= {"torch", "einops", "jaxtyping", *sys.stdlib_module_names}
    assert "__future__" not in imported  # strings would hide the shapes from the type checker


@every_file
def test_a_file_works_when_copied_alone(path):
    assert copied(path.stem).__name__ == f"copied_{path.stem}"


def test_importing_all_blocks_loads_no_heavy_package():
    heavy = ["torchvision", "timm", "beartype", "hypothesis", "sklearn", "matplotlib", "PIL"]
    imports = ", ".join(["sys", *(f"mimkit.{path.stem}" for path in SOURCES)])
    program = f"import {imports}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


@every_file
def test_a_file_draws_no_random_numbers_and_reads_nothing_back(path):
    tree = ast.parse(path.read_text())
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    random = r"rand(n|int|perm)?(_like)?|random_?|bernoulli_?|multinomial|normal_?|uniform_|.*dropout.*|Generator"
    host = r"item|cpu|tolist|numpy|nonzero|argwhere|masked_select|unique.*|is_nonzero|synchronize"
    assert [name for name in names if re.fullmatch(f"{random}|{host}", name)] == []


def public_functions() -> list:
    bodies = [(path.stem, ast.parse(path.read_text()).body) for path in SOURCES]
    return [
        pytest.param(node, id=f"{theme}.{node.name}")
        for theme, body in bodies
        for node in body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]


@pytest.mark.parametrize("function", public_functions())
def test_a_docstring_has_every_section(function):
    text = ast.get_docstring(function) or ""
    assert re.match(r"[A-Z][a-z]+ [^\n]*[.:)](\n|$)", text)
    assert "\nExample:\n" in text
    assert ">>> " in text
    assert "\nRaises:\n    ValueError: " in text
    keywords = [argument.arg for argument in function.args.kwonlyargs if argument.arg != "device"]
    undescribed = [name for name in keywords if not re.search(rf"^    {name}: ", text, re.MULTILINE)]
    assert undescribed == []


@pytest.mark.parametrize("function", public_functions())
def test_tensors_are_positional_and_numbers_are_keywords(function):
    by_place = {ast.unparse(argument.annotation) for argument in function.args.args}
    assert all(re.match(r"(Float|Int|Bool|Shaped)\[Tensor, ", annotation) for annotation in by_place)
    assert function.args.kwonlyargs or by_place
    assert function.decorator_list == []


@every_file
def test_equal_values_are_sorted_in_the_same_order_on_every_device(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    sorting = [call for call in calls if re.search(r"\b(arg|m)?sort$", ast.unparse(call.func))]
    unstable = [ast.unparse(call) for call in sorting if "stable=True" not in map(ast.unparse, call.keywords)]
    assert unstable == []
