"""Relative positions (iRPE): a bucket for each pair of tokens, and what a table of buckets adds to attention.

A matrix of buckets has a row per query and a column per key. A table has one entry per bucket: a number in bias mode, a
vector in contextual mode. Its leading axis has size 1 if all heads share the table, else one entry per head.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def piecewise_index(
    distance: Shaped[Tensor, "*shape"], *, alpha: float, beta: float, gamma: float
) -> Int[Tensor, "*shape"]:
    """Map distances to integers: near ones by rounding, far ones logarithmically, up to a limit.

    Distances up to `alpha` are rounded. Beyond, the index grows with the logarithm of the distance such that it would
    reach `beta` at `gamma`; it never exceeds the integer part of `beta`. Ties are rounded to even, and the limit is
    applied after rounding.

    Args:
        distance: of either sign, integer or real; computed in float64.
        alpha: above 0.
        beta: largest index before truncation to an integer; above `alpha`. iRPE uses 2 · `alpha`.
        gamma: above `alpha`. iRPE uses 8 · `alpha`.

    Returns:
        integers from −int(beta) to int(beta), an odd function of `distance`. (The bound can only be exceeded where
        `alpha` itself rounds to more than `beta`, for example 1.6 with a `beta` of 1.7.)

    Raises:
        ValueError: unless 0 < `alpha` < `beta` and `alpha` < `gamma`.

    Example:
        >>> piecewise_index(torch.tensor([-1, 0, 1, 2, 3, 4, 100]), alpha=1.9, beta=3.8, gamma=15.2)
        tensor([-1,  0,  1,  2,  2,  3,  3])

    Source: iRPE, arXiv 2107.14222, equation 18; the order of rounding, limit and truncation is that of the published
    code.
    """
    if not (0 < alpha < beta and alpha < gamma):
        raise ValueError(
            f"alpha={alpha}, beta={beta} and gamma={gamma} do not satisfy 0 < alpha < beta and alpha < gamma"
        )
    far = distance.double().abs()
    slope = (beta - alpha) / torch.full((), gamma / alpha, dtype=torch.float64, device=far.device).log()
    logarithmic = (alpha + (far.clamp(min=alpha) / alpha).log() * slope).round().clamp(max=beta).trunc()
    return (torch.where(far <= alpha, far.round(), logarithmic) * distance.sign()).long()


Method = Literal["product", "rows", "columns", "euclidean", "quantized"]


def num_buckets(*, method: Method = "product", ratio: float = 1.9, num_prefix: int = 1) -> int:
    """Return the number of entries that a table needs for `relative_buckets` with the same arguments.

    Args:
        method: as in `relative_buckets`.
        ratio: above 0.
        num_prefix: number of tokens before the patches; they share one bucket.

    Raises:
        ValueError: if `num_prefix` is not an integer or negative, `ratio` is not above 0, or the method is unknown.

    Example:
        >>> num_buckets()
        50

    Source: iRPE, arXiv 2107.14222.
    """
    _check_integers(num_prefix=num_prefix)
    if method not in ("product", "rows", "columns", "euclidean", "quantized"):
        raise ValueError(f"method={method} is not one of product, rows, columns, euclidean and quantized")
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
    """Return the bucket of each pair of tokens of a grid, which depends only on their offset, query minus key.

    The number of buckets does not depend on the grid, so one table fits grids of any size. `piecewise_index`, with
    alpha, beta and gamma of 1, 2 and 8 times `ratio`, is applied to a distance chosen by the method:

    - product: rows and columns separately, with a bucket for each pair of indices (the index of the row is the high
      digit);
    - rows, columns: one of the two. The method "cross" of iRPE has a table for each and adds the two biases;
    - euclidean: the rounded distance, regardless of direction;
    - quantized: the squared distance, regardless of direction.

    Args:
        height: rows of the grid, in patches.
        width: columns of the grid, in patches.
        method: the distance to index.
        ratio: how far away distances are still distinguished, above 0. With 1.9, offsets of 4 and more share a bucket,
            so a grid of 7 × 7 already uses every bucket that a larger grid can.
        num_prefix: number of tokens before the patches, such as a class token. They share the last bucket, both as
            queries and as keys.

    Returns:
        a row per query and a column per key, from 0 to `num_buckets` − 1, patches in raster order.

    Raises:
        ValueError: if a side or `num_prefix` is not an integer or negative, `ratio` is not above 0, or the method is
            unknown.

    Example:
        >>> relative_buckets(height=1, width=2)
        tensor([[49, 49, 49],
                [49, 24, 23],
                [49, 25, 24]])

    Source: iRPE, arXiv 2107.14222, section 3.2; "quantized" follows the published code, which does not rank the
    distances.
    """
    _check_integers(height=height, width=width)
    last = num_buckets(method=method, ratio=ratio, num_prefix=num_prefix) - 1
    if min(height, width) < 0:
        raise ValueError(f"a grid of {height} × {width} patches has a negative side")

    def _number(distance: Tensor) -> Tensor:
        """Return the piecewise index of distances, shifted to start at 0."""
        return piecewise_index(distance, alpha=ratio, beta=2 * ratio, gamma=8 * ratio) + int(2 * ratio)

    place = torch.arange(height * width, device=device)
    row, column = place // max(width, 1), place % max(width, 1)
    down, across = row[:, None] - row, column[:, None] - column
    if method == "product":
        buckets = _number(down) * (2 * int(2 * ratio) + 1) + _number(across)
    elif method in ("rows", "columns"):
        buckets = _number(down if method == "rows" else across)
    else:
        squared = down**2 + across**2
        buckets = _number(squared.double().sqrt().round() if method == "euclidean" else squared)
    return F.pad(buckets, (num_prefix, 0, num_prefix, 0), value=last)


def buckets_of(buckets: Int[Tensor, "n n"], tokens: Int[Tensor, "*batch k"]) -> Int[Tensor, "*batch k k"]:
    """Return the buckets of a subset of the tokens of a grid, separate for each row, such as the visible ones.

    The buckets of a smaller grid are no substitute, even if the numbers of tokens are equal: 49 visible tokens of 14 ×
    14 are not a grid of 7 × 7.

    Args:
        buckets: of all tokens, from `relative_buckets`.
        tokens: in 0…n−1, in any order. A class token counts: behind one, patch i is token i + 1.

    Raises:
        ValueError: if `buckets` is not square.

    Example:
        >>> buckets_of(relative_buckets(height=1, width=3, num_prefix=0), torch.tensor([0, 2]))
        tensor([[24, 22],
                [26, 24]])
    """
    if buckets.shape[-2] != buckets.shape[-1]:
        raise ValueError(f"buckets {tuple(buckets.shape)} are not square: they need a row and a column per token")
    return buckets[tokens.unsqueeze(-1), tokens.unsqueeze(-2)]


def contextual_bias(
    queries: Float[Tensor, "*batch h k d"],
    table: Float[Tensor, "heads d buckets"],
    buckets: Int[Tensor, "*images k n"],
) -> Float[Tensor, "*batch h k n"]:
    """Return the bias that relative positions on keys add to the attention scores: query · vector of the bucket.

    Pass it to `scaled_dot_product_attention` as `attn_mask`, which is added without scaling. LoMaR uses unscaled
    queries here; iRPE scales them by 1/√d, as in the scores themselves. Both can represent the same functions, but with
    unscaled queries the same table has √d times the effect.

    For relative positions on queries, pass keys instead of queries and transpose the last two axes of the result before
    adding it; the bucket of a pair is then that of key minus query.

    Args:
        queries: of all heads.
        table: shared by all heads (heads = 1) or one per head.
        buckets: k × n, shared by the whole batch; or with all leading axes of the queries except the heads, for tokens
            that differ from image to image (`buckets_of`).

    Raises:
        ValueError: if heads, features or leading axes do not match.

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
        raise ValueError(f"a table {tuple(table.shape)} does not hold vectors of {queries.shape[-1]} features")
    if queries.shape[-2] != buckets.shape[-2] or (buckets.ndim > 2 and buckets.shape[:-2] != queries.shape[:-3]):
        raise ValueError(f"buckets {tuple(buckets.shape)} and queries {tuple(queries.shape)} do not match")
    with _no_autocast(queries):
        if _by_pair(queries.device.type, table.shape, buckets.shape):
            return _bias_by_pair(queries, table, buckets)
        return _bias_by_bucket(queries, table, buckets)


