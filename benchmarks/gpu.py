"""The first ten minutes on a GPU: what must hold there, and how fast it is, in one report.

    pip install -e .[recipes,test,benchmarks]
    python benchmarks/gpu.py --out gpu.json
    python benchmarks/gpu.py --sections speed --minutes 30 --methods mae hpm
    torchrun --nproc_per_node=8 benchmarks/gpu.py --out gpus.json      sharding alone
    python benchmarks/gpu.py --toy                                     anywhere: everything at toy size

The sections, in the order in which they run:

    tests        the tests of the suite that need a GPU
    sync         20 steps of every recipe in which the host must not wait for the device
    recompiles   graphs that a compiled training captures after its first step, while all schedules move; 0 is expected
    determinism  two equal runs compared bit by bit, and the noise with that of a CPU
    attention    forms of the contextual relative bias, and explicit attention beside the fused one
    data         JPEGs through the loader, and the whole training on them beside synthetic images
    sharding     activation checkpointing; under torchrun DDP beside FSDP2
    speed        training steps of every recipe with ViT-B and ViT-L, and MAE beside transformers and lightly

`sync`, `recompiles` and `determinism` train two blocks as wide as those of ViT-B; `determinism` compiles two of the
methods. A section or a method that fails is reported and does not stop the others; a training that would begin less
than a minute before the end is named as left out. Speed comes last and takes the rest of the time; repeat it alone,
with the compiler's cache filled, for the trainings that were left out. The report is written after every section.

The images are synthetic and lie on the device, except in `data`. A step is that of the engine: forward, backward,
clipping, optimizer and what follows. Times are those of CUDA events around 20 steps after 10; `of peak` is the share of
a measured bf16 matrix product. The FLOPs are those of the matrix products that a method needs, counted from the shapes
in `step.py` or, for methods that are not in it, by PyTorch's counter on one step on the meta device. Each
comparison with a peer has the same network, batch, dtype and optimizer, in rounds of random order.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))  # recipes are scripts beside this folder, not a package

from common.config import SettingsError
from common.training.distributed import join_processes

import torch
import tyro
from gpu_speed import attention, data, sharding, speed
from gpu_trainings import RECIPES, ROOT, Bench, Row, described, determinism, free, recompiles, sync
from measuring import chosen_device, cpu_name, print_circumstances, version_of

TESTS_SECONDS = 180
PACKAGES = ("torch", "transformers", "lightly", "timm")


def tests(bench: Bench) -> list[Row]:
    """Run the tests of the suite that need a GPU."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    workers = 0 if bench.toy else min(8, (os.cpu_count() or 1) // 2)
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-n", workers, "-m", "gpu", *files]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TESTS_SECONDS,
        check=False,
    )
    *_, last = done.stdout.strip().splitlines() or [""]
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    if done.returncode not in (0, 1) or not counts:
        raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-400:]}")
    failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    return [{"what": "tests", "passed": counts.get("passed", 0), "failed": counts.get("failed", 0)} | counts] + [
        {"what": name, "error": "the test fails"} for name in failed
    ]


SECTIONS: dict[str, Callable[[Bench], list[Row]]] = {
    "tests": tests,
    "sync": sync,
    "recompiles": recompiles,
    "determinism": determinism,
    "attention": attention,
    "data": data,
    "sharding": sharding,
    "speed": speed,
}
Section = Literal["tests", "sync", "recompiles", "determinism", "attention", "data", "sharding", "speed"]


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    out: Path = Path("gpu.json")
    """file of the report"""
    sections: tuple[Section, ...] = ()
    """what to run; none: everything, under torchrun sharding alone"""
    methods: tuple[str, ...] = tuple(RECIPES)
    """recipes, the most important first"""
    minutes: float = 10.0
    """time after which nothing more is begun"""
    batch: int = 0
    """images per device and step where speed is measured; 0: chosen by what fits"""
    toy: bool = False
    """tiny networks and images; always on a CPU"""


def circumstances(device: torch.device) -> dict[str, Any]:
    """Return the device, versions, date and command."""
    on_gpu = device.type == "cuda"
    versions = {package: version_of(package) for package in PACKAGES}
    return {
        "card": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "cards": torch.cuda.device_count(),
        "driver": driver() if on_gpu else None,
        "cuda": torch.version.cuda,
        "versions": versions,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
    }


def driver() -> str:
    """Return the version of the GPU's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def run_section(section: Callable[[Bench], list[Row]], bench: Bench) -> dict[str, Any]:
    """Run a section, and return its rows or its error, and its seconds."""
    begin = time.monotonic()
    try:
        result: dict[str, Any] = {"rows": section(bench)}
    except Exception as error:
        result = {"error": described(error)}
    free(bench)
    return result | {"seconds": time.monotonic() - begin}


def print_section(name: str, result: dict[str, Any]) -> None:
    """Print a section as lines of the table."""
    rows = result.get("rows", []) + ([{"what": "", "error": result["error"]}] if "error" in result else [])
    for row in rows:
        values = ", ".join(f"{key} {written(value)}" for key, value in row.items() if key != "what")
        print(f"{name:<13}{row['what']:<42}{values}", flush=True)
    print(f"{name:<13}{'':<42}{result['seconds']:.0f} s", flush=True)


def written(value: Any) -> str:
    """Write a value in the table."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


def report(settings: Settings, bench: Bench) -> dict[str, Any]:
    """Run the sections, print the table and write the report after each of them."""
    several = bench.processes.world_size > 1
    chosen = settings.sections or (("sharding",) if several else tuple(SECTIONS))
    if several and chosen != ("sharding",):
        raise SettingsError("under torchrun only --sections sharding runs; start the others without torchrun")
    result = {**circumstances(bench.device), "toy": bench.toy, "sections": {}}
    if bench.processes.is_main:
        print_circumstances(bench.device, *PACKAGES)
        print(f"driver {result['driver']}, {result['date']}{', toy size' if bench.toy else ''}\n")
        print(f"{'section':<13}{'what':<42}found")
    for name in (name for name in SECTIONS if name in chosen):
        found = result["sections"][name] = run_section(SECTIONS[name], bench)
        if bench.processes.is_main:
            print_section(name, found)
            settings.out.write_text(json.dumps(result, indent=1))
    return result


def main() -> None:
    """Run the benchmark from the command line."""
    settings = tyro.cli(Settings, description=__doc__)
    unknown = [method for method in settings.methods if method not in RECIPES]
    if unknown:
        raise SystemExit(f"gpu: there is no recipe {', '.join(unknown)}: choose among {', '.join(RECIPES)}")
    ends = time.monotonic() + 60 * settings.minutes
    try:
        with join_processes() as processes, tempfile.TemporaryDirectory() as folder:
            toy = settings.toy or processes.device.type == "cpu"
            if processes.device.type == "cpu":
                chosen_device("cpu")
            steps = {"warmup": 2, "steps": 2} if toy else {}
            report(settings, Bench(processes, toy, settings.methods, settings.batch, Path(folder), ends, **steps))
    except SettingsError as error:
        raise SystemExit(f"gpu: {error}") from error


if __name__ == "__main__":
    main()
