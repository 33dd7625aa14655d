"""Training steps as one wrote them in 2021 to 2023: MAE, HPM, DropPos, LoMaR, literally from the papers' formulas.

All patches of an image are convolved and those needed are gathered, attention is three operations, heads predict all
tokens, a teacher is a copy of everything. Where a paper leaves a choice, the faster plain form is taken.

Each class offers `forward(images, noise)`, the loss of normalized images; `clip()` and `after_step()`, as far as the
method has them. The names of the parameters are those of the recipes. `fused_attention` and `lean` are what could be
done without changing the algorithm: another call for attention, and no pixels from a teacher that nobody looks at.
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SIDE, PATCH = 224, 16
GRID = SIDE // PATCH
NUM_PATCHES = GRID**2
NUM_VISIBLE = int(NUM_PATCHES * (1 - 0.75))
NUM_MASKED = NUM_PATCHES - NUM_VISIBLE
WINDOW, NUM_WINDOWS = 7, 4  # patches along a side of a window; windows of an image
NUM_MASKED_OF_WINDOW = int(WINDOW**2 * 0.8)
NUM_ANCHORS = int(NUM_VISIBLE * (1 - 0.75))  # visible patches that keep their position
PIXELS = PATCH**2 * 3  # values of a patch
CLIP = 5.0


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, *, fused_attention: bool, relative: bool = False) -> None:
        super().__init__()
        self.heads, self.fused_attention = heads, fused_attention
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        if relative:
            self.attn["rpe_k"] = RelativePositions(dim // heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(x))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        bias = self.attn["rpe_k"](q) if "rpe_k" in self.attn else None
        if self.fused_attention:
            branch = F.scaled_dot_product_attention(q, k, v, bias)
        else:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            scores = scores if bias is None else scores + bias
            branch = scores.softmax(dim=-1) @ v
        x = x + self.attn["proj"](rearrange(branch, "b h n d -> b n (h d)"))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class RelativePositions(nn.Module):
    """iRPE as LoMaR has it: products of the keys' positions with the query, which is not scaled; for all heads."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        buckets = window_buckets()
        count = int(buckets.max()) + 1
        self.lookup_table_weight = nn.Parameter(torch.zeros(1, dim, count))
        self.index: Tensor  # of each pair among the products of all queries
        self.register_buffer("index", buckets + count * torch.arange(len(buckets))[:, None], persistent=False)

    def forward(self, q: Tensor) -> Tensor:
        products = q @ self.lookup_table_weight
        return products.flatten(2)[:, :, self.index.flatten()].unflatten(2, self.index.shape)


def window_buckets() -> Tensor:
    """Number the offsets of each two patches of a window, query minus key; the class token is another one."""
    place = torch.arange(WINDOW**2)
    offsets = (line[:, None] - line for line in (place // WINDOW, place % WINDOW))
    # 1.9, 3.8 and 15.2: up to where an offset counts by itself, the largest number, where it would be reached
    far = {size: min(round(1.9 + 1.9 * math.log(size / 1.9) / math.log(8)), 3.8) for size in range(2, WINDOW)}
    number = torch.tensor([0, 1, *map(int, far.values())])
    down, across = (offset.sign() * number[offset.abs()] + 3 for offset in offsets)
    return F.pad(down * 7 + across, (1, 0, 1, 0), value=49)


class Blocks(nn.Module):
    """What encoders and decoders share."""

    def __init__(self, dim: int, depth: int, heads: int, **options: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(dim, heads, **options) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(x))


class Encoder(Blocks):
    def __init__(self, dim: int, depth: int, heads: int, **options: Any) -> None:
        super().__init__(dim, depth, heads, **options)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + NUM_PATCHES, dim), requires_grad=False)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, PATCH, PATCH)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))

    def embed(self, images: Tensor) -> Tensor:
        """Embed all patches, without positions."""
        return self.patch_embed["proj"](images).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Encode tokens behind the class token."""
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return super().forward(torch.cat([first, x], dim=1))


class Predictor(Blocks):
    def __init__(self, dim: int, depth: int, heads: int, outputs: int, **options: Any) -> None:
        super().__init__(dim, depth, heads, **options)
        self.head = nn.Linear(dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Predict all patches."""
        return self.head(super().forward(x))[:, 1:]


