"""A probe of a frozen encoder as a program, from the command line to the table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from common.config import Count, Counts, DataSettings, Flat, Run, SettingsError, parse
from common.data.sources import open_data
from common.evaluation.finetuning import check_finetuning
from common.files import write_json
from common.networks.encoder import Encoder
from common.report.curves import draw_curves
from common.report.tables import probe_table
from common.runs import Stage, prepare
from common.training.distributed import join_processes
from common.training.log import read_metrics
from common.weights.encoders import open_encoder


@dataclass(frozen=True)
class Probed:
    """The encoder, and the images that it is evaluated on."""

    encoder: str = "encoder.safetensors"
    """encoder.safetensors of a run, a published checkpoint of the MAE family, or timm:NAME:FILE with timm's name of a
    vision transformer (tag included if its mean and std matter) and a file of its weights"""
    data: Path | None = None
    """folder with train/CLASS/*.jpg and val/CLASS/*.jpg; none: the handwritten digits that come with scikit-learn"""
    image_size: Counts | None = None
    """height and width in pixels; none: those of the encoder. Positions are resampled"""
    labels_per_class: Count = 10
    """of the embedded digits: labeled images per class"""

    def images_for(self, encoder: Encoder, *, flip: float) -> DataSettings:
        """Return the settings of images as the encoder wants them."""
        return DataSettings(
            path=self.data,
            image_size=(encoder.height * encoder.patch, encoder.width * encoder.patch),
            channels=encoder.channels,  # pyright: ignore
            flip=flip,
            labels_per_class=self.labels_per_class,
        )


@dataclass(frozen=True)
class ProbeConfig:
    """What the settings of all probes have; each adds its own under `settings`."""

    probed: Flat[Probed] = field(default_factory=Probed)
    run: Flat[Run] = field(default_factory=Run)


class Config(Protocol):
    """What the settings of every probe have."""

    @property
    def probed(self) -> Probed: ...
    @property
    def run(self) -> Run: ...
    @property
    def settings(self) -> Any: ...


def probe(
    evaluation: Callable[..., dict[str, Any]],
    presets: dict[str, Any],
    *,
    name: str,
    title: str,
    description: str | None,
    args: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Open an encoder, evaluate it frozen, and print and write the result.

    Args:
        evaluation: `linear`, `knn` or `nonlinear`.
        presets: settings by name, as `config.parse` wants them.
        name: of the recipe, and of the run unless `--name` says otherwise.
        title: of the evaluation, for people.
        description: on top of the help.
        args: the command line; that of the process if none.
    """
    try:
        config: Config = parse(presets, args, name=name, description=description)
        probed, run = config.probed, config.run
        folder = run.runs / (run.name or name)
        with join_processes(run.device) as processes:
            encoder, normalize = open_encoder(probed.encoder, image_size=probed.image_size)
            settings = probed.images_for(encoder, flip=getattr(config, "flip", 0.0))  # k-NN has no flip
            data = open_data(settings, seed=run.seed)
            data.splits()  # before anything is written
            if finetuning := getattr(config.settings, "finetune", None):
                check_finetuning(finetuning, data, world_size=processes.world_size)
            prepare(folder, name, config, processes=processes)
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
