"""Unmodified vision transformers of timm as encoders."""

import math
from pathlib import Path
from typing import Any, cast

from common.config import SettingsError
from common.data.normalize import Normalize
from common.files import read_tensors
from common.weights.metadata import check_shapes, exported_arguments
from common.weights.reading import load_weights, read_foreign
from mimkit.positions import resize_table
from mimkit.tokens import unpatchify

import torch
from torch import Tensor, nn


class TimmViT(nn.Module):
    """An unmodified vision transformer of timm with the interface of an `Encoder`; it adds its own positions."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.height, self.width = model.patch_embed.grid_size
        self.patch, self.channels = model.patch_embed.patch_size[0], model.patch_embed.proj.in_channels
        self.dim, self.depth, self.heads = model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads

    @property
    def num_prefix(self) -> int:
        """Return the number of tokens before the patch tokens."""
        return self.model.num_prefix_tokens

    @property
    def cls_token(self) -> Tensor | None:
        """Return the class token, or None if there is none."""
        return self.model.cls_token

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the transformer blocks."""
        return self.model.blocks

    @property
    def pos_embed(self) -> Tensor:
        """Return the position table."""
        return self.model.pos_embed

    @property
    def positions(self) -> Tensor:
        """Return the positions of the whole grid in raster order, (n, dim)."""
        return self.model.pos_embed[0, -self.height * self.width :]

    def forward(self, patches: Tensor, positions: Tensor, noise: None = None) -> Tensor:
        """Encode all patches of images, in raster order; `positions` is ignored."""
        return self.model.forward_features(unpatchify(patches, height=self.height, width=self.width, patch=self.patch))


def load_timm(path: Path, name: str, *, image_size: tuple[int, int] | None = None) -> tuple[TimmViT, Normalize]:
    """Build a timm model from a file of weights, and the normalization of its images.

    Args:
        path: weights under timm's names, for square images, or an exported encoder; the head is dropped.
        name: timm's model name. It determines mean and std, unless the file contains them, as exported encoders do.
        image_size: height and width in pixels, for which positions are resampled; None: those of the file.

    Raises:
        SettingsError: if timm has no such vision transformer, or the weights do not match it.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    if not timm.is_model(name):
        raise SettingsError(f"timm knows no model called {name}")
    weights = read_foreign(path)
    about = read_tensors(path)[1] if path.suffix == ".safetensors" else {}
    arguments = exported_arguments(about, path)
    if arguments is not None:
        check_shapes(arguments, weights, path)
    kernel, table = weights.get("patch_embed.proj.weight"), weights.get("pos_embed")
    if kernel is None or kernel.ndim != 4 or table is None or table.ndim != 3:
        raise SettingsError(f"{path} is not a plain ViT, which has patch_embed.proj.weight and pos_embed")
    channels, patch = kernel.shape[1], kernel.shape[-1]
    side = math.isqrt(table.shape[1])
    old = [size // patch for size in arguments["img_size"]] if arguments else [side, side]
    H, W = image_size or (old[0] * patch, old[1] * patch)
    if H % patch or W % patch:
        raise SettingsError(f"images of {H} × {W} pixels are not made of patches of {patch} × {patch}")
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels, img_size=(H, W))
    except TypeError:  # a model without the argument img_size
        model = None
    if not isinstance(model, VisionTransformer):
        raise SettingsError(f"timm's {name} is not a vision transformer")
    if [H // patch, W // patch] != old:
        sizes = {"height": old[0], "width": old[1], "new_height": H // patch, "new_width": W // patch}
        prefix = table.shape[1] - old[0] * old[1]
        weights["pos_embed"] = torch.cat([table[:, :prefix], resize_table(table[:, prefix:], **sizes)], dim=1)
    loaded = load_weights(model, weights, renames={})
    numbers = cast(dict[str, list[float]], about if arguments else model.pretrained_cfg)
    mean, std = numbers["mean"], numbers["std"]
    if len(mean) != channels:
        mean, std = ([sum(values) / len(values)] * channels for values in (mean, std))
    if not arguments:
        print(f"{path}:\n{loaded}\nimages are normalized by mean {list(mean)} and std {list(std)}, timm's for {name}")
    return TimmViT(model), Normalize(mean, std)
