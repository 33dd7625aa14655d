"""The checks of LoMaR and of iRPE, its relative positions."""

import math
import re
import tempfile
from pathlib import Path
from typing import Any

from common.config import DataSettings, Network
from common.evaluation.finetuning import Classifier
from common.networks.vit import SIZES
from common.weights.encoders import load_encoder
from common.weights.reading import load_weights
from mimkit.masking import random_tokens
from mimkit.relative import (
    Method,
    contextual_bias,
    contextual_values,
    num_buckets,
    piecewise_index,
    relative_bias,
    relative_buckets,
)
from mimkit.tokens import patchify, put, split, take
from mimkit.windows import distinct_anchors, window_patches

import lomar
import mae
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from goldens import Golden, check
from methods import as_they_are, settings_for
from released import ReleasedLoMaR, released_pairs
from torch import Tensor, nn

ZERO = torch.zeros(())
METHODS: dict[str, Method] = {
    "product": "product",
    "euc": "euclidean",
    "quant": "quantized",
    "cross_rows": "rows",
    "cross_cols": "columns",
}


# iRPE


@check("irpe_piecewise")
def numbers(golden: Golden, _: Any) -> None:
    golden.close("abg", [[given[name] for name in ("alpha", "beta", "gamma")] for given in golden.params["sets"]])
    for i, given in enumerate(golden.params["sets"]):
        for kind in ("int", "float"):
            golden.close(f"idx_{kind}_{i}", piecewise_index(golden[f"x_{kind}"], **given))


@check("irpe_buckets")
def buckets(golden: Golden, _: Any) -> None:
    for i, (method, ratio, height, width, prefix) in enumerate(golden.params["cases"]):
        settings: dict[str, Any] = {"method": METHODS[method], "ratio": float(ratio), "num_prefix": prefix}
        golden.close(f"ids_{i}", relative_buckets(height=height, width=width, **settings))
        golden.close(f"num_buckets_{i}", num_buckets(**settings))


@check("irpe_encodings")
def encodings(golden: Golden, _: Any) -> None:
    for i, (where, mode, method, ratio, shared, height, width, prefix) in enumerate(golden.params["cases"]):
        grid = {"height": height, "width": width, "ratio": float(ratio), "num_prefix": prefix}
        x = golden[f"{i}.x"].requires_grad_()
        parts: dict[str, Method] = {"rows.": "rows", "cols.": "columns"} if method == "cross" else {"": METHODS[method]}
        tables = {part: golden[f"{i}.{part}tab"].requires_grad_() for part in parts}
        ids = {part: relative_buckets(method=method, **grid) for part, method in parts.items()}
        encode = contextual_values if where == "v" else contextual_bias
        terms = []
        for part, table in tables.items():
            assert len(table) == (1 if shared else x.shape[1])
            terms.append(relative_bias(table, ids[part])[None] if mode == "bias" else encode(x, table, ids[part]))
        y = torch.stack(terms).sum(dim=0)
        y.backward(golden[f"{i}.up"])
        golden.close(f"{i}.y", y)
        if mode == "ctx":
            golden.close(f"{i}.d_x", x.grad)
        for part, table in tables.items():
            gradient = _gradient(table)
            golden.close(f"{i}.d_{part}tab", gradient)
            each = gradient.movedim(1 if where == "v" else -1, 0)
            assert len(each) == num_buckets(method=parts[part], ratio=float(ratio), num_prefix=prefix)
            unused = ~torch.isin(torch.arange(len(each)), ids[part])
            assert not each[unused].any()


