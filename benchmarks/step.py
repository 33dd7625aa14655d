"""One training step of MAE, HPM, DropPos or LoMaR, side by side in one process: ours, peers, and a plain step.

    pip install -e .[recipes,benchmarks]
    python benchmarks/step.py
    python benchmarks/step.py --size base --precision fp32 --rounds 15 --variants transformers plain
    python benchmarks/step.py --method hpm --size small --rounds 11

A step is forward, backward, clipping, optimizer and whatever follows it, with the settings of the paper and the shapes
of ViT-S/16 or ViT-B/16 at 224 × 224 pixels, after a quarter of the training. The variants:

    ours               the recipe as the engine runs it: fused AdamW; compiled on a GPU
    plain              the formulas of the paper as one wrote them in 2021 to 2023 (`plain.py`), with PyTorch's default
                       AdamW
    plain-best         the same with what changes no line of the algorithm: fused AdamW, the attention that is fastest
                       on this device, and no pixels from HPM's teacher
    transformers       ViTMAEForPreTraining as shipped, with PyTorch's default AdamW
    transformers-best  the same with fused AdamW and the attention that is fastest on this device
    lightly            its masked ViT and decoder (on timm) as in lightly's example, with PyTorch's default AdamW
    lightly-best       the same with fused AdamW and the attention that is fastest on this device
    …-compiled         with --compile (minutes): ours (on a CPU) and the two peers at their best, through torch.compile

The two peers know MAE only. All start from the same weights, somewhat away from the first ones, and sort them into the
same two groups of weight decay. All get the same noise, made before. Ours gets uint8 images and normalizes them inside
the step; the others get the same images as normalized floats, made before. Loss (1e-5) and gradients (1e-4, relative,
each parameter) are compared in fp32 before anything is timed, and after one step how far HPM's teacher has moved.

Each round runs every variant once, in random order; a ratio is that of two times of one round. On a CPU: one thread and
processor time, so that other programs disturb little. On a GPU: CUDA events around 20 steps.
"""

import gc
import os
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))  # recipes are scripts beside this folder, not a package

from common.config import Optimization
from common.data.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from common.networks.vit import SIZES
from common.training.optimizer import clip, parameter_groups

import droppos
import hpm
import lomar
import mae
import plain
from measuring import chosen_device, in_rounds, kept_bytes, matmul_peak, print_circumstances, seconds_of
from plain import GRID, NUM_MASKED, NUM_PATCHES, NUM_VISIBLE, NUM_WINDOWS, PATCH, PIXELS, SIDE, WINDOW

PROGRESS = 0.25  # of the training: HPM's teacher chooses some patches, DropPos' targets are smoothed

GOALS = {  # least ratio to ours, by method, device and precision
    ("mae", "cpu", "fp32"): {"transformers": 1.0, "lightly": 1.0, "plain": 1.1},
    ("mae", "cpu", "bf16"): {
        "transformers": 1.3,
        "lightly": 1.3,
        "transformers-best": 1.0,
        "lightly-best": 1.0,
        "plain": 1.05,
    },
    ("mae", "cuda", "bf16"): {"transformers": 1.2, "transformers-compiled": 1.03, "plain": 1.5},
    ("hpm", "cpu", "fp32"): {"plain": 1.15},
    ("hpm", "cpu", "bf16"): {"plain": 1.15},
    ("hpm", "cuda", "bf16"): {"plain": 1.7},
    ("droppos", "cpu", "fp32"): {"plain": 1.15},
    ("droppos", "cpu", "bf16"): {"plain": 1.15},
    ("lomar", "cpu", "fp32"): {"plain": 1.0},
    ("lomar", "cpu", "bf16"): {"plain": 1.0},
}

Name = Literal["transformers", "transformers-best", "lightly", "lightly-best", "plain", "plain-best"]
VARIANTS: dict[str, tuple[Name, ...]] = {
    "mae": ("transformers", "transformers-best", "lightly", "lightly-best", "plain"),
    "hpm": ("plain", "plain-best"),
    "droppos": ("plain", "plain-best"),
    "lomar": ("plain", "plain-best"),
}
RECIPES: dict[str, Any] = {"mae": mae, "hpm": hpm, "droppos": droppos, "lomar": lomar}
# a constant added to all of HPM's predictions changes nothing, so these have no gradient but rounding noise
WITHOUT_GRADIENT = {"predictor.norm.bias", "predictor.head.bias"}