class Decoder(Predictor):
    def __init__(self, encoder_dim: int, dim: int, depth: int, heads: int, **options: Any) -> None:
        super().__init__(dim, depth, heads, PIXELS, **options)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + NUM_PATCHES, dim), requires_grad=False)
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))


class Plain(nn.Module):
    def clip(self) -> None:
        """Clip gradients, before the optimizer."""

    def after_step(self) -> None:
        """Whatever follows the optimizer."""


def cut(images: Tensor) -> Tensor:
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=PATCH, q=PATCH)


class MAE(Plain):
    def __init__(self, encoder: dict[str, int], decoder: dict[str, int], *, fused_attention: bool = False) -> None:
        super().__init__()
        options = {"fused_attention": fused_attention}
        self.encoder, self.decoder = Encoder(**encoder, **options), Decoder(encoder["dim"], **decoder, **options)

    def forward(self, images: Tensor, noise: dict[str, Tensor]) -> Tensor:
        encoder, decoder, batch = self.encoder, self.decoder, len(images)
        # 1. Embed all patches with their positions.
        x = encoder.embed(images) + encoder.pos_embed[:, 1:]
        # 2. Shuffle by the noise and keep the first.
        shuffle = noise["mask"].argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        x = x.gather(1, shuffle[:, :NUM_VISIBLE, None].expand(-1, -1, x.shape[-1]))
        mask = torch.ones_like(noise["mask"])
        mask[:, :NUM_VISIBLE] = 0
        mask = mask.gather(1, restore)
        # 3. Encode them behind the class token.
        x = decoder.embed(encoder(x))
        # 4. Put mask tokens in the empty places, add positions, decode.
        masked = decoder.mask_token.expand(batch, NUM_MASKED, -1)
        patches = torch.cat([x[:, 1:], masked.to(x.dtype)], dim=1)
        patches = patches.gather(1, restore[..., None].expand_as(patches))
        prediction = decoder(torch.cat([x[:, :1], patches], dim=1) + decoder.pos_embed)
        # 5. Compare all patches with their normalized pixels, then leave out the visible ones.
        target = cut(images)
        mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
        error = (prediction - target).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum()


