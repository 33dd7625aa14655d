"""One training step of MAE, side by side in one process: ours, two peers, and a plain step as it was written in 2021.

    pip install -e .[recipes,benchmarks]
    python benchmarks/step.py
    python benchmarks/step.py --size base --precision fp32 --rounds 15 --variants transformers plain

A step is forward, backward, optimiser and zero_grad, at the shapes of ViT-S/16 or ViT-B/16: 224 × 224 pixels, 75 % of
the patches masked, a decoder of width 512, 8 blocks and 16 heads, loss on normalised pixels. The variants:

    ours               `recipes/mae.py` as the engine runs it: fused AdamW; compiled on a GPU
    transformers       ViTMAEForPreTraining as shipped, with PyTorch's default AdamW
    transformers-best  the same with fused AdamW and the attention that is fastest on this device
    lightly            its masked ViT and decoder (on timm) as in lightly's example, with PyTorch's default AdamW
    lightly-best       the same with fused AdamW and the attention that is fastest on this device
    plain              the class `Plain` below: the formulas of the paper, with PyTorch's default AdamW
    …-compiled         with --compile (minutes): ours (on a CPU) and the two peers at their best, through torch.compile

All start from the same weights and sort them into the same two groups of weight decay. All get the same noise, made
before. Ours gets uint8 images and normalises them inside the step; the others get the same images as normalised floats,
made before. Loss (1e-5) and gradients (1e-4, relative, each parameter) are compared in fp32 before anything is timed.

Each round runs every variant once, in random order; a ratio is that of two times of one round. On a CPU: one thread and
processor time, so that other programs disturb little. On a GPU: CUDA events around 20 steps.
"""

import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))  # recipes are scripts beside this folder, not a package

from common.config import Images, Network, Optimisation
from common.engine import parameter_groups
from common.images import IMAGENET_MEAN, IMAGENET_STD, Normalise
from common.vit import SIZES

from mae import MAE, Config

SIDE, PATCH = 224, 16
NUM_PATCHES = (SIDE // PATCH) ** 2
NUM_VISIBLE = NUM_PATCHES // 4
PIXELS = PATCH**2 * 3  # values of a patch
DECODER = {"dim": 512, "depth": 8, "heads": 16}

GOALS = {  # least ratio to ours, by device and precision
    ("cpu", "fp32"): {"transformers": 1.0, "lightly": 1.0, "plain": 1.1},
    ("cpu", "bf16"): {
        "transformers": 1.3,
        "lightly": 1.3,
        "transformers-best": 1.0,
        "lightly-best": 1.0,
        "plain": 1.05,
    },
    ("cuda", "bf16"): {"transformers": 1.2, "transformers-compiled": 1.03, "plain": 1.5},
}

Name = Literal["transformers", "transformers-best", "lightly", "lightly-best", "plain"]


@dataclass(frozen=True)
class Settings:
    size: tuple[Literal["small", "base", "large"], ...] = ("small", "base")
    """encoders to measure"""
    precision: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """bf16 is autocast"""
    batch: int = 0
    """images per step; 0: 4 on a CPU, 256 on a GPU"""
    rounds: int = 5
    """each runs every variant once; take 15 or more for differences below 10 %"""
    variants: tuple[Name, ...] = ("transformers", "transformers-best", "lightly", "lightly-best", "plain")
    """what to compare with ours"""
    compile: bool = False
    """compiled variants too"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one"""


class PlainBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(x))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        x = x + self.attn["proj"](rearrange(weights @ v, "b h n d -> b n (h d)"))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class PlainViT(nn.Module):
    """What encoder and decoder share. The names of the parameters are ours."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + NUM_PATCHES, dim), requires_grad=False)
        self.blocks = nn.Sequential(*(PlainBlock(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)


class PlainEncoder(PlainViT):
    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__(dim, depth, heads)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, PATCH, PATCH)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))


class PlainDecoder(PlainViT):
    def __init__(self, encoder_dim: int, dim: int, depth: int, heads: int) -> None:
        super().__init__(dim, depth, heads)
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.head = nn.Linear(dim, PIXELS)


class Plain(nn.Module):
    """MAE from the formulas, as one wrote it in 2021: all patches embedded, attention as three operations."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.encoder, self.decoder = PlainEncoder(dim, depth, heads), PlainDecoder(dim, **DECODER)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        encoder, decoder, batch = self.encoder, self.decoder, len(images)
        # 1. Embed all patches with their positions.
        x = encoder.patch_embed["proj"](images).flatten(2).transpose(1, 2) + encoder.pos_embed[:, 1:]
        # 2. Shuffle by the noise and keep the first.
        shuffle = noise.argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        x = x.gather(1, shuffle[:, :NUM_VISIBLE, None].expand(-1, -1, x.shape[-1]))
        mask = torch.ones_like(noise)
        mask[:, :NUM_VISIBLE] = 0
        mask = mask.gather(1, restore)
        # 3. Encode them behind the class token.
        first = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(batch, -1, -1)
        x = encoder.norm(encoder.blocks(torch.cat([first, x], dim=1)))
        # 4. Put mask tokens in the empty places, add positions, decode.
        x = decoder.embed(x)
        masked = decoder.mask_token.expand(batch, NUM_PATCHES - NUM_VISIBLE, -1)
        patches = torch.cat([x[:, 1:], masked.to(x.dtype)], dim=1)
        patches = patches.gather(1, restore[..., None].expand_as(patches))
        x = torch.cat([x[:, :1], patches], dim=1) + decoder.pos_embed
        prediction = decoder.head(decoder.norm(decoder.blocks(x)))[:, 1:]
        # 5. Compare all patches with their normalised pixels, then leave out the visible ones.
        target = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=PATCH, q=PATCH)
        mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
        error = (prediction - target).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum()


