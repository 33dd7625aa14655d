"""A user's program with blocks of every module: one step of masked image modeling. Its types are checked by a test."""
# pyright: strict

from mimkit.degrade import area_resize, decolorize, random_kernels, zoom_out_any_size
from mimkit.losses import normalized_patches, ranking_loss, squared_error
from mimkit.masking import easy_to_hard, random_tokens
from mimkit.positions import drop_positions, shuffle, sincos
from mimkit.relative import Method, buckets_of, contextual_bias, num_buckets, relative_buckets
from mimkit.tokens import patchify, put, split, take
from mimkit.windows import distinct_anchors, window_patches

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

METHOD: Method = "product"


def degraded(images: Float[Tensor, "b c H W"], noise: Float[Tensor, "b 3"]) -> Float[Tensor, "b c H W"]:
    gray = decolorize(zoom_out_any_size(images, noise, sizes=((16, 16), (24, 32))), saturation=noise[:, 0])
    return area_resize(gray, H=images.shape[-2], W=images.shape[-1])


def bias(queries: Float[Tensor, "b h k d"], visible: Int[Tensor, "b k"]) -> Float[Tensor, "b h k k"]:
    table = torch.zeros(1, queries.shape[-1], num_buckets(method=METHOD, num_prefix=0))
    buckets = relative_buckets(height=4, width=4, method=METHOD, num_prefix=0, device=queries.device)
    return contextual_bias(queries, table, buckets_of(buckets, visible))


def step(images: Float[Tensor, "b c 32 32"], num_hard: int | Int[Tensor, ""]) -> Float[Tensor, ""]:
    patches, target = (patchify(x, patch=8) for x in (degraded(images, torch.rand(len(images), 3)), images))
    difficulty, noise = torch.rand(2, len(images), 16)
    mask: Bool[Tensor, "b 16"] = easy_to_hard(difficulty, noise, num_masked=12, num_hard=num_hard)
    visible, masked = split(mask, num_masked=12)
    positions = sincos(height=4, width=4, dim=patches.shape[-1])[visible]
    dropped = random_tokens(torch.rand(len(images), 4), num_masked=2)
    tokens = drop_positions(positions, dropped, torch.zeros_like(positions)) + take(patches, visible)
    order, back = shuffle(torch.rand(len(images), 4))
    tokens = take(take(tokens, order), back)
    scores = bias(tokens.unsqueeze(1), visible).squeeze(1)
    prediction = put(scores.softmax(dim=-1) @ tokens, visible, torch.zeros_like(patches))
    error = squared_error(take(prediction, masked), normalized_patches(take(target, masked)))
    loss, _right, pairs = ranking_loss(difficulty, noise)
    return error.mean() + loss.sum() / pairs.sum().clamp(min=1)


def windows() -> list[int]:
    anchors = distinct_anchors(torch.rand(5), torch.rand(5), num_windows=2)
    return [int(i) for i in window_patches(anchors, width=7, window_height=3, window_width=3).flatten()]


def main() -> None:
    kernel: Float[Tensor, "3 3"] = random_kernels(torch.rand(3, 3), mean=1 / 9, std=0.02)
    print(step(torch.rand(2, 3, 32, 32), num_hard=torch.tensor(4)), windows(), kernel)


if __name__ == "__main__":
    main()
