"""The checks of HPM and DropPos, which share their building blocks and the form of their files."""

import functools
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import Images, Optimization, Run
from common.data.normalize import Normalize
from common.evaluation import finetuning
from common.evaluation.knn import nearest
from common.networks import decoder, vit
from common.networks.ema import follow, teacher_of
from common.training import engine
from common.training.distributed import Processes
from common.training.log import read_metrics
from common.training.optimizer import clip, layer_of
from common.training.schedules import by_epoch
from common.weights.reading import load_weights
from common.weights.resizing import resize_positions
from mimkit.losses import normalized_patches, ranking_loss, squared_error
from mimkit.masking import random_tokens
from mimkit.positions import attentive_weights, sincos, smoothed_targets
from mimkit.tokens import patchify, split, take

import droppos
import hpm
import pytest
import torch
from goldens import Golden, check, classifier_of, groups_of, settings_for
from released import ColumnDropPos, ReleasedDropPos
from torch import Tensor, nn

# Both


@check("droppos_posembed")
@check("hpm_posembed")
def position_tables(golden: Golden, _: Any) -> None:
    for name in golden.arrays:
        dim, side, prefix = map(int, re.findall(r"\d+", name))
        table = sincos(height=side, width=side, dim=dim)
        golden.close(name, nn.functional.pad(table, (0, 0, prefix, 0)))


