"""The checks of LUT."""

from collections.abc import Iterator
from typing import Any

from common.config import Optimization
from common.data.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from common.data.views import WeakStrong, cover, padded_crop, recolor
from common.networks.building import count_masked
from common.networks.ema import cosine_momentum, ema_copy, ema_update
from common.networks.projectors import mlp
from common.training.schedules import learning_rate, peak_rate
from common.weights.reading import load_weights
from mimkit.losses import cosine_distance, normalized_patches, squared_error
from mimkit.masking import disjoint_views
from mimkit.tokens import patchify, put, split, take, unpatchify

import lut
import pytest
import torch
from attention_maps import last_attention
from goldens import Golden, check
from methods import as_they_are, classifier_of, groups_of, settings_for
from torch import Tensor, nn

HEAD = {"w1": "0.weight", "bn_weight": "1.weight", "bn_bias": "1.bias", "w2": "3.weight"}
HEAD |= {"running_mean0": "1.running_mean", "running_var0": "1.running_var"}
TEACHER = {r"encoder\.": "0.", r"projector\.": "1."}  # names of the recipe's teacher


def _cases(golden: Golden) -> Iterator[tuple[str, dict[str, Any]]]:
    return iter(golden.params["cases"].items())


@check("lut_masking")
def two_masks(golden: Golden, _: Any) -> None:
    for case, params in _cases(golden):
        noise = golden[f"{case}/noise"]
        n = noise.shape[-1]
        count = n - count_masked(n, params["mask_ratio"])
        order = noise.argsort(dim=-1)
        golden.close(f"{case}/ids_shuffle", order)
        golden.close(f"{case}/ids_restore", order.argsort(dim=-1))
        for i, mask in enumerate(disjoint_views(noise, num_visible=count)):
            golden.close(f"{case}/mask{i + 1}", mask.float())
            kept = order[:, i * count : (i + 1) * count]
            visible, _ = split(mask, num_masked=n - kept.shape[1])
            ours = take(golden[f"{case}/x{i + 1}"], visible)
            golden.close(f"{case}/x{i + 1}_visible", take(ours, _places(kept)))


