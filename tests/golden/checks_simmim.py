"""The checks of SimMIM."""

import tempfile
from pathlib import Path
from typing import Any

from common.config import DataSettings, Network, Optimization
from common.evaluation.finetuning import Classifier
from common.networks import attention
from common.networks.attention import RelativeBias, relative_index
from common.networks.building import whole_cells
from common.networks.decoder import PixelHead
from common.networks.vit import SIZES, PatchEmbed, ViT
from common.training.schedules import learning_rate
from common.weights.encoders import load_encoder
from common.weights.reading import load_weights
from mimkit.losses import absolute_error, window_normalized
from mimkit.masking import random_cells
from mimkit.tokens import patchify, unpatchify

import pytest
import simmim
import torch
from goldens import Golden, check
from methods import as_they_are
from torch import Tensor


@check("simmim_mask_gen")
def cells(golden: Golden, _: Any) -> None:
    for name, case in golden.params["cases"].items():
        permutation, patch = golden[f"{name}/perm"], case["model_patch"]
        data, network = DataSettings(image_size=(case["img"], case["img"])), Network(patch=patch)
        count, sizes = whole_cells(data, network, case["mask_patch"], case["ratio"])
        assert permutation.shape[-1] == count
        area = sizes["cell_height"] * sizes["cell_width"]
        golden.close(f"{name}/mask_count", sizes["num_masked"] // area)
        # the first of the permutation are masked, so that they have the largest noise
        noise = torch.zeros(permutation.shape).scatter(
            -1, permutation, 1 - torch.linspace(0, 1, count).expand_as(permutation)
        )
        mask = random_cells(noise, **sizes).unflatten(-1, (sizes["height"], sizes["width"]))
        golden.close(f"{name}/token_mask", mask.long())
        pixels = mask.repeat_interleave(patch, -2).repeat_interleave(patch, -1)
        golden.close(f"{name}/pixel_mask_rowsum", pixels.sum(dim=-1))
        if f"{name}/pixel_mask" in golden:
            golden.close(f"{name}/pixel_mask", pixels.long())


@check("simmim_embed")
def embedding(golden: Golden, _: Any) -> None:
    images, patch = golden["x"], golden.params["patch"]
    height, width = (side // patch for side in images.shape[-2:])
    golden.close("rel_index", relative_index(height, width))
    table = RelativeBias(height, width, golden.params["heads"])
    table.load_state_dict({"relative_position_bias_table": golden["rel_table"]})
    golden.close("rel_bias", table())

    dim, channels = golden["patch_weight"].shape[:2]
    embed = PatchEmbed(patch, channels, dim)
    embed.proj.load_state_dict({"weight": golden["patch_weight"], "bias": golden["patch_bias"]})
    patches = patchify(images, patch=patch)
    golden.close("embeddings", embed(patches))
    sizes = {"height": height, "width": width, "patch": patch, "channels": channels, "dim": dim, "heads": 1}
    encoder = ViT(**sizes, depth=0, class_token=False, table=None, mask_token=True)
    encoder.patch_embed = embed
    encoder.load_state_dict({"mask_token": golden["mask_token"]}, strict=False)
    mask = golden["token_mask"].flatten(1).bool()
    golden.close("embeddings_masked", encoder.unnormalized(patches, encoder.positions, mask=mask))


@check("simmim_head")
def head(golden: Golden, _: Any) -> None:
    patch, (height, width) = golden.params["stride"], golden["z"].shape[-2:]
    weight = golden["weight"]
    head = PixelHead(patch, len(weight) // patch**2, weight.shape[1])
    head.proj.load_state_dict({"weight": weight[..., None, None], "bias": golden["bias"]})
    prediction = head(golden["z"].flatten(2).mT)
    golden.close("x_rec", unpatchify(prediction, height=height, width=width, patch=patch))


@check("simmim_loss")
def loss(golden: Golden, _: Any) -> None:
    patch = golden.params["model_patch"]
    for case in {name.split("/")[0] for name in golden.arrays}:
        mask, prediction = golden[f"{case}/token_mask"].flatten(1), golden[f"{case}/x_rec"].requires_grad_()
        error = absolute_error(patchify(prediction, patch=patch), patchify(golden[f"{case}/x"], patch=patch))
        loss = (error * mask).sum() / (mask.sum() + 1e-5 / patch**2)
        loss.backward()
        golden.close(f"{case}/loss", loss)
        golden.close(f"{case}/grad_x_rec", prediction.grad)


@check("simmim_norm_targets")
def windows(golden: Golden, _: Any) -> None:
    for name, case in golden.params["cases"].items():
        images, window, valid = golden[f"{name}/target"], case["window"], golden[f"{name}/valid"].bool()
        ours = window_normalized(images, window=window)
        for right in (f"{name}/out", f"{name}/out64"):
            golden.close(right, ours.where(valid, golden[right]))
        # how many pixels are in the window of a lone bright pixel: its mean there is 1 / n, its variance, too
        H, W = images.shape[-2:]
        lone = torch.eye(H * W).unflatten(-1, (1, H, W))
        brightest = window_normalized(lone, window=window).flatten(1).diagonal().unflatten(0, (H, W))
        n = golden[f"{name}/count"]
        torch.testing.assert_close(brightest, (1 - 1 / n) / (1 / n + 1e-6).sqrt(), rtol=1e-3, atol=0.0)


@check("simmim_lr")
def schedule(golden: Golden, _: Any) -> None:
    for name, case in golden.params["cases"].items():
        settings = Optimization(
            epochs=case["epochs"],
            batch_size=256,
            base_lr=case["peak"],
            schedule="last_step",
            warmup_epochs=case["warmup"],
            warmup_lr=case["init"],
            min_lr=case["min"],
            milestones=tuple(case.get("milestones", ())),
        )
        rates = [learning_rate(step, settings, case["n"]) for step in range(case["epochs"] * case["n"])]
        golden.close(f"{name}/lr_used", rates)


@check("simmim_whole")
def whole(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    params, images = golden.params, golden["x"]
    patch, names = params["patch"], golden.about["param_order"]
    sizes = {"dim": params["dim"], "depth": params["depth"], "heads": params["heads"]}
    monkeypatch.setitem(SIZES, "golden", sizes)
    config = simmim.Config(
        mask_ratio=params["ratio"],
        cell=params["mask_patch"],
        drop_path=params["drop_path"],
        data=DataSettings(image_size=(params["img"], params["img"])),
        network=Network(size="golden", patch=patch),  # pyright: ignore
    )
    weights = {name.removeprefix("w/"): golden[name] for name in golden.arrays if name.startswith("w/")}
    index = weights["encoder.rel_pos_bias.relative_position_index"]

    method = simmim.SimMIM(config, as_they_are())
    report = load_weights(method, weights, renames=simmim.NAMES, optional=(r"normalize\.",))
    assert report.dropped == ["encoder.rel_pos_bias.relative_position_index"]
    assert relative_index(method.height, method.width).equal(index)
    parameters = {name.replace("head.proj.", "decoder.0."): p for name, p in method.named_parameters()}
    assert set(parameters) == set(names)

    # the attention of the last block, of an image in which nothing is masked
    patches, seen = patchify(images, patch=patch), []
    tokens = _before_last(method.encoder, patches[:1])
    with monkeypatch.context() as watched:
        watched.setattr(attention, "attend", lambda q, k, v, bias: seen.append((q, k, bias)) or v)
        method.encoder.blocks[-1](tokens, bias=method.encoder.rel_pos_bias())  # pyright: ignore
    q, k, bias = seen[-1]
    golden.close("attn_last", (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(dim=-1))

    # the forward pass, and three steps
    optimizer, step = torch.optim.SGD(method.parameters(), lr=params["lr"]), 0
    while f"step{step}/loss" in golden:
        mask = golden[f"mask{step}"].bool()
        if f"step{step}/z" in golden:
            tokens = method.encoder(patches, method.encoder.positions, mask=mask.flatten(1))[:, 1:]
            golden.close(f"step{step}/z", tokens.mT.unflatten(-1, mask.shape[-2:]))
            picture = unpatchify(method.head(tokens), height=method.height, width=method.width, patch=patch)
            golden.close(f"step{step}/x_rec", picture)
        side = params["mask_patch"] // patch
        noise = {"mask": mask[:, ::side, ::side].flatten(1).float()}  # a mask of cells is its own noise
        loss = method(images, noise, torch.tensor(0.0))["loss"]
        loss.backward()
        golden.close(f"step{step}/loss", loss)
        golden.close(f"step{step}/gradnorm", torch.stack([_norm(parameters[name].grad) for name in names]))
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    assert step
    for name in names:
        golden.close(f"after{step}/{name}", parameters[name])

    # the classifier that starts from the file as it was published, with a table in each block
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": weights}, Path(folder, "simmim.pth"))
        encoder, _ = load_encoder(Path(folder, "simmim.pth"))
    classes = len(golden["cls/head.bias"])
    classifier = Classifier(encoder, as_they_are(), classes, pool="mean", head_scale=0.01)
    for part in ("fc_norm", "head"):
        state = {kind: golden[f"cls/{part}.{kind}"] for kind in ("weight", "bias")}
        classifier.get_submodule(part).load_state_dict(state)
    golden.close("cls/logits", classifier.head(classifier.features(images)))


def _before_last(encoder: ViT, patches: Tensor) -> Tensor:
    """The tokens that the last block reads."""
    read: list[Tensor] = []
    with encoder.blocks[-1].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])):
        encoder(patches, encoder.positions)
    return read[0]


def _norm(gradient: Tensor | None) -> Tensor:
    return torch.zeros(()) if gradient is None else gradient.norm()