def contextual_values(
    weights: Float[Tensor, "*batch h k n"],
    table: Float[Tensor, "heads buckets d"],
    buckets: Int[Tensor, "*images k n"],
) -> Float[Tensor, "*batch h k d"]:
    """Return what relative positions on values add to the output of attention: the weighted sum of their vectors.

    The weights of each bucket are summed first, so no vector per pair is ever stored.

    Args:
        weights: attention probabilities.
        table: shared by all heads (heads = 1) or one per head; buckets are the middle axis.
        buckets: as in `contextual_bias`.

    Raises:
        ValueError: if heads or leading axes do not match.

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
        raise ValueError(f"buckets {tuple(buckets.shape)} and weights {tuple(weights.shape)} do not match")
    sums = weights.new_zeros(*weights.shape[:-1], table.shape[-2])
    with _no_autocast(weights):
        return sums.scatter_add(-1, _per_head(buckets, weights), weights) @ table.to(weights.dtype)


def relative_bias(
    table: Float[Tensor, "heads buckets"], buckets: Int[Tensor, "*images k n"]
) -> Float[Tensor, "*images heads k n"]:
    """Return the bias that relative positions in bias mode add to attention scores: the number of each bucket.

    It does not depend on the queries; with heads = 1 it is the same for all heads.

    Args:
        table: shared by all heads (heads = 1) or one per head.
        buckets: shared by the whole batch, or with leading axes for tokens that differ from image to image.

    Raises:
        ValueError: if the table holds vectors instead of numbers; use `contextual_bias` for these.

    Example:
        >>> relative_bias(torch.arange(50.0)[None], relative_buckets(height=1, width=2, num_prefix=0))
        tensor([[[24., 23.],
                 [25., 24.]]])

    Source: iRPE, arXiv 2107.14222, equation 11; as in the published code it is added to the scaled scores.
    """
    if table.ndim != 2:
        raise ValueError(f"a table {tuple(table.shape)} does not hold one number per head and bucket")
    return table[:, buckets].movedim(0, -3)


def _by_pair(device: str, table: tuple[int, ...], buckets: tuple[int, ...]) -> bool:
    """Tell whether to multiply queries with a vector for each pair of tokens instead of one for each bucket.

    With more keys than buckets this takes more products. But its backward pass adds into the table alone, a number per
    pair and feature, whereas the other one adds a number per image, head and pair into few places. These additions
    cost little on a CPU; a GPU makes them one after the other, and the products in parallel.

    Args:
        device: type of the device.
        table: shape of the table; only vectors that all heads share are looked up by pair.
        buckets: shape of the buckets, which must be shared by the batch.
    """
    return len(buckets) == 2 and table[0] == 1 and (device == "cuda" or buckets[-1] <= table[-1])


def _bias_by_pair(
    queries: Float[Tensor, "*batch h k d"], table: Float[Tensor, "1 d buckets"], buckets: Int[Tensor, "k n"]
) -> Float[Tensor, "*batch h k n"]:
    """Look up a vector for each pair of tokens and multiply it with the query."""
    vectors = table[0].index_select(1, buckets.flatten()).unflatten(1, buckets.shape)
    return torch.einsum("...id,dij->...ij", queries, vectors.to(queries.dtype))


def _bias_by_bucket(
    queries: Float[Tensor, "*batch h k d"], table: Float[Tensor, "heads d buckets"], buckets: Int[Tensor, "*images k n"]
) -> Float[Tensor, "*batch h k n"]:
    """Multiply each query with the vectors of all buckets, and look up the product for each key."""
    scores = queries @ table.to(queries.dtype)
    return scores.gather(-1, _per_head(buckets, scores))


def _no_autocast(like: Tensor) -> torch.autocast:
    """Disable autocast, also on devices without it such as meta, so that the result has the dtype of the input."""
    kind = like.device.type
    return torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False)


def _per_head(buckets: Tensor, like: Tensor) -> Tensor:
    """Expand buckets to all heads, and to the whole batch if it shares them."""
    if buckets.ndim > 2:
        buckets = buckets.unsqueeze(-3)
    return buckets.expand(*like.shape[:-1], buckets.shape[-1])


def _check_heads(table: Tensor, per_head: Tensor) -> None:
    if len(table) not in (1, per_head.shape[-3]):
        raise ValueError(f"a table {tuple(table.shape)} is neither for {per_head.shape[-3]} heads nor shared by all")


def _check_integers(**numbers: int) -> None:
    for name, number in numbers.items():
        # A symbolic integer of a compiler has an index, too; so has a tensor, but reading it would synchronize
        if isinstance(number, (bool, Tensor)) or not hasattr(number, "__index__"):
            raise ValueError(f"{name}={number!r} is not an integer")
