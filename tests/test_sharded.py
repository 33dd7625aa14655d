"""Training on two devices, replicated or sharded, equals training on one, and each goes on where another stopped."""

from pathlib import Path

from common.training.distributed import ALONE

import torch
from sharded import STEPS, train_in_two, trained
from torch import Tensor


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name in one.keys() | other.keys():
        if name in ("predictor.norm.bias", "predictor.head.bias"):
            continue  # a constant added to all predictions changes no order, and their gradients are rounding alone
        left, right = one[name], other[name]
        if name.endswith("qkv.bias"):  # the keys' biases change nothing, and their gradients are rounding alone
            left, right = (biases.reshape(3, -1)[::2] for biases in (left, right))
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_sharded_equals_replicated_equals_one_device_and_each_resumes_the_others(tmp_path: Path) -> None:
    """One run is interrupted after 4 steps sharded on two devices, then after 8 on one, then after 10 replicated."""
    sharded = {"shard": True, "activation_checkpointing": True}
    runs = [
        ("replicated", 2, {}),
        ("sharded", 2, {"shard": True}),
        ("sharded, each gradient clipped", 2, {"shard": True, "clip_each": True}),
        ("moved", 2, sharded | {"steps": 4}),
        ("moved", 1, {"steps": 8}),
        ("moved", 2, {"steps": 10}),
        ("moved", 2, sharded),
    ]
    torch.multiprocessing.spawn(train_in_two, args=(str(tmp_path), runs), nprocs=2)  # pyright: ignore
    whole = trained(tmp_path / "one", ALONE)
    for name in ("replicated", "sharded", "moved"):
        assert_close(whole, torch.load(tmp_path / name / "weights"))
    name = "sharded, each gradient clipped"
    assert_close(trained(tmp_path / "one, clipped", ALONE, clip_each=True), torch.load(tmp_path / name / "weights"))
    kept = {
        step: len([*(tmp_path / f"moved/checkpoint/step_{step:09d}").glob("*.safetensors")]) for step in (10, STEPS)
    }
    assert kept == {10: 1, STEPS: 2}  # a sharded checkpoint has one file per process


def test_recomputed_activations_give_the_same_bits(tmp_path: Path) -> None:
    one = trained(tmp_path / "one", ALONE)
    other = trained(tmp_path / "other", ALONE, activation_checkpointing=True)
    assert all(torch.equal(one[name], other[name]) for name in one)