@dataclass(frozen=True)
class Settings:
    method: Literal["mae", "hpm", "droppos", "lomar"] = "mae"
    """what to train"""
    size: tuple[Literal["small", "base", "large"], ...] = ("small", "base")
    """encoders to measure"""
    precision: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """bf16 is autocast"""
    batch: int = 0
    """images per step; 0: 4 on a CPU, 256 on a GPU"""
    rounds: int = 5
    """each runs every variant once; take 15 or more for differences below 10 %"""
    variants: tuple[Name, ...] = ()
    """what to compare with ours; none: all peers that know the method, and the plain step"""
    compile: bool = False
    """compiled variants of MAE too"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one"""


class Transformers(nn.Module):
    def __init__(self, encoder: dict[str, int], decoder: dict[str, int], *, attention: str | None = None) -> None:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        super().__init__()
        options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
        config = ViTMAEConfig(
            hidden_size=encoder["dim"],
            num_hidden_layers=encoder["depth"],
            num_attention_heads=encoder["heads"],
            intermediate_size=4 * encoder["dim"],
            layer_norm_eps=1e-6,  # the paper's; shipped is 1e-12
            image_size=SIDE,
            patch_size=PATCH,
            decoder_hidden_size=decoder["dim"],
            decoder_num_hidden_layers=decoder["depth"],
            decoder_num_attention_heads=decoder["heads"],
            decoder_intermediate_size=4 * decoder["dim"],
            norm_pix_loss=True,
            **options,
        )
        self.model = ViTMAEForPreTraining(config)

    def forward(self, images: Tensor, noise: dict[str, Tensor]) -> Tensor:
        return self.model(images, noise=noise["mask"]).loss

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
    def __init__(self, encoder: dict[str, int], decoder: dict[str, int], *, fused_attention: bool = True) -> None:
        from lightly.models.modules import MaskedVisionTransformerTIMM
        from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
        from timm.models.vision_transformer import VisionTransformer

        super().__init__()
        shape: dict[str, Any] = {"embed_dim": encoder["dim"], "depth": encoder["depth"], "num_heads": encoder["heads"]}
        vit = VisionTransformer(img_size=SIDE, patch_size=PATCH, **shape, num_classes=0)
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        # Since lightly 1.6 this class, with a linear layer on either side, takes the place of its MAEDecoderTIMM.
        self.embed = nn.Linear(encoder["dim"], decoder["dim"])
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=NUM_PATCHES, embed_dim=decoder["dim"], depth=decoder["depth"], num_heads=decoder["heads"]
        )
        self.head = nn.Linear(decoder["dim"], PIXELS)
        for part in self.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = fused_attention  # pyright: ignore[reportArgumentType]

    def forward(self, images: Tensor, noise: dict[str, Tensor]) -> Tensor:
        from lightly.models import utils

        # As `utils.random_token_mask`, which draws the noise itself; its indices count the class token.
        order = F.pad(noise["mask"], (1, 0), value=-1.0).argsort(dim=1)
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


def plain_names(name: str) -> list[str]:
    """Names in `plain.py` of one of our parameters: only HPM's differ, where the teacher is a copy of the student."""
    if not name.startswith(("teacher.", "predictor.", "encoder.", "decoder.")):
        return [name]
    for ours, theirs in (("0.", "encoder."), ("1.", "decoder.embed."), ("2.", "predictor.")):
        if name.startswith(f"teacher.{ours}"):
            return [name.replace(f"teacher.{ours}", f"teacher.{theirs}")]
    return [name if name.startswith("teacher.") else f"student.{name}"]


def nothing() -> None:
    """Peers clip nothing and have no teacher."""


def unchanged(name: str) -> list[str]:
    return [name]


