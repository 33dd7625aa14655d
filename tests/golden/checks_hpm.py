"""The checks of HPM."""

import functools
import re
from dataclasses import replace
from typing import Any

from common.config import DataSettings
from common.evaluation import finetuning
from common.evaluation.knn import nearest
from common.networks import decoder, vit
from common.networks.ema import ema_copy, ema_update
from common.training.optimizer import clip
from common.weights.reading import load_weights
from common.weights.resizing import resize_positions
from mimkit.losses import normalized_patches, ranking_loss, squared_error
from mimkit.masking import random_tokens
from mimkit.tokens import patchify, split, take

import hpm
import pytest
import torch
from goldens import Golden, check
from methods import (
    SMALL,
    as_they_are,
    classifier_of,
    compare_groups,
    compare_positions,
    compare_rates,
    loaded,
    noise_of,
    norms,
    progress_at,
    sized_settings,
    step_names,
    trained,
    with_gradients,
)
from torch import Tensor, nn


@check("hpm_posembed")
def position_tables(golden: Golden, _: Any) -> None:
    compare_positions(golden)


@check("hpm_clip")
def clipped_whole(golden: Golden, _: Any) -> None:
    for kind in {name.split("_")[0] for name in golden.arrays}:
        parameters = with_gradients(golden, f"{kind}_in")
        golden.close(f"{kind}_norm", nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        clip(parameters, golden.params["max_norm"])
        for i, parameter in enumerate(parameters):
            golden.close(f"{kind}_out{i}", parameter.grad)


@check("hpm_param_groups")
def hpm_groups(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    compare_groups(golden, lambda sizes: _hpm(sizes, monkeypatch), hpm.NAMES, finetuning.HPM)


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
        for noise in (golden[f"c{i}_noise"], noise_of(golden[f"c{i}_order"], case["L"])):
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
            loss = _prediction_loss(name, prediction, golden[f"{kind}_target"])
            loss.backward()
            golden.close(f"{kind}_{name}", loss)
            golden.close(f"{kind}_{name}_grad", prediction.grad)
    # one masked patch: where the published code has no number, there is nothing to rank
    one = golden["degenerate_pred"], golden["degenerate_target"]
    assert golden["degenerate_official"].isnan().all()
    assert _prediction_loss("relative", *one) == 0
    with pytest.raises(ValueError, match="patches of 1 value have no variance"):
        _prediction_loss("absolute", *one)


def _prediction_loss(objective: str, prediction: Tensor, errors: Tensor) -> Tensor:
    """The loss of the predictor, as in the recipe."""
    if objective == "absolute":
        return squared_error(prediction, normalized_patches(errors)).mean()
    loss, _, pairs = ranking_loss(prediction, errors)
    return loss.sum() / pairs.sum().clamp(min=1)


@check("hpm_schedules")
def hpm_schedules(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, settings in golden.params.items():
        compare_rates(golden, f"{kind}_lr", settings)
        factor = float(re.findall(r"lr_scale ([\d.]+)", golden.about["arrays"][f"{kind}_lr_scaled"]["meaning"])[0])
        compare_rates(golden, f"{kind}_lr_scaled", settings, scale=factor)
    epochs, momenta = len(golden["ema_decay"]), []
    method = _hpm(SMALL | {"epochs": epochs}, monkeypatch)
    monkeypatch.setattr(hpm, "ema_update", lambda teacher, student, momentum: momenta.append(momentum))
    for epoch in range(epochs):
        method.after_step(progress_at(epoch, epochs))
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
    method = _hpm(golden.params | {"epochs": epochs}, monkeypatch, momentum=(0.999, 0.999))
    ours = _loaded(golden, method)
    average = _average_of_all(method, monkeypatch)
    names, tokens = golden.about["param_names"], golden.params["patches"]
    stepper = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    rows = []
    for k in range(len(golden["losses"])):
        images, epoch = golden[f"s{k}_imgs"], int(golden[f"s{k}_epoch_T"][0])
        noise, progress = {"mask": noise_of(golden[f"s{k}_order"], tokens)}, progress_at(epoch, epochs)
        patches = patchify(images, patch=method.patch)
        difficulty, features = method.predict_difficulty(patches)
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
            golden.close(f"s{k}_grad_norms_predonly", norms(method, ours, names, gradients=True))
        stepper.zero_grad()
        losses["loss"].backward()
        golden.close(f"s{k}_grad_norms", norms(method, ours, names, gradients=True))
        stepper.step()
        method.after_step(progress)
    golden.close("losses", torch.stack(rows))
    golden.close("final_weight_norms", norms(method, ours, names))
    golden.close("final_ema_norms", torch.stack([_average(method, average)[ours[name]].norm() for name in names]))
    golden.close("final_ema_decoder_pred_losspred_weight", method.teacher[2].head.weight)  # pyright: ignore


@check("hpm_train_loop")
def hpm_training(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    params, names = golden.params, golden.about["param_names"]
    method = _hpm(params, monkeypatch)
    ours = _loaded(golden, method)
    average = _average_of_all(method, monkeypatch)
    seen, original = [], method.mask

    def watched(difficulty: Tensor, noise: dict[str, Tensor], progress: Tensor) -> Tensor:
        mask = original(difficulty, noise, progress)
        seen.append((difficulty, mask))
        return mask

    monkeypatch.setattr(method, "mask", watched)
    steps = list(step_names(params))
    noise = [{"mask": noise_of(golden[f"{step}_order"], params["patches"])} for step in steps]
    images = [golden[f"{step}_imgs"] for step in steps]
    records, gradients = trained(method, images, noise, params, monkeypatch, clip=params["clip_grad"])
    for step, (difficulty, mask) in zip(steps, seen, strict=True):
        golden.close(f"{step}_teacher_loss_pred", difficulty)
        golden.close(f"{step}_mask", mask.float())
    golden.close("rec_loss", [record["reconstruction"] for record in records])
    golden.close("pred_loss", [record["prediction"] for record in records])
    golden.close("lr", [record["lr"] for record in records])
    golden.close("grad_norm", [nn.utils.get_total_norm(list(found.values())) for found in gradients])
    noisy = "attn.qkv.bias", "decoder_norm_losspred.bias", "decoder_pred_losspred.bias"  # see the file's note
    apart = [name.endswith(noisy) for name in names], 2e-2
    golden.close("final_weight_norms", norms(method, ours, names), apart=apart)
    averages = _average(method, average)
    golden.close("final_ema_norms", torch.stack([averages[ours[name]].norm() for name in names]), apart=apart)


def _hpm(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch, image_size: tuple[int, int] | None = None, **more: Any
) -> hpm.HPM:
    sized = sized_settings(params, monkeypatch)
    if image_size is not None:
        sized["data"] = DataSettings(image_size=image_size)
    if "norm_pix_loss" in params:
        more["target"] = "normalized" if params["norm_pix_loss"] else "pixels"
    return hpm.HPM(hpm.Config(**sized, **more), as_they_are())


def _loaded(golden: Golden, method: hpm.HPM) -> dict[str, str]:
    """Fill student and teacher with the weights of a file, and return our name of each parameter."""
    ours = loaded(golden, method, hpm.NAMES)
    if "decoder_pos_embed" in golden.weights:  # a frozen table, the same as ours
        torch.testing.assert_close(method.decoder.pos_embed, golden.weights["decoder_pos_embed"][0, 1:])
    method.teacher = ema_copy(method.student())
    return ours


def _average_of_all(method: hpm.HPM, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A moving average of the reconstructor, which the published teacher keeps and nothing reads."""
    average = ema_copy(method.decoder)

    def both(teacher: nn.Module, student: nn.Module, momentum: Tensor) -> None:
        ema_update(teacher, student, momentum)
        ema_update(average, method.decoder, momentum)

    monkeypatch.setattr(hpm, "ema_update", both)
    return average


def _average(method: hpm.HPM, average: nn.Module) -> dict[str, Tensor]:
    """All that is averaged, under the names of what it follows."""
    encoder, embed, predictor = method.teacher
    parts = {"decoder.": average, "decoder.embed.": embed, "encoder.": encoder, "predictor.": predictor}
    return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.state_dict().items()}


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
        mask = method.mask(difficulty, {"mask": noise}, progress_at(epoch, method.config.optimization.epochs))
    return mask, asked[0]
