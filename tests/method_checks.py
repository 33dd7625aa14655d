"""What holds for more than one method, as functions that their tests call, on networks of two small blocks."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common.config import Optimization, Run
from common.data.normalize import Normalize
from common.networks.vit import SIZES
from common.pretraining import pretrain
from common.recipe import Recipe
from common.runs import Stage
from common.training.distributed import Processes
from common.training.engine import train
from common.training.optimizer import parameter_groups

import pytest
import torch
from strategies import seeded
from torch import Tensor, nn


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the smallest network two narrow blocks."""
    monkeypatch.setitem(SIZES, "nano", {"dim": 24, "depth": 2, "heads": 2})


def method_of(recipe: Recipe, **settings: Any) -> Any:
    torch.manual_seed(0)
    return recipe.method(replace(recipe.presets["digits"], **settings), Normalize([0.5], [0.5]))


def views_of(method: Any, count: int = 6) -> Tensor:
    return seeded(count, 1, *method.view_size, seed=1)


def noise_of(method: Any, count: int = 6) -> dict[str, Tensor]:
    seeds = iter(range(9))
    return method.noise(lambda *shape: seeded(*shape, seed=next(seeds)), count)


def at(epoch: float, method: Any) -> Tensor:
    """Return the progress at an epoch."""
    return torch.tensor(epoch / method.config.optimization.epochs, dtype=torch.float64)


def gradients_of(method: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    method.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in method.named_parameters() if p.requires_grad}


def check_first_use_of_weights(method: Any) -> None:
    """Check that no weight that learns is used without gradients first.

    Under autocast its bf16 copy was kept for the next use, in older PyTorch (2.7) without the way back to it.
    """
    first: dict[str, bool] = {}

    def note(key: str) -> None:
        first.setdefault(key, torch.is_grad_enabled())

    for key, part in method.named_modules():
        if any(parameter.requires_grad for parameter in part.parameters()):
            part.register_forward_pre_hook(lambda *_, key=key: note(key))
    method(views_of(method), noise_of(method), at(0, method))
    assert {"encoder", "encoder.blocks.0.attn"} <= set(first)
    assert all(first.values())


def check_gradients_in_bf16(method: Any) -> None:
    """Check that every weight learns in bf16 as in fp32."""
    views, noise, progress = views_of(method), noise_of(method), at(3, method)
    right = gradients_of(method, method(views, noise, progress)["loss"])
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(views, noise, progress)["loss"]
    found = gradients_of(method, loss)
    assert loss.dtype == torch.float32
    largest = max(float(gradient.norm()) for gradient in right.values() if gradient is not None)
    for key, gradient in found.items():
        expected = right[key]
        assert gradient is not None, key
        assert expected is not None, key
        assert float((gradient - expected).norm()) < 0.05 * float(expected.norm()) + 0.003 * largest, key


def check_frozen_tables(method: Any) -> None:
    """Check that only tables and constants are frozen, and that training leaves them as they are."""
    frozen = {key: p.clone() for key, p in method.named_parameters() if not p.requires_grad and "teacher" not in key}
    frozen |= {key: b.clone() for key, b in method.named_buffers()}
    assert all(key.endswith(("pos_embed", "normalize.mean", "normalize.std", ".drop")) for key in frozen)
    groups = parameter_groups(method, Optimization())
    names = [key for group in groups for key in group["names"]]
    assert set(names) == set(gradients_of(method, method(views_of(method), noise_of(method), at(0, method))["loss"]))
    assert not any(key.startswith("teacher") for key in names)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for epoch in range(3):
        method(views_of(method), noise_of(method), at(epoch, method))["loss"].backward()
        optimizer.step()
        if hasattr(method, "after_step"):
            method.after_step(at(epoch, method))
    now = {**dict(method.named_parameters()), **dict(method.named_buffers())}
    assert all(torch.equal(now[key], tensor) for key, tensor in frozen.items())


def in_micro_batches(method: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name of each loss, its value of a batch, and the mean of those of two micro-batches."""
    views, noise, now = views_of(method), noise_of(method), at(7, method)
    micro_batches = [method(views[i::2], {k: n[i::2] for k, n in noise.items()}, now) for i in range(2)]
    for key, value in method(views, noise, now).items():
        yield key, value, (micro_batches[0][key] + micro_batches[1][key]) / 2


class _Images:
    """Random images, up to the number of batches at which the training is interrupted."""

    unreadable = MappingProxyType[str, str]({})

    def __init__(self, batches: Any, last: int) -> None:
        self.batches, self.last = batches, last

    def __iter__(self) -> Iterator[Tensor]:
        for number, samples in enumerate(self.batches):
            if number == self.last:
                raise InterruptedError
            yield torch.cat([seeded(1, 1, 32, 32, seed=epoch + 10 * index) for epoch, index in samples])


def check_resumed_training(recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    """Check that a training that was stopped goes on bit for bit, and return all that the method keeps."""
    settings = Optimization(epochs=3, batch_size=4, base_lr=0.5, warmup_epochs=1.0, clip=5.0)

    def trained(name: str, *, resume: bool = False, last: int = 99) -> dict[str, Tensor]:
        method = method_of(recipe, optimization=settings)
        run = Run(precision="fp32", compile="off", log_every=1, checkpoint_minutes=0.0, resume=resume)
        data: Any = None  # the engine reads its batches from the loader
        stage = Stage(Processes(0, 1, torch.device("cpu")), data, run, folder / name, name)
        train(method, lambda batches: _Images(batches, last), num_images=8, settings=settings, stage=stage)
        return method.state_dict()

    whole = trained("whole")
    with pytest.raises(InterruptedError):
        trained("cut", last=4)
    cut = trained("cut", resume=True)
    assert all(torch.equal(cut[key], tensor) for key, tensor in whole.items())
    return whole


def sentence_of(recipe: Recipe, args: list[str], runs: Path) -> str:
    """Return the sentence that a recipe with a wrong setting ends with."""
    with pytest.raises(SystemExit) as ended:
        pretrain(recipe, name="recipe", args=[*args, "--runs", str(runs), "--device", "cpu"])
    return str(ended.value.code)