class Transformers(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, *, attention: str | None = None) -> None:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        super().__init__()
        options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
        config = ViTMAEConfig(
            hidden_size=dim,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * dim,
            layer_norm_eps=1e-6,  # the paper's; shipped is 1e-12
            image_size=SIDE,
            patch_size=PATCH,
            decoder_hidden_size=DECODER["dim"],
            decoder_num_hidden_layers=DECODER["depth"],
            decoder_num_attention_heads=DECODER["heads"],
            decoder_intermediate_size=4 * DECODER["dim"],
            norm_pix_loss=True,
            **options,
        )
        self.model = ViTMAEForPreTraining(config)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        return self.model(images, noise=noise).loss

    @staticmethod
    def names(name: str) -> list[str]:
        """Their names of one of our parameters; queries, keys and values are three of theirs."""
        for ours, theirs in (
            ("encoder.patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
            ("encoder.cls_token", "vit.embeddings.cls_token"),
            ("encoder.pos_embed", "vit.embeddings.position_embeddings"),
            ("encoder.blocks.", "vit.layers."),
            ("encoder.norm.", "vit.layernorm."),
            ("decoder.embed.", "decoder.decoder_embed."),
            ("decoder.pos_embed", "decoder.decoder_pos_embed"),
            ("decoder.blocks.", "decoder.decoder_layers."),
            ("decoder.norm.", "decoder.decoder_norm."),
            ("decoder.head.", "decoder.decoder_pred."),
            (".norm1.", ".layernorm_before."),
            (".norm2.", ".layernorm_after."),
            (".attn.proj.", ".attention.o_proj."),
        ):
            name = name.replace(ours, theirs)
        parts = "qkv" if ".attn.qkv." in name else "."
        return [f"model.{name.replace('.attn.qkv.', f'.attention.{part}_proj.')}" for part in parts]


class Lightly(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, *, fused_attention: bool = True) -> None:
        from lightly.models.modules import MaskedVisionTransformerTIMM
        from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
        from timm.models.vision_transformer import VisionTransformer

        super().__init__()
        vit = VisionTransformer(
            img_size=SIDE, patch_size=PATCH, embed_dim=dim, depth=depth, num_heads=heads, num_classes=0
        )
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        # Since lightly 1.6 this class, with a linear layer on either side, takes the place of its MAEDecoderTIMM.
        self.embed = nn.Linear(dim, DECODER["dim"])
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=NUM_PATCHES, embed_dim=DECODER["dim"], depth=DECODER["depth"], num_heads=DECODER["heads"]
        )
        self.head = nn.Linear(DECODER["dim"], PIXELS)
        for part in self.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = fused_attention  # pyright: ignore[reportArgumentType]

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        from lightly.models import utils

        # As `utils.random_token_mask`, which draws the noise itself; its indices count the class token.
        order = F.pad(noise, (1, 0), value=-1.0).argsort(dim=1)
        keep, masked = order[:, : 1 + NUM_VISIBLE], order[:, 1 + NUM_VISIBLE :]
        x = self.embed(self.backbone.encode(images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (len(images), 1 + NUM_PATCHES))
        tokens = utils.set_at_index(tokens, keep, x.type_as(tokens))
        prediction = self.head(utils.get_at_index(self.decoder(tokens), masked))
        # Their example predicts raw pixels; the target is arranged to be ours, by their own function.
        target = utils.get_at_index(utils.patchify(images, PATCH), masked - 1)
        return F.mse_loss(prediction, utils.normalize_mean_var(target))

    @staticmethod
    def names(name: str) -> list[str]:
        for ours, theirs in (
            ("encoder.", "backbone.vit."),
            ("decoder.embed.", "embed."),
            ("decoder.head.", "head."),
        ):
            name = name.replace(ours, theirs)
        return [name]


@dataclass(frozen=True)
class Batch:
    pixels: Tensor  # uint8, for ours
    images: Tensor  # the same, normalised, for the others
    noise: Tensor

    def first(self, count: int) -> "Batch":
        return Batch(self.pixels[:count], self.images[:count], self.noise[:count])


@dataclass(frozen=True)
class Variant:
    name: str
    module: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]
    called: nn.Module  # the module, or what the compiler made of it
    optimiser: torch.optim.Optimizer
    names: Callable[[str], list[str]]  # names of one of our parameters in this module
    autocast: bool

    def forward(self, batch: Batch, *, compiled: bool = True) -> Tensor:
        with torch.autocast(batch.noise.device.type, torch.bfloat16, enabled=self.autocast):
            return self.loss(self.called if compiled else self.module, batch)

    def step(self, batch: Batch) -> Tensor:
        loss = self.forward(batch)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss.detach()