@dataclass(frozen=True)
class Batch:
    pixels: Tensor  # uint8, for ours
    images: Tensor  # the same, normalized, for the others
    noise: dict[str, Tensor]

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    def first(self, count: int) -> "Batch":
        noise = {name: values[:count] for name, values in self.noise.items()}
        return Batch(self.pixels[:count], self.images[:count], noise)


@dataclass(frozen=True)
class Variant:
    name: str
    module: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]
    called: nn.Module  # the module, or what the compiler made of it
    clip: Callable[[], None]
    optimizer: torch.optim.Optimizer
    after_step: Callable[[], None]
    names: Callable[[str], list[str]]  # names of one of our parameters in this module
    autocast: bool

    def forward(self, batch: Batch, *, compiled: bool = True) -> Tensor:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.autocast):
            return self.loss(self.called if compiled else self.module, batch)

    def update(self) -> None:
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after_step()

    def step(self, batch: Batch) -> Tensor:
        loss = self.forward(batch)
        loss.backward()
        self.update()
        return loss.detach()


def make_pixels(size: int, side: int, generator: torch.Generator) -> Tensor:
    """Draw smooth pictures of the gray levels 0…255. Pure noise would make all targets alike."""
    coarse = torch.rand(size, 3, 12, 12, generator=generator)
    fine = F.interpolate(coarse, (side, side), mode="bicubic")
    return ((fine + 0.1 * torch.rand(fine.shape, generator=generator)).clamp(0, 1) * 255).to(torch.uint8)