class TwoDecoders(nn.Module):
    """The network of HPM."""

    def __init__(self, encoder: dict[str, int], decoder: dict[str, int], **options: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(**encoder, **options), Decoder(encoder["dim"], **decoder, **options)
        self.predictor = Predictor(**decoder, outputs=PIXELS, **options)

    def forward(self, images: Tensor, mask: Tensor, *, lean: bool = False) -> tuple[Tensor | None, Tensor]:
        """Return pixels and the error to expect, first of the visible patches, then of the masked ones."""
        encoder, decoder, batch = self.encoder, self.decoder, len(images)
        # 1. Embed all patches with their positions, and keep the visible ones.
        x = encoder.embed(images) + encoder.pos_embed[:, 1:]
        x = x[~mask].reshape(batch, -1, x.shape[-1])
        # 2. Encode them behind the class token.
        x = decoder.embed(encoder(x))
        # 3. Put the mask tokens behind them, add positions.
        places = decoder.pos_embed[:, 1:].expand(batch, -1, -1)
        visible = x[:, 1:] + places[~mask].reshape(batch, -1, x.shape[-1])
        masked = decoder.mask_token + places[mask].reshape(batch, NUM_PATCHES - visible.shape[1], x.shape[-1])
        x = torch.cat([x[:, :1] + decoder.pos_embed[:, :1], visible, masked], dim=1)
        # 4. One decoder predicts pixels, the other as many values, whose mean is the error to expect.
        return None if lean else decoder(x), self.predictor(x).float().mean(dim=-1)


class HPM(Plain):
    def __init__(
        self,
        encoder: dict[str, int],
        decoder: dict[str, int],
        *,
        epoch: int,
        epochs: int,
        fused_attention: bool = False,
        lean: bool = False,
    ) -> None:
        super().__init__()
        self.student = TwoDecoders(encoder, decoder, fused_attention=fused_attention)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.lean = lean
        self.num_hard = int(NUM_MASKED * 0.5 * (epoch + 1) / epochs)
        self.momentum = 0.999 + 0.0009 * min(epoch / 100, 1)

    def forward(self, images: Tensor, noise: dict[str, Tensor]) -> Tensor:
        # 1. The teacher sees the whole image.
        with torch.no_grad():
            nothing = torch.zeros_like(noise["mask"], dtype=torch.bool)
            _, difficulty = self.teacher(images, nothing, lean=self.lean)
        # 2. Mask image by image.
        mask = torch.stack([self.mask(*pair) for pair in zip(difficulty, noise["mask"], strict=True)])
        # 3. Reconstruct, and predict how well that goes.
        prediction, expected = self.student(images, mask)
        target = cut(images)[mask].reshape(len(images), NUM_MASKED, PIXELS)
        error = (prediction[:, -NUM_MASKED:] - target).square().mean(dim=-1)
        return error.mean() + ranking_loss(expected[:, -NUM_MASKED:], error.detach())

    def mask(self, difficulty: Tensor, noise: Tensor) -> Tensor:
        """Force the hardest patches of an image; of the others, shuffled, the first are visible."""
        order = difficulty.argsort()
        others = order[: NUM_PATCHES - self.num_hard]
        others = others[noise[others].argsort()]
        mask = torch.ones_like(noise, dtype=torch.bool)
        mask[others[:NUM_VISIBLE]] = False
        return mask

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)

    @torch.no_grad()
    def after_step(self) -> None:
        for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            old.mul_(self.momentum).add_(new, alpha=1 - self.momentum)


def ranking_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """The relative objective of HPM: a binary cross-entropy over all ordered pairs of tokens whose targets differ."""
    difference = prediction[:, None, :] - prediction[:, :, None]
    above = (target[:, None, :] > target[:, :, None]).float()
    below = (target[:, None, :] < target[:, :, None]).float()
    share = difference.sigmoid()
    loss = above * (share + 1e-6).log() + below * (1 - share + 1e-6).log()
    return -loss.sum() / (above + below).sum()