def make_batch(size: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    # Smooth pictures of the grey levels 0…255. Pure noise would make all targets alike.
    coarse = torch.rand(size, 3, 12, 12, generator=generator)
    fine = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic") + 0.1 * torch.rand(
        size, 3, SIDE, SIDE, generator=generator
    )
    pixels = (fine.clamp(0, 1) * 255).to(torch.uint8).to(device)
    # No two equal values: sorting then has one answer, stable or not.
    noise = torch.rand(size, NUM_PATCHES, generator=generator).argsort(dim=1) / NUM_PATCHES
    return Batch(pixels, Normalise(IMAGENET_MEAN, IMAGENET_STD).to(device)(pixels), noise.to(device))


def make_variants(size: str, precision: str, device: torch.device, settings: Settings) -> list[Variant]:
    """Build all variants with the weights of the first, which is ours."""
    torch.manual_seed(0)
    shape, optimisation = SIZES[size], Optimisation()
    on_cpu, bf16 = device.type == "cpu", precision == "bf16"
    # Explicit attention has the faster backward pass in bf16 on a CPU, at these lengths; everywhere else the fused one.
    fused_attention = not (on_cpu and bf16)
    config = Config(
        images=Images(image_size=(SIDE, SIDE), channels=3),
        network=Network(
            size=size,  # pyright: ignore[reportArgumentType]
            patch=PATCH,
            decoder_dim=DECODER["dim"],
            decoder_depth=DECODER["depth"],
            decoder_heads=DECODER["heads"],
        ),
    )
    method = MAE(config, Normalise(IMAGENET_MEAN, IMAGENET_STD)).to(device)
    progress = torch.zeros((), device=device)
    weights = {name: tensor for name, tensor in method.state_dict().items() if not name.startswith("normalise.")}
    weights["decoder.pos_embed"] = F.pad(method.decoder.pos_embed, (0, 0, 1, 0))[None]  # the class token's is zero

    def variant(
        name: str,
        module: nn.Module,
        loss: Callable[[nn.Module, Batch], Tensor],
        names: Callable[[str], list[str]],
        *,
        fused: bool,
        compiled: bool = False,
        **options: Any,
    ) -> Variant:
        groups = parameter_groups(module.to(device).train(), optimisation)
        optimiser = torch.optim.AdamW(
            groups, lr=optimisation.base_lr, betas=optimisation.betas, fused=True if fused else None
        )
        called: Any = torch.compile(module, dynamic=False, **options) if compiled else module
        return Variant(name, module, loss, called, optimiser, names, bf16)

    def ours(name: str, *, compiled: bool) -> Variant:
        module = method if name == "ours" else MAE(config, Normalise(IMAGENET_MEAN, IMAGENET_STD)).to(device)
        module.load_state_dict(method.state_dict())

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            return module(batch.pixels, {"mask": batch.noise}, progress)["loss"]

        return variant(name, module, loss, lambda name: [name], fused=True, compiled=compiled, fullgraph=True)

    def other(name: str) -> Variant:
        best, compiled = name.endswith(("-best", "-compiled")), name.endswith("-compiled")
        names: Callable[[str], list[str]] = lambda name: [name]  # noqa: E731
        if name.startswith("transformers"):
            attention = ("sdpa" if fused_attention else "eager") if best else None
            module, names = Transformers(**shape, attention=attention), Transformers.names
        elif name.startswith("lightly"):
            module, names = Lightly(**shape, fused_attention=fused_attention or not best), Lightly.names
        else:
            module = Plain(**shape)
        load(module, weights, names)

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            return module(batch.images, batch.noise)

        return variant(name, module, loss, names, fused=best, compiled=compiled)

    variants = [ours("ours", compiled=not on_cpu), *map(other, settings.variants)]  # compiled as the engine does
    if settings.compile:
        variants += [ours("ours-compiled", compiled=True)] if on_cpu else []
        variants += [other("transformers-compiled"), other("lightly-compiled")]
    return variants


