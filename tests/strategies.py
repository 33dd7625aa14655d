"""Hypothesis strategies of valid input, small tensors of any batch shape with and without ties; and copies of files."""

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

import mimkit

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

SOURCES = sorted(path for path in Path(mimkit.__path__[0]).glob("*.py") if path.stem != "__init__")

fast = settings(deadline=None)
batches = st.sampled_from([(), (1,), (3,), (2, 3), (0,), (2, 0)])
channels = st.sampled_from([1, 3, 10])


@functools.cache
def copied(theme: str) -> ModuleType:
    """Import a file of mimkit by itself, as if it had been copied into another code base.

    The run-time type checker does not apply to the copy, so it compiles in one graph and raises its own errors.
    """
    path = Path(mimkit.__path__[0], f"{theme}.py")
    spec = importlib.util.spec_from_file_location(f"copied_{theme}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Return uniform numbers in [0, 1) that are the same at every call."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def rows(tensor: Tensor) -> Tensor:
    """Flatten the leading axes of a tensor, even if it has no elements."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


@st.composite
def uniforms_like(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """Draw numbers in [0, 1) of the shape of a tensor: all distinct, with ties, or all zero."""
    levels = draw(st.sampled_from([2**24, 5, 2, 1]))
    return (seeded(*tensor.shape, seed=draw(st.integers(0, 99))) * levels).floor() / levels


@st.composite
def uniforms(draw: st.DrawFn, *shape: int) -> Tensor:
    """Draw numbers in [0, 1) with any leading axes: all distinct, with ties, or all zero."""
    return draw(uniforms_like(torch.empty((*draw(batches), *shape))))


@st.composite
def images(draw: st.DrawFn, *, even: bool = False) -> Tensor:
    """Draw images with sides of 1 to 7 pixels; `even` excludes odd sides."""
    sides = st.sampled_from([2, 4, 6]) if even else st.integers(1, 7)
    return draw(uniforms(draw(channels), draw(sides), draw(sides)))


@st.composite
def noise_and_count(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Draw noise for 0 to 9 tokens, and how many of them to mask."""
    n = draw(st.integers(0, 9))
    return draw(uniforms(n)), draw(st.integers(0, n))


@st.composite
def easy_to_hard_arguments(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Draw difficulty and noise of 0 to 9 tokens, how many to mask, and how many of these by difficulty."""
    noise, num_masked = draw(noise_and_count())
    difficulty = 2 * draw(uniforms_like(noise)) - 1
    return difficulty, noise, {"num_masked": num_masked, "num_hard": draw(st.integers(0, num_masked))}


@st.composite
def intervals(draw: st.DrawFn, *, least: int) -> tuple[int, int]:
    """Draw a size up to 6 and a length from `least` to the size."""
    size = draw(st.integers(least, 6))
    return size, draw(st.integers(least, size))