@check("lut_pixel_loss")
def pixel_loss(golden: Golden, _: Any) -> None:
    images, patch = golden["imgs"], golden.params["patch"]
    grid = {"height": images.shape[-2] // patch, "width": images.shape[-1] // patch, "patch": patch}
    golden.close("unpatchify_pred", unpatchify(golden["pred"], **grid))
    patches, mask = patchify(images, patch=patch), golden["mask"]
    for kind, target in {"raw": patches, "norm": normalized_patches(patches)}.items():
        prediction = golden["pred"].requires_grad_()
        loss = (squared_error(prediction, target) * mask).sum() / mask.sum()
        loss.backward()
        golden.close(f"{kind}/target", target)
        golden.close(f"{kind}/loss", loss)
        golden.close(f"{kind}/grad_pred", prediction.grad)


@check("lut_bc_loss")
def context_loss(golden: Golden, _: Any) -> None:
    for case, _params in _cases(golden):
        student = golden[f"{case}/student"].requires_grad_()
        (first, second), (target, other) = student.chunk(2), golden[f"{case}/teacher"].chunk(2)
        distances = {"s2_t1": cosine_distance(second, target), "s1_t2": cosine_distance(first, other)}
        loss = torch.stack([*distances.values()], dim=-1).mean()
        for name, distance in distances.items():
            golden.close(f"{case}/d_{name}", distance)
            golden.close(f"{case}/term_{name}", distance.mean())
        golden.close(f"{case}/loss", loss)
        if f"{case}/grad_student" in golden:
            golden.close(f"{case}/grad_student", torch.autograd.grad(loss, student)[0])


@check("lut_heads")
def heads(golden: Golden, _: Any) -> None:
    sizes = {"width": golden.params["hidden"], "depth": 2, "norm": "batch"}
    projector, predictor = (mlp(golden.params["D"], **sizes) for _ in range(2))
    for name, head in (("proj", projector), ("pred", predictor)):
        weights = {ours: golden[f"{name}/{theirs}"] for theirs, ours in HEAD.items()}
        head.load_state_dict(weights | {"1.num_batches_tracked": torch.tensor(0)})
    teacher = ema_copy(projector).eval()
    for view in ("1", "2"):
        golden.close(f"teacher_v{view}", teacher(golden[f"z{view}"]))
        golden.close(f"student_q{view}", predictor(projector(golden[f"z{view}"])))
        for name, head in (("proj", projector), ("pred", predictor)):
            golden.close(f"{name}/running_mean{view}", head[1].running_mean)
            golden.close(f"{name}/running_var{view}", head[1].running_var)


@check("lut_ema")
def moving_average(golden: Golden, _: Any) -> None:
    for name, params in golden.params["schedules"].items():
        per_epoch, every = params["iters_per_epoch"], params["accum_iter"]
        steps = torch.arange(params["epochs"] * per_epoch)
        momenta = torch.stack([cosine_momentum(t.double() / len(steps), params["base"]) for t in steps])
        golden.close(f"{name}/m", momenta)
        golden.close(f"{name}/one_minus_m", 1 - momenta)
        used = steps[(steps % per_epoch + 1) % every == 0]
        golden.close(f"{name}/update_steps", used)
        golden.close(f"{name}/one_minus_m_used", 1 - momenta[used])

    sizes = golden.params["tiny_module"]
    student = nn.ModuleDict({"lin": nn.Linear(sizes["d"], sizes["h"]), "bn": nn.BatchNorm1d(sizes["h"])})
    student.register_buffer("fixed", torch.zeros_like(golden["upd/teacher0/fixed"]))
    teacher = ema_copy(student)
    _load(teacher, golden, "upd/teacher0/")
    for step, momentum in enumerate(golden["upd/m"], start=1):
        _load(student, golden, f"upd/student{step}/")
        ema_update(teacher, student, momentum)
        for name, tensor in teacher.state_dict().items():
            if tensor.is_floating_point():  # counters are copied here, averaged and cut off there; nothing reads them
                golden.close(f"upd/teacher{step}/{name}", tensor)


def _load(module: nn.Module, golden: Golden, prefix: str) -> None:
    module.load_state_dict({name: golden[prefix + name] for name in module.state_dict()})


@check("lut_lr")
def rates(golden: Golden, _: Any) -> None:
    for name, params in golden.params["schedules"].items():
        settings = Optimization(
            epochs=params["epochs"],
            batch_size=params["B_eff"],
            base_lr=params["blr"],
            sqrt_rule_at=(256 // params["div"]) ** 2,
            warmup_epochs=params["warmup_epochs"],
            min_lr=params["min_lr"],
        )
        golden.close(f"{name}/lr_peak", peak_rate(settings))
        epochs = golden[f"{name}/epoch_fraction"].double()
        per_epoch = round(1 / float(epochs[1] - epochs[0]))
        golden.close(f"{name}/epoch_fraction", torch.arange(len(epochs)) / per_epoch)
        golden.close(f"{name}/lr", [learning_rate(step, settings, per_epoch) for step in range(len(epochs))])
    for name, params in golden.params["layer_decay"].items():
        depth = params["depth"]
        classifier = classifier_of({"img": 16, "p": 8, "dim": 8, "heads": 2, "depth": depth, "classes": 3}, "mean")
        groups = groups_of(classifier, Optimization(layer_decay=params["gamma"]), depth=depth)
        parts = ["encoder.cls_token", *(f"encoder.blocks.{i}.norm1.weight" for i in range(depth)), "head.weight"]
        golden.close(f"{name}/scales", [groups[part][1] for part in parts])


@check("lut_views")
def views(golden: Golden, _: Any) -> None:
    side, normalize = golden.params["input_size"], Normalize(IMAGENET_MEAN, IMAGENET_STD)
    views = WeakStrong((side, side))

    def picture(name: str) -> Tensor:
        return golden[name].to(torch.uint8).permute(2, 0, 1)

    resized = cover(picture("source"), side, side)
    assert resized.shape == picture("resized").shape
    assert (resized.int() - picture("resized").int()).abs().max() <= 1  # gray level: rounding, see common.images.resize
    operations = ["brightness", "contrast", "saturation", "hue"]
    for case in sorted({name.split("/")[0] for name in golden.arrays if "/" in name}):
        crops = []
        for view in ("1", "2"):
            top, left = golden[f"{case}/crop{view}"].tolist()
            crop = padded_crop(picture("resized"), top, left, size=views.size, pad=views.pad)
            crops.append(crop.flip(-1) if golden[f"{case}/flip{view}"] else crop)
        golden.close(f"{case}/view2_before_colour", crops[1].permute(1, 2, 0).long())
        jitter = []
        if f"{case}/jitter_order" in golden:
            factors, order = golden[f"{case}/jitter_factors"].tolist(), golden[f"{case}/jitter_order"].tolist()
            jitter = [(operations[i], factors[i]) for i in order]
        radius = float(golden[f"{case}/blur_radius"]) if f"{case}/blur_radius" in golden else 0.0
        strong = recolor(crops[1], jitter, case.split("_")[0], radius=radius)  # pyright: ignore
        golden.close(f"{case}/view1", normalize(crops[0]))
        golden.close(f"{case}/view2", normalize(strong))


@check("lut_whole")
def whole(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    params, names = golden.params, golden.about["param_order"]
    images, zero = (golden["view1"], golden["view2"]), torch.zeros(())
    first, second = (patchify(view, patch=params["patch"]) for view in images)

    def fresh() -> tuple[lut.LUT, nn.Module]:
        """The recipe, and a teacher of everything: the published one copies also what nobody asks it."""
        method = _lut(golden, monkeypatch)
        everything = ema_copy(_published(method)).eval()
        for prefix, module in (("student/", _published(method)), ("teacher/", everything)):
            weights = {k.removeprefix(prefix): golden[k] for k in golden.arrays if k.startswith(prefix)}
            report = load_weights(module, weights, renames=lut.NAMES, optional=(r"encoder\.pos_embed",))
            assert set(report.dropped) <= {"decoder_pos_embed"}
        report = load_weights(method.teacher, everything.state_dict(), renames=TEACHER)
        assert all(name.startswith(("decoder.", "predictor.")) for name in report.dropped)
        return method.train(), everything

    # What the encoders and the decoder give
    method, everything = fresh()
    table = nn.functional.pad(method.decoder.pos_embed, (0, 0, 1, 0))  # pyright: ignore
    torch.testing.assert_close(table, golden["student/decoder_pos_embed"][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(method.encoder.positions, golden["student/pos_embed"][0, 1:], rtol=1e-5, atol=1e-6)
    noise = {"mask": golden["noise0"]}
    order = noise["mask"].argsort(dim=-1)
    golden.close("step0/ids_restore", order.argsort(dim=-1))
    (visible, masked), (others, hidden) = method.split(noise)
    for view, patches, seen, unseen in (("1", first, visible, masked), ("2", second, others, hidden)):
        mask = torch.zeros(noise["mask"].shape).scatter(1, unseen, 1.0)
        golden.close(f"step0/mask{view}", mask)
        latent = method.encoder(take(patches, seen), method.encoder.positions[seen])
        kept = order[:, : seen.shape[1]] if view == "1" else order[:, visible.shape[1] :][:, : seen.shape[1]]
        own = torch.cat([torch.zeros_like(kept[:, :1]), 1 + _places(kept)], dim=-1)  # the file's order is the noise's
        golden.close(f"step0/latent{view}", take(latent, own))
        golden.close(f"step0/teacher_latent{view}", method.teacher[0](patches, method.encoder.positions))
        if view == "1":
            prediction = method.decoder(latent, seen, unseen, visible_too=True)  # pyright: ignore
            golden.close("step0/pred", put(prediction, torch.cat([seen, unseen], dim=-1), torch.zeros_like(prediction)))
    with torch.no_grad():
        golden.close("attn_last", last_attention(method.encoder, first))

    # Some steps of SGD
    parameters = dict(method.named_parameters())
    published = {ours: theirs for ours, theirs in _names(_published(method)).items() if ours in parameters}
    ours = {theirs: parameters[name] for name, theirs in published.items() if parameters[name].requires_grad}
    assert set(ours) == set(names)
    outputs: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    method.predictor.register_forward_hook(lambda *args: outputs["student"].append(args[-1]))
    method.teacher[1].register_forward_hook(lambda *args: outputs["teacher"].append(args[-1]))
    golden.close(
        "decay",
        [
            float(cosine_momentum(torch.tensor(t / params["steps"]).double(), params["m0"]))
            for t in range(params["steps"])
        ],
    )
    for step in range(params["steps"]):
        for values in outputs.values():
            values.clear()
        losses = method(images, {"mask": golden[f"noise{step}"]}, zero)
        student, teacher = (torch.cat(outputs[who]) for who in ("student", "teacher"))
        golden.close(f"step{step}/loss_mim", losses["pixels"])
        golden.close(f"step{step}/loss_bc", losses["context"])
        golden.close(f"step{step}/loss_total", losses["loss"])
        golden.close(f"step{step}/student_out", student)
        golden.close(f"step{step}/teacher_out", teacher)
        count = len(student) // 2
        golden.close(f"step{step}/term_s2_t1", cosine_distance(student[count:], teacher[:count]).mean())
        golden.close(f"step{step}/term_s1_t2", cosine_distance(student[:count], teacher[count:]).mean())
        of = {"total": "loss"} | ({"mim": "pixels", "bc": "context"} if step == 0 else {})
        for kind, name in of.items():
            grads = torch.autograd.grad(
                losses[name], [ours[name] for name in names], retain_graph=True, materialize_grads=True
            )
            golden.close(f"step{step}/gradnorm_{kind}", torch.stack([grad.norm() for grad in grads]))
        _step(method, everything, losses["loss"], params, torch.tensor(step / params["steps"]))
    after = f"after{params['steps']}"
    for who, found in (("student", _state(_published(method))), ("teacher", _state(everything))):
        for name in golden.arrays:
            if name.startswith(f"{after}/{who}/") and not (who == "teacher" and name.endswith("tracked")):
                golden.close(name, found[name.removeprefix(f"{after}/{who}/")])
    state = _state(everything)
    golden.close(f"{after}/teacher_l2", torch.stack([state[name].norm() for name in names]))
    _same_teacher(method, everything)

    # Four micro-batches, two of them in a step
    method, everything = fresh()
    count = len(golden["accum2/decay_all"])
    momenta = [cosine_momentum(torch.tensor(t / count).double(), params["m0"]) for t in range(count)]
    golden.close("accum2/decay_all", torch.stack(momenta))
    found = []
    for i in range(count):
        loss = method(images, {"mask": golden[f"noise{i}"]}, zero)["loss"] / 2
        found.append(loss.detach())
        if i % 2:
            _step(method, everything, loss, params, torch.tensor(i / count))
        else:
            loss.backward()
    golden.close("accum2/loss_over_2", torch.stack(found))
    for who, state in (("student", _state(_published(method))), ("teacher", _state(everything))):
        golden.close(f"accum2/{who}_l2", torch.stack([state[name].norm() for name in names]))
    _same_teacher(method, everything)

    # What reads the encoder afterwards
    method, _ = fresh()
    sizes = {"img": params["img"], "p": params["patch"], "dim": params["dim"], "depth": params["depth"]}
    sizes |= {"heads": params["heads"], "classes": len(golden["cls/head.bias"])}
    for pool, name in (("mean", "logits_global_pool"), ("class", "logits_cls_token")):
        classifier = classifier_of(sizes, pool)
        classifier.get_submodule("encoder").load_state_dict(method.encoder.state_dict())
        own = {k.removeprefix("cls/"): golden[k] for k in golden.arrays if k.startswith(("cls/fc_norm", "cls/head"))}
        classifier.load_state_dict({k: v for k, v in own.items() if pool == "mean" or "head" in k}, strict=False)
        golden.close(f"cls/{name}", classifier.head(classifier.features(images[0])))


def _lut(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> lut.LUT:
    """The recipe for the sizes of a file."""
    given = golden.params
    names = {"enc_dim": "dim", "enc_depth": "depth", "enc_heads": "heads", "p": "patch", "img": "img"}
    names |= {"dec_dim": "ddim", "dec_depth": "ddepth", "dec_heads": "dheads", "mask_ratio": "ratio"}
    settings = settings_for({ours: given[theirs] for ours, theirs in names.items()}, monkeypatch)
    assert given["w_mae"] == 1
    config = lut.Config(
        **settings,
        head_width=given["hidden"],
        context_weight=given["w_bc"],
        momentum=given["m0"],
        normalize_target=given["norm_pix"],
    )
    return lut.LUT(config, as_they_are())


def _published(method: lut.LUT) -> nn.ModuleDict:
    """The parts that a published checkpoint has."""
    parts = {name: getattr(method, name) for name in ("encoder", "decoder", "projector", "predictor")}
    return nn.ModuleDict(parts)


def _names(parts: nn.Module) -> dict[str, str]:
    """The published name of each parameter and running statistic."""
    found = {}
    for name in parts.state_dict():
        theirs = name.removeprefix("encoder.").replace("projector.", "head.").replace("decoder.head.", "decoder_pred.")
        found[name] = theirs.replace("decoder.mask_token", "mask_token").replace("decoder.", "decoder_")
    return found


def _state(parts: nn.Module) -> dict[str, Tensor]:
    """What a published checkpoint has, by its names."""
    state = parts.state_dict()
    return {theirs: state[ours] for ours, theirs in _names(parts).items()}


def _step(method: lut.LUT, everything: nn.Module, loss: Tensor, params: dict[str, Any], progress: Tensor) -> None:
    """Let plain SGD step, and both teachers follow."""
    stepper = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=params["lr"])
    loss.backward()
    stepper.step()
    stepper.zero_grad()
    method.after_step(progress.double())
    ema_update(everything, _published(method), cosine_momentum(progress.double(), params["m0"]))


def _same_teacher(method: lut.LUT, everything: nn.Module) -> None:
    """The recipe's teacher has what is read of the published one."""
    state = everything.state_dict()
    for name, tensor in method.teacher.state_dict().items():
        assert torch.equal(
            tensor, state[name.replace("0.", "encoder.", 1) if name[0] == "0" else f"projector.{name[2:]}"]
        )


def _places(kept: Tensor) -> Tensor:
    """Where each of some tokens stands when they are put into raster order."""
    return kept.argsort(dim=-1).argsort(dim=-1)