def load(module: nn.Module, weights: dict[str, Tensor], names: Callable[[str], list[str]]) -> None:
    """Copy our weights into another module."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        parts = names(name)
        theirs |= dict(zip(parts, tensor.chunk(len(parts)), strict=True))
    result = module.load_state_dict(theirs, strict=False)
    unused = {"backbone.mask_token"}  # of lightly, for methods that mask before the encoder
    if result.unexpected_keys or set(result.missing_keys) - unused:
        raise SystemExit(f"the weights do not fit: missing {result.missing_keys}, unknown {result.unexpected_keys}")


def loss_and_gradients(variant: Variant, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Both in fp32 and eager, the gradients by the names of the variant's own parameters."""
    loss = variant.loss(variant.module, batch)
    loss.backward()
    gradients = {name: p.grad for name, p in variant.module.named_parameters() if p.grad is not None}
    variant.optimiser.zero_grad(set_to_none=True)
    return float(loss.detach()), gradients


def check_parity(variants: list[Variant], batch: Batch) -> None:
    """Compare losses and gradients with ours, in fp32 and eager."""
    ours, *others = variants
    loss, gradients = loss_and_gradients(ours, batch)
    for variant in others:
        their_loss, theirs = loss_and_gradients(variant, batch)
        worst, where = 0.0, ""
        for name, gradient in gradients.items():
            # queries, keys and values together: the true gradient of the keys' bias alone is zero
            their = torch.cat([theirs.pop(part) for part in variant.names(name)])
            error = float((their - gradient).norm() / gradient.norm())
            worst, where = max((worst, where), (error, name))
        if theirs:
            raise SystemExit(f"{variant.name} also trains {', '.join(theirs)}")
        if not (abs(their_loss - loss) <= 1e-5 * abs(loss) and worst <= 1e-4):
            raise SystemExit(
                f"{variant.name} computes something else: loss {their_loss:.7f}, ours {loss:.7f}; "
                f"gradient of {where} differs by {worst:.1e}"
            )
        print(f"  {variant.name}: loss {their_loss:.6f} (ours {loss:.6f}), gradients within {worst:.0e}")


def check_timed(variants: list[Variant], batch: Batch) -> None:
    """Make the first step and compare its loss, in the precision and compiled as it will be timed, with fp32."""
    with torch.no_grad():
        expected = float(variants[0].loss(variants[0].module, batch))
    # A GPU convolves in TF32 where fp32 is asked for.
    tolerance = 1e-2 if variants[0].autocast or batch.noise.device.type == "cuda" else 1e-5
    for variant in variants:
        loss = float(variant.step(batch))
        if not abs(loss - expected) <= tolerance * abs(expected):
            raise SystemExit(f"{variant.name} as timed has the loss {loss:.6f} instead of {expected:.6f}")


def saved_bytes(variant: Variant, batch: Batch) -> int:
    """Bytes kept for the backward pass, per image: what two images need more than one, so weights do not count."""

    def total(count: int) -> int:
        storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            variant.forward(batch.first(count), compiled=False)
        return sum(storage.nbytes() for storage in storages.values())

    return total(2) - total(1)


