"""Compare hard and easy patches: train classifiers from scratch on only half of the patches of each image.

    python recipes/hpm.py && python recipes/half_patches.py --run runs/hpm
    python recipes/half_patches.py --run runs/hpm --data DIR --seeds 0

The difficulty predictor of a trained HPM ranks the patches of every view. In training and testing, the input of a
classifier is the hardest half, the easiest half, a random half, or all patches.

Paper: HPM, arXiv 2304.05919, supplement: ImageNet accuracy 79.8 % (hardest), 79.1 (random), 78.7 (easiest), 80.9 (all).
"""

import statistics
from dataclasses import dataclass, replace
from typing import Any, Literal

from common.analysis import AnalysisConfig, load_method
from common.config import MayDiffer, SettingsError, program, to_json
from common.data.sources import open_data
from common.evaluation.finetuning import check_finetuning, finetune
from common.files import write_json
from common.runs import Stage, prepare, resumable
from common.training.distributed import join_processes
from common.weights.encoders import load_encoder
from mimkit.masking import easy_to_hard
from mimkit.tokens import split

from torch import Tensor, nn

Part = Literal["all", "hardest", "random", "easiest"]


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Settings of the comparison; images, network and training are those of the run's fine-tuning."""

    parts: MayDiffer[tuple[Part, ...]] = ("all", "hardest", "random", "easiest")
    """selections of patches to compare"""
    share: float = 0.5
    """share of the patches in a selection other than all"""
    seeds: MayDiffer[tuple[int, ...]] = (0, 1, 2)
    """random seeds; every selection is trained once per seed"""
    epochs: int | None = None
    """epochs of each training; none: those of the run's fine-tuning"""
    labels_per_class: int = 100
    """mnist, digits and shapes only: labeled images per class"""
    workers: MayDiffer[int] = -1
    """data-loading processes; -1: one per free core, at most 16"""
    accept_changed_data: MayDiffer[bool] = False
    """go on although names or labels of the images have changed since the comparison was started"""


class Half(nn.Module):
    """Select visible patches by their difficulty, as predicted by a trained HPM."""

    def __init__(self, method: Any, part: Part, share: float) -> None:
        super().__init__()
        self.method, self.part = method.requires_grad_(False), part
        tokens = method.height * method.width
        self.num_hidden = tokens - int(tokens * share)
        if not 0 < share < 1 or self.num_hidden == tokens:
            raise SettingsError(f"--share {share} of {tokens} patches does not leave both seen and unseen ones")

    def forward(self, patches: Tensor, noise: Tensor) -> Tensor:
        difficulty, _ = self.method.predict_difficulty(patches)
        num_hard = 0 if self.part == "random" else self.num_hidden
        hidden = easy_to_hard(
            difficulty if self.part == "easiest" else -difficulty, noise, num_masked=self.num_hidden, num_hard=num_hard
        )
        return split(hidden, num_masked=self.num_hidden)[0]


def main(config: Config) -> None:
    method, trained = load_method(
        config.run, needs="predict_difficulty", of="hpm.py, whose method predicts how hard patches are"
    )
    path = config.data or trained.data.path
    settings = replace(trained.finetune, optimization=replace(trained.finetune.optimization, layer_decay=1.0))
    if config.epochs is not None:
        settings = replace(settings, optimization=replace(settings.optimization, epochs=config.epochs))
    accuracies: dict[str, list[float]] = {part: [] for part in config.parts}
    with join_processes(trained.run.device) as processes:
        for seed in config.seeds:
            images = replace(trained.data, path=path, labels_per_class=config.labels_per_class)
            data = open_data(images, seed=seed)
            check_finetuning(settings, data, world_size=processes.world_size)
            for part in config.parts:
                folder = config.run / "half_patches" / f"{part}-{seed}"
                again = {"resume": resumable(folder), "restart": False}
                again |= {"accept_changed_data": config.accept_changed_data}
                run = replace(trained.run, seed=seed, workers=config.workers, **again)
                prepare(folder, "half_patches", config, run=run, data=data, processes=processes)
                encoder, normalize = load_encoder(
                    config.run / "encoder.safetensors",
                    class_token=settings.pool == "class",
                    drop=settings.drop_path,
                    scratch=True,
                    seed=seed,
                )
                select = None if part == "all" else Half(method, part, config.share)
                stage = Stage(processes, data, run, folder, f"{part}, seed {seed}")
                result = finetune(encoder, normalize, settings=settings, stage=stage, select=select)
                accuracies[part].append(result["accuracy"])
        rows = {
            part: f"{statistics.mean(found):.1f} % ({min(found):.1f} – {max(found):.1f})"
            for part, found in accuracies.items()
        }
        if processes.is_main:
            write_json(config.run / "half_patches" / "result.json", {"config": to_json(config), **accuracies})
        processes.print("\n".join(["", *(f"{part:<10}{row}" for part, row in rows.items())]))


if __name__ == "__main__":
    program(main, Config, name="half_patches", description=__doc__)
