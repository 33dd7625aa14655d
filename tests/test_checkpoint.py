"""Files that survive a kill: one's own, and the checkpoints of a training."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.config import SettingsError
from common.files import read_json, read_tensors, write, write_json, write_tensors
from common.training.checkpoint import CHECKSUMS, Checkpoints, check_fit
from common.training.distributed import Processes, join_processes
from common.weights.reading import read_foreign

import pytest
import safetensors.torch
import torch
from forked import ended, fork, ranks
from hypothesis import given
from hypothesis import strategies as st
from strategies import fast, seeded
from torch import Tensor, nn

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether all bits are equal, NaN included."""

    def bits(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.dtype, tensor.shape, bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())

    return {name: bits(tensor) for name, tensor in left.items()} == {name: bits(t) for name, t in right.items()}


class Killed(BaseException):
    """The process ends here."""


@contextlib.contextmanager
def failing_at(number: int, error: BaseException) -> Iterator[list[int]]:
    """Raise an error at the n-th call to the disk; the list is not empty if that came."""
    calls, failed = itertools.count(1), []

    def counting(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                failed.append(number)
                raise error
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for place, name in [(os, "fsync"), (os, "unlink"), (os, "rmdir")]:
            patch.setattr(place, name, counting(getattr(place, name)))
        for name in ("open", "replace", "mkdir"):
            patch.setattr(Path, name, counting(getattr(Path, name)))
        yield failed


@contextlib.contextmanager
def killed_at(number: int) -> Iterator[list[int]]:
    """Kill whoever writes at the n-th call to the disk; the list is not empty if that came."""
    with contextlib.suppress(Killed), failing_at(number, Killed()) as killed:
        yield killed


# Files of one's own


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)])
def test_tensors_go_there_and_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path):
    tensor = (seeded(*shape) * 100).to(dtype)
    write_tensors(tmp_path / "a.safetensors", {"one": tensor, "two.three": tensor})
    found, metadata = read_tensors(tmp_path / "a.safetensors")
    assert same(found, {"one": tensor, "two.three": tensor})
    assert metadata == {}


def test_tensors_that_share_memory_or_need_a_gradient_are_written_apart(tmp_path: Path):
    base = nn.Parameter(seeded(4, 6))
    tensors = {"whole": base, "turned": base.T, "row": base[1], "nan": torch.tensor([float("nan"), -0.0])}
    write_tensors(tmp_path / "a.safetensors", tensors)
    assert same(read_tensors(tmp_path / "a.safetensors")[0], {name: t.detach() for name, t in tensors.items()})


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@fast
@given(metadata=st.dictionaries(st.text("abc_", min_size=1, max_size=5) | st.just("format"), plain, max_size=3))
def test_metadata_goes_there_and_back(tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, Any]):
    path = tmp_path_factory.getbasetemp() / "metadata.safetensors"
    write_tensors(path, {"a": torch.zeros(1)}, metadata)
    assert read_tensors(path)[1] == metadata


def test_metadata_of_others_is_text(tmp_path: Path):
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"format": "pt", "by": "them"})
    assert read_tensors(tmp_path / "a.safetensors")[1] == {"format": "pt", "by": "them"}
    assert read_foreign(tmp_path / "a.safetensors")["a"].equal(torch.ones(1))


def test_a_file_is_the_old_one_or_the_new_one_whenever_its_writer_is_killed(tmp_path: Path):
    path = tmp_path / "settings.json"
    number, killed = 0, [0]
    while killed:
        number += 1
        write_json(path, {"a": 1})
        with killed_at(number) as killed:
            write_json(path, {"a": 2})
        assert json.loads(path.read_text()) == {"a": 1 if killed else 2}
    assert number > 3


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events, fsync, rename = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(os.fstat(handle).st_size) or fsync(handle))
    monkeypatch.setattr(Path, "replace", lambda path, to: events.append(to.name) or rename(path, to))
    write(tmp_path / "a", b"12345")
    assert events == [5, "a"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:20], lambda b: b[:-1], lambda b: b"\xff" * len(b)])
