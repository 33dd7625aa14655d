"""All evaluations of a pre-trained encoder: fine-tuning, frozen features, and training from scratch for comparison."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.config import SettingsError
from common.evaluation import knn as knn_module
from common.evaluation import linear as linear_module
from common.evaluation import nonlinear as nonlinear_module
from common.evaluation import pixels
from common.evaluation.finetuning import Finetuning, finetune
from common.evaluation.knn import knn
from common.evaluation.linear import linear
from common.evaluation.nonlinear import fitted, nonlinear
from common.runs import Stage
from common.weights.encoders import load_encoder


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of an encoder.

    Args:
        title: title in messages and tables.
        run: maps the file of the encoder, the settings of fine-tuning, the stage and the earlier results to a result,
            None if the evaluation was skipped.
        trains: whether it uses the settings of fine-tuning, which must then be valid for the images.
    """

    title: str
    run: Callable[[Path, Finetuning, Stage, dict[str, Any]], dict[str, Any] | None]
    trains: bool = True


def _finetune(path: Path, settings: Finetuning, stage: Stage, results: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune the encoder."""
    return _tuned(path, settings, stage, scratch=False)


def _scratch(path: Path, settings: Finetuning, stage: Stage, results: dict[str, Any]) -> dict[str, Any]:
    """Train the same network from scratch for the same number of epochs, without layer-wise learning-rate decay."""
    rate = settings.scratch_lr or settings.optimization.base_lr
    settings = replace(settings, optimization=replace(settings.optimization, base_lr=rate, layer_decay=1.0))
    return _tuned(path, settings, stage, scratch=True)


def _budget(path: Path, settings: Finetuning, stage: Stage, results: dict[str, Any]) -> dict[str, Any]:
    """Train from scratch for as many floating-point operations as pre-training and fine-tuning take together."""
    pretraining, finetuning = (results[name]["operations"] for name in ("pretraining", "finetune"))
    epochs = round(settings.optimization.epochs * (pretraining + finetuning) / finetuning)
    optimization = replace(settings.optimization, epochs=epochs)
    return _scratch(path, replace(settings, optimization=optimization), stage, results)


def _tuned(path: Path, settings: Finetuning, stage: Stage, *, scratch: bool) -> dict[str, Any]:
    encoder, normalize = load_encoder(
        path,
        image_size=stage.data.settings.image_size,
        class_token=settings.pool == "class",
        drop=settings.drop_path,
        scratch=scratch,
        seed=stage.run.seed,
    )
    into = None if scratch else stage.folder.parent  # the classifier of a run is the fine-tuned one
    return finetune(encoder, normalize, settings=settings, stage=stage, into=into)


def _linear(path: Path, settings: Finetuning, stage: Stage, results: dict[str, Any]) -> dict[str, Any]:
    """Train a linear classifier on the frozen features."""
    return linear(*_frozen(path, stage), settings=_protocol(linear_module, stage), stage=stage)


def _knn(path: Path, settings: Finetuning, stage: Stage, results: dict[str, Any]) -> dict[str, Any]:
    """Classify by nearest neighbors of the frozen features."""
    return knn(*_frozen(path, stage), settings=_protocol(knn_module, stage), stage=stage)


def _nonlinear(path: Path, settings: Finetuning, stage: Stage, results: dict[str, Any]) -> dict[str, Any]:
    """Train new blocks on top of the frozen encoder."""
    protocol = fitted(_protocol(nonlinear_module, stage), stage)
    return nonlinear(*_frozen(path, stage), settings=protocol, stage=stage)


def _protocol(module: Any, stage: Stage) -> Any:
    """Return the default settings of the program of an evaluation, so that both give the same number."""
    return module.FOLDER if stage.data.settings.folder else module.DIGITS


def _frozen(path: Path, stage: Stage) -> Any:
    return load_encoder(path, image_size=stage.data.settings.image_size, seed=stage.run.seed)


EVALUATIONS = {
    "finetune": Evaluation("fine-tuning", _finetune),
    "scratch": Evaluation("from scratch, same epochs", _scratch),
    "budget": Evaluation("from scratch, same compute", _budget),
    "nearest": Evaluation("nearest neighbor on raw pixels", lambda *args: pixels.nearest(args[2]), trains=False),
    "svm": Evaluation("SVM on raw pixels", lambda *args: pixels.svm(args[2]), trains=False),
    "linear": Evaluation("linear probe of the frozen encoder", _linear, trains=False),
    "knn": Evaluation("k-NN on the frozen encoder", _knn, trains=False),
    "nonlinear": Evaluation("non-linear probe of the frozen encoder", _nonlinear, trains=False),
}


def in_order(wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Return the evaluations to run, each once and in the order of `EVALUATIONS`.

    Fine-tuning is added if the compute budget includes its operations.

    Raises:
        SettingsError: if the name of an evaluation is unknown.
    """
    unknown = [name for name in wanted if name not in EVALUATIONS]
    if unknown:
        raise SettingsError(f"--evaluate {unknown[0]}: choose among {', '.join(EVALUATIONS)}")
    needed = {*wanted, "finetune"} if "budget" in wanted else {*wanted}
    return tuple(name for name in EVALUATIONS if name in needed)
