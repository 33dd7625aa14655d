"""Build networks from settings, and count the tokens to mask."""

import math
from collections.abc import Callable
from typing import Any

from common.config import DataSettings, Network, SettingsError
from common.networks.decoder import Decoder, Predictor
from common.networks.initialization import initialize_simmim
from common.networks.vit import SIZES, ViT
from mimkit.positions import sincos

from torch import Tensor


def grid(data: DataSettings, network: Network) -> tuple[int, int]:
    """Return the number of rows and columns of patches.

    Raises:
        SettingsError: if the image size is not a multiple of the patch size.
    """
    height, width = data.image_size
    if min(height, width, network.patch) < 1 or height % network.patch or width % network.patch:
        raise SettingsError(
            f"--image-size {height} {width} is not made of patches of {network.patch} × {network.patch}"
        )
    return height // network.patch, width // network.patch


def build_vit(data: DataSettings, network: Network, **options: Any) -> ViT:
    """Build a ViT of a named size for the images; for the options see `ViT`."""
    height, width = grid(data, network)
    sizes = {"height": height, "width": width, "patch": network.patch, "channels": data.channels}
    return ViT(**sizes, **SIZES[network.size], **options)


def decoder_sizes(network: Network) -> tuple[int, int, int]:
    """Return width, number of blocks and of heads of the decoder; those that are not given follow the encoder."""
    encoder = SIZES[network.size]
    dim = network.decoder_dim or encoder["dim"] // 2
    heads = max(count for count in range(1, encoder["heads"] + 1) if dim % count == 0)
    return dim, network.decoder_depth or max(1, encoder["depth"] // 4), network.decoder_heads or heads


def build_predictor(network: Network, *, outputs: int) -> Predictor:
    """Build a predictor of the size of the decoder."""
    dim, depth, heads = decoder_sizes(network)
    return Predictor(dim, depth, heads, outputs)


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

    Without a position table, both use contextual relative position encoding.
    """
    shape: dict[str, Any] = {"class_token": class_token, "key_bias": key_bias, "table": table}
    encoder = build_vit(data, network, **shape, relative="contextual" if table is None else None)
    dim, depth, heads = decoder_sizes(network)
    decoder = Decoder(
        **shape,
        height=encoder.height,
        width=encoder.width,
        encoder_dim=encoder.dim,
        dim=dim,
        depth=depth,
        heads=heads,
        outputs=network.patch**2 * data.channels,
        embed_bias=embed_bias,
    )
    return encoder, decoder


def masking_encoder(data: DataSettings, network: Network, *, drop: float = 0.0) -> ViT:
    """Build and initialize the ViT of SimMIM and BEiT: mask token, shared relative position table, layer scale."""
    options = {"key_bias": False, "table": None, "relative": "shared", "layer_scale": 0.1, "mask_token": True}
    encoder = build_vit(data, network, drop=drop, **options)
    initialize_simmim(encoder)
    return encoder


def whole_cells(data: DataSettings, network: Network, cell: int, ratio: float) -> tuple[int, dict[str, int]]:
    """Return the number of square cells of an image, and the arguments of `mimkit.masking.random_cells`.

    Args:
        data: settings of the images.
        network: settings of the network.
        cell: side of a cell in pixels.
        ratio: share of the cells to mask, rounded up to a whole number of cells.

    Raises:
        SettingsError: if the cell size is not a multiple of the patch size or does not divide the image size, or if no
            or all cells would be masked.
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
    """Return the number of tokens to mask; the number kept is truncated in double precision, as in MAE's code.

    Raises:
        SettingsError: if no token would be masked or none would remain visible.
    """
    kept = int(tokens * (1 - ratio)) if 0 < ratio < 1 else 0
    if not 0 < kept < tokens:
        raise SettingsError(f"--mask-ratio {ratio} of {tokens} patches does not leave both masked and visible ones")
    return tokens - kept