def test_a_damaged_file_is_named(damage: Callable[[bytes], bytes], tmp_path: Path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": seeded(10)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SettingsError, match=f"^{re.escape(str(path))} is damaged or not a safetensors file: "):
        read_tensors(path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_file_that_cannot_be_written_is_named_with_the_reason_and_stays_as_it_was(code: int, tmp_path: Path):
    path = tmp_path / "settings.json"
    number, failed = 0, [0]
    while failed:
        number += 1
        write_json(path, {"a": 1})
        sentence = f"^{re.escape(str(path))} cannot be written: {re.escape(os.strerror(code))}$"
        refused = contextlib.nullcontext() if number > 3 else pytest.raises(SettingsError, match=sentence)
        with refused, failing_at(number, OSError(code, os.strerror(code))) as failed:
            write_json(path, {"a": 2})
        assert json.loads(path.read_text()) == {"a": 1 if failed else 2}
        assert list(tmp_path.iterdir()) == [path]
    assert number == 4  # open, flush and rename


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b'{"a": ', "Expecting value: line 1 column 7"),
        (b"\xff\xfe", "'utf-8' codec can't decode"),
    ],
)
def test_json_that_is_missing_or_damaged_is_named(content: bytes | None, reason: str, tmp_path: Path):
    path = tmp_path / "settings.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=f"^{re.escape(str(path))} cannot be read: {re.escape(reason)}"):
        read_json(path)


def test_tensors_that_are_missing_are_named(tmp_path: Path):
    with pytest.raises(SettingsError, match=r"a\.safetensors cannot be read: No such file"):
        read_tensors(tmp_path / "a.safetensors")


# Checkpoints


