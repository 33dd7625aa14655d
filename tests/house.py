"""The house in numbers, and what breaks its rules: python tests/house.py.

Rules: imports point one way, from the recipes down to torch, without a circle, none hidden in a function; no file of
recipes/ has more than 400 lines, no function more than 60 lines of code; recipes are short and do not repeat each
other; public names of mimkit/ and recipes/common/ are annotated and documented.
"""

import ast
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
MOST_LINES, MOST_IN_FUNCTION, MOST_MEAN, LEAST_DISTINCT = 400, 60, 145, 0.80

BASE = {"common", "common.config", "common.help", "common.files", "common.locks", "common.randomness"}
DATA = BASE | {"common.data"}
TRAINING = DATA | {"common.training", "common.runs"}
NETWORKS = BASE | {"mimkit", "common.networks"}
WEIGHTS = NETWORKS | {"common.weights", "common.data"}
REPORT = DATA | {"mimkit", "common.report"}
EVALUATION = WEIGHTS | TRAINING | REPORT | {"common.evaluation"}
RECIPE = EVALUATION | {"common.recipe"}
ALL = RECIPE | {"common.pretraining", "common.analysis"}
MAY_IMPORT = {  # data and training know neither mimkit nor networks
    **dict.fromkeys(BASE, BASE),
    "common.data": DATA,
    **dict.fromkeys(("common.training", "common.runs"), TRAINING),
    "common.networks": NETWORKS,
    "common.weights": WEIGHTS,
    "common.report": REPORT,
    "common.evaluation": EVALUATION,
    "common.recipe": RECIPE,
    **dict.fromkeys(("common.pretraining", "common.analysis"), ALL),
}


@dataclass(frozen=True)
class Import:
    """A module of the project that a file imports, and whether inside a function."""

    module: str
    inside: bool


def module_of(path: Path) -> str:
    """Return the name by which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] in ("recipes", "tests", "benchmarks") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """Return the folder below recipes/common, or the module directly in it; elsewhere the top of the name."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "common" else parts[0]


def files_of(group: str) -> list[Path]:
    """Return the Python files of a folder, of recipes/ only those directly in it."""
    folder = ROOT / group
    return sorted(folder.glob("*.py") if group == "recipes" else folder.rglob("*.py"))


def imports_of(path: Path, known: set[str]) -> Iterator[Import]:
    """Yield the modules of the project that a file imports."""
    tree = ast.parse(path.read_text())
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in full]
        for name in dict.fromkeys(names):
            if name in known:
                yield Import(name, id(node) in inside)


def code_lines(function: ast.FunctionDef, rows: list[str]) -> int:
    """Count the lines of a function without its docstring, comments and empty lines."""
    first = function.body[0]
    documented = range(first.lineno, (first.end_lineno or 0) + 1) if ast.get_docstring(function) else ()
    lines = (rows[i - 1].strip() for i in range(function.lineno, (function.end_lineno or 0) + 1) if i not in documented)
    return sum(line != "" and line[0] != "#" for line in lines)


def broken_imports() -> list[str]:
    """Return the imports that point upward, are hidden in a function, or form a circle."""
    files = {module_of(path): path for group in ("mimkit", "recipes", "recipes/common") for path in files_of(group)}
    graph = {module: list(imports_of(path, set(files))) for module, path in files.items()}
    broken, recipes = [], {path.stem for path in files_of("recipes")}
    for module, imports in graph.items():
        for found in imports:
            other, room, their_room = found.module, room_of(module), room_of(found.module)
            if found.inside:
                broken.append(f"{module} imports {other} inside a function")
            if room == "mimkit" and other != module:
                broken.append(f"{module} imports {other}: a file of mimkit works alone")
            elif room in MAY_IMPORT and their_room not in MAY_IMPORT[room]:
                broken.append(f"{module} imports {other}, which is above it")
            elif room in recipes and other in recipes and other not in module:
                broken.append(f"{module} imports {other}, another recipe that its name does not join")
    return broken + [f"circle of imports: {' → '.join(circle)}" for circle in circles(graph)]