def seconds_per_step(variant: Variant, batch: Batch, steps: int) -> float:
    if batch.noise.device.type == "cpu":
        begin = time.process_time()
        for _ in range(steps):
            variant.step(batch)
        return (time.process_time() - begin) / steps
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(steps):
        variant.step(batch)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / steps


def flops_per_image(size: str) -> float:
    """Floating-point operations of the matrix products that a step needs (a multiply-add counts two)."""

    def block(tokens: int, dim: int) -> int:
        return 24 * dim**2 * tokens + 4 * tokens**2 * dim

    dim, depth = SIZES[size]["dim"], SIZES[size]["depth"]
    linear = 2 * dim * (NUM_VISIBLE * PIXELS + (1 + NUM_VISIBLE) * DECODER["dim"])
    linear += 2 * DECODER["dim"] * PIXELS * (NUM_PATCHES - NUM_VISIBLE)
    decoder = DECODER["depth"] * block(1 + NUM_PATCHES, DECODER["dim"])
    return 3 * (depth * block(1 + NUM_VISIBLE, dim) + decoder + linear)


def measured_peak(device: torch.device) -> float:
    """FLOP/s of a bf16 product of matrices of 8192 × 8192."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for i in range(60):
        if i == 10:
            begin.record()
        torch.mm(a, b)
    end.record()
    end.synchronize()
    return 2 * 8192**3 * 50 / (begin.elapsed_time(end) / 1e3)


def measure(size: str, precision: str, device: torch.device, settings: Settings, peak: float | None) -> None:
    count = settings.batch or (4 if device.type == "cpu" else 256)
    title = f"ViT-{size[0].upper()}/{PATCH}, {precision}, batch {count}, {settings.rounds} rounds"
    print(f"\n{title}; load average {os.getloadavg()[0]:.1f}")
    batch = make_batch(count, device)
    variants = make_variants(size, precision, device, settings)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check_parity(variants, batch.first(2))
    saved = {variant.name: saved_bytes(variant, batch.first(2)) for variant in variants}

    check_timed(variants, batch)
    warmup, steps = (1, 1) if device.type == "cpu" else (10, 20)
    memory = {}
    for variant in variants:
        seconds_per_step(variant, batch, warmup)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            variant.step(batch)
            memory[variant.name] = torch.cuda.max_memory_allocated() - before
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    order = random.Random(0)
    for _ in range(settings.rounds):
        for variant in order.sample(variants, len(variants)):
            times[variant.name].append(seconds_per_step(variant, batch, steps))

    goals = GOALS.get((device.type, precision), {})
    header = f"{'variant':<22}{'ms per step':>12}{'ratio':>8}{'min':>7}{'max':>7}{'goal':>8}{'saved MB/image':>16}"
    if device.type == "cuda":
        header += f"{'img/s':>9}{'of peak':>9}{'step GB':>9}"
    print(header)
    for name, values in times.items():
        median = statistics.median(values)
        ratios = [value / ours for value, ours in zip(values, times["ours"], strict=True)]
        goal = f"≥ {goals[name]:.2f}" if name in goals else ""
        line = f"{name:<22}{median * 1e3:>12.1f}{statistics.median(ratios):>8.3f}{min(ratios):>7.3f}{max(ratios):>7.3f}"
        line += f"{goal:>8}{saved[name] / 1e6:>16.1f}"
        if device.type == "cuda":
            speed = count / median
            share = f"{speed * flops_per_image(size) / peak:.1%}" if peak and precision == "bf16" else ""
            line += f"{speed:>9.0f}{share:>9}{memory[name] / 1e9:>9.1f}"
        print(line, flush=True)
    if "plain" in saved:
        print(f"saved for the backward pass, ours ÷ plain: {saved['ours'] / saved['plain']:.2f}")


def versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in ("torch", "transformers", "lightly", "timm"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} –")
    return ", ".join([f"Python {platform.python_version()}", *found])


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name if settings.device == "auto" else settings.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # two threads that wait for each other in turns measure the waiting
    print("python", *sys.argv)
    print(versions())
    print(torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(), end="")
    print(f", {torch.get_num_threads()} thread(s), load average {' '.join(f'{x:.1f}' for x in os.getloadavg())}")
    peak = measured_peak(device) if device.type == "cuda" else None
    if peak:
        print(f"measured peak: {peak / 1e12:.0f} TFLOP/s (bf16 product of 8192 × 8192 matrices)")
    for size in settings.size:
        for precision in settings.precision:
            measure(size, precision, device, settings, peak)


if __name__ == "__main__":
    main()