def state(step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {"weight": seeded(5, 3, seed=step), "step": torch.tensor(step)}, {"step": step, "last": {"loss": step / 7}}


def saved(folder: Path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, *state(step))
    return checkpoints


def is_state(found: Any, step: int) -> bool:
    return (
        found is not None
        and found.step == step
        and same(found.tensors, state(step)[0])
        and found.state == state(step)[1]
    )


def damage(folder: Path, step: int, file: str = "tensors.safetensors") -> None:
    path = folder / f"step_{step:09d}" / file
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_checkpoints_are_kept_and_the_newest_is_loaded(keep: int, tmp_path: Path):
    checkpoints = saved(tmp_path / "checkpoint", 1, 20, 100, 2_000_000_000, keep=keep)
    assert checkpoints.steps() == [1, 20, 100, 2_000_000_000][-keep:]
    assert is_state(checkpoints.load(), 2_000_000_000)


def test_where_nothing_was_saved_nothing_is_loaded(tmp_path: Path):
    assert Checkpoints(tmp_path / "checkpoint").load() is None
    assert Checkpoints(tmp_path / "checkpoint").steps() == []


def test_a_step_can_be_saved_again(tmp_path: Path):
    checkpoints = saved(tmp_path, 3, 5)
    checkpoints.save(5, {"weight": torch.ones(1)}, {"again": True})
    assert checkpoints.steps() == [3, 5]
    found = checkpoints.load()
    assert found is not None
    assert found.state == {"again": True}


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_with_a_sentence(file: str, tmp_path: Path, capsys: Any):
    checkpoints = saved(tmp_path, 3, 5)
    damage(tmp_path, 5, file)
    assert is_state(checkpoints.load(), 3)
    printed = capsys.readouterr().out
    assert printed.startswith(f"checkpoint {tmp_path / 'step_000000005'} is passed over: ")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_a_checkpoint_without_one_of_its_files_is_passed_over(file: str, tmp_path: Path):
    checkpoints = saved(tmp_path, 3, 5)
    (tmp_path / "step_000000005" / file).unlink()
    assert is_state(checkpoints.load(), 3)


def test_if_all_checkpoints_are_damaged_nothing_is_loaded(tmp_path: Path, capsys: Any):
    checkpoints = saved(tmp_path, 3, 5)
    damage(tmp_path, 3)
    damage(tmp_path, 5)
    assert checkpoints.load() is None
    assert capsys.readouterr().out.count("is passed over") == 2


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_checkpoint_that_was_passed_over_does_not_push_out_new_ones(keep: int, tmp_path: Path):
    checkpoints = saved(tmp_path, 3, 5, keep=keep)
    damage(tmp_path, 5)
    checkpoints.load()
    checkpoints.save(4, *state(4))
    assert checkpoints.steps() == [3, 4][-keep:]
    assert is_state(checkpoints.load(), 4)


def test_a_checkpoint_is_whole_or_not_there_whenever_its_writer_is_killed(tmp_path: Path):
    number, killed = 0, [0]
    while killed:
        number += 1
        folder = tmp_path / str(number)
        checkpoints = saved(folder, 3, 5)
        with killed_at(number) as killed:
            checkpoints.save(7, *state(7))
        assert is_state(checkpoints.load(), checkpoints.steps()[-1])
        assert checkpoints.steps() in ([3, 5], [3, 5, 7], [5, 7])
        checkpoints.save(9, *state(9))
        assert is_state(checkpoints.load(), 9)
        assert len(list(folder.iterdir())) == len(checkpoints.steps()) == 2  # what the killed one left is gone
    assert number > 10


def test_what_another_killed_process_left_is_ignored_and_cleaned(tmp_path: Path):
    checkpoints = saved(tmp_path, 3)
    leftover = tmp_path / ".step_4.999"
    leftover.mkdir()
    (leftover / "tensors.safetensors").write_bytes(b"half")
    assert checkpoints.steps() == [3]
    assert is_state(checkpoints.load(), 3)
    checkpoints.save(5, *state(5))
    assert not leftover.exists()


def test_folders_of_other_names_are_neither_read_nor_deleted(tmp_path: Path):
    foreign = ["step_best", "step_²", "step_25", "step_0000000012", "step_000000012.bak", "step_٠٠٠٠٠٠٠١٢", "notes"]
    for name in foreign:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").touch()
    checkpoints = saved(tmp_path, 3, 5, 7)
    assert checkpoints.steps() == [5, 7]
    assert is_state(checkpoints.load(), 7)
    checkpoints.remove(everything=True)
    assert sorted(path.name for path in tmp_path.glob("*/file")) == ["file"] * len(foreign)
    assert checkpoints.steps() == []


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", CHECKSUMS])
def test_every_flipped_bit_is_found(file: str, tmp_path: Path, capsys: Any):
    checkpoints = saved(tmp_path, 3, 5)
    path = checkpoints.path(5) / file
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = content[position] ^ (1 << position % 8)
        path.write_bytes(content[:position] + bytes([flipped]) + content[position + 1 :])
        assert is_state(checkpoints.load(), 3)
    path.write_bytes(content)
    assert is_state(checkpoints.load(), 5)
    first = capsys.readouterr().out.splitlines()[0]
    assert re.search(r"step_000000005 is passed over: .* is damaged: .* does not agree with SHA256SUMS$", first)


def test_all_files_of_a_checkpoint_are_verified_whatever_they_are_called(tmp_path: Path):
    checkpoints = saved(tmp_path, 3)
    with checkpoints.writing(5) as folder:
        write_tensors(folder / "tensors.safetensors", state(5)[0])
        write_json(folder / "state.json", state(5)[1])
        (folder / "shards").mkdir()
        write_tensors(folder / "shards" / "1.safetensors", {"a": torch.ones(2)})
    assert is_state(checkpoints.load(), 5)
    lines = (checkpoints.path(5) / CHECKSUMS).read_text().splitlines()
    shard = checkpoints.path(5) / "shards" / "1.safetensors"
    assert lines[0] == f"{hashlib.sha256(shard.read_bytes()).hexdigest()}  shards/1.safetensors"
    shard.unlink()
    assert is_state(checkpoints.load(), 3)


@pytest.mark.parametrize("lines", [0, 1])
def test_a_list_of_checksums_that_was_cut_is_found(lines: int, tmp_path: Path):
    checkpoints = saved(tmp_path, 3, 5)
    path = checkpoints.path(5) / CHECKSUMS
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))
    assert is_state(checkpoints.load(), 3)


def test_a_damaged_checkpoint_does_not_count_among_those_to_keep(tmp_path: Path):
    checkpoints = saved(tmp_path, 3, 5)
    damage(tmp_path, 5)
    checkpoints.load()
    checkpoints.save(6, *state(6))
    assert checkpoints.steps() == [3, 6]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_checkpoint_that_cannot_be_written_is_named_and_the_earlier_ones_are_kept(code: int, tmp_path: Path):
    number, failed, sentences = 0, [0], []
    while failed:
        number += 1
        folder = tmp_path / str(number)
        checkpoints = saved(folder, 3, 5)
        with failing_at(number, OSError(code, os.strerror(code))) as failed:
            try:
                checkpoints.save(7, *state(7))
            except SettingsError as error:
                sentences.append(str(error))
        assert is_state(checkpoints.load(), checkpoints.steps()[-1])
        assert set(checkpoints.steps()) >= {5}
        assert not list(folder.glob(".*"))
    assert len(sentences) > 10
    pattern = rf"{re.escape(str(tmp_path))}/.*step_000000007.* cannot be written: {os.strerror(code)}"
    assert all(re.fullmatch(pattern, sentence) for sentence in sentences)


