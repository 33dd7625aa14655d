"""Export encoders to files, and load them for any image size."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import SettingsError
from common.data.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from common.files import read_tensors, write_tensors
from common.networks.encoder import Encoder
from common.networks.initialization import initialize_mae, initialize_simmim
from common.networks.vit import ViT
from common.weights.metadata import check_shapes, exported_arguments
from common.weights.reading import LoadReport, load_weights, read_foreign
from common.weights.resizing import own_tables, resize_positions
from common.weights.timm_models import load_timm
from common.weights.timm_names import OWN_TABLE, SHARED_TABLE, timm_arguments, timm_arguments_of, timm_state
from mimkit.positions import sincos

import torch
from torch import Tensor, nn


def export(path: Path, encoder: ViT, normalize: Normalize) -> None:
    """Write an encoder under timm's parameter names, with the arguments to rebuild it (in timm, if possible)."""
    write_tensors(path, timm_state(encoder), described(encoder, normalize))


def described(encoder: ViT, normalize: Normalize) -> dict[str, Any]:
    """Return the metadata of an encoder: its arguments as `timm` or, without such a network, `mimkit`; mean and std."""
    return {
        "mimkit" if encoder.relative == "contextual" else "timm": timm_arguments(encoder),
        "mean": normalize.mean.flatten().tolist(),
        "std": normalize.std.flatten().tolist(),
    }


def load_encoder(
    path: Path,
    *,
    image_size: tuple[int, int] | None = None,
    class_token: bool = False,
    drop: float = 0.0,
    scratch: bool = False,
    seed: int = 0,
    unused: tuple[str, ...] = (),
) -> tuple[ViT, Normalize]:
    """Build an encoder from its file, optionally for another image size, and the normalization of its images.

    A relative position table shared by all blocks is copied to each block, as is usual for fine-tuning, which does not
    change the outputs. Contextual relative position encoding (LoMaR) applies to any image size.

    Args:
        path: an exported encoder, or a published checkpoint of the MAE family, SimMIM, BEiT or LoMaR (for square
            ImageNet images).
        image_size: height and width in pixels, for which positions are resampled; None: those of the file.
        class_token: add a new class token (normal, std 0.02, position zero) if the encoder has none.
        drop: drop path rate of the last block.
        scratch: use random weights instead, except for the position table.
        seed: seed of newly initialized parameters.
        unused: regular expressions for weights that may be missing, because the caller does not use them.

    Raises:
        SettingsError: if the file does not contain an encoder, its metadata or weights are damaged, or the image size
            is not a multiple of the patch size.
    """
    content = read_foreign(path)
    about = read_tensors(path)[1] if path.suffix == ".safetensors" else {}
    written = exported_arguments(about, path)
    exported = written is not None
    if exported and written.get("global_pool") == "avg" and not unused:
        raise SettingsError(f"{path} is a classifier without the final norm of its encoder: give encoder.safetensors")
    prefix = "encoder." if "encoder.patch_embed.proj.weight" in content else ""  # beside a pre-training head
    weights = {name.removeprefix(prefix): tensor for name, tensor in content.items() if name.startswith(prefix)}
    arguments = written or timm_arguments_of(weights, path)
    check_shapes(arguments, weights, path)
    patch, (H, W) = arguments["patch_size"], image_size or arguments["img_size"]
    if H % patch or W % patch:
        raise SettingsError(f"images of {H} × {W} pixels are not made of patches of {patch} × {patch}")
    old = {"height": arguments["img_size"][0] // patch, "width": arguments["img_size"][1] // patch}
    new = {"height": H // patch, "width": W // patch}
    sizes = {**old, "new_height": new["height"], "new_width": new["width"]}
    beit = "use_abs_pos_emb" in arguments  # see `common.weights.timm_names.in_beit`
    contextual = arguments.get("relative") == "contextual"
    own_table = arguments.get("use_rel_pos_bias") or arguments.get("use_shared_rel_pos_bias")
    torch.manual_seed(seed)
    vit = ViT(
        **new,
        patch=patch,
        channels=arguments["in_chans"],
        dim=arguments["embed_dim"],
        depth=arguments["depth"],
        heads=arguments["num_heads"],
        class_token=beit or class_token or arguments["class_token"],
        key_bias=not beit,
        drop=drop,
        table=sincos if arguments.get("use_abs_pos_emb", not contextual) else None,
        relative="contextual" if contextual else "each" if own_table else None,
        layer_scale=arguments.get("init_values"),
    )
    (initialize_simmim if beit else initialize_mae)(vit)
    if vit.pos_embed is not None:
        table = resize_positions(weights["pos_embed"], **sizes)
        # a newly added class token has position zero
        weights["pos_embed"] = nn.functional.pad(table, (0, 0, vit.pos_embed.shape[1] - table.shape[1], 0))
    if vit.relative == "each":
        weights = own_tables(weights, depth=vit.depth, **sizes)
    if scratch:
        weights = {"pos_embed": weights["pos_embed"]} if vit.pos_embed is not None else {}
    optional = (r".",) if scratch else (r"cls_token",) if not (beit or arguments["class_token"]) else ()
    report = load_weights(vit, weights, renames={}, optional=(*optional, *unused))
    if not exported:
        _name_all(report, content, prefix, own=vit.state_dict())
        print(f"{path}:\n{report}")
    mean, std = (about["mean"], about["std"]) if exported else (IMAGENET_MEAN, IMAGENET_STD)
    return vit, Normalize(mean, std)


def _name_all(report: LoadReport, content: Mapping[str, Tensor], prefix: str, *, own: Mapping[str, Tensor]) -> None:
    """Complete a report by the names in the file, which stand behind a prefix."""
    targets = {name: name.removeprefix(prefix) for name in content if name.startswith(prefix)}
    report.renamed = {name: target for name, target in targets.items() if target != name and target in own}
    if prefix + SHARED_TABLE in content:
        report.renamed[prefix + SHARED_TABLE] = OWN_TABLE.format("*")
    report.dropped = [name for name in content if targets.get(name) in (None, *report.dropped)]


def open_encoder(encoder: str | Path, *, image_size: tuple[int, int] | None = None) -> tuple[Encoder, Normalize]:
    """Open an encoder for evaluation: an exported encoder, a published checkpoint, or a vision transformer of timm.

    Args:
        encoder: a file as for `load_encoder`, or `timm:NAME:FILE`, timm's model name and a file of its weights.
        image_size: height and width in pixels, for which positions are resampled; None: those of the encoder.

    Raises:
        SettingsError: if the file does not contain such an encoder.
    """
    if not str(encoder).startswith("timm:"):
        return load_encoder(Path(encoder), image_size=image_size)
    _, name, file = (*str(encoder).split(":", 2), "", "")[:3]
    if not file:
        raise SettingsError(f"--encoder {encoder}: give the weights, too, as in --encoder timm:{name or 'NAME'}:FILE")
    return load_timm(Path(file), name, image_size=image_size)