@check("hpm_clip")
def clipped_whole(golden: Golden, _: Any) -> None:
    for kind in {name.split("_")[0] for name in golden.arrays}:
        parameters = _with_gradients(golden, f"{kind}_in")
        golden.close(f"{kind}_norm", nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        clip(parameters, golden.params["max_norm"])
        for i, parameter in enumerate(parameters):
            golden.close(f"{kind}_out{i}", parameter.grad)


@check("droppos_clip")
def clipped_each(golden: Golden, _: Any) -> None:
    parameters = _with_gradients(golden, "in")
    golden.close("norms", torch.stack([p.grad.norm() for p in parameters if p.grad is not None]))
    clip(parameters, golden.params["clip"], each=True)
    for i, parameter in enumerate(parameters):
        golden.close(f"out{i}", parameter.grad)


@check("hpm_param_groups")
def hpm_groups(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    _groups(golden, lambda sizes: _hpm(sizes, monkeypatch), finetuning.HPM)


@check("droppos_param_groups")
def droppos_groups(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    _groups(golden, lambda sizes: _droppos(sizes, monkeypatch), finetuning.DROPPOS)


def _groups(golden: Golden, build: Any, finetune: finetuning.Finetuning) -> None:
    names = golden.about["pretrain_names"]
    sizes = SMALL | {"depth": _blocks(names, "blocks"), "dec_depth": _blocks(names, "decoder_blocks")}
    method = build(sizes)
    found = groups_of(method, Optimization(weight_decay=golden.params["pretrain"]["wd"]))
    ours = _renamed(method, names)
    assert set(found) == set(ours.values())
    golden.close("pretrain_weight_decay", [found[ours[name]][0] for name in names])
    assert {scale for _, scale in found.values()} == {1.0}

    params, names = golden.params["finetune"], golden.about["finetune_names"]
    sizes = {"img": 16, "p": 8, "dim": 8, "heads": 2, "depth": params["depth"], "classes": 3}
    classifier = classifier_of(sizes, finetune.pool)
    classifier.encoder.pos_embed.requires_grad_(finetune.train_positions)
    settings = replace(finetune.optimization, layer_decay=params["ld"], weight_decay=params["wd"])
    groups = groups_of(classifier, settings, depth=params["depth"])
    found = {name.removeprefix("encoder."): group for name, group in groups.items()}
    assert set(found) == set(names)
    golden.close("finetune_weight_decay", [found[name][0] for name in names])
    golden.close("finetune_lr_scale", [found[name][1] for name in names])
    if "finetune_layer_id" in golden:
        golden.close("finetune_layer_id", [layer_of(name, params["depth"]) for name in names])


# HPM


@check("hpm_recon_target")
def reconstruction_targets(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    patches = patchify(golden["imgs"], patch=golden.params["patch"])
    golden.close("patches", patches)
    _, masked = split(golden["mask"].bool(), num_masked=golden.params["masked"])
    targets = {"pixels": take(patches, masked), "normalized": normalized_patches(take(patches, masked))}
    for i, (kind, target) in enumerate(targets.items()):
        golden.close(f"target_normpix{i}", target)
        prediction = golden["pred"].requires_grad_()
        errors = _hpm(SMALL, monkeypatch, target=kind).errors(prediction, take(patches, masked), torch.empty(0))
        golden.close(f"loss_matrix_normpix{i}", errors)
        errors.mean().backward()
        golden.close(f"loss_mean_normpix{i}", errors.mean())
        golden.close(f"grad_pred_normpix{i}", prediction.grad)


@check("hpm_feature_target")
def feature_targets(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    _, masked = split(golden["mask"].bool(), num_masked=golden["pred"].shape[1])
    method = _hpm(SMALL, monkeypatch, target="features")
    errors = method.errors(golden["pred"], torch.empty(0), take(golden["target_all"], masked))
    golden.close("loss_matrix", errors)
    golden.close("loss_mean", errors.mean())


@check("hpm_mask")
def hard_masks(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    def method(tokens: int, ratio: float, epochs: int) -> hpm.HPM:
        sizes = SMALL | {"mask_ratio": ratio, "epochs": epochs}
        return _hpm(sizes, monkeypatch, image_size=(SMALL["patch"], SMALL["patch"] * tokens))

    for i, case in enumerate(golden.params["cases"]):
        ours, difficulty = method(case["L"], case["ratio"], case["total_epochs"]), golden[f"c{i}_pred"]
        for noise in (golden[f"c{i}_noise"], _noise_of(golden[f"c{i}_order"], case["L"])):
            mask, hard = _mask(ours, difficulty, noise, case["epoch"], monkeypatch)
            golden.close(f"c{i}_mask", mask.float())
            golden.close(f"c{i}_forced", difficulty.argsort(dim=-1)[:, case["L"] - hard :])
            golden.close(f"c{i}_counts", [case["L"], case["L"] - ours.num_masked, ours.num_masked, hard])
    for name in golden.arrays:
        if name.startswith("len_forced"):
            tokens, percent, epochs = map(int, re.findall(r"\d+", name))
            ours, nothing = method(tokens, percent / 100, epochs), torch.zeros(1, tokens)
            counts = [_mask(ours, nothing, nothing, epoch, monkeypatch)[1] for epoch in range(epochs)]
            if "code" in name:
                golden.close(name, counts)
                continue
            # the paper's schedule is the published code's an epoch later, and its count one less now and then where
            # what is masked is not the very share of all patches
            later, paper = torch.tensor([0, *counts[:-1]]), golden[name]
            exact = 100 * ours.num_masked == tokens * percent
            assert (later - paper).abs().max() <= (0 if exact else 1)


@check("hpm_loss_pred")
def predicted_losses(golden: Golden, _: Any) -> None:
    kinds = {name.removesuffix("_relative") for name in golden.arrays if name.endswith("_relative")}
    for kind in kinds:
        for name in ("relative", "absolute"):
            prediction = golden[f"{kind}_pred"].requires_grad_()
            loss = _predicted(name, prediction, golden[f"{kind}_target"])
            loss.backward()
            golden.close(f"{kind}_{name}", loss)
            golden.close(f"{kind}_{name}_grad", prediction.grad)
    # one masked patch: where the published code has no number, there is nothing to rank
    one = golden["degenerate_pred"], golden["degenerate_target"]
    assert golden["degenerate_official"].isnan().all()
    assert _predicted("relative", *one) == 0
    with pytest.raises(ValueError, match="patches of 1 value have no variance"):
        _predicted("absolute", *one)


def _predicted(objective: str, prediction: Tensor, errors: Tensor) -> Tensor:
    """The loss of the predictor, written as in the recipe."""
    if objective == "absolute":
        return squared_error(prediction, normalized_patches(errors)).mean()
    loss, _, pairs = ranking_loss(prediction, errors)
    return loss.sum() / pairs.sum().clamp(min=1)


@check("hpm_schedules")
def hpm_schedules(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, settings in golden.params.items():
        _rates(golden, f"{kind}_lr", settings)
        factor = float(re.findall(r"lr_scale ([\d.]+)", golden.about["arrays"][f"{kind}_lr_scaled"]["meaning"])[0])
        _rates(golden, f"{kind}_lr_scaled", settings, scale=factor)
    epochs, momenta = len(golden["ema_decay"]), []
    method = _hpm(SMALL | {"epochs": epochs}, monkeypatch)
    monkeypatch.setattr(hpm, "follow", lambda teacher, student, momentum: momenta.append(momentum))
    for epoch in range(epochs):
        method.after_step(_progress(epoch, epochs))
    golden.close("ema_decay", torch.stack(momenta))


@check("hpm_knn")
def nearest_neighbors(golden: Golden, _: Any) -> None:
    names = "train_features", "train_labels", "test_features"
    labels, counts = golden["test_labels"], golden["k"].tolist()
    sizes = {"classes": golden.params["C"], "k": counts, "temperature": golden.params["T"]}
    best = nearest(*(golden[name] for name in names), **sizes).topk(min(5, golden.params["C"]), dim=-1).indices
    for right, (top1, top5) in zip(best == labels[:, None], golden["top1_top5"].tolist(), strict=True):
        assert 100 * float(right[:, 0].double().mean()) == pytest.approx(top1, abs=1e-4)
        # where the neighbors are of fewer than five classes, the order of the others is anyone's
        assert 100 * float(right.any(dim=-1).double().mean()) == pytest.approx(top5, abs=1)


@check("hpm_vit_classifier")
def half_of_the_patches(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    params, images = golden.params, golden["imgs"]
    for module in (vit, decoder):
        monkeypatch.setattr(module, "Block", functools.partial(vit.Block, mlp_ratio=params["mlp_ratio"]))
    classifier = classifier_of(params | {"p": params["patch"]}, "mean")
    renames = {r"(?=cls_token|pos_embed|patch_embed|blocks)": "encoder."}
    load_weights(classifier, golden.weights, renames=renames, optional=(r"normalize\.", r"encoder\.norm\."))
    golden.close("logits_all", classifier.head(classifier.features(images)))
    encoder, patches = classifier.encoder, patchify(images, patch=params["patch"])
    half = patches.shape[1] // 2
    hard = split(random_tokens(golden["score"], num_masked=half), num_masked=half)
    for name, kept in zip(("bottom50", "top50"), hard, strict=True):
        tokens = encoder.unnormalized(take(patches, kept), encoder.positions[kept])
        golden.close(f"logits_{name}", classifier.head(classifier.fc_norm(tokens[:, encoder.num_prefix :].mean(dim=1))))
    for name in golden.arrays:
        if name.startswith("pos_embed_resized"):
            old, new = map(int, re.findall(r"\d+", name))
            grids = {"height": old, "width": old, "new_height": new, "new_width": new}
            golden.close(name, resize_positions(golden["w.pos_embed"], **grids))


@check("hpm_model")
def hpm_model(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = int(golden["s0_epoch_T"][1])
    method, ours = _loaded(
        golden, lambda: _hpm(golden.params | {"epochs": epochs}, monkeypatch, momentum=(0.999, 0.999))
    )
    average = _average_of_all(method, monkeypatch)
    names, tokens = golden.about["param_names"], golden.params["patches"]
    stepper = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    rows = []
    for k in range(len(golden["losses"])):
        images, epoch = golden[f"s{k}_imgs"], int(golden[f"s{k}_epoch_T"][0])
        noise, progress = {"mask": _noise_of(golden[f"s{k}_order"], tokens)}, _progress(epoch, epochs)
        patches = patchify(images, patch=method.patch)
        difficulty, features = method.ask_teacher(patches)
        mask, hard = _mask(method, difficulty, noise["mask"], epoch, monkeypatch)
        golden.close(f"s{k}_teacher_loss_pred", difficulty)
        golden.close(f"s{k}_mask", mask.float())
        golden.close(f"s{k}_forced", difficulty.argsort(dim=-1)[:, tokens - hard :])
        if f"s{k}_latent" in golden:
            visible, masked = split(mask, num_masked=method.num_masked)
            latent = method.encoder(take(patches, visible), method.encoder.positions[visible])
            golden.close(f"s{k}_latent", latent)
            sequence = method.decoder.sequence(latent, visible, masked)
            everything = method.decoder.predict(sequence, tokens)
            golden.close(f"s{k}_pix_pred", everything)
            golden.close(f"s{k}_loss_pred", method.predictor.predict_mean(sequence, tokens))
            errors = method.errors(everything[:, visible.shape[1] :], take(patches, masked), take(features, masked))
            golden.close(f"s{k}_loss_matrix", errors)
            whole = method.teacher[0](patches, method.encoder.positions)
            golden.close(f"s{k}_teacher_latent", whole)
            assert (whole[:, 1:] == features).all()
        losses = method(images, noise, progress)
        with monkeypatch.context() as other:
            other.setattr(method, "config", replace(method.config, objective="absolute"))
            absolute = method(images, noise, progress)["prediction"]
        row = [losses["reconstruction"], losses["prediction"], absolute, losses["loss"]]
        rows.append(torch.stack(row).detach())
        if f"s{k}_grad_norms_predonly" in golden:
            losses["prediction"].backward(retain_graph=True)
            golden.close(f"s{k}_grad_norms_predonly", _norms(method, ours, names, gradients=True))
        stepper.zero_grad()
        losses["loss"].backward()
        golden.close(f"s{k}_grad_norms", _norms(method, ours, names, gradients=True))
        stepper.step()
        method.after_step(progress)
    golden.close("losses", torch.stack(rows))
    golden.close("final_weight_norms", _norms(method, ours, names))
    golden.close("final_ema_norms", torch.stack([_average(method, average)[ours[name]].norm() for name in names]))
    golden.close("final_ema_decoder_pred_losspred_weight", method.teacher[2].head.weight)  # pyright: ignore


@check("hpm_train_loop")
def hpm_training(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    params, names = golden.params, golden.about["param_names"]
    method, ours = _loaded(golden, lambda: _hpm(params, monkeypatch))
    average = _average_of_all(method, monkeypatch)
    seen, original = [], method.mask

    def watched(difficulty: Tensor, noise: dict[str, Tensor], progress: Tensor) -> Tensor:
        mask = original(difficulty, noise, progress)
        seen.append((difficulty, mask))
        return mask

    monkeypatch.setattr(method, "mask", watched)
    steps = list(_steps(params))
    noise = [{"mask": _noise_of(golden[f"{step}_order"], params["patches"])} for step in steps]
    images = [golden[f"{step}_imgs"] for step in steps]
    records, gradients = _trained(method, images, noise, params, monkeypatch, clip=params["clip_grad"])
    for step, (difficulty, mask) in zip(steps, seen, strict=True):
        golden.close(f"{step}_teacher_loss_pred", difficulty)
        golden.close(f"{step}_mask", mask.float())
    golden.close("rec_loss", [record["reconstruction"] for record in records])
    golden.close("pred_loss", [record["prediction"] for record in records])
    golden.close("lr", [record["lr"] for record in records])
    golden.close("grad_norm", [nn.utils.get_total_norm(list(found.values())) for found in gradients])
    noisy = "attn.qkv.bias", "decoder_norm_losspred.bias", "decoder_pred_losspred.bias"  # see the file's note
    apart = [name.endswith(noisy) for name in names], 5e-3
    golden.close("final_weight_norms", _norms(method, ours, names), apart=apart)
    averages = _average(method, average)
    golden.close("final_ema_norms", torch.stack([averages[ours[name]].norm() for name in names]), apart=apart)


# DropPos


@check("droppos_masking")
def dropped(golden: Golden, _: Any) -> None:
    for i, case in enumerate(golden.params["cases"]):
        counts = droppos.count_dropped(case["L"], case["gamma"], case["gamma_pos"])
        visible, found, order = _dropped(golden, f"c{i}_", counts)
        golden.close(f"c{i}_patch_mask", torch.ones(len(visible), case["L"]).scatter(1, visible, 0))
        golden.close(f"c{i}_ids_keep", visible.gather(1, order))
        golden.close(f"c{i}_pos_mask", found.gather(1, order))
        kept = case["L"] - counts[0]
        golden.close(f"c{i}_counts", [case["L"], kept, kept - counts[1], counts[1]])


@check("droppos_smoothing")
def smoothed(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    for side, sigma in golden.params["grid_sigma"]:
        name = f"g{side}_s{sigma}".replace(".", "p")
        targets = smoothed_targets(torch.tensor(sigma), height=side, width=side)
        golden.close(f"rownorm_{name}", targets)
        golden.close(f"official_{name}", targets.mT)
    for name in golden.arrays:
        if name.startswith("as_run"):
            pixels, side = map(int, re.findall(r"\d+", name))
            sizes = SMALL | {"img": pixels, "patch": pixels // side}
            method = _droppos(sizes, monkeypatch, ReleasedDropPos)
            golden.close(name, method.targets(torch.tensor(1.0)))


@check("droppos_attn")
def attention(golden: Golden, _: Any) -> None:
    guide, patches, visible = golden["cls"].squeeze(1), golden["patch"], golden["ids_keep"]
    for temperature in golden.params["taus"]:
        name = f"tau{temperature}".replace(".", "p")
        whole = attentive_weights(patches, guide, temperature=temperature)
        golden.close(f"full_{name}", whole)
        golden.close(f"weight_{name}", attentive_weights(take(patches, visible), guide, temperature=temperature))
        # the cosines, but for a constant of each row
        cosines, right = temperature * whole.log(), golden["sim"]
        golden.close("sim", cosines + (right - cosines).mean(dim=-1, keepdim=True))


@check("droppos_loss")
def located(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    visible, order = golden["ids_keep"].sort(dim=-1)
    places = golden.params["L"]
    mask = torch.ones(len(visible), places, dtype=torch.bool).scatter(1, visible, False)
    forms: dict[str, dict[str, Any]] = {
        "plain": {"sigma": (0.0, 0.0)},
        "smooth": {},
        "attn": {"sigma": (0.0, 0.0), "temperature": 0.1},
        "full": {"temperature": 0.1},
        "confignore": {"confident": False},
    }
    for name, form in forms.items():
        side = round(places**0.5)
        sizes = SMALL | {"img": SMALL["patch"] * side, "gamma": 1 - (visible.shape[1] + 0.5) / places}
        method = _droppos(sizes, monkeypatch, ColumnDropPos, **{"temperature": torch.inf} | form)
        logits = golden["logits"].requires_grad_()
        masks = iter([mask, golden["pos_mask"].gather(1, order).bool()])
        monkeypatch.setattr(droppos, "random_tokens", lambda *_, masks=masks, **__: next(masks))
        monkeypatch.setattr(method, "locate", lambda *_, logits=logits: take(logits, order))
        if "temperature" in form:
            monkeypatch.setattr(method, "attention", lambda *_: golden["attn"].gather(1, order))
        noise = {"mask": torch.empty(0), "drop": torch.empty(0)}
        losses = method(torch.zeros(len(visible), 3, *method.view_size), noise, _progress(0, 1))
        losses["loss"].backward()
        golden.close(f"{name}_loss", losses["loss"])
        golden.close(f"{name}_acc", losses["weighted_accuracy"])
        golden.close(f"{name}_grad", logits.grad)


@check("droppos_schedules")
def droppos_schedules(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = golden.params["epochs"]
    _rates(golden, "lr", golden.params)
    method = _droppos(SMALL | {"epochs": epochs}, monkeypatch)
    golden.close("sigma", torch.stack([method.sigma(_progress(epoch, epochs)) for epoch in range(epochs)]))


@check("droppos_model")
def droppos_model(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    names, rows = golden.about["param_names"], []
    method, ours = _loaded(golden, lambda: _droppos(golden.params, monkeypatch, ColumnDropPos))
    stepper = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    for k in range(len(golden["losses"])):
        images, width, now = golden[f"s{k}_imgs"], float(golden[f"s{k}_sigma"]), _progress(0, 1)
        method.config = replace(method.config, sigma=(width, width))
        golden.close(f"s{k}_smooth", method.targets(method.sigma(now)))
        visible, found, order = _dropped(golden, f"s{k}_", (method.num_masked, method.num_dropped))
        noise = {
            "mask": golden[f"s{k}_patch_noise"],
            "drop": golden[f"s{k}_pos_noise"].gather(1, order.argsort(dim=-1)),
        }

        def other(images: Tensor = images, noise: Any = noise, **form: Any) -> dict[str, Tensor]:
            with monkeypatch.context() as patched:
                patched.setattr(method, "config", replace(method.config, **form))
                return method(images, noise, _progress(0, 1))

        if f"s{k}_latent" in golden:
            golden.close(f"s{k}_ids_keep", visible.gather(1, order))
            golden.close(f"s{k}_pos_mask", found.gather(1, order))
            patches, read = patchify(images, patch=method.patch), []
            hook = method.encoder.register_forward_hook(lambda _, __, latent, read=read: read.append(latent))
            logits = method.locate(take(patches, visible), visible, found, {})
            hook.remove()
            (latent,), whole = read, method.encoder(patches, method.encoder.positions)
            mask = random_tokens(noise["mask"], num_masked=method.num_masked)
            weights = method.attention(patches, *split(mask, num_masked=method.num_masked))
            golden.close(f"s{k}_latent", torch.cat([latent[:, :1], take(latent[:, 1:], order)], dim=1))
            golden.close(f"s{k}_logits", take(logits, order))
            golden.close(f"s{k}_attn", weights.gather(1, order))
            every = attentive_weights(whole[:, 1:], whole[:, 0], temperature=golden.params["tau"])
            golden.close(f"s{k}_attn_full", every)
            with monkeypatch.context() as patched:
                patched.setattr(method, "config", replace(method.config, dropped="zero"))
                logits = method.locate(take(patches, visible), visible, found, {})
            golden.close(f"s{k}_logits_zero_token", take(logits, order))
            plain = other(sigma=(0.0, 0.0), temperature=torch.inf)
            golden.close(f"s{k}_plain_loss_acc", torch.stack([plain["loss"], plain["accuracy"]]))
        losses = method(images, noise, now)
        rows.append(torch.stack([losses["loss"], losses["weighted_accuracy"]]).detach())
        stepper.zero_grad()
        losses["loss"].backward()
        golden.close(f"s{k}_grad_norms", _norms(method, ours, names, gradients=True))
        stepper.step()
    golden.close("losses", torch.stack(rows))
    golden.close("final_weight_norms", _norms(method, ours, names))


@check("droppos_train_loop")
def droppos_training(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    params, names, steps = golden.params, golden.about["param_names"], list(_steps(golden.params))
    sigma = (params["sigma0"], 0.0)
    method, ours = _loaded(golden, lambda: _droppos(params, monkeypatch, ColumnDropPos, sigma=sigma))
    for epoch in range(params["epochs"]):
        golden.close(f"e{epoch}_smooth", method.targets(method.sigma(_progress(epoch, params["epochs"]))))
    noise = []
    for step in steps:
        _, _, order = _dropped(golden, f"{step}_", (method.num_masked, method.num_dropped))
        drop = golden[f"{step}_pos_noise"].gather(1, order.argsort(dim=-1))
        noise.append({"mask": golden[f"{step}_patch_noise"], "drop": drop})
    images = [golden[f"{step}_imgs"] for step in steps]
    largest = params["clip_grad_per_tensor"]
    records, gradients = _trained(method, images, noise, params, monkeypatch, clip=largest, clip_each=True)
    golden.close("loss", [record["loss"] for record in records])
    golden.close("acc", [record["weighted_accuracy"] for record in records])
    golden.close("lr", [record["lr"] for record in records])
    norms = [[float(found[ours[name]].norm()) for name in names] for found in gradients]
    golden.close("grad_norms", norms)
    apart = [name.endswith("attn.qkv.bias") for name in names], 5e-3  # see the file's note
    golden.close("final_weight_norms", _norms(method, ours, names), apart=apart)


@check("droppos_accgrid")
def accuracy_grid(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    method, _ = _loaded(golden, lambda: _droppos(golden.params, monkeypatch))
    images, right = golden["imgs"], golden["accuracy"]
    patches, cells = patchify(images, patch=method.patch), torch.zeros(right.shape)
    counts = torch.zeros(right.shape, dtype=torch.int64)
    for i, j in torch.cartesian_prod(*map(torch.arange, right.shape)).tolist():
        ratios = (round(float(golden[name][at]), 6) for name, at in (("gammas", i), ("gammas_pos", j)))
        count = droppos.count_dropped(golden.params["patches"], *ratios)
        visible, found, _ = _dropped(golden, f"{i}{j}", count)
        with torch.no_grad():
            logits = method.locate(take(patches, visible), visible, found, {})
        counts[i, j] = found.sum()
        cells[i, j] = 100 * ((logits.argmax(dim=-1) == visible) & found).sum() / counts[i, j]
    golden.close("counts", counts)
    flip = 100 / counts  # of one patch whose best two logits differ by rounding alone
    assert ((cells - right).abs() <= 1.001 * flip).all()
    assert abs(cells.mean() - golden["average"]) <= 1.001 * flip.max() / cells.numel()


# What the checks share

SMALL = {"img": 16, "patch": 8, "dim": 8, "depth": 1, "heads": 2, "dec_dim": 8, "dec_depth": 1, "dec_heads": 2}


def _config(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
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


def _hpm(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch, image_size: tuple[int, int] | None = None, **more: Any
) -> hpm.HPM:
    sized = _config(params, monkeypatch)
    if image_size is not None:
        sized["images"] = Images(image_size=image_size)
    if "norm_pix_loss" in params:
        more["target"] = "normalized" if params["norm_pix_loss"] else "pixels"
    return hpm.HPM(hpm.Config(**sized, **more), _as_they_are())


def _droppos(
    params: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    method: type[droppos.DropPos] = droppos.DropPos,
    **more: Any,
) -> droppos.DropPos:
    more = {"drop_ratio": params.get("gamma_pos", 0.5), "temperature": params.get("tau", 0.1)} | more
    return method(droppos.Config(**_config(params, monkeypatch), **more), _as_they_are())


def _as_they_are() -> Normalize:
    """The files' images are normalized already."""
    return Normalize([0.0] * 3, [1.0] * 3)


def _loaded(golden: Golden, build: Any) -> tuple[Any, dict[str, str]]:
    """A method with the weights of a file, and our name of each of its parameters."""
    method = build()
    names = hpm.NAMES if isinstance(method, hpm.HPM) else droppos.NAMES
    report = load_weights(method, golden.weights, renames=names, optional=(r"normalize\.", r"teacher\."))
    assert set(report.dropped) <= {"decoder_pos_embed"}  # a frozen table, and ours is the same:
    if "decoder_pos_embed" in golden.weights:
        torch.testing.assert_close(method.decoder.pos_embed, golden.weights["decoder_pos_embed"][0, 1:])
    if isinstance(method, hpm.HPM):
        method.teacher = teacher_of(method.student())
    return method, {name: report.renamed.get(name, name) for name in golden.weights}


def _renamed(method: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Our name of each published one."""
    rules = hpm.NAMES if isinstance(method, hpm.HPM) else droppos.NAMES
    renamed = {}
    for name in names:
        rule = next((rule for rule in rules if re.match(rule, name)), None)
        renamed[name] = name if rule is None else re.sub(rule, rules[rule], name, count=1)
    return renamed


def _average_of_all(method: hpm.HPM, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A moving average of the reconstructor, which the published teacher keeps and nothing reads."""
    average = teacher_of(method.decoder)

    def both(teacher: nn.Module, student: nn.Module, momentum: Tensor) -> None:
        follow(teacher, student, momentum)
        follow(average, method.decoder, momentum)

    monkeypatch.setattr(hpm, "follow", both)
    return average


def _average(method: hpm.HPM, average: nn.Module) -> dict[str, Tensor]:
    """All that is averaged, under the names of what it follows."""
    encoder, embed, predictor = method.teacher
    parts = {"decoder.": average, "decoder.embed.": embed, "encoder.": encoder, "predictor.": predictor}
    return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.state_dict().items()}


def _norms(method: nn.Module, ours: dict[str, str], names: list[str], *, gradients: bool = False) -> Tensor:
    """The norms of all weights, or of their gradients, in the order of the file."""
    found = dict(method.named_parameters())
    assert {name for name, p in found.items() if p.requires_grad} == {ours[name] for name in names}
    tensors = [found[ours[name]].grad if gradients else found[ours[name]] for name in names]
    return torch.stack([torch.zeros(()) if tensor is None else tensor.detach().norm() for tensor in tensors])


def _blocks(names: list[str], prefix: str) -> int:
    return 1 + max(int(name.split(".")[1]) for name in names if name.startswith(f"{prefix}."))


def _with_gradients(golden: Golden, prefix: str) -> list[nn.Parameter]:
    parameters = []
    while f"{prefix}{len(parameters)}" in golden:
        gradient = golden[f"{prefix}{len(parameters)}"]
        parameters.append(nn.Parameter(torch.zeros_like(gradient)))
        parameters[-1].grad = gradient
    return parameters


def _rates(golden: Golden, name: str, settings: dict[str, Any], *, scale: float = 1.0) -> None:
    numbers = {key: settings[key] for key in ("lr", "min_lr", "warmup", "epochs")}
    steps = range(settings["epochs"] * settings["iters"])
    golden.close(name, [scale * by_epoch(step / settings["iters"], **numbers) for step in steps])


def _progress(epoch: int, epochs: int) -> Tensor:
    return torch.tensor(epoch / epochs, dtype=torch.float64)


def _noise_of(order: Tensor, tokens: int) -> Tensor:
    """Noise that orders the patches of each row so; those that are not in it are masked whatever their noise."""
    places = torch.arange(order.shape[1]) / tokens
    return torch.zeros(len(order), tokens).scatter(1, order, places.expand(order.shape))


def _mask(
    method: hpm.HPM, difficulty: Tensor, noise: Tensor, epoch: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, int]:
    """The mask of an epoch, and how many patches the teacher chose."""
    asked: list[int] = []

    def watched(*args: Tensor, num_hard: Tensor, **count: int) -> Tensor:
        asked.append(int(num_hard))
        return easy_to_hard(*args, num_hard=num_hard, **count)

    easy_to_hard = hpm.easy_to_hard
    with monkeypatch.context() as patched:
        patched.setattr(hpm, "easy_to_hard", watched)
        mask = method.mask(difficulty, {"mask": noise}, _progress(epoch, method.config.optimization.epochs))
    return mask, asked[0]


def _dropped(golden: Golden, prefix: str, counts: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Visible patches and dropped positions as ours, in raster order, and where the file's slots are among them."""
    names = (f"noise_{kind}_{prefix}" for kind in ("patch", "pos"))
    if f"{prefix}patch_noise" in golden:
        names = (f"{prefix}{kind}_noise" for kind in ("patch", "pos"))
    patch, position = (golden[name] for name in names)
    visible, _ = split(random_tokens(patch, num_masked=counts[0]), num_masked=counts[0])
    order = patch.argsort(dim=-1)[:, : visible.shape[1]].argsort(dim=-1).argsort(dim=-1)
    found = random_tokens(position.gather(1, order.argsort(dim=-1)), num_masked=counts[1])
    return visible, found, order


def _steps(params: dict[str, Any]) -> Iterator[str]:
    return (f"e{epoch}i{i}" for epoch in range(params["epochs"]) for i in range(params["iters_per_epoch"]))


class _Recorded(list[Tensor]):
    """The batches of a file, for the engine."""

    unreadable = ()


def _trained(
    method: Any,
    images: list[Tensor],
    noise: list[dict[str, Tensor]],
    params: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    **clipping: Any,
) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]]]:
    """Train with our engine on the images and the noise of a file; return its log and the gradients, unclipped."""
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
    gradients, steps = [], iter(noise)

    def watched(parameters: list[nn.Parameter], norm: float, *, each: bool = False) -> None:
        found = method.named_parameters()
        gradients.append({name: p.grad.clone() for name, p in found if p.grad is not None})
        clip(parameters, norm, each=each)

    monkeypatch.setattr(engine, "clip", watched)
    monkeypatch.setattr(method, "noise", lambda rand, batch: next(steps))
    with tempfile.TemporaryDirectory() as folder:
        engine.train(
            method,
            lambda batches: _Recorded(images),
            images=batch * params["iters_per_epoch"],
            settings=settings,
            run=Run(precision="fp32", compile="off", log_every=1),
            folder=Path(folder),
            place=Processes(0, 1, torch.device("cpu")),
        )
        return read_metrics(Path(folder) / "metrics.jsonl"), gradients
