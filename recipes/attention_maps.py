"""Draw attention maps of an encoder: the attention of all heads of its last block, from chosen patches of an image.

    python recipes/attention_maps.py --encoder runs/lut/encoder.safetensors --queries 3,4 7,7
    python recipes/attention_maps.py --encoder mae_pretrain_vit_base.pth --data photo.jpg --queries 7,7
    python recipes/attention_maps.py --encoder timm:vit_base_patch16_224.dino:vit.safetensors --data DIR --count 4

Each map ranges from the minimum (dark) to the maximum (bright) attention of its head. Its title shows the mean
attention distance of the head in pixels, averaged over many images and all queries.

Paper: LUT, ECCV 2024, figures A and B.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.analysis import images_to_look_at
from common.config import Count, DataSettings, SettingsError, program
from common.data.files import Files
from common.data.loading import Loader, ViewDataset
from common.data.normalize import Normalize
from common.data.sources import Source
from common.data.views import CenterCrop
from common.networks.encoder import Encoder
from common.report import Pictures, draw_pictures, framed
from common.report.pictures import maps
from common.weights.encoders import open_encoder
from mimkit.tokens import patchify

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Config:
    """Settings of the encoder, the images and the queries."""

    encoder: str
    """encoder.safetensors of a run, a published checkpoint of the MAE family, or timm:NAME:FILE, timm's name of a
    vision transformer and a file of its weights"""
    data: str = "mnist"
    """an image, or a folder with val/CLASS/*.jpg or any images, or mnist, digits or shapes"""
    image_size: tuple[int, int] | None = None
    """height and width in pixels, for which positions are resampled; none: those of the encoder"""
    queries: tuple[str, ...] = ()
    """row,column of the query patches, counted from 0; none: the central patch and the upper left one"""
    count: Count = 2
    """number of images to draw"""
    measured: int = 256
    """largest number of images over which the attention distance is averaged"""
    out: Path | None = None
    """file of the picture; none: attention_maps.png in the folder of the encoder"""


class _LastAttention(TorchFunctionMode):
    """Record the arguments of the last call of `scaled_dot_product_attention`."""

    called_with: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.called_with = args, kwargs or {}
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def last_attention(encoder: Encoder, patches: Tensor) -> Tensor:
    """Compute the attention of the last block from its queries and keys: softmax(q kᵀ · scale + bias).

    They are the arguments of its call of `scaled_dot_product_attention`, so any preceding operation, such as a norm of
    queries and keys, is included.

    Args:
        encoder: an encoder in evaluation mode.
        patches: all normalized patches of each image, (b, n, values).

    Returns:
        Attention (b, heads, prefix + n, prefix + n); the row of each query sums to one.

    Raises:
        SettingsError: if the encoder does not call `scaled_dot_product_attention`.
    """
    with _LastAttention() as seen:
        encoder(patches, encoder.positions)
    if seen.called_with is None:
        raise SettingsError("the encoder does not call scaled_dot_product_attention: what it attends to is not known")
    (query, key, _, *more), named = seen.called_with
    bias, scale = named.get("attn_mask", more[0] if more else None), named.get("scale")
    scores = query.float() @ key.float().transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    return scores.softmax(dim=-1)


def attention_distance(attention: Tensor, *, height: int, width: int, patch: int) -> Tensor:
    """Compute the mean distance from queries to keys in pixels, weighted by attention.

    Args:
        attention: attention between patches (…, n, n); rows are normalized to sum to one.
        height, width: size of the grid in patches.
        patch: side of a patch in pixels.

    Returns:
        Mean distances (…,).
    """
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(attention) * patch
    return (attention * torch.cdist(places, places)).sum(dim=-1).div(attention.sum(dim=-1)).mean(dim=-1)


def parse_queries(queries: tuple[str, ...], *, height: int, width: int) -> list[tuple[int, int]]:
    """Parse queries of the form row,column.

    Raises:
        SettingsError: if a query is not a patch of the grid.
    """
    found = []
    for query in queries or (f"{height // 2},{width // 2}", "0,0"):
        row, _, column = query.partition(",")
        if not (row.isdecimal() and column.isdecimal() and int(row) < height and int(column) < width):
            raise SettingsError(
                f"--queries {query}: no row,column of {height} × {width} patches, which are counted from 0,0"
            )
        found.append((int(row), int(column)))
    return found


def load(config: Config) -> tuple[Any, Normalize, Source]:
    """Open the encoder, its normalization and the images."""
    encoder, normalize = open_encoder(config.encoder, image_size=config.image_size)
    network: Any = encoder
    channels = encoder.channels
    if Path(config.data).is_file():
        return network.eval(), normalize, Files([Path(config.data)], channels)
    return network.eval(), normalize, images_to_look_at(DataSettings(channels=channels), config.data)  # pyright: ignore[reportArgumentType]


def main(config: Config) -> None:
    encoder, normalize, source = load(config)
    grid = {"height": encoder.height, "width": encoder.width}
    sizes = {**grid, "patch": encoder.patch}
    queries = parse_queries(config.queries, **grid)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder.to(device)
    normalize.to(device)
    views = ViewDataset(
        source, CenterCrop((encoder.height * encoder.patch, encoder.width * encoder.patch), crop_fraction=1.0)
    )

    def attend(count: int, at_a_time: int = 32) -> Any:
        """Yield evenly spaced images in [0, 1] and their attention between patches."""
        chosen = [(0, index * len(source) // count) for index in range(count)]
        for images in Loader(views, [chosen[i : i + at_a_time] for i in range(0, count, at_a_time)]):
            attention = last_attention(encoder, patchify(normalize(images.to(device)), patch=encoder.patch))
            yield normalize.unit(images), attention[..., encoder.num_prefix :, encoder.num_prefix :].cpu()

    # 1. Measure the attention distance of each head.
    count = min(config.measured, len(source))
    distances = torch.cat([attention_distance(attention, **sizes) for _, attention in attend(count)]).mean(dim=0)
    evenly = attention_distance(torch.ones(1, *2 * [encoder.height * encoder.width]), **sizes).item()
    print(f"mean attention distance in the last block, pixels, over {count} images (uniform attention: {evenly:.1f})")
    print("".join(f"{f'head {i}':>9}" for i in range(1, 1 + len(distances))) + "     mean")
    print("".join(f"{distance:>9.1f}" for distance in [*distances.tolist(), distances.mean().item()]))

    # 2. Draw the attention of each query.
    images, attention = (torch.cat(parts) for parts in zip(*attend(min(config.count, len(source))), strict=True))
    rows = [(i, row, column) for i in range(len(images)) for row, column in queries]
    asking = [framed(images[i], row, column, patch=encoder.patch) for i, row, column in rows]
    columns = {"the query": torch.stack(asking)}
    for head, distance in enumerate(distances.tolist()):
        values = torch.stack([attention[i, head, row * encoder.width + column] for i, row, column in rows])
        columns[f"head {head + 1}: {distance:.1f} px"] = maps(values, **grid)
    file = Path(config.encoder.split(":")[-1])
    path = config.out or file.parent / "attention_maps.png"
    note = f"last block of {file.name}: each map from its minimum (dark) to its maximum (bright) attention"
    draw_pictures(path, Pictures(columns, note, tuple(f"patch {row},{column}" for _, row, column in rows)))
    print(path)


if __name__ == "__main__":
    program(main, Config, name="attention_maps", description=__doc__)
