"""Compare several recipes, each with several seeds, on the same images and with the same budget.

    python recipes/study.py --runs runs/study                        all recipes, three seeds
    python recipes/study.py --only mae integrated --seeds 0 --extra="--epochs 10"

Finished runs are skipped and interrupted runs are resumed, so the command can be repeated.
"""

import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from common.config import SettingsError, program
from common.files import read_json, write
from common.runs import resumable
from common.training.log import read_metrics
from common.training.signals import Stopped, stopping_at_once

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RECIPES = {
    "mae": "mae --evaluate finetune",
    "masked": "beyond_masking --evaluate finetune --task masked",
    "masked, block": "beyond_masking --evaluate finetune --task masked --mask block",
    "zoom_in": "beyond_masking --evaluate finetune --task zoom_in",
    "zoom_in, anywhere": "beyond_masking --evaluate finetune --task zoom_in --zoom anywhere",
    "zoom_out": "beyond_masking --evaluate finetune --task zoom_out",
    "zoom_out, black": "beyond_masking --evaluate finetune --task zoom_out --fill black",
    "distorted": "beyond_masking --evaluate finetune --task distorted",
    "blurred": "beyond_masking --evaluate finetune --task blurred",
    "decolorized": "beyond_masking --evaluate finetune --task decolorized",
    "integrated": "beyond_masking_integrated --evaluate finetune scratch",
    "hpm": "hpm --evaluate finetune",
    "droppos": "droppos --evaluate finetune",
    "simmim": "simmim --evaluate finetune",
    "lut": "lut --evaluate finetune",
    "lut, context": "lut --evaluate finetune --loss context",
    "lut_simmim": "lut_simmim --evaluate finetune",
    "mae, relative": "mae --evaluate finetune --positions relative",
    "lomar": "lomar --evaluate finetune",
    "lomar, absolute": "lomar --evaluate finetune --positions absolute",
    "lomar, 1 window": "lomar --evaluate finetune --windows 1",
    "lomar, 2 windows": "lomar --evaluate finetune --windows 2",
    "lomar, 6 windows": "lomar --evaluate finetune --windows 6 --anchors independent",
}


@dataclass(frozen=True)
class Study:
    """Settings of the comparison."""

    only: tuple[str, ...] = tuple(RECIPES)
    """rows of the table; the default lists all of them"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """random seeds; every recipe runs once per seed"""
    runs: Path = Path("runs/study")
    """folder of the runs and of the results, study.md and study.png"""
    extra: str = ""
    """options for every recipe, in one string"""


def main(study: Study) -> None:
    unknown = set(study.only) - set(RECIPES)
    if unknown:
        raise SettingsError(f"{', '.join(sorted(unknown))}: choose among {', '.join(RECIPES)}")
    for seed in study.seeds:
        for row in study.only:
            run(row, seed, study)
    table = [f"| task | fine-tuned, mean of {len(study.seeds)} | min – max | loss |", "|---|---|---|---|"]
    scratch: list[float] = []
    for row in study.only:
        results = [read_json(folder(row, seed, study) / "result.json") for seed in study.seeds]
        scratch = scratch or [result["scratch"]["accuracy"] for result in results if "scratch" in result]
        loss = statistics.mean(result["pretraining"]["loss"] for result in results)
        table.append(line(row, [result["finetune"]["accuracy"] for result in results], f"{loss:.3f}"))
    if scratch:
        table.append(line("no pre-training", scratch, ""))
    write(study.runs / "study.md", "\n".join([*table, ""]).encode())
    draw(study)
    print("\n".join(table), f"\n{study.runs / 'study.md'}\n{study.runs / 'study.png'}", sep="\n")


def line(title: str, accuracies: list[float], loss: str) -> str:
    """Format a row of the table: mean and range of the accuracies, and the loss."""
    least, most = min(accuracies), max(accuracies)
    return f"| {title} | {statistics.mean(accuracies):.1f} | {least:.1f} – {most:.1f} | {loss} |"


def folder(row: str, seed: int, study: Study) -> Path:
    """Return the folder of a run."""
    return study.runs / f"{re.sub('[ ,]+', '_', row)}-{seed}"


def run(row: str, seed: int, study: Study) -> None:
    """Run a recipe in a subprocess, unless its result exists.

    Raises:
        SystemExit: with the exit code of the recipe, if it fails or is stopped by a signal.
    """
    place = folder(row, seed, study)
    if (place / "result.json").exists():
        return
    name, *options = shlex.split(RECIPES[row])
    script = Path(__file__).parent / f"{name}.py"
    own = ["--seed", str(seed), "--runs", str(place.parent), "--name", place.name]
    own += ["--resume"] if resumable(place) else []
    print(f"{row}, seed {seed}", flush=True)
    process = subprocess.Popen([sys.executable, script, *options, *own, *shlex.split(study.extra)])
    try:
        with stopping_at_once():
            code = process.wait()
    except Stopped:
        process.terminate()  # it stops with a checkpoint
        code = process.wait()
    if code:
        raise SystemExit(code)  # it has said why


def draw(study: Study) -> None:
    """Plot the pre-training loss of each recipe against the epochs, averaged over seeds."""
    figure, axis = plt.subplots(figsize=(7, 5))
    axis.set_prop_cycle(color=plt.colormaps["tab20"].colors)  # pyright: ignore
    for row in study.only:
        records = [read_metrics(folder(row, seed, study) / "metrics.jsonl") for seed in study.seeds]
        losses = [statistics.mean(record["loss"] for record in step) for step in zip(*records, strict=False)]
        axis.plot([record["epoch"] for record in records[0]][: len(losses)], losses, label=row)
    axis.set_xlabel("epoch")
    axis.set_ylabel("pre-training loss")
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(study.runs / "study.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    program(main, Study, name="study", description=__doc__)
