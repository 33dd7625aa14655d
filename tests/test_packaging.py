"""What an installation gives to a user's program: blocks that run, and types that mypy and pyright check."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import users_program

CACHE = Path(__file__).resolve().parent.parent / ".mypy_cache"  # what mypy knows of torch: seconds of each run

MISTAKES = """\
# pyright: strict
import torch
from mimkit.masking import random_tokens
from mimkit.relative import relative_buckets
from mimkit.tokens import split

noise = torch.rand(4)
random_tokens(noise, num_masked="two")  # mistake: no number
random_tokens(noise, 2)  # mistake: numbers go by keyword
random_tokens(noise, ratio=0.75)  # mistake: counts, no ratios
split(random_tokens(noise, num_masked=2), num_masked=2).shape  # mistake: two tensors have no shape
relative_buckets(height=2, width=2, method="diagonal")  # mistake: no such method
"""


@pytest.mark.parametrize(
    "checker",
    [["mypy", "--strict", "--cache-dir", str(CACHE)], ["pyright", "--pythonpath", sys.executable]],
    ids=["mypy", "pyright"],
)
def test_a_checker_finds_nothing_in_a_users_program_and_every_mistake_in_another(checker, tmp_path):
    if not importlib.util.find_spec(checker[0]):
        pytest.skip(f"{checker[0]} is not installed")
    shutil.copy(users_program.__file__, tmp_path / "program.py")
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    # another process in another folder: nothing but the installation leads to mimkit
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    command = [sys.executable, "-m", *checker, "program.py", "mistakes.py"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    found = set(re.findall(r"(\w+)\.py:(\d+):.* error: ", answer.stdout))
    lines = enumerate(MISTAKES.splitlines(), start=1)
    assert found == {("mistakes", str(i)) for i, line in lines if "# mistake" in line}, answer.stdout + answer.stderr


def test_the_users_program_runs(capsys):
    users_program.main()
    assert capsys.readouterr().out.startswith("tensor(")
