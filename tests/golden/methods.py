"""Methods and classifiers of the sizes of a golden file, and what the checks do with them."""

import functools
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common.config import DataSettings, Network, Optimization, Run
from common.data.normalize import Normalize
from common.evaluation.finetuning import Classifier, Finetuning
from common.networks import decoder, vit
from common.networks.vit import SIZES, ViT
from common.runs import Stage
from common.training import engine
from common.training.distributed import Processes
from common.training.log import read_metrics
from common.training.optimizer import clip, layer_of, parameter_groups
from common.training.schedules import by_epoch
from common.weights.reading import load_weights
from mimkit.positions import sincos, sinusoid
from mimkit.tokens import split

import pytest
import torch
from goldens import Golden
from torch import Tensor, nn


def settings_for(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings for the sizes of a file, with ImageNet's mean and std already taken off its images or not."""
    sizes = {"dim": params["enc_dim"], "depth": params["enc_depth"], "heads": params["enc_heads"]}
    monkeypatch.setitem(SIZES, "golden", sizes)
    network = Network(
        size="golden",  # pyright: ignore
        patch=params["p"],
        decoder_dim=params["dec_dim"],
        decoder_depth=params["dec_depth"],
        decoder_heads=params["dec_heads"],
    )
    data = DataSettings(image_size=(params["img"], params["img"]))
    return {"network": network, "data": data, "mask_ratio": params["mask_ratio"]}


def classifier_of(params: dict[str, Any], pool: Any, *, key_bias: bool = True, positions: bool = True) -> Classifier:
    side = params["img"] // params["p"]
    encoder = ViT(
        height=side,
        width=side,
        patch=params["p"],
        channels=3,
        dim=params["dim"],
        depth=params["depth"],
        heads=params["heads"],
        key_bias=key_bias,
        table=sincos if positions else sinusoid,
    )
    encoder.pos_embed.requires_grad_(positions)
    return Classifier(encoder, as_they_are(), params["classes"], pool=pool, head_scale=0.01)


def groups_of(module: nn.Module, settings: Optimization, *, depth: int = 0) -> dict[str, tuple[float, float]]:
    """Weight decay and scale of each trainable parameter."""
    groups = parameter_groups(module, settings, depth=depth)
    return {name: (group["weight_decay"], group["lr_scale"]) for group in groups for name in group["names"]}


SMALL = {"img": 16, "patch": 8, "dim": 8, "depth": 1, "heads": 2, "dec_dim": 8, "dec_depth": 1, "dec_heads": 2}


def sized_settings(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings for the sizes of a file; one epoch unless it says more."""
    for module in (vit, decoder):
        monkeypatch.setattr(module, "Block", functools.partial(vit.Block, mlp_ratio=params.get("mlp_ratio", 4)))
    sizes = {
        "p": params["patch"],
        "img": params["img"],
        "mask_ratio": params.get("mask_ratio", params.get("gamma", 0.5)),
    }
    sizes |= {f"enc_{name}": params[name] for name in ("dim", "depth", "heads")}
    sized = settings_for(sizes | {k: v for k, v in params.items() if k.startswith("dec_")}, monkeypatch)
    return sized | {"optimization": Optimization(epochs=params.get("epochs", 1))}


def as_they_are() -> Normalize:
    """The files' images are normalized already."""
    return Normalize([0.0] * 3, [1.0] * 3)


def loaded(golden: Golden, method: nn.Module, names: dict[str, str]) -> dict[str, str]:
    """Fill a method with the weights of a file, and return our name of each of its parameters."""
    report = load_weights(method, golden.weights, renames=names, optional=(r"normalize\.", r"teacher\."))
    assert set(report.dropped) <= {"decoder_pos_embed"}
    return {name: report.renamed.get(name, name) for name in golden.weights}


def renamed(names: Iterable[str], rules: dict[str, str]) -> dict[str, str]:
    """Our name of each published one."""
    ours = {}
    for name in names:
        rule = next((rule for rule in rules if re.match(rule, name)), None)
        ours[name] = name if rule is None else re.sub(rule, rules[rule], name, count=1)
    return ours


def norms(method: nn.Module, ours: dict[str, str], names: list[str], *, gradients: bool = False) -> Tensor:
    """The norms of all weights, or of their gradients, in the order of the file."""
    found = dict(method.named_parameters())
    assert {name for name, p in found.items() if p.requires_grad} == {ours[name] for name in names}
    tensors = [found[ours[name]].grad if gradients else found[ours[name]] for name in names]
    return torch.stack([torch.zeros(()) if tensor is None else tensor.detach().norm() for tensor in tensors])


def num_blocks(names: list[str], prefix: str) -> int:
    return 1 + max(int(name.split(".")[1]) for name in names if name.startswith(f"{prefix}."))


def with_gradients(golden: Golden, prefix: str) -> list[nn.Parameter]:
    parameters = []
    while f"{prefix}{len(parameters)}" in golden:
        gradient = golden[f"{prefix}{len(parameters)}"]
        parameters.append(nn.Parameter(torch.zeros_like(gradient)))
        parameters[-1].grad = gradient
    return parameters


def compare_positions(golden: Golden) -> None:
    """Compare the fixed position tables; those of prefix tokens are zero."""
    for name in golden.arrays:
        dim, side, prefix = map(int, re.findall(r"\d+", name))
        table = sincos(height=side, width=side, dim=dim)
        golden.close(name, nn.functional.pad(table, (0, 0, prefix, 0)))


def compare_groups(
    golden: Golden, build: Callable[[dict[str, Any]], nn.Module], rules: dict[str, str], finetune: Finetuning
) -> None:
    """Compare the weight decay and learning rate of every parameter, in pre-training and in fine-tuning."""
    names = golden.about["pretrain_names"]
    sizes = SMALL | {"depth": num_blocks(names, "blocks"), "dec_depth": num_blocks(names, "decoder_blocks")}
    found = groups_of(build(sizes), Optimization(weight_decay=golden.params["pretrain"]["wd"]))
    ours = renamed(names, rules)
    assert set(found) == set(ours.values())
    golden.close("pretrain_weight_decay", [found[ours[name]][0] for name in names])
    assert {scale for _, scale in found.values()} == {1.0}

    params, names = golden.params["finetune"], golden.about["finetune_names"]
    sizes = {"img": 16, "p": 8, "dim": 8, "heads": 2, "depth": params["depth"], "classes": 3}
    classifier = classifier_of(sizes, finetune.pool)
    classifier.get_parameter("encoder.pos_embed").requires_grad_(finetune.train_positions)
    settings = replace(finetune.optimization, layer_decay=params["ld"], weight_decay=params["wd"])
    groups = groups_of(classifier, settings, depth=params["depth"])
    found = {name.removeprefix("encoder."): group for name, group in groups.items()}
    assert set(found) == set(names)
    golden.close("finetune_weight_decay", [found[name][0] for name in names])
    golden.close("finetune_lr_scale", [found[name][1] for name in names])
    if "finetune_layer_id" in golden:
        golden.close("finetune_layer_id", [layer_of(name, params["depth"]) for name in names])


def order_of(golden: Golden) -> tuple[Tensor, Tensor, Tensor]:
    """Visible and masked indices as ours, and where each token of the file's order stands among our visible ones."""
    mask = golden["mask"].bool()
    visible, masked = split(mask, num_masked=int(mask[0].sum()))
    kept = golden["ids_restore"].argsort(dim=-1)[:, : visible.shape[1]]
    return visible, masked, kept.argsort(dim=-1).argsort(dim=-1)


def compare_gradients(golden: Golden, module: nn.Module, published: Callable[[str], str]) -> None:
    """Compare the gradients of all parameters, which `published` names as the file does."""
    found = {published(name): p.grad for name, p in module.named_parameters() if p.grad is not None}
    zero = torch.zeros(())
    names = golden.about["param_names"]
    assert set(found) <= set(names)
    golden.close("grad_norm", torch.stack([found.get(name, zero).norm() for name in names]))
    for name in names:
        if f"grad.{name}" in golden:
            golden.close(f"grad.{name}", found[name])


def losses_of(optimizer: torch.optim.Optimizer, losses: Callable[[], Tensor]) -> Iterator[Tensor]:
    """The losses before the first and after each of three steps; the first of several is minimized."""
    for _ in range(4):
        values = losses()
        yield values.detach()
        optimizer.zero_grad()
        values.flatten()[0].backward()
        optimizer.step()


def compare_rates(golden: Golden, name: str, settings: dict[str, Any], *, scale: float = 1.0) -> None:
    numbers = {key: settings[key] for key in ("lr", "min_lr", "warmup", "epochs")}
    steps = range(settings["epochs"] * settings["iters"])
    golden.close(name, [scale * by_epoch(step / settings["iters"], **numbers) for step in steps])


def progress_at(epoch: int, epochs: int) -> Tensor:
    return torch.tensor(epoch / epochs, dtype=torch.float64)


def noise_of(order: Tensor, tokens: int) -> Tensor:
    """Noise that orders the patches of each row so; those that are not in it are masked whatever their noise."""
    places = torch.arange(order.shape[1]) / tokens
    return torch.zeros(len(order), tokens).scatter(1, order, places.expand(order.shape))


def step_names(params: dict[str, Any]) -> Iterator[str]:
    return (f"e{epoch}i{i}" for epoch in range(params["epochs"]) for i in range(params["iters_per_epoch"]))


class Recorded(list[Tensor]):
    """The batches of a file, as the engine reads them."""

    unreadable = MappingProxyType[str, str]({})


def trained(
    method: Any,
    images: list[Tensor],
    noise: list[dict[str, Tensor]],
    params: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    **clipping: Any,
) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]]]:
    """Train with the engine on the images and the noise of a file; return its log and the gradients before clipping."""
    batch = params["batch"]
    settings = Optimization(
        epochs=params["epochs"],
        batch_size=batch,
        base_lr=params["lr"] * 256 / batch,
        warmup_epochs=params["warmup_epochs"],
        min_lr=params["min_lr"],
        weight_decay=params["weight_decay"],
        betas=tuple(params["betas"]),
        **clipping,
    )
    gradients, draws = [], iter(noise)

    def watched(parameters: list[nn.Parameter], norm: float, *, each: bool = False) -> None:
        found = method.named_parameters()
        gradients.append({name: p.grad.clone() for name, p in found if p.grad is not None})
        clip(parameters, norm, each=each)

    monkeypatch.setattr(engine, "clip", watched)
    monkeypatch.setattr(method, "noise", lambda rand, batch: next(draws))
    run = Run(precision="fp32", compile="off", log_every=1)
    with tempfile.TemporaryDirectory() as folder:
        data: Any = None  # the engine reads its batches from the loader
        stage = Stage(Processes(0, 1, torch.device("cpu")), data, run, Path(folder), "training")
        engine.train(
            method,
            lambda batches: Recorded(images),
            num_images=batch * params["iters_per_epoch"],
            settings=settings,
            stage=stage,
        )
        return read_metrics(Path(folder) / "metrics.jsonl"), gradients