def circles(graph: dict[str, list[Import]]) -> list[list[str]]:
    """Return circles of imports, each once."""
    found, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for other in graph[module]:
                visit(other.module, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


def broken_sizes() -> list[str]:
    """Return files and functions that are too long, and recipes that are too long or repeat each other."""
    broken = []
    for group in ("mimkit", "recipes", "recipes/common", "benchmarks"):
        for path in files_of(group):
            rows = path.read_text().splitlines()
            if len(rows) > MOST_LINES and group.startswith("recipes"):
                broken.append(f"{path.relative_to(ROOT)}: {len(rows)} lines")
            functions = [node for node in ast.walk(ast.parse("\n".join(rows))) if isinstance(node, ast.FunctionDef)]
            lengths = {node.name: code_lines(node, rows) for node in functions}
            too_long = {name: lines for name, lines in lengths.items() if lines > MOST_IN_FUNCTION}
            broken += [f"{path.relative_to(ROOT)} {name}: {lines} lines of code" for name, lines in too_long.items()]
    mean = statistics.mean(len(path.read_text().splitlines()) for path in methods())
    if mean > MOST_MEAN:
        broken.append(f"recipes of methods: {mean:.1f} lines on average")
    if (share := distinct(files_of("recipes"))) < LEAST_DISTINCT:
        broken.append(f"recipes: {share:.1%} distinct lines")
    return broken


def methods() -> list[Path]:
    """Return the recipes of pre-training methods."""
    return [path for path in files_of("recipes") if "\nRECIPE = " in path.read_text()]


def distinct(paths: list[Path]) -> float:
    """Return the share of distinct lines, without comments and lines of a word's length."""
    rows = (row.strip() for path in paths for row in path.read_text().splitlines())
    lines = Counter(row for row in rows if len(row) > 3 and not row.startswith("#"))
    return len(lines) / sum(lines.values())


def undescribed(group: str) -> tuple[list[str], int]:
    """Return the public functions and classes of a folder without docstring or annotations, and how many there are."""
    missing, total = [], 0
    for path in files_of(group):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            total += 1
            arguments = []
            if isinstance(node, ast.FunctionDef):
                arguments = [a for a in (*node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
            if ast.get_docstring(node) is None or not all(a.annotation for a in arguments):
                missing.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} is not annotated and documented")
    return missing, total


def main() -> None:
    """Print a table and what breaks a rule."""
    print(f"{'':<16}{'files':>6}{'lines':>8}{'median':>8}{'longest':>9}{'longest function':>18}{'distinct lines':>16}")
    for group in ("mimkit", "recipes", "recipes/common", "tests", "benchmarks"):
        paths = files_of(group)
        rows = {path: path.read_text().splitlines() for path in paths}
        functions = [
            code_lines(node, lines)
            for lines in rows.values()
            for node in ast.walk(ast.parse("\n".join(lines)))
            if isinstance(node, ast.FunctionDef)
        ]
        sizes = [len(lines) for lines in rows.values()]
        print(
            f"{group:<16}{len(paths):>6}{sum(sizes):>8}{statistics.median(sizes):>8.0f}{max(sizes):>9}"
            f"{max(functions):>18}{distinct(paths):>16.0%}"
        )
    lengths = [len(path.read_text().splitlines()) for path in methods()]
    print(f"\n{len(lengths)} recipes of methods: mean {statistics.mean(lengths):.1f} lines, longest {max(lengths)}")
    broken = [*broken_imports(), *broken_sizes()]
    for group in ("mimkit", "recipes/common"):
        missing, total = undescribed(group)
        print(f"{group}: {total - len(missing)} of {total} public names are annotated and documented")
        broken += missing
    print("\n".join(["", "broken rules:", *broken] if broken else ["", "no rule is broken"]))
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
