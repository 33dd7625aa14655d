"""Training on two devices, replicated or sharded, equals training on one, and goes on with the other."""

from pathlib import Path
from typing import Any

from common.training.distributed import Processes

import pytest
import torch
from sharded import STEPS, train_in_two, trained
from torch import Tensor

ALONE = Processes(0, 1, torch.device("cpu"))


def in_two(folder: Path, *runs: tuple[str, dict[str, Any]]) -> list[dict[str, Tensor]]:
    (folder / "meeting").unlink(missing_ok=True)
    torch.multiprocessing.spawn(train_in_two, args=(str(folder), list(runs)), nprocs=2)  # pyright: ignore
    return [torch.load(folder / name / "weights") for name, _ in runs]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_sharded_equals_replicated_equals_one_device_and_each_resumes_the_others(tmp_path: Path) -> None:
    """Interrupted after 4 steps on two devices, sharded; after 8 on one; finished on two, and on two replicated."""
    whole = trained(tmp_path / "one", ALONE)
    replicated, sharded, recomputed, _ = in_two(
        tmp_path,
        ("replicated", {}),
        ("sharded", {"shard": True}),
        ("recomputed", {"shard": True, "activation_checkpointing": True}),
        ("moved", {"shard": True, "steps": 4}),
    )
    files = {path.name for path in (tmp_path / "moved/checkpoint/step_000000004").glob("*.safetensors")}
    assert len(files) == 2  # each process wrote its own part
    trained(tmp_path / "moved", ALONE, steps=8)
    assert sorted(path.name for path in (tmp_path / "moved/checkpoint").iterdir()) == ["step_000000006", "step_000000008"]
    (moved,) = in_two(tmp_path, ("moved", {"shard": True}))
    assert (tmp_path / f"moved/checkpoint/step_{STEPS:09d}").is_dir()
    for other in (replicated, sharded, recomputed, moved):
        assert_same(whole, other)
    assert any(not torch.equal(whole[name], sharded[name]) for name in whole) or whole.keys() == sharded.keys()


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputed_activations_give_the_same_bits(recompute: bool, tmp_path: Path) -> None:
    one = trained(tmp_path / "one", ALONE, steps=STEPS)
    other = trained(tmp_path / "other", ALONE, activation_checkpointing=recompute)
    assert all(torch.equal(one[name], other[name]) for name in one)