@check("irpe_attention_deit")
def attention(golden: Golden, _: Any) -> None:
    """A layer of DeiT: its queries are scaled, unlike LoMaR's, and there may be tables on queries and values, too."""
    heads, order = golden.params["heads"], golden.params["param_order"]
    for i, (on, method, ratio, shared, side, prefix) in enumerate(golden.params["cases"]):
        ids = relative_buckets(height=side, width=side, method=METHODS[method], ratio=float(ratio), num_prefix=prefix)
        x, up, names = golden[f"{i}.x"].requires_grad_(), golden[f"{i}.up"], order[str(i)]
        weights = {name: golden[f"{i}.w.{name}"].requires_grad_() for name in names}
        tables = {name: weights.get(f"rpe_{name}.lookup_table_weight") for name in "qkv"}
        given = {name: table for name, table in tables.items() if table is not None}
        assert "".join(given) == "".join(sorted(on, key="qkv".index))
        assert all(len(table) == (1 if shared else heads) for table in given.values())

        qkv = F.linear(x, weights["qkv.weight"], weights["qkv.bias"])
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=heads)
        scale = q.shape[-1] ** -0.5
        bias = torch.zeros(())
        if tables["k"] is not None:
            bias = bias + contextual_bias(q * scale, tables["k"], ids)
        if tables["q"] is not None:
            bias = bias + contextual_bias(k * scale, tables["q"], ids).mT
        probabilities = (q * scale @ k.mT + bias).softmax(dim=-1)
        y = probabilities @ v
        if tables["v"] is not None:
            y = y + contextual_values(probabilities, tables["v"], ids)
        ways = {"explicit": y}
        if tables["v"] is None:  # what is added to values needs the probabilities
            ways["fused"] = F.scaled_dot_product_attention(q, k, v, bias)
        for way in ways.values():
            y = F.linear(rearrange(way, "b h n d -> b n (h d)"), weights["proj.weight"], weights["proj.bias"])
            gradients = torch.autograd.grad(y, [x, *weights.values()], up, retain_graph=True)
            golden.close(f"{i}.y", y)
            golden.close(f"{i}.d_x", gradients[0])
            golden.close(f"{i}.grad_norm", torch.stack([gradient.norm() for gradient in gradients[1:]]))


# LoMaR


@check("lomar_windows")
def windows(golden: Golden, _: Any) -> None:
    for i, (height, width, side, count) in enumerate(golden.params["cases"]):
        rows, columns = golden[f"{i}.top"], golden[f"{i}.left"]
        noise = _first(rows, height - side + 1), _first(columns, width - side + 1)
        anchors = distinct_anchors(*noise, num_windows=count)
        assert anchors.equal(torch.stack([rows, columns], dim=-1))
        golden.close(f"{i}.ids", window_patches(anchors, width=width, window_height=side, window_width=side))


@check("lomar_masks")
def masks(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, Any] = {"patch": 1, "embed_dim": 4, "depth": 1, "heads": 1}
    for i, (images, count, side, ratio, grid) in enumerate(golden.params["cases"]):
        pairs = released_pairs(torch.arange(count).unsqueeze(-1), num_images=images).squeeze(-1)
        golden.close(f"{i}.row_image", torch.arange(images).repeat(count))
        golden.close(f"{i}.row_window", pairs.mT.flatten())
        given = small | {"N": images, "M": count, "K": side, "img_size": grid, "mask_ratio": ratio}
        for pairing in _pairings(given):
            method = _lomar(given, monkeypatch, pairing)
            noise, rows = _noise(golden, method, f"{i}.")
            _same_draw(golden, method, noise, rows, f"{i}.")
    golden.close("count_K", [side for side, _ in golden.params["counts"]])
    golden.close("count_ratio", [ratio for _, ratio in golden.params["counts"]])
    counts = []
    for side, ratio in golden.params["counts"]:
        given = small | {"M": 1, "K": side, "img_size": side, "mask_ratio": ratio}
        counts.append(_lomar(given, monkeypatch).num_masked)
    golden.close("count_masked", counts)


class _Given(nn.Module):
    """An encoder without positions whose tokens are given, behind a class token."""

    pos_embed = None

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return F.pad(self.tokens, (0, 0, 1, 0))