def test_tensors_that_do_not_fit_are_named():
    expected = {"a": torch.zeros(2, 3), "b.step": torch.zeros(())}

    def sentence(**found: Tensor) -> str:
        with pytest.raises(SettingsError) as error:
            check_fit(
                {"a": torch.ones(2, 3), **{name.replace("_", "."): t for name, t in found.items()}},
                expected,
                optional=("b.",),
            )
        return str(error.value)

    check_fit({"a": torch.ones(2, 3)}, expected, optional=("b.",))
    assert sentence(a=torch.ones(3, 2)) == "a is float32 (3, 2) in the checkpoint, but float32 (2, 3) in this training"
    assert "a is float64 (2, 3) in the checkpoint" in sentence(a=torch.ones(2, 3).double())
    assert "b.step is float32 (1,) in the checkpoint, but float32 () in" in sentence(b_step=torch.ones(1))
    assert "b.more is float32 () in the checkpoint, but absent in" in sentence(b_more=torch.ones(()))
    with pytest.raises(SettingsError, match=r"^a is absent in the checkpoint, but float32 \(2, 3\) in this training$"):
        check_fit({}, expected, optional=("b.",))


# Several processes


def loaded_by_two(folders: list[Path], output: Path) -> list[str]:
    """Load a checkpoint on two processes, each from its folder, and return what each printed."""

    def work(rank: int) -> None:
        with join_processes("cpu") as processes:
            try:
                found = Checkpoints(folders[rank]).load_together(processes)
                print(found and found.step, flush=True)
            except SettingsError as error:
                print(error, flush=True)

    outputs = [output / f"{rank}.txt" for rank in range(2)]
    pids = [fork(lambda rank=rank: work(rank), outputs[rank], **own) for rank, own in enumerate(ranks(2))]
    assert [ended(pid) for pid in pids] == [0, 0], [path.read_text() for path in outputs]
    return [path.read_text() for path in outputs]


def test_every_process_loads_the_checkpoint_that_the_main_process_finds_good(tmp_path: Path):
    one, other = tmp_path / "one", tmp_path / "other"
    saved(one, 3, 5)
    saved(other, 3, 5)
    damage(one, 5)
    first, second = loaded_by_two([one, other], tmp_path)
    assert f"{one / 'step_000000005'} is passed over: " in first
    assert (first.splitlines()[-1], second) == ("3", "3\n")


@pytest.mark.parametrize("case", ["absent", "another", "damaged"])
def test_a_process_that_cannot_load_the_same_checkpoint_stops_all_with_one_sentence(case: str, tmp_path: Path):
    one, other = tmp_path / "one", tmp_path / "other"
    saved(one, 3, 5)
    saved(other, 3)
    if case != "absent":
        Checkpoints(other).save(5, *state(5 if case == "damaged" else 6))
    if case == "damaged":
        damage(other, 5)
    first, second = loaded_by_two([one, other], tmp_path)
    assert first == second
    sentence = rf"process 1 cannot resume from {re.escape(str(other))}/step_000000005 as process 0 does \(.*\): "
    assert re.fullmatch(sentence + "--runs must be on a disk that all nodes share\n", first)


def test_if_there_are_only_damaged_checkpoints_it_says_how_to_start_over(tmp_path: Path):
    alone = Processes(0, 1, torch.device("cpu"))
    assert Checkpoints(tmp_path / "none").load_together(alone) is None
    checkpoints = saved(tmp_path, 3, 5)
    damage(tmp_path, 3)
    damage(tmp_path, 5)
    with pytest.raises(SettingsError, match=r"^no checkpoint in .* can be read: start over with --restart, or delete"):
        checkpoints.load_together(alone)


def test_keeping_no_checkpoint_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^keep=0 checkpoints would leave nothing to resume from$"):
        Checkpoints(tmp_path, keep=0)