def make_batch(method: str, size: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = make_pixels(size, SIDE, generator).to(device)

    def noise(*shape: int) -> Tensor:
        # No two equal values: sorting then has one answer, stable or not.
        return torch.rand(size, *shape, generator=generator).argsort(dim=-1) / shape[-1]

    if method == "lomar":
        places = GRID - WINDOW + 1
        chance = {"rows": noise(places), "columns": noise(places), "mask": noise(NUM_WINDOWS, WINDOW**2)}
    else:
        mask, drop = noise(NUM_PATCHES), noise(NUM_VISIBLE)
        # Ours has the visible patches in raster order, a plain step in the order of the noise.
        shuffled = drop.gather(1, mask.argsort(dim=1)[:, :NUM_VISIBLE].argsort(dim=1).argsort(dim=1))
        chance = {"mask": mask, "drop": drop, "drop, shuffled": shuffled}
    chance = {name: values.to(device) for name, values in chance.items()}
    return Batch(pixels, Normalize(IMAGENET_MEAN, IMAGENET_STD).to(device)(pixels), chance)


def config_of(method: str, size: str) -> Any:
    """The settings of the paper with an encoder of this size."""
    preset = RECIPES[method].PRESETS["imagenet"]
    return replace(preset, network=replace(preset.network, size=size))


def shapes_of(config: Any) -> tuple[dict[str, int], dict[str, int]]:
    network = config.network
    decoder = {"dim": network.decoder_dim, "depth": network.decoder_depth, "heads": network.decoder_heads}
    return SIZES[network.size], decoder


def variant_of(
    name: str,
    module: nn.Module,
    loss: Callable[[nn.Module, Batch], Tensor],
    optimization: Optimization,
    device: torch.device,
    *,
    bf16: bool,
    fused: bool,
    clip: Callable[[], None] = nothing,
    after_step: Callable[[], None] = nothing,
    names: Callable[[str], list[str]] = unchanged,
    compiled: bool = False,
    **options: Any,
) -> Variant:
    groups = parameter_groups(module.to(device).train(), optimization)
    optimizer = torch.optim.AdamW(
        groups, lr=optimization.base_lr, betas=optimization.betas, fused=True if fused else None
    )
    called: Any = torch.compile(module, dynamic=False, **options) if compiled else module
    return Variant(name, module, loss, called, clip, optimizer, after_step, names, bf16)


def recipe_variant(
    name: str, module: nn.Module, optimization: Optimization, device: torch.device, *, bf16: bool, compiled: bool
) -> Variant:
    """Run a recipe's module as the engine does."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    done = torch.tensor(PROGRESS, dtype=torch.float64)
    progress = done.to(device)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return module(batch.pixels, batch.noise, progress)["loss"]

    def clip_ours() -> None:
        if optimization.clip is not None:
            clip(trained, optimization.clip, each=optimization.clip_each)

    def after_step() -> None:
        if hasattr(module, "after_step"):
            with torch.no_grad():
                cast(Any, module).after_step(done)

    options: dict[str, Any] = {"clip": clip_ours, "after_step": after_step, "compiled": compiled, "fullgraph": True}
    return variant_of(name, module, loss, optimization, device, bf16=bf16, fused=True, **options)


def make_variants(size: str, precision: str, device: torch.device, settings: Settings) -> list[Variant]:
    """Build all variants with the weights of the first, which is ours."""
    config: Any = config_of(settings.method, size)
    optimization, shapes = config.optimization, shapes_of(config)
    epochs = {"epoch": int(PROGRESS * optimization.epochs), "epochs": optimization.epochs}
    on_cpu, bf16 = device.type == "cpu", precision == "bf16"
    # Explicit attention has the faster backward pass on a CPU in bf16, at these lengths, and where a bias is trained.
    fused_attention = not (on_cpu and (bf16 or settings.method == "lomar"))
    recipe: Any = RECIPES[settings.method].RECIPE.method
    torch.manual_seed(0)
    method = recipe(config, Normalize(IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        for parameter in method.parameters():  # no bias is zero then, and a student is not its teacher
            parameter.add_(0.02 * torch.randn_like(parameter) * parameter.requires_grad)
    method.to(device)
    weights = {name: tensor for name, tensor in method.state_dict().items() if not name.startswith("normalize.")}
    if settings.method in ("mae", "hpm"):
        weights["decoder.pos_embed"] = F.pad(method.decoder.pos_embed, (0, 0, 1, 0))[None]  # the class token's is zero
    if settings.method == "lomar":
        weights["encoder.pos_embed"] = torch.zeros(1, 1 + NUM_PATCHES, method.encoder.dim)  # there, and not read
    if settings.method == "hpm":  # the teacher of a plain step is complete
        more = {name: tensor for name, tensor in weights.items() if name.startswith("decoder.")}
        weights |= {f"teacher.{name}": tensor for name, tensor in more.items() if ".embed." not in name}

    def ours(name: str, *, compiled: bool) -> Variant:
        module = method if name == "ours" else recipe(config, Normalize(IMAGENET_MEAN, IMAGENET_STD)).to(device)
        module.load_state_dict(method.state_dict())
        return recipe_variant(name, module, optimization, device, bf16=bf16, compiled=compiled)

    def other(name: str) -> Variant:
        best, compiled = name.endswith(("-best", "-compiled")), name.endswith("-compiled")
        if not name.startswith("plain") and settings.method != "mae":
            raise SystemExit(f"{name} knows MAE only, not {settings.method}")
        names: Callable[[str], list[str]] = unchanged
        if name.startswith("transformers"):
            attention = ("sdpa" if fused_attention else "eager") if best else None
            module, names = Transformers(*shapes, attention=attention), Transformers.names
        elif name.startswith("lightly"):
            module, names = Lightly(*shapes, fused_attention=fused_attention or not best), Lightly.names
        elif settings.method == "lomar":
            module = plain.LoMaR(shapes[0], fused_attention=fused_attention and best)
        else:
            options: dict[str, Any] = {"fused_attention": fused_attention and best}
            options |= {"lean": best} if settings.method == "hpm" else {}
            options |= epochs if settings.method != "mae" else {}
            names = plain_names if settings.method == "hpm" else unchanged
            module = {"mae": plain.MAE, "hpm": plain.HPM, "droppos": plain.DropPos}[settings.method](*shapes, **options)
        load(module, weights, names)

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            return module(batch.images, batch.noise)

        after: dict[str, Any] = {"names": names, "compiled": compiled}
        after |= {"clip": module.clip, "after_step": module.after_step} if isinstance(module, plain.Plain) else {}
        return variant_of(name, module, loss, optimization, device, bf16=bf16, fused=best, **after)

    others = settings.variants or VARIANTS[settings.method]
    variants = [ours("ours", compiled=not on_cpu), *map(other, others)]  # compiled as the engine does
    if settings.compile:
        variants += [ours("ours-compiled", compiled=True)] if on_cpu else []
        variants += [other("transformers-compiled"), other("lightly-compiled")] if settings.method == "mae" else []
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
    """Both in fp32 and eager, the gradients by the names of the variant's own parameters and clipped."""
    loss = variant.loss(variant.module, batch)
    (100 * loss).backward()  # so that there is something to clip
    variant.clip()
    gradients = {name: p.grad for name, p in variant.module.named_parameters() if p.grad is not None}
    variant.optimizer.zero_grad(set_to_none=True)
    return float(loss.detach()), gradients


def check_parity(variants: list[Variant], batch: Batch) -> None:
    """Compare losses and gradients with ours, in fp32 and eager, and what a step makes of the teacher."""
    ours, *others = variants
    loss, gradients = loss_and_gradients(ours, batch)
    whole = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    moves = teacher_moves(ours, ours, batch)
    for variant in others:
        their_loss, theirs = loss_and_gradients(variant, batch)
        worst, where = 0.0, ""
        for name, gradient in gradients.items():
            # queries, keys and values together: the true gradient of the keys' bias alone is zero
            their = torch.cat([theirs.pop(part) for part in variant.names(name)])
            scale = 1e-2 * whole if name in WITHOUT_GRADIENT else gradient.norm()
            error = float((their - gradient).norm() / scale)
            worst, where = max((worst, where), (error, name))
        if theirs:
            raise SystemExit(f"{variant.name} also trains {', '.join(theirs)}")
        if not (abs(their_loss - loss) <= 1e-5 * abs(loss) and worst <= 1e-4):
            raise SystemExit(
                f"{variant.name} computes something else: loss {their_loss:.7f}, ours {loss:.7f}; "
                f"gradient of {where} differs by {worst:.1e}"
            )
        line = f"  {variant.name}: loss {their_loss:.6f} (ours {loss:.6f}), gradients within {worst:.0e}"
        their_moves = teacher_moves(variant, ours, batch)
        errors = {name: float((their_moves[name] - move).norm() / move.norm()) for name, move in moves.items()}
        where = max(errors, key=errors.__getitem__, default="")
        if errors and not errors[where] <= 2e-3:
            raise SystemExit(f"{variant.name} moves the teacher elsewhere: {where} differs by {errors[where]:.1e}")
        print(line + (f", the teacher's step within {errors[where]:.0e}" if errors else ""))


def teacher_moves(variant: Variant, ours: Variant, batch: Batch) -> dict[str, Tensor]:
    """Make a step in fp32 and eager. Return how far it moved the teacher, by the names of ours.

    Biases are left out: those of keys have no true gradient, and AdamW makes a step of rounding noise.
    """
    tensors = dict(variant.module.named_parameters())
    names = {name: variant.names(name)[0] for name, p in ours.module.named_parameters() if p.ndim > 1}
    names = {name: theirs for name, theirs in names.items() if name.startswith("teacher.")}
    before = {name: tensors[theirs].clone() for name, theirs in names.items()}
    variant.loss(variant.module, batch).backward()
    variant.update()
    moves = {name: tensors[theirs] - before[name] for name, theirs in names.items()}
    return {name: move for name, move in moves.items() if not name.endswith("pos_embed")}


def check_timed(variants: list[Variant], batch: Batch) -> None:
    """Make the first step and compare its loss, in the precision and compiled as it will be timed, with fp32."""
    with torch.no_grad():
        expected = float(variants[0].loss(variants[0].module, batch))
    # A GPU convolves in TF32 where fp32 is asked for.
    tolerance = 1e-2 if variants[0].autocast or batch.device.type == "cuda" else 1e-5
    for variant in variants:
        loss = float(variant.step(batch))
        if not abs(loss - expected) <= tolerance * abs(expected):
            raise SystemExit(f"{variant.name} as timed has the loss {loss:.6f} instead of {expected:.6f}")


def saved_bytes(variant: Variant, batch: Batch) -> int:
    """Bytes kept for the backward pass, per image: what two images need more than one, so weights do not count."""

    def total(count: int) -> int:
        return kept_bytes(lambda: variant.forward(batch.first(count), compiled=False))

    return total(2) - total(1)


def step_bytes(variant: Variant, batch: Batch) -> int:
    """Most bytes that a step needs on a GPU besides what was there before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    variant.step(batch)
    return torch.cuda.max_memory_allocated() - before


def seconds_per_step(variant: Variant, batch: Batch, steps: int) -> float:
    return seconds_of(partial(variant.step, batch), steps, batch.device)


def flops_per_image(method: str, size: str) -> float:
    """Floating-point operations of the matrix products that a step needs (a multiply-add counts two)."""
    encoder, decoder = shapes_of(config_of(method, size))

    def blocks(tokens: int, *, dim: int, depth: int, heads: int) -> int:
        return depth * (24 * dim**2 * tokens + 4 * tokens**2 * dim)

    def embed(patches: int, *, dim: int, **_: int) -> int:
        return 2 * dim * (patches * PIXELS + (1 + patches) * decoder["dim"])

    seen, whole = 1 + NUM_VISIBLE, 1 + NUM_PATCHES
    encode = blocks(seen, **encoder) + embed(NUM_VISIBLE, **encoder)
    if method == "lomar":  # of each patch of a window the pixels are either embedded or predicted
        relative = encoder["depth"] * 2 * encoder["dim"] * 50 * (1 + WINDOW**2)
        pixels = 2 * encoder["dim"] * PIXELS * WINDOW**2
        return 3 * NUM_WINDOWS * (blocks(1 + WINDOW**2, **encoder) + relative + pixels)
    if method == "droppos":
        locate = blocks(seen, **decoder) + 2 * decoder["dim"] * NUM_PATCHES * NUM_VISIBLE
        return 3 * (encode + locate) + blocks(whole, **encoder) + 2 * encoder["dim"] * NUM_PATCHES * PIXELS
    forward = encode + blocks(whole, **decoder) + 2 * decoder["dim"] * PIXELS * NUM_MASKED
    if method == "mae":
        return 3 * forward
    teacher = blocks(whole, **encoder) + embed(NUM_PATCHES, **encoder) + blocks(whole, **decoder)
    return 3 * (forward + blocks(whole, **decoder)) + teacher


def measure(size: str, precision: str, device: torch.device, settings: Settings, peak: float | None) -> None:
    count = settings.batch or (4 if device.type == "cpu" else 256)
    title = f"{settings.method}, ViT-{size[0].upper()}/{PATCH}, {precision}, batch {count}, {settings.rounds} rounds"
    print(f"\n{title}; load average {os.getloadavg()[0]:.1f}")
    batch = make_batch(settings.method, count, device)
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
            memory[variant.name] = step_bytes(variant, batch)
    clocks = {variant.name: partial(seconds_per_step, variant, batch, steps) for variant in variants}
    times = in_rounds(clocks, settings.rounds, random.Random(0))

    goals = GOALS.get((settings.method, device.type, precision), {})
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
            share = (
                f"{speed * flops_per_image(settings.method, size) / peak:.1%}" if peak and precision == "bf16" else ""
            )
            line += f"{speed:>9.0f}{share:>9}{memory[name] / 1e9:>9.1f}"
        print(line, flush=True)
    if "plain" in saved:
        print(f"saved for the backward pass, ours ÷ plain: {saved['ours'] / saved['plain']:.2f}")


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    device = chosen_device(settings.device)
    print_circumstances(device, "torch", "transformers", "lightly", "timm")
    peak = matmul_peak(device) if device.type == "cuda" else None
    if peak:
        print(f"measured peak: {peak / 1e12:.0f} TFLOP/s (bf16 product of 8192 × 8192 matrices)")
    for size in settings.size:
        for precision in settings.precision:
            measure(size, precision, device, settings, peak)
            gc.collect()  # some peers refer to themselves; free them before the next are built


if __name__ == "__main__":
    main()
