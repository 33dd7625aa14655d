"""The checks of Beyond Masking."""

from typing import Any

from common.config import Optimization
from common.data.normalize import Normalize
from common.training.optimizer import layer_of
from common.training.schedules import by_step
from common.weights.reading import load_weights
from mimkit.degrade import (
    area_resize,
    central_crop,
    convolve_each,
    decolorize,
    fisheye_at,
    mirror_fill,
    paste,
    random_kernels,
    wave,
    zoom_in,
    zoom_in_anywhere,
    zoom_out,
)
from mimkit.losses import channel_normalized_patches, squared_error
from mimkit.masking import all_but_block
from mimkit.positions import sinusoid
from mimkit.tokens import patchify, split, take, unpatchify

import beyond_masking as beyond_masking_tasks
import beyond_masking_integrated as beyond_masking
import numpy as np
import pytest
import torch
from goldens import Golden, check
from methods import classifier_of, compare_gradients, groups_of, losses_of, order_of, settings_for
from torch import Tensor

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


OWN = (r"normalize\.", r"encoder\.pos_embed")


@check("beyond_masking_targets")
def channel_targets(golden: Golden, _: Any) -> None:
    for i, case in enumerate(golden.params["cases"]):
        images = golden[f"image_{i}"]
        golden.close(f"patches_{i}", patchify(images, patch=case["p"]))
        target = channel_normalized_patches(patchify(images * STD + MEAN, patch=case["p"]), channels=3)
        assert target[0, 0].abs().max() <= 0.1  # a constant patch: rounding noise
        target[0, 0] = 0
        golden.close(f"target_{i}", target)


@check("beyond_masking_area")
def area(golden: Golden, _: Any) -> None:
    for before, after in golden.params["pairs"]:
        matrix = area_resize(torch.eye(before)[None], H=after, W=before)[0]
        golden.close(f"A_{before}_to_{after}", matrix)
    H, W = golden["y"].shape[-2:]
    golden.close("y", area_resize(golden["x"], H=H, W=W))


@check("beyond_masking_zoom_in")
def zoom(golden: Golden, _: Any) -> None:
    for i in golden.cases():
        side = int(golden[f"S_{i}"])
        golden.close(f"zoomed_{i}", zoom_in(golden[f"image_{i}"], window_H=side, window_W=side))


@check("beyond_masking_sinusoid")
def sinusoid_table(golden: Golden, _: Any) -> None:
    for i, case in enumerate(golden.params["cases"]):
        golden.close(f"table_{i}", sinusoid(height=1, width=case["L"], dim=case["d"]))


@check("beyond_masking_schedule")
def schedule_by_step(golden: Golden, _: Any) -> None:
    for i, case in enumerate(golden.params["cases"]):
        steps, warmup = case["epochs"] * case["steps"], case["warmup"] * case["steps"]
        settings = {"lr": case["base"], "min_lr": case["final"], "warmup": warmup, "steps": steps}
        golden.close(f"lr_{i}", np.array([by_step(step, **settings) for step in range(steps)]))


