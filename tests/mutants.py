"""Do the tests notice? Change mimkit in one small way at a time, and run the tests of its theme on each change.

    python tests/mutants.py --count 200 --seed 0 --only masking

A mutant is mimkit with one expression of one function changed: a comparison, an operator, a constant, an argument, a
call left out. It is killed if a test fails, crashes or hangs, and survives if all pass: those in test_THEME.py, the
theme's rows in test_contract.py and test_promises.py, and the module's examples. Every survivor is printed. Some are
equivalent programs, such as a faster path that is never taken; each of the others is a property that no test states.

All happens in a copy of the repository in a temporary folder. Each mutant is tested in a fork of this process, which
has imported torch already. The same seed gives the same mutants and the same examples.
"""

import argparse
import ast
import copy
import inspect
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 12 * 2**30  # bytes of addresses that a mutant may use: a wrong size should fail, not fill the machine

OPERATORS: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
}
PAIRS = [("min", "max"), ("minimum", "maximum"), ("amin", "amax"), ("sin", "cos"), ("floor", "ceil"), ("any", "all")]
NAMES = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
SYMMETRIC = {"min", "max", "minimum", "maximum"}  # exchanging their arguments changes nothing


def changes(node: ast.AST) -> Iterator[ast.expr]:
    """All small changes of one expression."""
    match node:
        case ast.Compare():
            for i, operator in enumerate(node.ops):
                if type(operator) in OPERATORS:
                    yield but(node, ops=[*node.ops[:i], OPERATORS[type(operator)](), *node.ops[i + 1 :]])
        case ast.BinOp() if type(node.op) in OPERATORS:
            yield but(node, op=OPERATORS[type(node.op)]())
            yield node.left
        case ast.BoolOp():
            yield but(node, op=OPERATORS[type(node.op)]())
            for i in range(len(node.values)):
                rest = node.values[:i] + node.values[i + 1 :]
                yield but(node, values=rest) if len(rest) > 1 else rest[0]
        case ast.UnaryOp():
            yield node.operand
        case ast.IfExp():
            yield but(node, body=node.orelse, orelse=node.body)
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1))
        case ast.Constant(value=float(value)):
            yield ast.Constant(2 * value if value else 1.0)
        case ast.Call(func=ast.Name(id=name)):
            if name in NAMES:
                yield but(node, func=ast.Name(NAMES[name]))
            yield from exchanged(node, name)
        case ast.Call(func=ast.Attribute(value=owner, attr=name)):
            if name in NAMES:
                yield but(node, func=ast.Attribute(owner, NAMES[name]))
            if not re.fullmatch(r"(torch|F|math)(\.\w+)*", ast.unparse(owner)):
                yield owner
            for i, keyword in enumerate(node.keywords):
                others = node.keywords[:i] + node.keywords[i + 1 :]
                yield but(node, keywords=others)
                if keyword.arg in NAMES:
                    yield but(node, keywords=[*others, ast.keyword(NAMES[keyword.arg], keyword.value)])
            yield from exchanged(node, name)


def exchanged(call: ast.Call, name: str) -> Iterator[ast.expr]:
    """A call with two neighboring arguments exchanged."""
    if name in SYMMETRIC:
        return
    for i, (first, second) in enumerate(zip(call.args, call.args[1:], strict=False)):
        yield but(call, args=[*call.args[:i], second, first, *call.args[i + 2 :]])
    for i, (a, b) in enumerate(zip(call.keywords, call.keywords[1:], strict=False)):
        pair = [ast.keyword(a.arg, b.value), ast.keyword(b.arg, a.value)]
        yield but(call, keywords=[*call.keywords[:i], *pair, *call.keywords[i + 2 :]])


def but(node: ast.expr, **fields: object) -> ast.expr:
    """A copy of a node with other fields."""
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def changed_expressions(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """The expressions below a node, each with every change; none of annotations and of error messages."""
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.arguments):
        return
    if isinstance(node, ast.If):
        yield node.test, ast.Constant(False)
    if isinstance(node, ast.expr):
        yield from ((node, change) for change in changes(node))
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from changed_expressions(child)


@dataclass(frozen=True, order=True)
class Mutant:
    """A file with one change: the bytes from `start` to `stop` become others."""

    theme: str
    start: int
    stop: int
    after: str
    function: str
    shown: str

    def applied(self, source: bytes) -> bytes:
        return source[: self.start] + f"({self.after})".encode() + source[self.stop :]


def functions_of(source: bytes) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]


