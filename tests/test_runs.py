"""The folder of a run: one writer, what it takes to resume or to start over, and what is never deleted."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import locks
from common.config import DataSettings, SettingsError, check, parse
from common.data.sources import open_data
from common.runs import prepare
from common.training.checkpoint import Checkpoints
from common.training.distributed import join_processes

import mae
import pytest
import torch
from forked import ended, fork, ranks, until

STAGES = ("finetune", "linear")
DIGITS = open_data(DataSettings(path="digits", channels=1), seed=0)


def opened(folder: Path, *args: str, recipe: str = "mae", after: Callable[[], object] = lambda: None) -> None:
    """Prepare the folder of a run, as a program does at its start, and do something before its end."""
    config = parse(mae.PRESETS, ["--runs", str(folder.parent), "--name", folder.name, *args], name="mae")
    with join_processes("cpu") as processes:
        prepare(folder, recipe, config, run=config.run, data=DIGITS, stages=STAGES, processes=processes)
        after()


def checkpoint(folder: Path, step: int = 5) -> None:
    Checkpoints(folder / "checkpoint").save(step, {"a": torch.ones(2)}, {})


def files(folder: Path) -> set[str]:
    """The files in a folder but for the lock and the fingerprint of the images, which every run has."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return found - {locks.FILE, "data.json"}


def refuses(folder: Path, sentence: str, *args: str, **options: Any) -> None:
    before = files(folder) if folder.is_dir() else set()
    with pytest.raises(SettingsError, match="^" + re.escape(sentence)):
        opened(folder, *args, **options)
    assert not folder.is_dir() or files(folder) == before


# What it takes to resume or to start over


@pytest.mark.parametrize("option", [[], ["--resume"], ["--restart"]])
def test_a_new_run_writes_its_settings(option: list[str], tmp_path: Path) -> None:
    opened(tmp_path / "a" / "b", *option, "--epochs", "3")
    settings = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert (settings["recipe"], settings["optimization"]["epochs"]) == ("mae", 3)


def test_a_run_with_a_checkpoint_is_resumed_or_deleted_but_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    opened(folder, "--epochs", "3")
    checkpoint(folder)
    refuses(folder, f"{folder} holds a run already: go on with --resume, delete it with --restart, or give another")
    refuses(folder, f"{folder} was started with --epochs 3 and cannot be resumed with 4", "--resume", "--epochs", "4")
    refuses(folder, f"{folder} holds a run of mae, which hpm cannot resume", "--resume", recipe="hpm")
    refuses(folder, f"{folder} holds a run of mae, which hpm cannot resume", "--restart", recipe="hpm")
    refuses(folder, "--resume goes on with a run, and --restart deletes it: choose one", "--resume", "--restart")
    opened(folder, "--resume")
    assert Checkpoints(folder / "checkpoint").steps() == [5]
    opened(folder, "--restart", "--epochs", "4")
    assert files(folder) == {"config.json"}
    assert json.loads((folder / "config.json").read_text())["optimization"]["epochs"] == 4
    checkpoint(folder)
    opened(folder, "--resume")  # although it was started with --restart
    assert Checkpoints(folder / "checkpoint").steps() == [5]


@pytest.mark.parametrize("file", ["result.json", "encoder.safetensors", "finetune/classifier.safetensors"])
def test_results_and_weights_are_not_overwritten_either(file: str, tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    refuses(tmp_path, f"{tmp_path} holds a run already: ")


def test_a_run_that_crashed_before_its_first_checkpoint_does_not_block_its_name(tmp_path: Path) -> None:
    opened(tmp_path, "--epochs", "3")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "events.out.tfevents.1").touch()
    refuses(tmp_path, f"{tmp_path} has no checkpoint to resume from: start over with --restart", "--resume")
    opened(tmp_path, "--epochs", "4")
    assert files(tmp_path) == {"config.json"}
    assert json.loads((tmp_path / "config.json").read_text())["optimization"]["epochs"] == 4
    opened(tmp_path, recipe="hpm")
    assert json.loads((tmp_path / "config.json").read_text())["recipe"] == "hpm"


def test_a_run_whose_checkpoints_were_deleted_does_not_start_over_silently(tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / "result.json").touch()
    refuses(tmp_path, f"{tmp_path} has no checkpoint to resume from: start over with --restart", "--resume")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "cannot be read: No such file or directory"), ("{", "cannot be read: Expecting property name")],
)
def test_settings_that_are_missing_or_damaged_are_named(content: str | None, reason: str, tmp_path: Path) -> None:
    opened(tmp_path)
    checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    if content:
        (tmp_path / "config.json").write_text(content)
    refuses(tmp_path, f"{tmp_path / 'config.json'} {reason}", "--resume")
    opened(tmp_path, "--restart")
    assert files(tmp_path) == {"config.json"}


@pytest.mark.parametrize("option", [[], ["--restart"]])
def test_a_config_json_of_another_program_is_not_overwritten(option: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"their": "settings"}')
    refuses(tmp_path, f"{tmp_path / 'config.json'} is not that of a run: give another --name", *option)


