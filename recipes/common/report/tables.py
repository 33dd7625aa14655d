"""Text tables of results."""

from pathlib import Path
from typing import Any


def table(name: str, result: dict[str, Any], titles: dict[str, str], folder: Path) -> str:
    """Format the results of a pre-training and its evaluations: accuracy, time and files."""
    trained = result["pretraining"]
    lines = [
        "",
        f"{name}: pre-trained for {trained['epoch']:.0f} epochs in {trained['seconds']:.0f} s, "
        f"loss {trained['loss']:.4f}, {trained['images_per_second']:.0f} images/s, "
        f"{trained['waiting']:.1%} of the time waiting for data",
    ]
    rows = [(key, titles[key], result[key]) for key in titles if key in result]
    if rows:
        first = rows[0][2]
        lines += [
            "",
            f"{'accuracy on ' + str(first['test']) + ' test images':<42}{'accuracy':>10}{'epochs':>9}{'seconds':>9}",
            "─" * 70,
        ]
        for key, title, row in rows:
            what = "pre-trained, then fine-tuned" if key == "finetune" else title
            epochs = f"{row['epoch']:.0f}" if "epoch" in row else ""
            lines.append(f"{what:<42}{row['accuracy']:>8.1f} %{epochs:>9}{row['seconds']:>9.0f}")
        lines += ["─" * 70, f"{first['labeled']} labeled images"]
    files = (
        "encoder.safetensors",
        "classifier.safetensors",
        "confusion.png",
        "reconstruction.png",
        "curves.png",
        "result.json",
        "metrics.jsonl",
    )
    return "\n".join([*lines, *_files(folder, *files)])


def tuned_table(title: str, result: dict[str, Any], folder: Path) -> str:
    """Format the results of training a classifier: accuracy, time and files."""
    return "\n".join(
        [
            "",
            f"{title}: {result['accuracy']:.1f} % of {result['test']} test images are right, after "
            f"{result['epoch']:.0f} epochs of {result['labeled']} labeled images in {result['seconds']:.0f} s, "
            f"{result['images_per_second']:.0f} images/s, {result['waiting']:.1%} of the time waiting for data",
            *_files(folder, "classifier.safetensors", "confusion.png", "result.json", "metrics.jsonl", "curves.png"),
        ]
    )


def _files(folder: Path, *names: str) -> list[str]:
    return ["", "files:", *(f"  {folder / name}" for name in names if (folder / name).exists())]


def probe_table(title: str, result: dict[str, Any], folder: Path) -> str:
    """Format the results of a probe: accuracy, selection of the learning rate or of k, and files."""
    if "images_per_second" in result:
        return tuned_table(title, result, folder)
    of_class, of_mean = "the class token", "the mean of the patch tokens"
    lines = ["", f"{title} on {of_class if result['feature'] == 'class' else of_mean}"]
    if result.get("held_out"):
        lines += ["", f"{'base learning rate':<42}{'held out':>10}", "─" * 52]
        lines += [
            f"{rate:<42}{value:>8.1f} %{'  ← taken' if float(rate) == result['base_lr'] else ''}"
            for rate, value in result["held_out"].items()
        ]
    if "by_k" in result:
        left_out = result["leave_one_out"]
        lines += ["", f"{'neighbors':<26}{'leave-one-out':>16}{'accuracy':>10}", "─" * 52]
        lines += [
            f"{k:<26}{left_out[k]:>14.1f} %{value:>8.1f} %{'  ← taken' if int(k) == result['k'] else ''}"
            for k, value in result["by_k"].items()
        ]
    at = f"k = {result['k']}" if "k" in result else f"{result['epoch']} epochs at {result['base_lr']:g}"
    lines += [
        "",
        f"{result['accuracy']:.1f} % of {result['test']} test images are right ({at}), "
        f"with {result['labeled']} labeled images, in {result['seconds']:.0f} s",
        "",
        "files:",
    ]
    names = "result.json", "metrics.jsonl", "curves.png"
    return "\n".join([*lines, *(f"  {folder / name}" for name in names if (folder / name).exists())])