def mutants_of(path: Path) -> list[Mutant]:
    """Every mutant of a file, in a fixed order."""
    source, found = path.read_bytes(), set()
    lines = source.splitlines(keepends=True)
    begins = [sum(map(len, lines[:i])) for i in range(len(lines))]
    for function in functions_of(source):
        for node, change in (pair for statement in function.body for pair in changed_expressions(statement)):
            before, after = ast.unparse(node), ast.unparse(change)
            last, column = node.end_lineno or 0, node.end_col_offset or 0
            start, stop = begins[node.lineno - 1] + node.col_offset, begins[last - 1] + column
            around = lines[node.lineno - 1][: node.col_offset].decode(), lines[last - 1][column:].decode()
            shown = f"{path.name}:{node.lineno} {function.name}: {around[0].lstrip()}⟦{before} → {after}⟧{around[1]}"
            if before != after:
                found.add(Mutant(path.stem, start, stop, after, function.name, shown.rstrip()))
    return sorted(found)


def callers(function: str, source: bytes) -> set[str]:
    """A function and all that call it, also by way of others."""
    uses = {f.name: {node.id for node in ast.walk(f) if isinstance(node, ast.Name)} for f in functions_of(source)}
    names, more = set(), {function}
    while more:
        names |= more
        more = {name for name, used in uses.items() if used & more} - names
    return names


class Nearest:
    """A plugin of pytest: of what all themes share only the theme's rows, and tests that name a function first."""

    def __init__(self, theme: str, names: set[str]) -> None:
        self.theme, self.names = theme, re.compile(rf"\b({'|'.join(sorted(names))})\b")

    def pytest_collection_modifyitems(self, items: list) -> None:
        assert Path(sys.modules["mimkit"].__path__[0]).resolve() == Path("mimkit").resolve()
        shared, row = ("test_contract", "test_promises"), re.compile(rf"[\[-]{self.theme}[.\]]")
        items[:] = [item for item in items if item.path.stem not in shared or row.search(item.name)]
        items.sort(key=lambda item: not self.names.search(item.name + self.text(item)))

    @staticmethod
    def text(item: object) -> str:
        function = getattr(item, "function", None)
        return inspect.getsource(inspect.unwrap(function)) if function else ""


def status(theme: str, names: set[str]) -> int:
    """Run the tests of a theme on what is in the folder now; 0 if all pass."""
    import pytest

    files = [f"mimkit/{theme}.py", f"tests/test_{theme}.py", "tests/test_contract.py", "tests/test_promises.py"]
    options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
    return int(pytest.main([*options, *files], plugins=[Nearest(theme, names)]))


def verdict(theme: str, names: set[str], seconds: float) -> str:
    """Say whether what is in the folder now survives, is killed, or hangs and is killed after some seconds."""
    child = os.fork()
    if not child:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            code = status(theme, names)
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            return "killed" if code else "survived"
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


def warm(folder: Path, examples: int) -> None:
    """Go to the copy and load once what every fork needs, but nothing of mimkit."""
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork has none of its parent's threads
    sys.dont_write_bytecode = True  # two mutants of one second and one length would be taken for the same
    sys.path[0] = str(folder)
    os.chdir(folder)
    import beartype  # noqa: F401
    import hypothesis
    import pytest  # noqa: F401
    import torch

    torch.compile(torch.neg, backend="aot_eager")(torch.zeros(1))
    hypothesis.settings.register_profile(
        "mutants",
        max_examples=examples,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # one failure is enough, also a large one
        deadline=None,
        derandomize=True,
        database=None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="how many mutants to sample")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", default="*", help="theme: the stem of a file in mimkit")
    parser.add_argument("--examples", type=int, default=50, help="examples of each property")
    parser.add_argument("--timeout", type=float, default=120, help="seconds after which a mutant hangs")
    options = parser.parse_args()
    paths = [path for path in sorted((ROOT / "mimkit").glob(f"{options.only}.py")) if path.stem != "__init__"]
    pool = [mutant for path in paths for mutant in mutants_of(path)]
    mutants = sorted(random.Random(options.seed).sample(pool, min(options.count, len(pool))))
    print(f"{len(mutants)} of {len(pool)} mutants, seed {options.seed}", flush=True)
    verdicts = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "mimkit"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
        warm(folder, options.examples)
        for theme in sorted({mutant.theme for mutant in mutants}):
            if verdict(theme, {theme}, options.timeout) != "survived":
                sys.exit(f"the tests of {theme} fail, or take more than {options.timeout:g} s, before any change")
        for i, mutant in enumerate(mutants, start=1):
            path = folder / "mimkit" / f"{mutant.theme}.py"
            source = path.read_bytes()
            path.write_bytes(mutant.applied(source))
            verdicts.append(verdict(mutant.theme, callers(mutant.function, source), options.timeout))
            path.write_bytes(source)
            if verdicts[-1] != "killed":
                print(f"{verdicts[-1]} ({i} of {len(mutants)}): {mutant.shown}", flush=True)
        os.chdir(ROOT)
    killed = len(mutants) - verdicts.count("survived")
    print(f"{killed} of {len(mutants)} mutants killed: {killed / max(len(mutants), 1):.1%}")


if __name__ == "__main__":
    main()
