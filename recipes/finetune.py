"""Fine-tune an encoder on labeled images and measure its accuracy.

    python recipes/finetune.py --encoder runs/mae/encoder.safetensors                     MNIST
    python recipes/finetune.py --encoder runs/mae/encoder.safetensors --data DIR          images of your own
    torchrun --nproc_per_node=8 recipes/finetune.py --preset mae_base --encoder mae_pretrain_vit_base.pth --data DIR

The encoder is an export of any of these recipes, or a published checkpoint of the MAE family, SimMIM or BEiT.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.config import EMBEDDED, Count, Counts, Flat, Run, SettingsError, Share, parse
from common.data.sources import open_data
from common.evaluation import finetuning
from common.evaluation.evaluations import EVALUATIONS
from common.evaluation.finetuning import Finetuning, check_finetuning, finetune, of, resolved
from common.evaluation.probe import images_for
from common.files import write_json
from common.report.curves import draw_curves
from common.report.tables import tuned_table
from common.runs import Stage, prepare
from common.training.distributed import join_processes
from common.training.log import read_metrics
from common.training.threads import with_threads
from common.weights.encoders import load_encoder


@dataclass(frozen=True)
class Config:
    """The presets are the settings of the papers."""

    encoder: Path
    """encoder.safetensors of a run, or a published checkpoint"""
    scratch: bool = False
    """train the same network from scratch instead"""
    data: str = "mnist"
    """folder with train/CLASS/*.jpg and val/CLASS/*.jpg; or mnist, digits or shapes, images that need no file"""
    image_size: Counts | None = None
    """height and width in pixels, for which positions are resampled; none: those of the encoder"""
    flip: Share = 0.5
    """probability of a horizontal flip"""
    labels_per_class: Count = 10
    """mnist, digits and shapes only: labeled images per class"""
    run: Flat[Run] = field(default_factory=Run)
    finetune: Flat[Finetuning] = field(default_factory=Finetuning)


UNSET = Path("encoder.safetensors")
PRESETS = {
    **dict.fromkeys(EMBEDDED, Config(UNSET, flip=0.0, finetune=finetuning.DIGITS)),
    "mnist": Config(UNSET, flip=0.0, finetune=finetuning.MNIST),
    "folder": Config(UNSET, finetune=finetuning.FOLDER),
    "mae_base": Config(UNSET, finetune=finetuning.MAE),
    "mae_large": Config(UNSET, finetune=finetuning.MAE_LARGE),
    "mae_huge": Config(UNSET, finetune=finetuning.MAE_HUGE),
    "simmim_base": Config(UNSET, finetune=finetuning.SIMMIM),
    "beyond_masking": Config(UNSET, finetune=finetuning.BEYOND_MASKING),
    "lut_small": Config(UNSET, finetune=of(finetuning.LUT, epochs=300, base_lr=5e-4, layer_decay=0.75)),
    "lut_base": Config(UNSET, finetune=finetuning.LUT),
    "lut_large": Config(UNSET, finetune=finetuning.LUT_LARGE),
}


def main(config: Config) -> None:
    run, settings = config.run, config.finetune
    folder = run.runs / (run.name or "finetune")
    with join_processes(run.device) as processes:
        encoder, normalize = load_encoder(
            config.encoder,
            image_size=config.image_size,
            class_token=settings.pool == "class",
            drop=settings.drop_path,
            scratch=config.scratch,
            seed=run.seed,
        )
        sizes: Any = {"path": config.data, "flip": config.flip, "labels_per_class": config.labels_per_class}
        data = open_data(images_for(encoder, **sizes), seed=run.seed)
        settings = resolved(settings, data, processes.world_size)
        run = with_threads(run, folder, processes)
        config = replace(config, finetune=settings, run=run)
        check_finetuning(settings, data, world_size=processes.world_size)
        prepare(folder, "finetune", config, run=run, data=data, processes=processes)
        title = EVALUATIONS["scratch" if config.scratch else "finetune"].title
        stage = Stage(processes, data, run, folder, title)
        result = finetune(encoder, normalize, settings=settings, stage=stage, into=folder)
        if processes.is_main:
            write_json(folder / "result.json", {"recipe": "finetune", "encoder": str(config.encoder), **result})
            draw_curves(folder / "curves.png", {title: read_metrics(folder / "metrics.jsonl")})
            processes.print(tuned_table(title, result, folder))


if __name__ == "__main__":
    try:
        main(parse(PRESETS, name="finetune", description=__doc__))
    except SettingsError as error:
        raise SystemExit(f"finetune: {error}") from error
