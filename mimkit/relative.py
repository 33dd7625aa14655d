"""Relative positions: a bucket for each pair of tokens, and what a table of buckets adds to attention (iRPE).

A matrix of buckets has a row per query and a column per key. A table has one entry per bucket: a number in bias mode, a
vector in contextual mode, for all heads (a leading axis of 1) or for each.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def piecewise_index(
    distance: Shaped[Tensor, "*shape"], *, alpha: float, beta: float, gamma: float
) -> Int[Tensor, "*shape"]:
    """Number distances: near ones exactly, far ones logarithmically, the farthest alike.

    Up to `alpha` a distance is rounded; from there on the number grows as the logarithm, so that it would reach `beta`
    at `gamma`; it never exceeds `beta` cut to an integer. Ties are rounded to the even number, and the limit is taken
    after rounding.

    Args:
        distance: of either sign, integer or real; computed in float64.
        alpha: above 0.
        beta: largest number, before it is cut to an integer; above `alpha`. iRPE takes 2 · `alpha`.
        gamma: above `alpha`. iRPE takes 8 · `alpha`.

    Returns:
        numbers from −int(beta) to int(beta), odd in `distance`. (Unless `alpha` itself is rounded to more than `beta`:
        1.6 with a `beta` of 1.7.)

    Raises:
        ValueError: unless 0 < `alpha` < `beta` and `alpha` < `gamma`.

    Example:
        >>> piecewise_index(torch.tensor([-1, 0, 1, 2, 3, 4, 100]), alpha=1.9, beta=3.8, gamma=15.2)
        tensor([-1,  0,  1,  2,  2,  3,  3])

    Source: iRPE, arXiv 2107.14222, equation 18; where the limit is taken and what is cut is the published code's.
    """
    if not (0 < alpha < beta and alpha < gamma):
        raise ValueError(f"alpha={alpha}, beta={beta}, gamma={gamma}: not 0 < alpha < beta and alpha < gamma")
    far = distance.double().abs()
    slope = (beta - alpha) / torch.tensor(gamma / alpha, dtype=torch.float64).log()
    logarithmic = (alpha + (far.clamp(min=alpha) / alpha).log() * slope).round().clamp(max=beta).trunc()
    return (torch.where(far <= alpha, far.round(), logarithmic) * distance.sign()).long()


Method = Literal["product", "rows", "columns", "euclidean", "quantized"]


def num_buckets(*, method: Method = "product", ratio: float = 1.9, num_prefix: int = 1) -> int:
    """Count the entries that a table needs for `relative_buckets` with the same arguments.

    Args:
        method: of `relative_buckets`, as the others.
        ratio: above 0.
        num_prefix: tokens before the patches; they share one bucket.

    Raises:
        ValueError: if `num_prefix` is negative, `ratio` is not above 0 or the method is another.

    Example:
        >>> num_buckets()
        50

    Source: iRPE, arXiv 2107.14222.
    """
    if method not in ("product", "rows", "columns", "euclidean", "quantized"):
        raise ValueError(f"method={method} is none of product, rows, columns, euclidean and quantized")
    if not ratio > 0:
        raise ValueError(f"ratio={ratio} is not above 0")
    if num_prefix < 0:
        raise ValueError(f"num_prefix={num_prefix} is negative")
    side = 2 * int(2 * ratio) + 1
    return (side**2 if method == "product" else side) + (num_prefix > 0)


def relative_buckets(
    *,
    height: int,
    width: int,
    method: Method = "product",
    ratio: float = 1.9,
    num_prefix: int = 1,
    device: torch.device | str | None = None,
) -> Int[Tensor, "{num_prefix}+{height}*{width} {num_prefix}+{height}*{width}"]:
    """Give each pair of tokens of a grid a bucket that depends on their offset, query minus key, alone.

    The number of buckets does not depend on the grid, so a table fits any. The method says what is numbered by
    `piecewise_index`, with alpha, beta and gamma of 1, 2 and 8 times `ratio`:

    - product: rows and columns apart, a bucket for each pair of numbers (the rows' number is the high digit);
    - rows, columns: one of the two; the method "cross" of iRPE is a table for each, whose biases are added;
    - euclidean: the distance, rounded; direction does not matter;
    - quantized: the squared distance; direction does not matter.

    Args:
        height: rows of the grid, in patches.
        width: columns of the grid, in patches.
        method: what is numbered.
        ratio: how far distances are told apart, above 0. With 1.9 offsets of 4 and more are alike, so a grid of 7 × 7
            meets every bucket that a larger one can.
        num_prefix: tokens before the patches, a class token say. They share the last bucket, as queries and as keys.

    Returns:
        a row per query and a column per key, 0 to `num_buckets` − 1, patches in raster order.

    Raises:
        ValueError: if a side or `num_prefix` is negative, `ratio` is not above 0 or the method is another.

    Example:
        >>> relative_buckets(height=1, width=2)
        tensor([[49, 49, 49],
                [49, 24, 23],
                [49, 25, 24]])

    Source: iRPE, arXiv 2107.14222, section 3.2; "quantized" is the published code's, which ranks no distances.
    """
    last = num_buckets(method=method, ratio=ratio, num_prefix=num_prefix) - 1
    if min(height, width) < 0:
        raise ValueError(f"a grid of {height} × {width} has a negative side")

    def number(distance: Tensor) -> Tensor:
        return piecewise_index(distance, alpha=ratio, beta=2 * ratio, gamma=8 * ratio) + int(2 * ratio)

    place = torch.arange(height * width, device=device)
    row, column = place // max(width, 1), place % max(width, 1)
    down, across = row[:, None] - row, column[:, None] - column
    if method == "product":
        buckets = number(down) * (2 * int(2 * ratio) + 1) + number(across)
    elif method in ("rows", "columns"):
        buckets = number(down if method == "rows" else across)
    else:
        squared = down**2 + across**2
        buckets = number(squared.double().sqrt().round() if method == "euclidean" else squared)
    return F.pad(buckets, (num_prefix, 0, num_prefix, 0), value=last)


def buckets_of(buckets: Int[Tensor, "n n"], tokens: Int[Tensor, "*batch k"]) -> Int[Tensor, "*batch k k"]:
    """Return the buckets of some tokens of the grid, each row its own: of those that are visible, say.

    Some tokens of a grid are no smaller grid, even if their number is a square: 49 visible ones of 14 × 14 are not
    7 × 7.

    Args:
        buckets: of all tokens, from `relative_buckets`.
        tokens: in 0…n−1, in any order; a class token counts, so patch i is token i + 1 behind one.

    Raises:
        ValueError: if `buckets` are not those of the same tokens as queries and as keys.

    Example:
        >>> buckets_of(relative_buckets(height=1, width=3, num_prefix=0), torch.tensor([0, 2]))
        tensor([[24, 22],
                [26, 24]])
    """
    if buckets.shape[-2] != buckets.shape[-1]:
        raise ValueError(f"buckets {tuple(buckets.shape)} are not square: a row and a column per token")
    return buckets[tokens.unsqueeze(-1), tokens.unsqueeze(-2)]


def contextual_bias(
    queries: Float[Tensor, "*batch h k d"],
    table: Float[Tensor, "heads d buckets"],
    buckets: Int[Tensor, "*images k n"],
) -> Float[Tensor, "*batch h k n"]:
    """Return what relative positions on the keys add to the scores of attention: query · vector of the bucket.

    Give it to `scaled_dot_product_attention` as `attn_mask`, which is added and not scaled. LoMaR has the queries
    unscaled here, iRPE scaled by 1/√d as in the scores themselves: the same functions, but with the one a table is √d
    times louder than with the other.

    For relative positions on the queries put keys in the place of queries, and transpose the last two axes of the
    result before it is added: there a bucket is that of key minus query.

    Args:
        table: for all heads (heads = 1) or for each.
        buckets: the same for the whole batch, k × n; or with all leading axes of the queries but that of the heads, for
            tokens that differ from image to image (`buckets_of`).

    Raises:
        ValueError: if heads, features or leading axes do not fit.

    Example:
        >>> queries, table = torch.ones(1, 3, 2), torch.zeros(1, 2, 50)
        >>> table[0, :, 24] = 0.5  # 24: a patch with itself
        >>> contextual_bias(queries, table, relative_buckets(height=1, width=2))
        tensor([[[0., 0., 0.],
                 [0., 1., 0.],
                 [0., 0., 1.]]])

    Source: iRPE, arXiv 2107.14222, equation 13; LoMaR, arXiv 2206.00790 (published code).
    """
    _check_heads(table, queries)
    if table.shape[1] != queries.shape[-1]:
        raise ValueError(f"a table {tuple(table.shape)} has not vectors of {queries.shape[-1]} features")
    if queries.shape[-2] != buckets.shape[-2] or (buckets.ndim > 2 and buckets.shape[:-2] != queries.shape[:-3]):
        raise ValueError(f"buckets {tuple(buckets.shape)} are not those of queries {tuple(queries.shape)}")
    # Few keys: a vector for each pair, as one product per query, whose gradient gathers the table's and scatters
    # nothing of the batch. Many keys: that would be more products than buckets.
    with _no_autocast(queries):
        if buckets.ndim == 2 and len(table) == 1 and buckets.shape[-1] <= table.shape[-1]:
            vectors = table[0].index_select(1, buckets.flatten()).unflatten(1, buckets.shape)
            return torch.einsum("...id,dij->...ij", queries, vectors.to(queries.dtype))
        scores = queries @ table.to(queries.dtype)
    return scores.gather(-1, _per_head(buckets, scores))


def contextual_values(
    weights: Float[Tensor, "*batch h k n"],
    table: Float[Tensor, "heads buckets d"],
    buckets: Int[Tensor, "*images k n"],
) -> Float[Tensor, "*batch h k d"]:
    """Return what relative positions on the values add to the output of attention: weighted vectors of the buckets.

    The weights of each bucket are summed first, so no vector per pair is ever made.

    Args:
        weights: the probabilities of attention.
        table: for all heads (heads = 1) or for each; the bucket is its middle axis.
        buckets: as of `contextual_bias`.

    Raises:
        ValueError: if heads or leading axes do not fit.

    Example:
        >>> table = torch.arange(50.0).view(1, 50, 1)
        >>> contextual_values(torch.full((1, 3, 3), 1 / 3), table, relative_buckets(height=1, width=2))
        tensor([[[49.0000],
                 [32.0000],
                 [32.6667]]])

    Source: iRPE, arXiv 2107.14222, equation 14.
    """
    _check_heads(table, weights)
    if weights.shape[-2:] != buckets.shape[-2:] or (buckets.ndim > 2 and buckets.shape[:-2] != weights.shape[:-3]):
        raise ValueError(f"buckets {tuple(buckets.shape)} are not those of weights {tuple(weights.shape)}")
    sums = weights.new_zeros(*weights.shape[:-1], table.shape[-2])
    with _no_autocast(weights):
        return sums.scatter_add(-1, _per_head(buckets, weights), weights) @ table.to(weights.dtype)


def relative_bias(
    table: Float[Tensor, "heads buckets"], buckets: Int[Tensor, "*images k n"]
) -> Float[Tensor, "*images heads k n"]:
    """Return what relative positions in bias mode add to the scores of attention: the number of each pair's bucket.

    It depends on no query, and with heads = 1 it is the same for all of them.

    Args:
        table: for all heads (heads = 1) or for each.
        buckets: the same for the whole batch, or with leading axes for tokens that differ from image to image.

    Raises:
        ValueError: if the table has no number, but a vector per bucket (`contextual_bias` is for these).

    Example:
        >>> relative_bias(torch.arange(50.0)[None], relative_buckets(height=1, width=2, num_prefix=0))
        tensor([[[24., 23.],
                 [25., 24.]]])

    Source: iRPE, arXiv 2107.14222, equation 11; as in the published code it is added to scaled scores.
    """
    if table.ndim != 2:
        raise ValueError(f"a table {tuple(table.shape)} has not one number per head and bucket")
    return table[:, buckets].movedim(0, -3)


def _no_autocast(like: Tensor) -> torch.autocast:
    """Autocast switched off, also where there is none (on the meta device): the answer has the dtype of the input."""
    kind = like.device.type
    return torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False)


def _per_head(buckets: Tensor, like: Tensor) -> Tensor:
    """Repeat buckets for all heads, and for a whole batch if they are shared."""
    if buckets.ndim > 2:
        buckets = buckets.unsqueeze(-3)
    return buckets.expand(*like.shape[:-1], buckets.shape[-1])


def _check_heads(table: Tensor, per_head: Tensor) -> None:
    if len(table) not in (1, per_head.shape[-3]):
        raise ValueError(f"a table {tuple(table.shape)} is not for {per_head.shape[-3]} heads, nor for all alike")
