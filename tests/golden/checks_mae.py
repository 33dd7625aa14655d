"""The checks of MAE."""

from typing import Any

from common.config import Optimization
from common.data.mixing import cutmix_weights, mix_pairs, smoothed
from common.data.views import one_shot_crop_size
from common.evaluation.finetuning import Classifier
from common.networks.building import count_masked
from common.training.optimizer import LARS, layer_of, parameter_groups
from common.training.schedules import by_epoch
from common.weights.reading import load_weights
from common.weights.resizing import resize_positions
from mimkit.losses import normalized_patches, squared_error
from mimkit.masking import random_tokens
from mimkit.positions import sincos
from mimkit.tokens import patchify, put, split, take, unpatchify

import mae
import numpy as np
import pytest
import torch
from goldens import Golden, check
from methods import as_they_are, classifier_of, compare_gradients, groups_of, losses_of, order_of, settings_for
from torch import nn


@check("mae_masking")
def masking(golden: Golden, _: Any) -> None:
    for i, case in enumerate(golden.params["cases"]):
        noise, tokens, kept = golden[f"noise_{i}"], golden[f"x_{i}"], golden[f"ids_keep_{i}"]
        count = count_masked(noise.shape[-1], case["r"])
        mask = random_tokens(noise, num_masked=count)
        visible, masked = split(mask, num_masked=count)
        golden.close(f"mask_{i}", mask.float())
        assert (visible == kept.sort(dim=-1).values).all()
        assert (torch.cat([visible, masked], dim=-1).sort(dim=-1).values == torch.arange(noise.shape[-1])).all()
        golden.close(f"x_masked_{i}", take(take(tokens, visible), kept.argsort().argsort()))
    lengths, ratios = golden["keep_table_L"].tolist(), golden["keep_table_ratio_x100"].tolist()
    for length, ratio, keep in zip(lengths, ratios, golden["keep_table_keep"].tolist(), strict=True):
        if 0 < keep < length:
            assert length - count_masked(length, ratio / 100) == keep
        else:
            with pytest.raises(ValueError, match="does not leave both masked and visible"):
                count_masked(length, ratio / 100)


