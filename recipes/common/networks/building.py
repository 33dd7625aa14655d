"""From settings to networks, and to counts of tokens."""

import math
from collections.abc import Callable
from typing import Any

from common.config import DataSettings, Network, SettingsError
from common.networks.decoder import Decoder
from common.networks.initialization import initialize_simmim
from common.networks.vit import SIZES, ViT
from mimkit.positions import sincos

from torch import Tensor


def grid(data: DataSettings, network: Network) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        SettingsError: if the image cannot be cut into patches.
    """
    height, width = data.image_size
    if min(height, width, network.patch) < 1 or height % network.patch or width % network.patch:
        raise SettingsError(
            f"--image-size {height} {width} is not made of patches of {network.patch} × {network.patch}"
        )
    return height // network.patch, width // network.patch


def build_vit(data: DataSettings, network: Network, **options: Any) -> ViT:
    """Build a ViT of a named size for the grid of the images; for the options see `ViT`."""
    height, width = grid(data, network)
    sizes = {"height": height, "width": width, "patch": network.patch, "channels": data.channels}
    return ViT(**sizes, **SIZES[network.size], **options)


def encoder_and_decoder(
    data: DataSettings,
    network: Network,
    *,
    class_token: bool = True,
    key_bias: bool = True,
    embed_bias: bool = True,
    table: Callable[..., Tensor] | None = sincos,
) -> tuple[ViT, Decoder]:
    """Build a ViT of a named size and a decoder that predicts the pixels of its patches; for the options see `ViT`.

    Without a table both have contextual relative positions.
    """
    shape: dict[str, Any] = {"class_token": class_token, "key_bias": key_bias, "table": table}
    encoder = build_vit(data, network, **shape, relative="contextual" if table is None else None)
    decoder = Decoder(
        **shape,
        height=encoder.height,
        width=encoder.width,
        encoder_dim=encoder.dim,
        dim=network.decoder_dim,
        depth=network.decoder_depth,
        heads=network.decoder_heads,
        outputs=network.patch**2 * data.channels,
        embed_bias=embed_bias,
    )
    return encoder, decoder


def masking_encoder(data: DataSettings, network: Network, *, drop: float = 0.0) -> ViT:
    """Build and initialize the ViT of SimMIM and BEiT: mask token, relative positions in one table, layer scale."""
    options = {"key_bias": False, "table": None, "relative": "shared", "layer_scale": 0.1, "mask_token": True}
    encoder = build_vit(data, network, drop=drop, **options)
    initialize_simmim(encoder)
    return encoder


def whole_cells(data: DataSettings, network: Network, cell: int, ratio: float) -> tuple[int, dict[str, int]]:
    """Count square cells of `cell` pixels a side, and return what `mimkit.masking.random_cells` needs to mask a share.

    The share is rounded up.

    Raises:
        SettingsError: if the cells are not made of patches or do not fill the image, or nothing or all would be masked.
    """
    (height, width), side = grid(data, network), cell // network.patch
    if cell < 1 or cell % network.patch or height % side or width % side:
        size, patch = data.image_size, network.patch
        raise SettingsError(
            f"--cell {cell}: images of {size[0]} × {size[1]} are not cut into such cells of patches of {patch}"
        )
    cells = (height // side) * (width // side)
    masked = math.ceil(cells * ratio) if 0 < ratio < 1 else 0
    if not 0 < masked < cells:
        raise SettingsError(f"--mask-ratio {ratio} of {cells} cells does not leave both masked and visible ones")
    sizes = {"height": height, "width": width, "cell_height": side, "cell_width": side}
    return cells, sizes | {"num_masked": masked * side**2}


def count_masked(tokens: int, ratio: float) -> int:
    """Tokens to mask: what is kept is truncated in double precision, as in the code that everybody follows.

    Raises:
        SettingsError: if nothing would be masked or nothing visible.
    """
    kept = int(tokens * (1 - ratio)) if 0 < ratio < 1 else 0
    if not 0 < kept < tokens:
        raise SettingsError(f"--mask-ratio {ratio} of {tokens} patches does not leave both masked and visible ones")
    return tokens - kept
