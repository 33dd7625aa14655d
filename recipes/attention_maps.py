"""Where does an encoder look? The attention of all heads of its last block, from one or more patches of an image.

    python recipes/attention_maps.py --encoder runs/lut/encoder.safetensors --queries 3,4 7,7
    python recipes/attention_maps.py --encoder mae_pretrain_vit_base.pth --data photo.jpg --queries 7,7
    python recipes/attention_maps.py --encoder timm:vit_base_patch16_224.dino:vit.safetensors --data DIR --count 4

Each map goes from the least (dark) to the greatest (bright) attention of its head to a patch. Above it stands how far
the head looks on average over many images and all queries, in pixels.

Paper: LUT, ECCV 2024, figures A and B.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.analysis import images_to_look_at
from common.config import DataSettings, SettingsError, program
from common.data.loading import Loader, ViewDataset
from common.data.normalize import Normalize
from common.data.sources import Source, decode
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
    """Which encoder, images and queries."""

    encoder: str
    """encoder.safetensors of a run, a published checkpoint of the MAE family, or timm:NAME:FILE with timm's name of a
    vision transformer and a file of its weights"""
    data: Path | None = None
    """an image, or a folder with val/CLASS/*.jpg or of any images; none: the handwritten digits of scikit-learn"""
    image_size: tuple[int, int] | None = None
    """height and width in pixels; none: those of the encoder. Positions are resampled: more pixels, finer maps"""
    queries: tuple[str, ...] = ()
    """row,column of the patches that ask, counted from 0; none: the one in the middle and the one at the upper left"""
    count: int = 2
    """images to draw"""
    measured: int = 256
    """images, or as many as there are, over which it is measured how far the heads look"""
    out: Path | None = None
    """the picture; none: attention_maps.png beside the encoder"""


class _LastAttention(TorchFunctionMode):
    """Note what the last attention of a network is called with."""

    called_with: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.called_with = args, kwargs or {}
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def last_attention(encoder: Encoder, patches: Tensor) -> Tensor:
    """Compute the attention of the last block from its own queries and keys: softmax(q kᵀ · scale + bias).

    They are taken from its call of `scaled_dot_product_attention`, so all that stands before that is in them, norms of
    queries and keys, say, whosever block it is.

    Args:
        patches: all of each image, (b, n, values), normalized.

    Returns:
        (b, heads, prefix + n, prefix + n): the row of a query sums to one.

    Raises:
        SettingsError: if the encoder computes its attention in another way.
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
    """Average the distance from patches to those they attend to, in pixels: over the queries, keys by their attention.

    Args:
        attention: (…, n, n) from patch to patch; rows are brought to a sum of one.

    Returns:
        (…,)
    """
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(attention) * patch
    return (attention * torch.cdist(places, places)).sum(dim=-1).div(attention.sum(dim=-1)).mean(dim=-1)


def parse_queries(queries: tuple[str, ...], *, height: int, width: int) -> list[tuple[int, int]]:
    """Read rows and columns.

    Raises:
        SettingsError: if one is not a patch of the grid.
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


class _File:
    """A source of one image."""

    def __init__(self, path: Path, channels: int) -> None:
        self.channels, self.classes, self.path = channels, list[str](), path

    def __len__(self) -> int:
        return 1

    def image(self, index: int) -> Tensor:
        return decode(self.path, self.channels)

    def label(self, index: int) -> int:
        return -1

    def name(self, index: int) -> str:
        return str(self.path)


def load(config: Config) -> tuple[Any, Normalize, Source]:
    """Open the encoder and the images."""
    encoder, normalize = open_encoder(config.encoder, image_size=config.image_size)
    network: Any = encoder
    channels = encoder.channels
    if config.data is not None and config.data.is_file():
        return network.eval(), normalize, _File(config.data, channels)
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
        chosen = [(0, index * len(source) // count) for index in range(count)]
        for images in Loader(views, [chosen[i : i + at_a_time] for i in range(0, count, at_a_time)]):
            attention = last_attention(encoder, patchify(normalize(images.to(device)), patch=encoder.patch))
            yield normalize.unit(images), attention[..., encoder.num_prefix :, encoder.num_prefix :].cpu()

    # 1. How far each head looks
    count = min(config.measured, len(source))
    distances = torch.cat([attention_distance(attention, **sizes) for _, attention in attend(count)]).mean(dim=0)
    evenly = attention_distance(torch.ones(1, *2 * [encoder.height * encoder.width]), **sizes).item()
    print(f"mean attention distance in the last block, pixels, over {count} images (all patches alike: {evenly:.1f})")
    print("".join(f"{f'head {i}':>9}" for i in range(1, 1 + len(distances))) + "     mean")
    print("".join(f"{distance:>9.1f}" for distance in [*distances.tolist(), distances.mean().item()]))

    # 2. Where it looks from each query
    images, attention = (torch.cat(parts) for parts in zip(*attend(min(config.count, len(source))), strict=True))
    rows = [(i, row, column) for i in range(len(images)) for row, column in queries]
    asking = [framed(images[i], row, column, patch=encoder.patch) for i, row, column in rows]
    columns = {"the query": torch.stack(asking)}
    for head, distance in enumerate(distances.tolist()):
        values = torch.stack([attention[i, head, row * encoder.width + column] for i, row, column in rows])
        columns[f"head {head + 1}: {distance:.1f} px"] = maps(values, **grid)
    file = Path(config.encoder.split(":")[-1])
    path = config.out or file.parent / "attention_maps.png"
    note = f"last block of {file.name}: each map from its least (dark) to its greatest (bright) attention"
    draw_pictures(path, Pictures(columns, note, tuple(f"patch {row},{column}" for _, row, column in rows)))
    print(path)


if __name__ == "__main__":
    program(main, Config, name="attention_maps", description=__doc__)
