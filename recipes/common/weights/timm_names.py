"""Map encoders to timm's parameter names and model arguments."""

import math
import re
from typing import Any, cast

from common.config import SettingsError
from common.networks.attention import relative_rows
from common.networks.vit import SIZES, Block, ViT

from torch import Tensor


def in_beit(vit: ViT) -> bool:
    """Return whether timm implements this network in `beit`, not in `vision_transformer`.

    Raises:
        SettingsError: if timm implements it in neither.
    """
    plain = vit.pos_embed is not None and vit.layer_scale is None and vit.relative is None
    if not plain and (vit.key_bias or vit.cls_token is None):
        raise SettingsError(
            "timm has no network with a key bias, or without class token, that has relative or no positions"
        )
    return not plain


SHARED_TABLE, OWN_TABLE = "rel_pos_bias.relative_position_bias_table", "blocks.{}.attn.relative_position_bias_table"


def timm_state(vit: ViT) -> dict[str, Tensor]:
    """Return the weights under timm's names, without the mask token, which only pre-training uses.

    The query and value biases of a plain ViT become a joint bias whose key part is zero. An encoder with contextual
    relative position encoding, which timm does not implement, keeps its names.
    """
    state = {name: tensor.detach() for name, tensor in vit.state_dict().items() if name != "mask_token"}
    if vit.relative == "contextual" or in_beit(vit):
        return state
    for i, block in enumerate(vit.blocks):
        state[f"blocks.{i}.attn.qkv.bias"] = cast(Block, block).attn.qkv_bias().detach()
        state.pop(f"blocks.{i}.attn.q_bias", None)
        state.pop(f"blocks.{i}.attn.v_bias", None)
    return state


def timm_arguments(vit: ViT) -> dict[str, Any]:
    """Return the arguments with which timm's `VisionTransformer` or `Beit` (see `in_beit`) builds the same network.

    For contextual relative position encoding, which timm does not implement, there is an additional key `relative`.
    """
    arguments = {
        "img_size": [vit.height * vit.patch, vit.width * vit.patch],
        "patch_size": vit.patch,
        "in_chans": vit.channels,
        "embed_dim": vit.dim,
        "depth": vit.depth,
        "num_heads": vit.heads,
    }
    if vit.relative == "contextual":
        return arguments | {"class_token": vit.cls_token is not None, "relative": vit.relative}
    if in_beit(vit):
        return arguments | {
            "use_abs_pos_emb": vit.pos_embed is not None,
            "use_rel_pos_bias": vit.relative == "each",
            "use_shared_rel_pos_bias": vit.relative == "shared",
            "init_values": vit.layer_scale,
            "global_pool": "",
            "num_classes": 0,
        }
    return arguments | {
        "class_token": vit.cls_token is not None,
        "global_pool": "token" if vit.cls_token is not None else "",
        "num_classes": 0,
    }


def timm_arguments_of(weights: dict[str, Tensor], source: object) -> dict[str, Any]:
    """Infer the arguments of `timm_arguments` from the weights of a published encoder for square images.

    The number of heads follows from the width or, with relative positions (SimMIM, BEiT, LoMaR), from their table.

    Raises:
        SettingsError: if the weights are not those of a plain ViT of a named size or of one with relative positions.
    """
    kernel, table = weights.get("patch_embed.proj.weight"), weights.get("pos_embed")
    blocks = [int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))]
    relative = weights.get(SHARED_TABLE, weights.get(OWN_TABLE.format(0)))
    if kernel is not None and kernel.ndim == 4 and relative is not None and relative.ndim == 2 and blocks:
        dim, channels, patch, _ = kernel.shape
        side = (1 + math.isqrt(max(0, len(relative) - 3))) // 2
        if relative_rows(side, side) != len(relative):
            raise SettingsError(f"{source}: {len(relative)} relative positions are not those of a square grid")
        return {
            "img_size": [side * patch, side * patch],
            "patch_size": patch,
            "in_chans": channels,
            "embed_dim": dim,
            "depth": 1 + max(blocks),
            "num_heads": relative.shape[1],
            "use_abs_pos_emb": table is not None,
            "use_rel_pos_bias": OWN_TABLE.format(0) in weights,
            "use_shared_rel_pos_bias": SHARED_TABLE in weights,
            "init_values": 0.1 if "blocks.0.gamma_1" in weights else None,
        }
    if kernel is None or kernel.ndim != 4 or table is None or table.ndim != 3 or not blocks:
        raise SettingsError(f"{source} is not a plain ViT, which has patch_embed.proj.weight, pos_embed and blocks")
    dim, channels, patch, _ = kernel.shape
    contextual = weights.get("blocks.0.attn.rpe_k.lookup_table_weight")
    heads = next((size["heads"] for size in SIZES.values() if size["dim"] == dim), None)
    if contextual is not None:  # (1, dim of a head, buckets)
        heads = dim // contextual.shape[1] if contextual.ndim == 3 and contextual.shape[1] else None
    side = math.isqrt(table.shape[1])
    if heads is None or side**2 + ("cls_token" in weights) != table.shape[1]:
        raise SettingsError(f"{source}: width {dim} and {table.shape[1]} positions are not those of a known encoder")
    return {
        "img_size": [side * patch, side * patch],
        "patch_size": patch,
        "in_chans": channels,
        "embed_dim": dim,
        "depth": 1 + max(blocks),
        "num_heads": heads,
        "class_token": "cls_token" in weights,
    } | ({} if contextual is None else {"relative": "contextual"})