@check("beyond_masking_groups")
def beyond_masking_groups(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    depth, decay = golden.params["depth"], golden.params["layer_decay"]
    names = golden.about["finetune_names"]
    sizes = {"img": 16, "p": 8, "dim": 8, "heads": 2, "depth": depth, "classes": 3}
    classifier = classifier_of(sizes, "class", key_bias=False, positions=False)
    settings = Optimization(layer_decay=decay, undecayed=("cls_token", "pos_embed"))
    found = {k.removeprefix("encoder."): v for k, v in groups_of(classifier, settings, depth=depth).items()}
    assert set(found) == set(names)
    golden.close("finetune_weight_decay", [found[name][0] for name in names])
    golden.close("finetune_lr_scale", [found[name][1] for name in names])
    golden.close("finetune_layer_id", [layer_of(name, depth) for name in names])

    names = golden.about["pretrain_names"]
    sizes = {"img": 16, "p": 8, "big": 20, "enc_dim": 8, "enc_depth": depth, "enc_heads": 2, "mask_ratio": 0.5}
    decoder = 1 + max(int(name.split(".")[2]) for name in names if name.startswith("decoder.blocks."))
    sizes |= {"dec_dim": 8, "dec_depth": decoder, "dec_heads": 2}
    found = groups_of(_integrated(sizes, monkeypatch), Optimization(undecayed=("mask_token",)))
    published = {_beyond_masking_name(name): group[0] for name, group in found.items()}
    published["encoder.cls_token"] = 0.05  # in the release a parameter that nothing uses; there is none here
    golden.close("pretrain_weight_decay", [published.pop(name) for name in names])
    assert not published


@check("beyond_masking_integrated_loss")
def integrated_loss(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, case in enumerate(golden.params["cases"]):
        sizes = {"img": case["img"], "p": case["p"], "big": case["big"], "mask_ratio": case["ratio"]}
        sizes |= {"enc_dim": 8, "enc_depth": 1, "enc_heads": 2, "dec_dim": 8, "dec_depth": 1, "dec_heads": 2}
        method = _integrated(sizes, monkeypatch)
        prediction = golden[f"pred_{i}"].requires_grad_()

        def predicted(_: Tensor, visible: Tensor, masked: Tensor, of: Tensor = prediction, **__: Any) -> Tensor:
            return take(of, torch.cat([visible, masked], dim=-1))

        monkeypatch.setattr(method.decoder, "forward", predicted)
        view = golden[f"ori_{i}"] * STD + MEAN
        losses = method(view, {"mask": golden[f"mask_{i}"]}, torch.tensor(0.0))  # a mask is its own noise
        losses["loss"].backward()
        golden.close(f"loss_in_{i}", losses["inner"])
        golden.close(f"loss_out_{i}", losses["outer"])
        golden.close(f"loss_{i}", losses["loss"])
        golden.close(f"grad_{i}", prediction.grad)
        border = (case["big"] - case["img"]) // 2
        ours, right = method.outer_target(view), golden[f"target_out_{i}"]
        band = torch.ones(case["big"], case["big"], dtype=torch.bool)
        band[border:-border, border:-border] = False
        torch.testing.assert_close(ours[..., band], right[..., band], **golden.tolerance(f"target_out_{i}"))


@check("beyond_masking_model_integrated")
def integrated_model(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    view, noise = golden["ori"] * STD + MEAN, {"mask": golden["noise"]}

    def fresh() -> Any:
        method = _integrated(golden.params, monkeypatch)
        report = load_weights(method, golden.weights, renames=beyond_masking.NAMES, optional=OWN)
        assert report.dropped == ["encoder.cls_token"]
        return method

    method = fresh()
    visible, masked, order = order_of(golden)
    border = (golden.params["big"] - golden.params["img"]) // 2
    patches = patchify(golden["ori"][..., border:-border, border:-border], patch=golden.params["p"])
    latent = method.encoder(take(patches, visible), method.encoder.positions[visible])
    golden.close("latent", take(latent, order))
    center = central_crop(view, H=golden.params["img"], W=golden.params["img"])
    picture, found = method.predict(center, noise)
    assert found.equal(masked)
    prediction = patchify(picture, patch=golden.params["p"])
    if "pred" in golden:
        golden.close("pred", prediction)
    else:
        golden.close("pred_head", prediction[:, : golden["pred_head"].shape[1]])
        golden.close("pred_token_mean", prediction.mean(dim=-1))
        golden.close("pred_token_sumsq", prediction.square().sum(dim=-1))
    losses = method(view, noise, torch.tensor(0.0))
    losses["loss"].backward()
    golden.close("loss_in", losses["inner"])
    golden.close("loss_out", losses["outer"])
    golden.close("loss", losses["loss"])
    compare_gradients(golden, method, _beyond_masking_name)
    method = fresh()
    rows = losses_of(
        torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1),
        lambda: torch.stack([*method(view, noise, torch.tensor(0.0)).values()]),
    )
    golden.close("sgd_losses", torch.stack(list(rows)))


@check("beyond_masking_model_finetune")
def beyond_masking_classifier(golden: Golden, _: Any) -> None:
    classifier = classifier_of(golden.params, "class", key_bias=False, positions=False)
    renames = {r"(?=cls_token|patch_embed|blocks|norm)": "encoder."}
    load_weights(classifier, golden.weights, renames=renames, optional=(r"normalize\.", r"encoder\.pos_embed"))
    encoder = classifier.encoder
    golden.close("features", encoder(patchify(golden["image"], patch=encoder.patch), encoder.positions))
    golden.close("logits", classifier.head(classifier.features(golden["image"])))


@check("beyond_masking_fisheye")
def bent(golden: Golden, _: Any) -> None:
    for i in golden.cases():
        images, centers, twists = golden[f"image_{i}"], golden[f"center_{i}"].flip(-1)[None], golden[f"m_{i}"][None]
        golden.close(f"distorted_{i}", fisheye_at(images, centers, twists))
        # an image of its own coordinates, bent, is the grid, but for what lies outside
        H, W = images.shape[-2:]
        columns, rows = torch.meshgrid(torch.linspace(-1, 1, W), torch.linspace(-1, 1, H), indexing="xy")
        ours = fisheye_at(torch.stack([columns, rows])[None], centers, twists).movedim(1, -1)
        right = golden[f"grid_{i}"]
        inside = (right.abs() <= 1).all(dim=-1, keepdim=True)
        golden.close(f"grid_{i}", ours.where(inside, right))
    view, centers, twists = golden["big_image"], golden["big_center"].flip(-1)[None], golden["big_m"][None]
    H, W = golden["big_input"].shape[-2:]
    golden.close("big_input", area_resize(fisheye_at(view, centers, twists), H=H, W=W))
    golden.close("big_target_image", central_crop(view, H=H, W=W))


@check("beyond_masking_wave")
def waved(golden: Golden, _: Any) -> None:
    ours = wave(golden["image"], amplitude=float(golden["amplitude"]), frequency=float(golden["frequency"]))
    golden.close("waved_reflect", ours)
    inside = (golden["grid"].abs() <= 1).all(dim=-1).unsqueeze(1)
    golden.close("waved", ours.where(inside, golden["waved"]))


@check("beyond_masking_zoom_out")
def zoomed_out(golden: Golden, _: Any) -> None:
    offsets, several = golden.params["offsets_left_top"], golden.params["multi"]
    places = {f"{{}}_{i}": [int(golden[f"top_{i}"]), int(golden[f"left_{i}"])] for i in range(len(offsets))}
    places |= {f"multi_{{}}_{i}": golden[f"multi_left_top_{i}"].flip(0).tolist() for i in range(len(several))}
    for name, place in places.items():
        small, canvas = golden[name.format("small")], name.format("canvas")
        (h, w), (H, W) = small.shape[-2:], golden[canvas].shape[-2:]
        golden.close(canvas, mirror_fill(small, _noise_of(place, small, room=(H - h, W - w)), H=H, W=W))

    small, prediction, patch = golden["loss_small"], golden["loss_pred"].requires_grad_(), golden.params["loss"]["p"]
    (h, w), (H, W) = small.shape[-2:], golden["plain_image"].shape[-2:]
    noise = _noise_of(golden["loss_left_top"].flip(0).tolist(), small, room=(H - h, W - w))

    def on_canvas(patches: Tensor) -> Tensor:
        picture = unpatchify(patches, height=H // patch, width=W // patch, patch=patch)
        return patchify(zoom_out(picture, noise, small_H=h, small_W=w), patch=patch)

    def target(images: Tensor) -> Tensor:
        return channel_normalized_patches(patchify(images * STD + MEAN, patch=patch), channels=3)

    error = squared_error(on_canvas(prediction), on_canvas(target(area_resize(small, H=H, W=W))))
    loss = (error * golden["loss_mask"]).sum() / golden["loss_mask"].sum()
    loss.backward()
    golden.close("loss_canvas", loss)
    golden.close("loss_canvas_grad", prediction.grad)

    golden.close("plain_small", area_resize(golden["plain_image"], H=h, W=w))
    golden.close("plain_target", target(golden["plain_image"]))
    golden.close("plain_loss", squared_error(prediction, target(golden["plain_image"])).mean())


@check("beyond_masking_blur")
def blurred(golden: Golden, _: Any) -> None:
    for i, case in enumerate(golden.params["cases"]):
        images, box = golden[f"image_{i}"], {"mean": 1 / case["k"] ** 2, "std": 0.02}
        noise = torch.special.ndtr(golden[f"z_{i}"].double()).float()
        kernels = random_kernels(noise, **box)
        golden.close(f"kernel_{i}", kernels)
        golden.close(f"blurred_{i}", convolve_each(images, kernels.squeeze(1)[None]))
        noise = torch.special.ndtr(golden[f"z_mix_{i}"].double()).float()
        kernels = random_kernels(noise, **box)
        golden.close(f"blurred_mix_{i}", convolve_each(images, kernels.flatten(0, 1)[None]))


@check("beyond_masking_decolorize")
def decolorized(golden: Golden, _: Any) -> None:
    for factor in golden.params["factors"]:
        name = f"f{round(100 * factor)}"
        ours = decolorize(golden["rgb"], saturation=factor)
        golden.close(f"out_{name}", ours)
        # the published 8-bit version, of a corner of the image
        quantized = golden[f"quant_rgb_{name}"].permute(2, 0, 1) / 255
        corner = ours[0, :, : quantized.shape[1], : quantized.shape[2]]
        most = float(golden.about["tolerance"]["quantised_vs_float"].split()[-1])
        assert (corner - quantized).abs().max() <= most


@check("beyond_masking_ablations")
def ablations(golden: Golden, _: Any) -> None:
    for i, case in enumerate(golden.params["blocks"]):
        grid, block = case["N"] // case["p"], case["S"] // case["p"]
        sizes = {"height": grid, "width": grid, "block_height": block, "block_width": block}
        mask = all_but_block(torch.full((2,), 0.5), **sizes)
        golden.close(f"block_mask_{i}", mask.float())
        golden.close(f"block_visible_{i}", split(mask, num_masked=grid**2 - block**2)[0])

    case, images = golden.params["random_zoom"], golden["zoom_image"]
    room = case["N"] - case["S"]
    noise = _noise_of([case["top"], case["left"]], images, room=(room, room))
    golden.close("zoom_random", zoom_in_anywhere(images, noise, window_H=case["S"], window_W=case["S"]))

    case, images = golden.params["paste"], golden["paste_image"]
    small = area_resize(images, H=case["S"], W=case["S"])
    golden.close("paste_small", small)
    room = case["N"] - case["S"]
    noise = _noise_of([case["top"], case["left"]], images, room=(room, room))
    golden.close("paste_black", paste(small, (-MEAN / STD).expand_as(images), noise))
    golden.close("paste_foreign", paste(small, images.roll(1, dims=0), noise))


@check("beyond_masking_model_distorted")
def task_model(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    params = golden.params
    bends = torch.tensor(params["cx_cy_m"])
    golden.close("degraded", fisheye_at(golden["original"], bends[:, [1, 0]], bends[:, 2]))
    original, noise = golden["original"] * STD + MEAN, {"mask": torch.zeros(0), "place": torch.zeros(len(bends), 3)}

    def fresh() -> Any:
        sized = settings_for(params | {"mask_ratio": 0.75}, monkeypatch)
        config = beyond_masking_tasks.Config(**sized, task="distorted")
        method = beyond_masking_tasks.Task(config, Normalize(MEAN.flatten().tolist(), STD.flatten().tolist()))
        monkeypatch.setattr(method, "degrade", lambda *_: (golden["degraded"], original))
        load_weights(method, golden.weights, renames=beyond_masking_tasks.NAMES, optional=OWN)
        return method

    method = fresh()
    visible = torch.arange(golden["pred"].shape[1]).expand(len(bends), -1)
    latent = method.encode(golden["degraded"], visible)
    golden.close("pred", method.decoder(latent, visible, visible[:, :0], visible_too=True))
    target = channel_normalized_patches(patchify(original, patch=params["p"]), channels=3)
    golden.close("target", target)
    loss = method(original, noise, torch.tensor(0.0))["loss"]
    loss.backward()
    golden.close("loss", loss)
    compare_gradients(golden, method, _beyond_masking_name)
    method = fresh()
    stepper = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    losses = losses_of(stepper, lambda: method(original, noise, torch.tensor(0.0))["loss"])
    golden.close("sgd_losses", torch.stack(list(losses)))


def _integrated(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> beyond_masking.Integrated:
    config = beyond_masking.Config(**settings_for(params, monkeypatch), view_size=(params["big"], params["big"]))
    return beyond_masking.Integrated(config, Normalize(MEAN.flatten().tolist(), STD.flatten().tolist()))


def _noise_of(place: list[int], images: Tensor, *, room: tuple[int, int]) -> Tensor:
    """Noise that puts each image at this row and column, of `room` + 1 possible ones."""
    noise = torch.tensor([(first + 0.5) / (most + 1) for first, most in zip(place, room, strict=True)])
    return noise.expand(len(images), 2)


def _beyond_masking_name(ours: str) -> str:
    name = ours.replace("decoder.mask_token", "mask_token")
    return name.replace("decoder.embed.", "encoder_to_decoder.")