@check("mae_patchify_target")
def patch_targets(golden: Golden, _: Any) -> None:
    for i, case in enumerate(golden.params["cases"]):
        images, mask, size = golden[f"image_{i}"], golden[f"mask_{i}"], {"patch": case["p"]}
        patches = patchify(images, **size)
        golden.close(f"patches_{i}", patches)
        grid = {"height": images.shape[-2] // case["p"], "width": images.shape[-1] // case["p"]}
        assert (unpatchify(patches, **grid, **size) == images).all()
        golden.close(f"target_norm_{i}", normalized_patches(patches))
        for kind, target in {"raw": patches, "norm": normalized_patches(patches)}.items():
            prediction = golden[f"pred_{i}"].requires_grad_()
            loss = (squared_error(prediction, target) * mask).sum() / mask.sum()
            loss.backward()
            golden.close(f"loss_{kind}_{i}", loss)
            golden.close(f"grad_{kind}_{i}", prediction.grad)


@check("mae_sincos")
def sincos_table(golden: Golden, _: Any) -> None:
    for i, case in enumerate(golden.params["cases"]):
        table = sincos(height=case["grid"], width=case["grid"], dim=case["D"])
        right = golden[f"table_{i}"]
        golden.close(f"table_{i}", nn.functional.pad(table, (0, 0, 1, 0))[: len(right)])
    before, after = golden["interp_in"], golden["interp_out"]
    old, new = (round((table.shape[1] - 1) ** 0.5) for table in (before, after))
    sizes = {"height": old, "width": old, "new_height": new, "new_width": new}
    golden.close("interp_out", resize_positions(before, **sizes))


@check("mae_lr_schedule")
def schedule_by_epoch(golden: Golden, _: Any) -> None:
    for i, case in enumerate(golden.params["cases"]):
        settings = {"lr": case["lr"], "min_lr": case["min_lr"], "warmup": case["warmup"], "epochs": case["epochs"]}
        rates = np.array([by_epoch(epoch, **settings) for epoch in golden[f"epoch_{i}"].tolist()])
        golden.close(f"lr_{i}", rates)
        golden.close(f"lr_scaled_{i}", rates * case["scale"])


@check("mae_groups")
def groups(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    depth, names = golden.params["depth"], golden.about["names_pretrain"]
    decoder = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("decoder_blocks."))
    sizes = {"img": 16, "p": 8, "enc_dim": 8, "enc_depth": depth, "enc_heads": 2, "mask_ratio": 0.5}
    sizes |= {"dec_dim": 8, "dec_depth": decoder, "dec_heads": 2}
    found = groups_of(_mae(sizes, monkeypatch), Optimization(weight_decay=golden.params["wd"]))
    published = {_mae_name(name): group for name, group in found.items()}
    golden.close("weight_decay_pretrain", [published.pop(name)[0] for name in names])
    assert not published
    for pool, ours in (("pool", "mean"), ("cls", "class")):
        names = golden.about[f"names_{pool}"]
        classifier = classifier_of({"img": 16, "p": 8, "dim": 8, "heads": 2, "depth": depth, "classes": 3}, ours)
        settings = Optimization(
            weight_decay=golden.params["wd"],
            layer_decay=golden.params["layer_decay"],
            undecayed=("cls_token", "pos_embed"),
        )
        found = {k.removeprefix("encoder."): v for k, v in groups_of(classifier, settings, depth=depth).items()}
        assert set(found) == set(names)
        golden.close(f"weight_decay_{pool}", [found[name][0] for name in names])
        golden.close(f"lr_scale_{pool}", [found[name][1] for name in names])
        golden.close(f"layer_id_{pool}", [layer_of(name, depth) for name in names])


@check("mae_lars")
def lars(golden: Golden, _: Any) -> None:
    for i, case in enumerate(golden.params["cases"]):
        parameters = {kind: nn.Parameter(golden[f"p0_{kind}_{i}"]) for kind in ("w", "b")}
        optimizer = LARS(
            parameters.values(), lr=case["lr"], weight_decay=case["wd"], momentum=case["mom"], trust=case["eta"]
        )
        step = 0
        while f"grad_w_{i}_{step}" in golden:
            for kind, parameter in parameters.items():
                parameter.grad = golden[f"grad_{kind}_{i}_{step}"]
            optimizer.step()
            for kind, parameter in parameters.items():
                golden.close(f"p_{kind}_{i}_{step}", parameter)
            step += 1
        assert step


@check("mae_linprobe_crop")
def one_shot_crop(golden: Golden, _: Any) -> None:
    draws = [golden[name].tolist() for name in ("H", "W", "u_area", "u_logratio")]
    sizes = [one_shot_crop_size(*draw) for draw in zip(*draws, strict=True)]
    golden.close("h", [h for h, _ in sizes])
    golden.close("w", [w for _, w in sizes])


@check("mae_mixup")
def mixup(golden: Golden, _: Any) -> None:
    """The partner of an image in the file is its mirror image in the batch, ours its neighbor."""
    images, labels = golden["image"], golden["label"]
    B, _, H, W = images.shape
    pairs = torch.stack([torch.arange(B // 2), B - 1 - torch.arange(B // 2)], dim=1).flatten()
    targets = smoothed(labels, num_classes=golden.params["classes"], smoothing=golden.params["smoothing"])
    noise = (golden["cy_cx"] + 0.5) / torch.tensor([H, W])
    cut = cutmix_weights(golden["lam_cut"], noise, H=H, W=W)
    golden.close("lam_cut_corrected", cut.mean())
    inside = [(cut == 0).any(dim=axis).nonzero() for axis in (1, 0)]
    golden.close("box", [int(end) for places in inside for end in (places.min(), places.max() + 1)])
    for names, weights in (("mixed", "target_mix"), golden["lam_mix"].expand(H, W)), (("cut", "target_cut"), cut):
        for name, mixed in zip(names, mix_pairs(images[pairs], targets[pairs], weights), strict=True):
            golden.close(name, mixed[pairs.argsort()])
    golden.close("loss", Classifier.loss(golden["logits"], golden["target_mix"]))


@check("mae_model_norm")
@check("mae_model_raw")
def mae_model(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    images, noise = golden["image"], {"mask": golden["noise"]}

    def fresh() -> Any:
        method = _mae(golden.params, monkeypatch, normalize_target=golden.params["norm_pix_loss"])
        report = load_weights(method, golden.weights, renames=mae.RECIPE.published_names, optional=(r"normalize\.",))
        assert report.dropped == ["decoder_pos_embed"]
        return method

    method = fresh()
    visible, masked, order = order_of(golden)
    patches = take(patchify(images, patch=golden.params["p"]), visible)
    latent = method.encoder(patches, method.encoder.positions[visible])
    own = torch.cat([torch.zeros_like(order[:, :1]), 1 + order], dim=-1)  # the file's order is that of the noise
    golden.close("latent", take(latent, own))
    prediction = method.decoder(latent, visible, masked, visible_too=True)
    golden.close("pred", put(prediction, torch.cat([visible, masked], dim=-1), into=torch.zeros_like(prediction)))

    loss = method(images, noise, torch.tensor(0.0))["loss"]
    loss.backward()
    golden.close("loss", loss)
    compare_gradients(golden, method, _mae_name)
    for name, optimizer in {
        "sgd_losses": lambda groups: torch.optim.SGD(groups, lr=0.1),
        "adamw_losses": lambda groups: torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True),
    }.items():
        if name in golden:
            method = fresh()
            stepper = optimizer(_plain(parameter_groups(method, Optimization(weight_decay=0.05)), name))
            losses = list(losses_of(stepper, lambda method=method: method(images, noise, torch.tensor(0.0))["loss"]))
            golden.close(name, torch.stack(losses))


@check("mae_model_finetune")
def mae_classifier(golden: Golden, _: Any) -> None:
    images, labels, params = golden["image"], golden["label"], golden.params
    for pool, ours in (("cls", "class"), ("pool", "mean")):
        names = golden.about[f"param_names_{pool}"]

        def fresh(ours: Any = ours) -> Classifier:
            classifier = classifier_of(params, ours)
            weights = dict(golden.weights)
            if ours == "mean":
                weights |= {f"fc_norm.{kind}": weights[f"norm.{kind}"] for kind in ("weight", "bias")}
            renames = {r"(?=cls_token|pos_embed|patch_embed|blocks|norm)": "encoder."}
            load_weights(classifier, weights, renames=renames, optional=(r"normalize\.",))
            return classifier

        classifier = fresh()
        golden.close(f"feature_{pool}", classifier.features(images))
        golden.close(f"logits_{pool}", classifier.head(classifier.features(images)))
        noise: Any = {"drop_path": None}
        loss = classifier((images, labels), noise, torch.tensor(0.0))["loss"]
        loss.backward()
        golden.close(f"ce_{pool}", loss)
        found: dict[str, Any] = {
            k.removeprefix("encoder."): p.grad for k, p in classifier.named_parameters() if p.requires_grad
        }
        assert set(found) == set(names)
        golden.close(f"grad_norm_{pool}", torch.stack([found[name].norm() for name in names]))

        classifier = fresh()
        settings = Optimization(layer_decay=params["layer_decay"], undecayed=("cls_token", "pos_embed"))
        groups = parameter_groups(classifier, settings, depth=params["depth"])
        for group in groups:
            group["lr"] = 1e-3 * group["lr_scale"]
        stepper = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)
        losses = losses_of(stepper, lambda c=classifier: c((images, labels), noise, torch.tensor(0.0))["loss"])  # noqa: B023
        golden.close(f"adamw_losses_{pool}", torch.stack(list(losses)))
        if ours == "class":
            norm = nn.BatchNorm1d(params["dim"], affine=False, eps=1e-6)
            probe = fresh()
            normal = norm(probe.features(images))
            golden.close("probe_bn", normal)
            golden.close("probe_logits", probe.head(normal))
            golden.close("probe_running_mean", norm.running_mean)
            golden.close("probe_running_var", norm.running_var)


def _mae(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **more: Any) -> mae.MAE:
    return mae.MAE(mae.Config(**settings_for(params, monkeypatch), **more), as_they_are())


def _mae_name(ours: str) -> str:
    """The published name of a parameter."""
    name = ours.removeprefix("encoder.").replace("decoder.head.", "decoder_pred.")
    return name.replace("decoder.mask_token", "mask_token").replace("decoder.", "decoder_")


def _plain(groups: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The file's plain SGD has no weight decay."""
    return groups if name == "adamw_losses" else [{"params": group["params"]} for group in groups]
