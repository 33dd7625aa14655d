"""The program of a probe of a frozen encoder, from the command line to the printed table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from common.config import Count, Counts, DataSettings, Flat, Run, SettingsError, parse
from common.data.sources import open_data
from common.evaluation.finetuning import check_finetuning, resolved
from common.files import write_json
from common.networks.encoder import Encoder
from common.report.curves import draw_curves
from common.report.tables import probe_table
from common.runs import Stage, has_results, prepare
from common.training.distributed import join_processes
from common.training.log import read_metrics
from common.training.threads import with_threads
from common.weights.encoders import open_encoder


@dataclass(frozen=True)
class Probed:
    """The encoder, and the images on which it is evaluated."""

    encoder: str = "encoder.safetensors"
    """encoder.safetensors of a run, a published checkpoint of the MAE family, or timm:NAME:FILE, timm's name of a
    vision transformer (with the tag, which determines mean and std) and a file of its weights"""
    data: str = "mnist"
    """folder with train/CLASS/*.jpg and val/CLASS/*.jpg; or mnist, digits or shapes, images that need no file"""
    image_size: Counts | None = None
    """height and width in pixels, for which positions are resampled; none: those of the encoder"""
    labels_per_class: Count = 10
    """mnist, digits and shapes only: labeled images per class"""


@dataclass(frozen=True)
class ProbeConfig:
    """Settings shared by all probes; each adds its own as `settings`."""

    probed: Flat[Probed] = field(default_factory=Probed)
    run: Flat[Run] = field(default_factory=Run)


def images_for(encoder: Encoder, *, path: str, flip: float, labels_per_class: int) -> DataSettings:
    """Return the settings of images of the size and channels that an encoder takes."""
    return DataSettings(
        path=path,
        image_size=(encoder.height * encoder.patch, encoder.width * encoder.patch),
        channels=encoder.channels,
        flip=flip,
        labels_per_class=labels_per_class,
    )


def probe(
    evaluation: Callable[..., dict[str, Any]],
    presets: dict[str, Any],
    *,
    name: str,
    title: str,
    description: str | None,
    args: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Evaluate a frozen encoder, and print and write the result.

    Args:
        evaluation: `linear`, `knn` or `nonlinear`.
        presets: settings by name, see `config.parse`.
        name: name of the recipe, and of the run unless `--name` is given.
        title: title of the evaluation in messages.
        description: text shown at the top of the help.
        args: command-line arguments; by default those of the process.

    Returns:
        The result of the evaluation.

    Raises:
        SystemExit: with a message, if a setting is invalid or the evaluation fails.
    """
    try:
        config: Any = parse(presets, args, name=name, description=description)
        probed, run = config.probed, config.run
        folder = run.runs / (run.name or name)
        with join_processes(run.device) as processes:
            run = with_threads(run, folder, processes)
            config = replace(config, run=run)
            encoder, normalize = open_encoder(probed.encoder, image_size=probed.image_size)
            flip = getattr(config, "flip", 0.0)  # k-NN has no flip
            settings = images_for(encoder, path=probed.data, flip=flip, labels_per_class=probed.labels_per_class)
            data = open_data(settings, seed=run.seed)
            data.splits()  # before anything is written
            if finetuning := getattr(config.settings, "finetune", None):
                finetuning = resolved(finetuning, data, processes.world_size)
                config = replace(config, settings=replace(config.settings, finetune=finetuning))
                check_finetuning(finetuning, data, world_size=processes.world_size)
            # without checkpoints, an evaluation that was interrupted starts anew
            resume = run.resume and (finetuning is not None or has_results(folder))
            prepare(folder, name, config, run=replace(run, resume=resume), data=data, processes=processes)
            stage = Stage(processes, data, run, folder, title)
            result = evaluation(encoder, normalize, settings=config.settings, stage=stage)
            if processes.is_main:
                write_json(folder / "result.json", {"recipe": name, "encoder": str(probed.encoder), **result})
                if metrics := read_metrics(folder / "metrics.jsonl"):
                    draw_curves(folder / "curves.png", {title: metrics})
                processes.print(probe_table(title, result, folder))
        return result
    except SettingsError as error:
        raise SystemExit(f"{name}: {error}") from error