def test_restarting_deletes_the_files_of_the_run_and_no_others(tmp_path: Path) -> None:
    opened(tmp_path)
    own = ["metrics.jsonl", "events.out.tfevents.1", "reconstruction.png", "curves.png", "encoder.safetensors"]
    own += ["result.json", "budget.json", ".result.json.12", "checkpoint/.step_000000004/state.json"]
    own += ["finetune/metrics.jsonl", "linear/metrics.jsonl"]
    foreign = ["notes.md", "finetune/notes.md", "backup/metrics.jsonl", "checkpoint/step_25/a", "half/result.json"]
    for name in own + foreign:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    checkpoint(tmp_path)
    checkpoint(tmp_path / "finetune")
    opened(tmp_path, "--restart")
    assert files(tmp_path) == {"config.json", *foreign}
    assert not (tmp_path / "linear").exists()


def test_resuming_removes_what_killed_processes_left(tmp_path: Path) -> None:
    opened(tmp_path)
    checkpoint(tmp_path)
    for name in (".result.json.12", ".encoder.safetensors.7", "finetune/.metrics.jsonl.9", ".mine.12"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "checkpoint" / ".step_000000009").mkdir()
    opened(tmp_path, "--resume")
    assert {name for name in files(tmp_path) if "/" not in name} == {"config.json", ".mine.12"}
    assert not list(tmp_path.glob("*/.*"))


def test_a_folder_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refuses(tmp_path / "file" / "run", f"{tmp_path / 'file' / 'run'} cannot be written: Not a directory")
    (tmp_path / "run" / locks.FILE).mkdir(parents=True)
    refuses(tmp_path / "run", f"{tmp_path / 'run'} cannot be written: Is a directory")


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../b", "a//b", "a/", "..", ".", "./a", " ", "a/ /b", "a\nb"])
def test_a_name_that_leaves_the_folder_of_runs_is_refused(name: str) -> None:
    sentence = f"--name {name}: must be a name, or several joined by /, without .. or empty parts"
    with pytest.raises(SettingsError, match=f"^{re.escape(sentence)}$"):
        parse(mae.PRESETS, [f"--name={name}"], name="mae")


@pytest.mark.parametrize("name", ["", "a", "study/mae-0", "..a", "größe 2"])
def test_a_name_may_be_that_of_a_subfolder(name: str) -> None:
    check(parse(mae.PRESETS, [f"--name={name}"], name="mae"))


# One run, one writer


def test_a_second_program_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    first = fork(lambda: opened(tmp_path, after=lambda: time.sleep(60)), tmp_path / "output.txt")
    until((tmp_path / "config.json").exists, of=first)
    for option in ([], ["--resume"], ["--restart"]):
        refuses(tmp_path, f"{tmp_path} is in use by process {first} on {socket.gethostname()}: wait for its", *option)
    os.kill(first, signal.SIGKILL)
    assert ended(first) == -signal.SIGKILL
    opened(tmp_path, "--epochs", "3")
    opened(tmp_path, "--epochs", "4")


def test_a_worker_that_outlives_its_program_does_not_keep_the_folder_locked(tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / "worker").write_text(str(fork(lambda: time.sleep(60), tmp_path / "output.txt")))
        time.sleep(60)

    first = fork(lambda: opened(tmp_path, after=work), tmp_path / "output.txt")
    until(lambda: (tmp_path / "worker").exists() and (tmp_path / "worker").read_text(), of=first)
    os.kill(first, signal.SIGKILL)
    ended(first)
    try:
        opened(tmp_path)
    finally:
        os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)


def test_a_folder_stays_locked_while_any_process_of_the_program_lives(tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / os.environ["RANK"]).touch()
        time.sleep(60)

    pids = [fork(lambda: opened(tmp_path, after=work), tmp_path / "output.txt", **own) for own in ranks(2)]
    for rank, pid in enumerate(pids):
        until((tmp_path / str(rank)).exists, of=pid)
    host = socket.gethostname()
    refuses(tmp_path, f"{tmp_path} is in use by process {pids[0]} on {host}, process {pids[1]} on {host}: ")
    os.kill(pids[0], signal.SIGKILL)
    ended(pids[0])
    refuses(tmp_path, f"{tmp_path} is in use by process {pids[1]} on {host}: ", "--resume")
    os.kill(pids[1], signal.SIGKILL)
    ended(pids[1])
    opened(tmp_path)


def test_a_program_may_prepare_the_same_folder_again(tmp_path: Path) -> None:
    config = parse(mae.PRESETS, ["--runs", str(tmp_path)], name="mae")
    with join_processes("cpu") as processes:
        for _ in range(2):
            prepare(tmp_path / "mae", "mae", config, run=config.run, data=DIGITS, processes=processes)
    assert locks._held == {}


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_without(code: int, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def refused(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refused)
    opened(tmp_path)
    assert files(tmp_path) == {"config.json"}
    assert "this file system has no locks: nothing keeps a second program from" in capsys.readouterr().out


def test_nodes_without_a_shared_disk_are_told_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / locks.FILE).write_text("another run's token 12 there\n")
    outputs = [tmp_path / "0.txt", tmp_path / "1.txt"]

    def work(rank: int) -> None:
        try:
            opened(tmp_path / str(rank))
        except SettingsError as error:
            print(error)

    pids = [fork(lambda rank=rank: work(rank), outputs[rank], **own) for rank, own in enumerate(ranks(2))]
    assert [ended(pid) for pid in pids] == [0, 0]
    sentence = f"{tmp_path / '1'} on {socket.gethostname()} is not the folder in which the main process writes: "
    sentence += "--runs must be on a disk that all nodes share\n"
    assert [path.read_text() for path in outputs] == [sentence, sentence]
    assert files(tmp_path / "0") == set()
