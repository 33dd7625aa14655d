"""Resample position tables for another grid."""

from common.config import SettingsError
from common.weights.timm_names import OWN_TABLE, SHARED_TABLE
from mimkit.positions import resize_table

import torch
from jaxtyping import Float
from torch import Tensor


def resize_positions(
    pos_embed: Float[Tensor, "1 prefix+n d"], *, height: int, width: int, new_height: int, new_width: int
) -> Float[Tensor, "1 prefix+m d"]:
    """Resample a position table for another grid; the row of a class token, if there is one, is kept.

    Raises:
        SettingsError: if the number of rows does not match the grid.
    """
    prefix = pos_embed.shape[1] - height * width
    if prefix not in (0, 1):
        raise SettingsError(f"a table of {pos_embed.shape[1]} rows is not one of a grid of {height} × {width}")
    table = resize_table(pos_embed[:, prefix:], height=height, width=width, new_height=new_height, new_width=new_width)
    return torch.cat([pos_embed[:, :prefix], table], dim=1)


def own_tables(
    weights: dict[str, Tensor], *, depth: int, height: int, width: int, new_height: int, new_width: int
) -> dict[str, Tensor]:
    """Return the weights with one relative position table per block, resampled for another grid.

    A shared table is copied to every block. Tables are resampled by bicubic interpolation over the offsets, see
    `resize_table`; the published code uses a geometric grid of offsets instead. The three rows of the class token are
    kept.

    Raises:
        ValueError: if the number of rows of a table does not match the grid.
    """
    old = {"height": 2 * height - 1, "width": 2 * width - 1}
    new = {"new_height": 2 * new_height - 1, "new_width": 2 * new_width - 1}
    tables = {}
    for name in map(OWN_TABLE.format, range(depth)):
        table = weights.get(name, weights.get(SHARED_TABLE))
        if table is not None:
            tables[name] = torch.cat([resize_table(table[:-3], **old, **new), table[-3:]])
    return {name: tensor for name, tensor in weights.items() if name != SHARED_TABLE} | tables
