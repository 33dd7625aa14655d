"""The checks of DropPos."""

import re
from dataclasses import replace
from typing import Any

from common.evaluation import finetuning
from common.training.optimizer import clip
from mimkit.masking import random_tokens
from mimkit.positions import attentive_weights, smoothed_targets
from mimkit.tokens import patchify, split, take

import droppos
import pytest
import torch
from goldens import Golden, check
from methods import (
    SMALL,
    as_they_are,
    compare_groups,
    compare_positions,
    compare_rates,
    loaded,
    norms,
    progress_at,
    sized_settings,
    step_names,
    trained,
    with_gradients,
)
from released import ColumnDropPos, ReleasedDropPos
from torch import Tensor


@check("droppos_posembed")
def position_tables(golden: Golden, _: Any) -> None:
    compare_positions(golden)


@check("droppos_clip")
def clipped_each(golden: Golden, _: Any) -> None:
    parameters = with_gradients(golden, "in")
    golden.close("norms", torch.stack([p.grad.norm() for p in parameters if p.grad is not None]))
    clip(parameters, golden.params["clip"], each=True)
    for i, parameter in enumerate(parameters):
        golden.close(f"out{i}", parameter.grad)


@check("droppos_param_groups")
def droppos_groups(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    compare_groups(golden, lambda sizes: _droppos(sizes, monkeypatch), droppos.NAMES, finetuning.DROPPOS)


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
        losses = method(torch.zeros(len(visible), 3, *method.view_size), noise, progress_at(0, 1))
        losses["loss"].backward()
        golden.close(f"{name}_loss", losses["loss"])
        golden.close(f"{name}_acc", losses["weighted_accuracy"])
        golden.close(f"{name}_grad", logits.grad)


@check("droppos_schedules")
def droppos_schedules(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = golden.params["epochs"]
    compare_rates(golden, "lr", golden.params)
    method = _droppos(SMALL | {"epochs": epochs}, monkeypatch)
    golden.close("sigma", torch.stack([method.sigma(progress_at(epoch, epochs)) for epoch in range(epochs)]))


@check("droppos_model")
def droppos_model(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    names, rows = golden.about["param_names"], []
    method = _droppos(golden.params, monkeypatch, ColumnDropPos)
    ours = loaded(golden, method, droppos.NAMES)
    stepper = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    for k in range(len(golden["losses"])):
        images, width, now = golden[f"s{k}_imgs"], float(golden[f"s{k}_sigma"]), progress_at(0, 1)
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
                return method(images, noise, progress_at(0, 1))

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
        golden.close(f"s{k}_grad_norms", norms(method, ours, names, gradients=True))
        stepper.step()
    golden.close("losses", torch.stack(rows))
    golden.close("final_weight_norms", norms(method, ours, names))


@check("droppos_train_loop")
def droppos_training(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    params, names, steps = golden.params, golden.about["param_names"], list(step_names(golden.params))
    sigma = (params["sigma0"], 0.0)
    method = _droppos(params, monkeypatch, ColumnDropPos, sigma=sigma)
    ours = loaded(golden, method, droppos.NAMES)
    for epoch in range(params["epochs"]):
        golden.close(f"e{epoch}_smooth", method.targets(method.sigma(progress_at(epoch, params["epochs"]))))
    noise = []
    for step in steps:
        _, _, order = _dropped(golden, f"{step}_", (method.num_masked, method.num_dropped))
        drop = golden[f"{step}_pos_noise"].gather(1, order.argsort(dim=-1))
        noise.append({"mask": golden[f"{step}_patch_noise"], "drop": drop})
    images = [golden[f"{step}_imgs"] for step in steps]
    largest = params["clip_grad_per_tensor"]
    records, gradients = trained(method, images, noise, params, monkeypatch, clip=largest, clip_each=True)
    golden.close("loss", [record["loss"] for record in records])
    golden.close("acc", [record["weighted_accuracy"] for record in records])
    golden.close("lr", [record["lr"] for record in records])
    golden.close("grad_norms", [[float(found[ours[name]].norm()) for name in names] for found in gradients])
    apart = (
        [name.endswith("attn.qkv.bias") for name in names],
        2e-2,
    )  # rounding noise, as the file notes, which differs between processors
    golden.close("final_weight_norms", norms(method, ours, names), apart=apart)


@check("droppos_accgrid")
def accuracy_grid(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    method = _droppos(golden.params, monkeypatch)
    loaded(golden, method, droppos.NAMES)
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


def _droppos(
    params: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    method: type[droppos.DropPos] = droppos.DropPos,
    **more: Any,
) -> droppos.DropPos:
    more = {"drop_ratio": params.get("gamma_pos", 0.5), "temperature": params.get("tau", 0.1)} | more
    return method(droppos.Config(**sized_settings(params, monkeypatch), **more), as_they_are())


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
