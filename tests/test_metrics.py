"""Accuracies of each class, and accuracies measured during a fine-tuning, which change nothing of it."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import Optimization
from common.evaluation import metrics as module
from common.evaluation.finetuning import DIGITS, Classifier, finetune
from common.evaluation.metrics import measurements, scores, top1
from common.report.classes import draw_confusion
from common.training.log import read_metrics

import pytest
import torch
from PIL import Image
from probes import NORMALIZE, small, stage
from torch import Tensor

SHORT = Optimization(epochs=4, batch_size=10, base_lr=0.05, warmup_epochs=1, betas=(0.9, 0.999))  # 12 steps
TIMED = ("images_per_second", "waiting")


def test_the_scores_are_those_of_the_counts() -> None:
    confusion = torch.tensor([[6, 2, 0], [0, 1, 1], [0, 0, 0]])  # no image of the third class
    result = scores(confusion, ["a", "b", "c"])
    assert result["accuracy"] == top1(confusion) == pytest.approx(70)
    assert result["balanced_accuracy"] == pytest.approx((75 + 50) / 2)
    assert result["per_class"] == {"a": 75.0, "b": 50.0, "c": None}
    assert result["confusion"] == {"a": {"a": 6, "b": 2}, "b": {"b": 1, "c": 1}, "c": {}}


@pytest.mark.parametrize("batch", [7, 1000])
def test_a_row_counts_the_images_of_a_true_class(batch: int, tmp_path: Path) -> None:
    where = stage(tmp_path)
    _, test = where.data.splits()
    counted = module.Confusion(test, where, 1.0, batch=batch).count(lambda images: torch.full((len(images),), 3))
    assert counted[:, 3].tolist() == [[test.label(i) for i in range(len(test))].count(digit) for digit in range(10)]
    assert counted.sum() == len(test)


@pytest.mark.parametrize(
    ("wanted", "trained", "tested", "times"),
    [(None, 128_000_000, 50_000, 10), (None, 4000, 497, 2), (None, 100, 10_000, 1), (0, 10**6, 1, 0), (7, 1, 9, 7)],
)
def test_few_measurements_where_they_would_take_long(wanted: Any, trained: int, tested: int, times: int) -> None:
    assert measurements(wanted, trained=trained, tested=tested) == times


def tuned(folder: Path, times: int, **run: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    where, encoder = stage(folder), small()
    where = replace(where, run=replace(where.run, log_every=5, checkpoint_minutes=0.0, **run))
    settings = replace(DIGITS, optimization=SHORT, measurements=times)
    return finetune(encoder, NORMALIZE, settings=settings, stage=where), encoder.state_dict()


def log(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in TIMED} for record in read_metrics(folder / "metrics.jsonl")]


def test_what_is_measured_during_training_is_logged_and_changes_nothing(tmp_path: Path) -> None:
    result, weights = tuned(tmp_path / "measured", 3)
    without, same = tuned(tmp_path / "without", 0)
    assert all(torch.equal(weights[name], tensor) for name, tensor in same.items())
    assert [record["step"] for record in log(tmp_path / "measured")] == [4, 5, 8, 10, 12]
    assert [record["step"] for record in log(tmp_path / "measured") if "accuracy" in record] == [4, 8, 12]
    assert [record["step"] for record in log(tmp_path / "without")] == [5, 10, 12]
    assert not any("accuracy" in record for record in log(tmp_path / "without"))
    assert log(tmp_path / "measured")[-1]["accuracy"] == result["accuracy"] == without["accuracy"]
    assert result["confusion"] == without["confusion"]


def test_the_last_measurement_is_the_result_so_that_the_test_images_are_not_classified_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    count = module.Confusion.count
    monkeypatch.setattr(module.Confusion, "count", lambda *args: (calls.append(1), count(*args))[1])
    tuned(tmp_path / "measured", 3)
    assert len(calls) == 3
    again = tuned(tmp_path / "measured", 3, resume=True)[0]  # which ended, so nothing is trained
    assert len(calls) == 4
    assert again["accuracy"] == log(tmp_path / "measured")[-1]["accuracy"]


@pytest.mark.parametrize("killed_in", [5, 8])  # right after a record alone, and right after a measurement
def test_a_killed_run_that_is_resumed_measures_the_same(
    killed_in: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, weights = tuned(tmp_path / "whole", 3)
    with monkeypatch.context() as patch:
        steps = iter(range(killed_in))
        forward = Classifier.forward
        patch.setattr(Classifier, "forward", lambda *args: (next(steps), forward(*args))[1])
        with pytest.raises(StopIteration):
            tuned(tmp_path / "cut", 3)
    again, same = tuned(tmp_path / "cut", 3, resume=True)
    assert all(torch.equal(weights[name], tensor) for name, tensor in same.items())
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    assert again["confusion"] == whole["confusion"]


@pytest.mark.parametrize("count", [2, 10, 60, 1000])
def test_a_confusion_matrix_of_any_size_is_drawn(count: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    confusion = torch.diag(torch.full((count,), 40)) + (torch.rand(count, count, generator=generator) < 0.05).long()
    draw_confusion(tmp_path / "confusion.png", confusion, [f"class {i} of a long name" for i in range(count)])
    with Image.open(tmp_path / "confusion.png") as picture:
        assert 600 < picture.width < 2500
        assert math.prod(picture.size) < 5e6