class DropPos(Plain):
    def __init__(
        self,
        encoder: dict[str, int],
        decoder: dict[str, int],
        *,
        epoch: int,
        epochs: int,
        fused_attention: bool = False,
    ) -> None:
        super().__init__()
        options = {"fused_attention": fused_attention}
        self.encoder = Encoder(**encoder, **options)
        self.embed = nn.Linear(encoder["dim"], decoder["dim"])
        self.decoder = Predictor(**decoder, outputs=NUM_PATCHES, **options)
        self.position_token = nn.Parameter(torch.zeros(1, 1, encoder["dim"]))
        self.smooth: Tensor  # made once per epoch, so not in a step
        self.register_buffer("smooth", smoothed_targets(1 - epoch / epochs, side=GRID), persistent=False)

    def forward(self, images: Tensor, noise: dict[str, Tensor]) -> Tensor:
        encoder, batch = self.encoder, len(images)
        # 1. Embed all patches, and keep the first by the noise, in its order.
        patches = encoder.embed(images)
        dim = patches.shape[-1]
        places = noise["mask"].argsort(dim=1)[:, :NUM_VISIBLE]
        x = patches.gather(1, places[..., None].expand(-1, -1, dim))
        # 2. The first by another noise keep their position, the others get a token instead.
        shuffle = noise["drop, shuffled"].argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        anchors = places.gather(1, shuffle[:, :NUM_ANCHORS])
        anchors = encoder.pos_embed[:, 1:].expand(batch, -1, -1).gather(1, anchors[..., None].expand(-1, -1, dim))
        tokens = self.position_token.repeat(batch, NUM_VISIBLE - NUM_ANCHORS, 1)
        positions = torch.cat([anchors, tokens], dim=1).gather(1, restore[..., None].expand(-1, -1, dim))
        dropped = torch.ones_like(noise["drop, shuffled"])
        dropped[:, :NUM_ANCHORS] = 0
        dropped = dropped.gather(1, restore)
        # 3. Encode them, and say where each belongs.
        logits = self.decoder(self.embed(encoder(x + positions))).float()
        # 4. Encode the whole image, and weigh the visible patches by how much they resemble the class token.
        with torch.no_grad():
            whole = encoder(patches.detach() + encoder.pos_embed[:, 1:]).float()
            attention = (F.cosine_similarity(whole[:, :1], whole[:, 1:], dim=-1) / 0.1).softmax(dim=-1)
            attention = attention.gather(1, places)
            weights = dropped * attention / attention.sum(dim=-1, keepdim=True)
        # 5. Compare where the position was dropped.
        error = -(self.smooth[places] * logits.log_softmax(dim=-1)).sum(dim=-1)
        self.accuracy = (weights * (logits.argmax(dim=-1) == places)).sum() / weights.sum()
        return (weights * error).sum() / weights.sum()

    def clip(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                share = CLIP / (parameter.grad.norm() + 1e-6)
                if share < 1:
                    parameter.grad.mul_(share)


def smoothed_targets(sigma: float, *, side: int) -> Tensor:
    """The targets of DropPos: a Gaussian of the distances of all pairs of positions, each row divided by its sum."""
    rows, columns = torch.arange(side).repeat_interleave(side).float(), torch.arange(side).repeat(side).float()
    squared = (rows[:, None] - rows).square() + (columns[:, None] - columns).square()
    weights = (-squared / sigma**2).exp()
    return weights / weights.sum(dim=1, keepdim=True)


class WindowEncoder(Encoder):
    """The encoder of LoMaR. Its table of positions is there and stays zero."""

    def __init__(self, dim: int, depth: int, heads: int, **options: Any) -> None:
        super().__init__(dim, depth, heads, relative=True, **options)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))


class LoMaR(Plain):
    def __init__(self, encoder: dict[str, int], *, fused_attention: bool = False) -> None:
        super().__init__()
        self.encoder = WindowEncoder(**encoder, fused_attention=fused_attention)
        self.head = nn.Linear(encoder["dim"], PIXELS)

    def forward(self, images: Tensor, noise: dict[str, Tensor]) -> Tensor:
        encoder, device = self.encoder, images.device
        # 1. Embed all patches.
        x = encoder.embed(images).float()
        # 2. Gather those of each window; from here on a window is a row.
        top, left = (noise[side].argsort(dim=1)[:, :NUM_WINDOWS, None] for side in ("rows", "columns"))
        inside = torch.arange(WINDOW, device=device)
        places = (top * GRID + left + (inside[:, None] * GRID + inside).flatten()).flatten(1)
        x = x.gather(1, places[..., None].expand(-1, -1, x.shape[-1])).reshape(-1, WINDOW**2, x.shape[-1])
        # 3. Put the mask token in the place of those with the largest noise.
        chance = noise["mask"].flatten(0, 1)
        mask = torch.zeros_like(chance)
        mask[:, -NUM_MASKED_OF_WINDOW:] = 1
        mask = mask.gather(1, chance.argsort(dim=1).argsort(dim=1))
        x = torch.where(mask[..., None] > 0, encoder.mask_token, x)
        # 4. Encode each window behind the class token, and predict all its patches.
        prediction = self.head(encoder(x))[:, 1:]
        # 5. Compare with their normalized pixels, then leave out the visible ones.
        target = cut(images)
        target = target.gather(1, places[..., None].expand(-1, -1, PIXELS)).reshape(-1, WINDOW**2, PIXELS)
        mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
        error = (prediction - target).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum()
