"""Files that survive a kill, and weights of others of which no code is run."""

import argparse
import contextlib
import itertools
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import Images, Network
from common.data.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from common.files import read_tensors, write, write_json, write_tensors
from common.training.checkpoint import Checkpoints
from common.weights.encoders import load_encoder
from common.weights.reading import LoadReport, load_weights, read_foreign
from mimkit.tokens import patchify, split

import mae
import pytest
import safetensors.torch
import torch
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
def killed_at(number: int) -> Iterator[list[int]]:
    """Kill whoever writes at the n-th call to the disk; the list is not empty if that came."""
    calls, killed = itertools.count(1), []

    def counting(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                killed.append(number)
                raise Killed
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        for place, name in [(os, "fsync"), (os, "unlink"), (os, "rmdir")]:
            patch.setattr(place, name, counting(getattr(place, name)))
        for name in ("open", "replace", "mkdir"):
            patch.setattr(Path, name, counting(getattr(Path, name)))
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
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is damaged or not a safetensors file: "):
        read_tensors(path)


# Checkpoints


def state(step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {"weight": seeded(5, 3, seed=step), "step": torch.tensor(step)}, {"step": step, "last": {"loss": step / 7}}


def saved(folder: Path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, *state(step))
    return checkpoints


def is_state(found: Any, step: int) -> bool:
    return found is not None and found[0] == step and same(found[1], state(step)[0]) and found[2] == state(step)[1]


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
    assert found[2] == {"again": True}


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_with_a_sentence(file: str, tmp_path: Path, capsys: Any):
    checkpoints = saved(tmp_path, 3, 5)
    damage(tmp_path, 5, file)
    assert is_state(checkpoints.load(), 3)
    printed = capsys.readouterr().out
    assert printed.startswith(f"checkpoint {tmp_path / 'step_000000005'} cannot be read and is passed over: ")
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


def test_a_folder_of_another_name_is_left_alone(tmp_path: Path):
    (tmp_path / "step_best").mkdir()
    checkpoints = saved(tmp_path, 3, 5, 7)
    assert checkpoints.steps() == [5, 7]
    assert (tmp_path / "step_best").exists()


def test_keeping_no_checkpoint_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^keep=0 checkpoints would leave nothing to resume from$"):
        Checkpoints(tmp_path, keep=0)


# Weights of others


def test_a_published_file_with_its_settings_is_read(tmp_path: Path):
    weights = {"a": seeded(2, 3), "b": seeded(1)}
    settings = argparse.Namespace(lr=1e-3, name="mae", nested={"a": [1, 2]})
    torch.save({"model": weights, "args": settings, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "a.pth")
    assert same(read_foreign(tmp_path / "a.pth"), weights)


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w}, lambda w: {"student": {}, "teacher": w}])
def test_weights_are_found_under_their_usual_keys(wrap: Any, tmp_path: Path):
    torch.save(wrap({"a": torch.ones(2), "steps": 3}), tmp_path / "a.pth")
    assert same(read_foreign(tmp_path / "a.pth"), {"a": torch.ones(2)})


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_refused_and_never_run(tmp_path: Path):
    path, trace = tmp_path / "a.pth", tmp_path / "trace"
    torch.save({"model": {"a": torch.ones(1)}, "args": Trap(trace)}, path)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_foreign(path)
    assert not trace.exists()
    assert str(caught.value) == f"{path} cannot be read as plain weights: it asks for {os.name}.mkdir"
    torch.load(path, weights_only=False)  # the trap is a real one
    assert trace.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bare_pickle_with_code_is_refused_and_never_run(tmp_path: Path):
    path, trace = tmp_path / "a.pth", tmp_path / "trace"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"a": Trap(trace)}, protocol))
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))} cannot be read as plain weights: [^\n]+$"):
            read_foreign(path)
        assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut"])
def test_what_is_no_checkpoint_is_refused_with_one_sentence(content: bytes, tmp_path: Path):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or no checkpoint") as caught:
        read_foreign(path)
    assert str(caught.value) == f"{path} cannot be read as plain weights: it is damaged or no checkpoint of PyTorch"


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 3}, [torch.ones(1)], 3])
def test_a_file_without_weights_is_an_error(content: Any, tmp_path: Path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'a.pth'))} holds no weights$"):
        read_foreign(tmp_path / "a.pth")


def test_a_missing_file_is_an_error(tmp_path: Path):
    for path in (tmp_path / "a.pth", tmp_path / "a.safetensors", tmp_path):
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is not a file$"):
            read_foreign(path)


def two_layers() -> nn.ModuleDict:
    return nn.ModuleDict({"body": nn.Linear(2, 3), "head": nn.Linear(3, 1)})


def test_every_key_that_is_renamed_dropped_or_missing_is_reported():
    module = two_layers()
    weights = {"trunk.weight": seeded(3, 2), "body.bias": seeded(3), "teacher.center": seeded(1)}
    report = load_weights(module, weights, renames={r"trunk\.": "body."}, optional=(r"head\.",))
    assert report.renamed == {"trunk.weight": "body.weight"}
    assert report.dropped == ["teacher.center"]
    assert report.missing == ["head.weight", "head.bias"]
    assert str(report).splitlines() == [
        "renamed  trunk.weight → body.weight",
        "dropped  teacher.center",
        "missing  head.weight",
        "missing  head.bias",
    ]
    assert module.state_dict()["body.weight"].equal(weights["trunk.weight"])
    assert module.state_dict()["body.bias"].equal(weights["body.bias"])


