"""What it costs on a CPU that glibc returns freed memory to the system: a training step with and without.

    python benchmarks/memory.py
    python benchmarks/memory.py --method droppos --size small --precision fp32 --rounds 25

Three processes train the same recipe: `kept`, as the recipes set it (`recipes/common/__init__.py`); `returned`, glibc's
default; `large pages`, the default with THP_MEM_ALLOC_ENABLE=1. Each round runs one step of each, in random order; a
ratio is that of two times of one round. One thread and processor time. Page faults are those of one step.
"""

import os
import random
import resource
import statistics
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal, cast
from unittest import mock

import tyro

VARIANTS = "kept", "returned", "large pages"


@dataclass(frozen=True)
class Settings:
    method: Literal["mae", "hpm", "droppos", "lomar"] = "mae"
    """what to train"""
    size: Literal["small", "base", "large"] = "base"
    """size of the encoder"""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 is autocast"""
    batch: int = 4
    """images per step"""
    rounds: int = 15
    """each runs one step of every variant"""


def train(variant: str, settings: Settings) -> None:
    """Make a step for each line of the input, and print its seconds, page faults and the peak of the memory in GB."""
    if variant != "kept":
        with mock.patch("ctypes.CDLL", side_effect=OSError):  # as if there were no mallopt
            sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "recipes"))
            import common  # noqa: F401  # pyright: ignore[reportUnusedImport]
    from common.data.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize

    import step
    import torch
    from measuring import chosen_device

    device, config = chosen_device("cpu"), step.config_of(settings.method, settings.size)
    torch.manual_seed(0)
    method = step.RECIPES[settings.method].RECIPE.method(config, Normalize(IMAGENET_MEAN, IMAGENET_STD))
    bf16 = settings.precision == "bf16"
    ours = step.recipe_variant("ours", method, config.optimization, device, bf16=bf16, compiled=False)
    batch = step.make_batch(settings.method, settings.batch, device)
    for _ in range(4):
        ours.step(batch)
    print("ready", flush=True)
    for _ in sys.stdin:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds = step.seconds_per_step(ours, batch, 1)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        print(seconds, usage.ru_minflt - before, usage.ru_maxrss / 1e6, flush=True)


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in VARIANTS:
        train(sys.argv[1], tyro.cli(Settings, args=sys.argv[2:]))
        return
    settings = tyro.cli(Settings, description=__doc__)
    processes: dict[str, subprocess.Popen[str]] = {}
    for variant in VARIANTS:
        environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1" if variant == "large pages" else "0"}
        command = [sys.executable, __file__, variant, *sys.argv[1:]]
        pipe = subprocess.PIPE
        processes[variant] = subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe)

    def answer(variant: str) -> str:
        return cast(str, processes[variant].stdout.readline())  # pyright: ignore[reportOptionalMemberAccess]

    if [answer(variant).strip() for variant in VARIANTS] != ["ready"] * 3:
        raise SystemExit("a process did not start")
    rows: dict[str, list[list[float]]] = {variant: [] for variant in VARIANTS}
    order = random.Random(0)
    for _ in range(settings.rounds):
        for variant in order.sample(VARIANTS, 3):
            print("step", file=processes[variant].stdin, flush=True)
            rows[variant].append([float(number) for number in answer(variant).split()])
    print("python", *sys.argv)
    print(f"{settings}; load average {os.getloadavg()[0]:.1f}")
    print(f"{'variant':<12}{'ms per step':>12}{'ratio':>8}{'min':>7}{'max':>7}{'page faults':>13}{'peak GB':>9}")
    for variant in VARIANTS:
        seconds, faults, peaks = zip(*rows[variant], strict=True)
        ratios = [row[0] / kept[0] for row, kept in zip(rows[variant], rows["kept"], strict=True)]
        line = f"{variant:<12}{statistics.median(seconds) * 1e3:>12.1f}{statistics.median(ratios):>8.3f}"
        line += f"{min(ratios):>7.3f}{max(ratios):>7.3f}{statistics.median(faults):>13.0f}{peaks[-1]:>9.2f}"
        print(line)


if __name__ == "__main__":
    main()