@check("lomar_loss")
def loss(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe with the file's windows and predictions in the place of its own."""
    for i, (images, count, side, pixels, patch, ratio) in enumerate(golden.params["cases"]):
        pictures, ids, mask = golden[f"{i}.imgs"], golden[f"{i}.ids"], golden[f"{i}.mask"]
        golden.close(f"{i}.patches", patchify(pictures[:1], patch=patch))
        rows = golden[f"{i}.row_image"].argsort(stable=True)
        given: dict[str, Any] = {"patch": patch, "embed_dim": 4, "depth": 1, "heads": 1, "img_size": pixels}
        given |= {"M": count, "K": side, "mask_ratio": ratio}
        for kind in ("norm", "raw"):
            method = _lomar(given, monkeypatch, normalize_target=kind == "norm")
            prediction = golden[f"{i}.pred"].requires_grad_()
            of_each, of_rows = ids[rows].unflatten(0, (images, count)), prediction[rows]
            monkeypatch.setattr(method, "patches_of", lambda _, windows=of_each: windows)
            method.encoder = _Given(of_rows)  # pyright: ignore[reportAttributeAccessIssue]
            monkeypatch.setattr(method, "head", nn.Identity())
            noise = method.noise(torch.rand, images)
            noise["mask"] = mask[rows].unflatten(0, (images, count)).float()  # a mask is its own noise
            loss = method(pictures, noise, ZERO)["loss"]
            loss.backward()
            golden.close(f"{i}.loss_{kind}", loss)
            assert prediction.grad is not None
            if kind == "raw":
                golden.close(f"{i}.dpred_raw_row0", prediction.grad[0])
            else:  # half of it times the number of values is prediction − target: read as targets, at their tolerance
                half = mask.sum() * prediction.shape[-1] / 2
                gradients = prediction.grad[0], golden[f"{i}.dpred_norm_row0"]
                targets = [prediction.detach()[0] - half * gradient for gradient in gradients]
                torch.testing.assert_close(*targets, rtol=1e-4, atol=1e-4)


@check("lomar_model")
def model(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    params, images, names = golden.params, golden["imgs"], golden.params["param_order"]

    def fresh(pairing: type[lomar.LoMaR], **options: Any) -> tuple[lomar.LoMaR, dict[str, Tensor]]:
        return _loaded(golden, monkeypatch, pairing, **{"normalize_target": params["norm_pix_loss"]} | options)

    pairing = _pairings(params)[0]
    method, parameters = fresh(pairing)
    assert (method.height, method.num_masked) == (params["grid"], params["masked_per_window"])
    assert method.encoder.norm.eps == params["ln_eps"]
    noise, rows = _noise(golden, method)
    _same_draw(golden, method, noise, rows)
    loss, prediction, seen = _watched(method, images, noise, rows)
    golden.close("tokens_in", seen[0])
    for i, tokens in enumerate(seen[1:]):
        if f"block{i}_row0" in golden:
            golden.close(f"block{i}_row0", tokens[0])
    golden.close("pred", prediction)
    golden.close("loss", loss)
    loss.backward()
    golden.close("grad_norm", torch.stack([_gradient(parameters[name]).norm() for name in names]))
    for name in golden.arrays:
        if name.startswith("g."):
            golden.close(name, _gradient(parameters[name.removeprefix("g.")]))

    optimizer = torch.optim.SGD(method.parameters(), lr=_learning_rate(golden))
    losses = [loss]
    while len(losses) < len(golden["sgd_losses"]):
        optimizer.step()
        optimizer.zero_grad()
        losses.append(method(images, noise, ZERO)["loss"])
        losses[-1].backward()
    golden.close("sgd_losses", torch.stack(losses))

    # other targets; the published pairing of images and windows, which here is each with each; no positions
    method, _ = fresh(pairing, normalize_target=False)
    golden.close("loss_raw", method(images, noise, ZERO)["loss"])
    method, parameters = fresh(ReleasedLoMaR)
    noise, _ = _noise(golden, method)
    golden.close("loss", method(images, noise, ZERO)["loss"])
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "rpe_k" in name:
                parameter.zero_()
    golden.close("loss_zero_tables", method(images, noise, ZERO)["loss"])


@check("lomar_ape")
def absolute_positions(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    method, _ = _loaded(golden, monkeypatch, _pairings(golden.params)[0], positions="absolute")
    golden.close("pos_embed", method.encoder.pos_embed)
    noise, rows = _noise(golden, method)
    _same_draw(golden, method, noise, rows)
    loss, prediction, _ = _watched(method, golden["imgs"], noise, rows)
    golden.close("pred", prediction)
    golden.close("loss", loss)


@check("lomar_classifier")
def classifier(golden: Golden, _: Any) -> None:
    params, images, names = golden.params, golden["imgs"], golden.params["param_order"]
    own = {name: tensor for name, tensor in golden.weights.items() if name.startswith(("head.", "fc_norm."))}
    published = {name: tensor for name, tensor in golden.weights.items() if name not in own}
    # what the published code stores and never reads
    published["pos_embed"] = torch.full((1, 1 + params["grid"] ** 2, params["embed_dim"]), math.nan)
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": published}, Path(folder, "lomar.pth"))
        encoders = [load_encoder(Path(folder, "lomar.pth"))[0] for _ in range(2)]
    assert encoders[0].height * encoders[0].patch == params["img_size"]
    assert (encoders[0].depth, encoders[0].heads) == (params["depth"], params["heads"])

    mean, first = (
        Classifier(encoder, as_they_are(), params["classes"], pool=pool, head_scale=0.01)
        for encoder, pool in zip(encoders, ("mean", "class"), strict=True)
    )
    mean.load_state_dict(mean.state_dict() | own)
    first.head.load_state_dict(mean.head.state_dict())
    golden.close("logits_cls", first.head(first.features(images)))
    golden.close("logits_gap", mean.head(mean.features(images)))
    loss = mean((images, golden["labels"]), {}, ZERO)["loss"]
    loss.backward()
    golden.close("ce_gap", loss)
    parameters = {name.removeprefix("encoder."): p for name, p in mean.named_parameters() if p.requires_grad}
    assert set(parameters) == set(names)
    golden.close("grad_norm", torch.stack([_gradient(parameters[name]).norm() for name in names]))


@check("lomar_mae_rpe")
def mae_with_relative_positions(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    params, images, names = golden.params, golden["imgs"], golden.params["param_order"]
    tokens, kept = params["grid"] ** 2, golden["ids_keep"]
    sizes = {f"{part}_{size}": params[part][size] for part in ("enc", "dec") for size in ("dim", "depth", "heads")}
    ratio = 1 - (params["keep"] + 0.5) / tokens  # what is kept is cut
    sizes |= {"p": params["patch"], "img": params["img_size"], "mask_ratio": ratio}
    config = mae.Config(**settings_for(sizes, monkeypatch), positions="relative")
    method = mae.MAE(config, as_they_are())
    report = load_weights(method, golden.weights, renames=mae.RECIPE.published_names, optional=(r"normalize\.",))
    parameters = _published(method, report.renamed)
    assert set(parameters) == set(names)

    noise = {"mask": golden["noise"]}
    patches, mask = patchify(images, patch=params["patch"]), random_tokens(noise["mask"], num_masked=method.num_masked)
    visible, masked = split(mask, num_masked=method.num_masked)
    golden.close("mask", mask.float())
    assert visible.equal(kept.sort(dim=-1).values)
    golden.close("bucket_enc", method.encoder.buckets_of(kept))

    def predict(latent: Tensor) -> Tensor:
        prediction = method.decoder(latent, visible, masked, visible_too=True)
        return put(prediction, torch.cat([visible, masked], dim=-1), torch.zeros_like(prediction))

    prediction = predict(
        method.encoder(
            take(patches, visible), method.encoder.positions[visible], buckets=method.encoder.buckets_of(visible)
        )
    )
    golden.close("pred", prediction)
    loss = method(images, noise, ZERO)["loss"]
    golden.close("loss", loss)
    loss.backward()
    golden.close("grad_norm", torch.stack([_gradient(parameters[name]).norm() for name in names]))

    # The visible patches, in the order of their noise, taken for a small image: another loss, and never by accident
    side = math.isqrt(params["keep"])
    assert side**2 == params["keep"]
    assert not torch.isclose(loss, golden["loss_square_trap"], rtol=1e-6, atol=0.0)
    for count in (params["keep"], params["keep"] - 1):
        part = kept[:, :count]
        with pytest.raises(ValueError, match=f"relative positions are those of all {tokens} patches, not of a part"):
            method.encoder(take(patches, part), method.encoder.positions[part])
    latent = method.encoder(take(patches, kept), None, buckets=relative_buckets(height=side, width=side))
    trapped = take(latent, F.pad(1 + kept.argsort(dim=-1), (1, 0)))
    assert (predict(trapped) - prediction).norm() > 1e-3 * prediction.norm()
    monkeypatch.setattr(method.encoder, "forward", lambda *_, **__: trapped)
    golden.close("loss_square_trap", method(images, noise, ZERO)["loss"])


def _pairings(params: dict[str, Any]) -> list[type[lomar.LoMaR]]:
    """Methods that pair images and windows as a file does: where it holds every pair, the recipe is one of them."""
    return [lomar.LoMaR, ReleasedLoMaR] if math.gcd(params["N"], params["M"]) == 1 else [ReleasedLoMaR]


def _lomar(
    params: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    method: type[lomar.LoMaR] = lomar.LoMaR,
    **options: Any,
) -> lomar.LoMaR:
    """The recipe for the sizes of a file."""
    sizes = {"dim": params["embed_dim"], "depth": params["depth"], "heads": params["heads"]}
    monkeypatch.setitem(SIZES, "golden", sizes)
    config = lomar.Config(
        windows=params["M"],
        window_size=params["K"],
        mask_ratio=params["mask_ratio"],
        data=DataSettings(image_size=(params["img_size"], params["img_size"])),
        network=Network(size="golden", patch=params["patch"]),  # pyright: ignore
        **options,
    )
    return method(config, as_they_are())


def _loaded(
    golden: Golden, monkeypatch: pytest.MonkeyPatch, pairing: type[lomar.LoMaR], **options: Any
) -> tuple[lomar.LoMaR, dict[str, Tensor]]:
    """The recipe with the weights of a file, and its parameters by their published names."""
    method = _lomar(golden.params, monkeypatch, pairing, **options)
    optional = (r"normalize\.", r"encoder\.pos_embed")
    report = load_weights(method, golden.weights, renames=lomar.NAMES, optional=optional)
    assert report.dropped == []
    parameters = _published(method, report.renamed)
    assert set(parameters) == set(golden.weights)
    assert set(parameters) == set(golden.params.get("param_order", parameters))
    return method, parameters


def _published(method: nn.Module, renamed: dict[str, str]) -> dict[str, Tensor]:
    """The trainable parameters by their published names."""
    theirs = {ours: name for name, ours in renamed.items()}
    return {theirs.get(name, name): p for name, p in method.named_parameters() if p.requires_grad}


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _first(chosen: Tensor, places: int) -> Tensor:
    """Noise for which these places have the smallest, in their order."""
    return torch.ones(places).scatter(0, chosen, torch.arange(len(chosen)) / len(chosen))


def _noise(golden: Golden, method: lomar.LoMaR, case: str = "") -> tuple[dict[str, Tensor], Tensor]:
    """Noise from which the recipe draws a file's windows and masks, and which row of the file each of its own is."""
    image, window, noise = golden[f"{case}row_image"], golden[f"{case}row_window"], golden[f"{case}noise"]
    key = image if isinstance(method, ReleasedLoMaR) else image * method.count + window
    rows = key.argsort(stable=True)
    anchors = (
        _first(golden[f"{case}{name}"], side - method.size + 1).expand(len(noise), -1)
        for name, side in (("top", method.height), ("left", method.width))
    )
    # the published code masks the smallest noise, the recipe the largest
    mask = -noise.flatten(0, 1)[rows].unflatten(0, noise.shape[:2])
    return dict(zip(("rows", "columns"), anchors, strict=True)) | {"mask": mask}, rows


def _same_draw(golden: Golden, method: lomar.LoMaR, noise: dict[str, Tensor], rows: Tensor, case: str = "") -> None:
    """Assert that the recipe has the windows and masks of a file."""
    ids = method.patches_of(method.anchors(noise)).flatten(0, 1)
    mask = random_tokens(noise["mask"].flatten(0, 1), num_masked=method.num_masked)
    golden.close(f"{case}ids", ids[rows.argsort()])
    golden.close(f"{case}mask", mask[rows.argsort()].long())


def _watched(
    method: lomar.LoMaR, images: Tensor, noise: dict[str, Tensor], rows: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run the recipe; return its loss, and in the file's rows what it predicts of all patches and what blocks read."""
    read, encoded = [], []
    hooks = [
        block.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])) for block in method.encoder.blocks
    ]
    hooks.append(method.encoder.norm.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])))
    hooks.append(method.encoder.register_forward_hook(lambda *args: encoded.append(args[-1])))
    loss = method(images, noise, ZERO)["loss"]
    for hook in hooks:
        hook.remove()
    back = rows.argsort()
    return loss, method.head(encoded[0][:, 1:])[back], [tokens[back] for tokens in read]


def _learning_rate(golden: Golden) -> float:
    """That of the steps of SGD, which the file tells in words."""
    found = (re.search(r"p - ([\d.e-]+)\*grad", note) for note in golden.about["notes"])
    return next(float(match[1]) for match in found if match)
