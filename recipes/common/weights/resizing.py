"""Position tables for another grid."""

from common.config import SettingsError
from common.weights.timm_names import OWN_TABLE, SHARED_TABLE
from mimkit.positions import resize_table

import torch
from jaxtyping import Float
from torch import Tensor


def resize_positions(
    pos_embed: Float[Tensor, "1 prefix+n d"], *, height: int, width: int, new_height: int, new_width: int
) -> Float[Tensor, "1 prefix+m d"]:
    """Resample a table with or without the row of a class token for another grid; the class row stays.

    Raises:
        SettingsError: if the table has more or fewer rows, or a side is not positive.
    """
    prefix = pos_embed.shape[1] - height * width
    if prefix not in (0, 1):
        raise SettingsError(f"a table of {pos_embed.shape[1]} rows is not one of a grid of {height} × {width}")
    table = resize_table(pos_embed[:, prefix:], height=height, width=width, new_height=new_height, new_width=new_width)
    return torch.cat([pos_embed[:, :prefix], table], dim=1)


def own_tables(
    weights: dict[str, Tensor], *, depth: int, height: int, width: int, new_height: int, new_width: int
) -> dict[str, Tensor]:
    """Give every block a table of relative positions of its own, a copy of the shared one if there is one.

    For another grid they are resampled as pictures of all offsets are (bicubic, see `resize_table`; the published code
    has a geometric grid of offsets instead); the three rows of the class token stay.

    Raises:
        SettingsError: if a table has more or fewer rows than its grid.
    """
    old = {"height": 2 * height - 1, "width": 2 * width - 1}
    new = {"new_height": 2 * new_height - 1, "new_width": 2 * new_width - 1}
    tables = {}
    for name in map(OWN_TABLE.format, range(depth)):
        table = weights.get(name, weights.get(SHARED_TABLE))
        if table is not None:
            tables[name] = torch.cat([resize_table(table[:-3], **old, **new), table[-3:]])
    return {name: tensor for name, tensor in weights.items() if name != SHARED_TABLE} | tables