def test_the_first_rule_that_matches_at_the_start_of_a_name_holds():
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b, self.b = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    module = Names()
    rules = {r"x_": "a_", r"x_b": "b", r"b": "b"}
    assert load_weights(module, {"x_b": torch.ones(1), "b": -torch.ones(1)}, renames=rules).renamed == {"x_b": "a_b"}
    assert module.a_b.item() == 1
    assert module.b.item() == -1
    assert load_weights(module, {"a_x_b": torch.zeros(1)}, renames={r"x_": ""}, optional=(r".",)).dropped == ["a_x_b"]


def test_if_nothing_is_to_be_said_the_report_says_so():
    module = two_layers()
    report = load_weights(module, module.state_dict(), renames={})
    assert report == LoadReport()
    assert str(report) == "every key was found under its own name"


def test_weights_that_are_needed_and_missing_are_named():
    message = "^2 of 4 weights are missing in the file: body.bias, head.weight$"
    with pytest.raises(ValueError, match=message):
        load_weights(two_layers(), {"body.weight": seeded(3, 2)}, renames={}, optional=(r"head\.bias",))
    many = nn.Sequential(*[nn.Linear(1, 1) for _ in range(3)])
    with pytest.raises(ValueError, match=r"^6 of 6 weights .*: 0.weight, 0.bias, 1.weight, 1.bias, 2.weight…$"):
        load_weights(many, {}, renames={})


def test_weights_of_another_shape_are_an_error_and_load_nothing():
    module = two_layers()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    weights = {**{name: tensor + 1 for name, tensor in before.items()}, "head.weight": seeded(3, 1)}
    with pytest.raises(ValueError, match=r"^head.weight is \(3, 1\) in the file but \(1, 3\) here$"):
        load_weights(module, weights, renames={})
    assert same(module.state_dict(), before)


# The published layout of MAE

CONFIG = mae.Config(
    images=Images(image_size=(32, 32)),
    network=Network(size="tiny", patch=8, decoder_dim=32, decoder_depth=2, decoder_heads=2),
)


def method(seed: int, **changes: Any) -> mae.MAE:
    torch.manual_seed(seed)
    return mae.MAE(replace(CONFIG, **changes), Normalize(IMAGENET_MEAN, IMAGENET_STD)).eval()


def published_name(name: str) -> str:
    name = name.removeprefix("encoder.")
    for ours, theirs in {"decoder.mask_token": "mask_token", "decoder.head.": "decoder_pred."}.items():
        name = name.replace(ours, theirs)
    return re.sub(r"^decoder\.", "decoder_", name)


@pytest.fixture(params=["encoder only", "with decoder"])
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[mae.MAE, Path]:
    """A small MAE, and a file with its weights under the published names."""
    original = method(1)
    with torch.no_grad():
        for parameter in original.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    weights = {published_name(name): t for name, t in original.state_dict().items() if "normalize" not in name}
    weights["decoder_pos_embed"] = torch.nn.functional.pad(original.decoder.pos_embed, (0, 0, 1, 0))[None]
    if request.param == "encoder only":
        weights = {name: tensor for name, tensor in weights.items() if not re.match("decoder|mask_token", name)}
    path = tmp_path / "mae_pretrain_vit_tiny.pth"
    torch.save({"model": weights, "args": argparse.Namespace(mask_ratio=0.75), "epoch": 800}, path)
    return original, path


def test_a_published_checkpoint_goes_on_where_it_was(published: tuple[mae.MAE, Path], capsys: Any):
    original, path = published
    loaded, images = method(2, weights=path), seeded(2, 3, 32, 32)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{path}:"
    assert "renamed  patch_embed.proj.weight → encoder.patch_embed.proj.weight" in printed
    assert same(loaded.encoder.state_dict(), original.encoder.state_dict())
    whole = "decoder_pos_embed" in read_foreign(path)
    assert ("dropped  decoder_pos_embed" in printed) == whole
    assert ("missing  decoder.head.weight" in printed) == (not whole)
    noise, progress = {"mask": seeded(2, 16)}, torch.zeros(())
    assert loaded(images, noise, progress)["loss"].equal(original(images, noise, progress)["loss"]) == whole


def test_the_encoder_of_a_published_checkpoint_is_loaded_alone(published: tuple[mae.MAE, Path], capsys: Any):
    original, path = published
    encoder, normalize = load_encoder(path)
    assert f"{path}:\n" in capsys.readouterr().out
    patches = patchify(normalize(seeded(2, 3, 32, 32)), patch=8)
    expected = original.encoder(patches, original.encoder.positions)
    assert encoder(patches, encoder.positions).equal(expected)
    visible, _ = split(seeded(2, 16).argsort() < 12, num_masked=12)
    assert encoder.positions[visible].equal(original.encoder.positions[visible])


def test_the_same_weights_as_safetensors_are_the_same_encoder(published: tuple[mae.MAE, Path]):
    original, path = published
    other = path.with_suffix(".safetensors")
    safetensors.torch.save_file(read_foreign(path), other, {"format": "pt"})
    assert same(load_encoder(other)[0].state_dict(), original.encoder.state_dict())


def test_a_published_encoder_of_which_a_block_is_missing_is_an_error(published: tuple[mae.MAE, Path]):
    path = published[1]
    weights = {name: tensor for name, tensor in read_foreign(path).items() if "blocks.3.mlp" not in name}
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"^4 of \d+ weights are missing in the file: encoder.blocks.3.mlp.fc1.weight"):
        method(2, weights=path)
    with pytest.raises(ValueError, match=r"^4 of \d+ weights are missing in the file: blocks.3.mlp.fc1.weight"):
        load_encoder(path)
