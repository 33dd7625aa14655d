"""Fine-tuning with all that mixes: the batch size alone decides the result, and a killed run goes on bit for bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import Optimization, SettingsError
from common.evaluation.finetuning import MAE, Classifier, Finetuning, check_finetuning, finetune
from common.files import read_tensors
from common.training.log import read_metrics

import pytest
import torch
from pictures import quoting
from probes import NORMALIZE, small, stage
from torch import Tensor

SHORT = Optimization(epochs=3, batch_size=12, base_lr=0.05, warmup_epochs=1, betas=(0.9, 0.999), layer_decay=0.65)
MIXED = replace(MAE, head_scale=0.5, optimization=SHORT)


def tuned(folder: Path, settings: Finetuning = MIXED, **run: Any) -> dict[str, Tensor]:
    """Return the weights after training, without the keys' biases, whose gradients are rounding alone."""
    where = stage(folder)
    where = replace(where, run=replace(where.run, log_every=1, checkpoint_minutes=0.0, **run))
    finetune(small(), NORMALIZE, settings=settings, stage=where)
    tensors = read_tensors(max((folder / "checkpoint").glob("step_*")) / "tensors.safetensors")[0]
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("method.")}
    for name in [name for name in weights if name.endswith("qkv.bias")]:
        q, _, v = weights[name].chunk(3)
        weights[name] = torch.cat([q, v])
    return weights


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]


def test_the_size_of_the_micro_batches_does_not_change_the_result(tmp_path: Path) -> None:
    whole = tuned(tmp_path / "whole")
    cut = tuned(tmp_path / "cut", replace(MIXED, optimization=replace(SHORT, device_batch=4)))
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    for name, tensor in whole.items():
        torch.testing.assert_close(
            cut[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", ["mixup", "cutmix", "erasing", "smoothing"])
def test_every_setting_that_mixes_changes_the_loss(name: str, tmp_path: Path) -> None:
    tuned(tmp_path / "all")
    tuned(tmp_path / "without", replace(MIXED, **{name: 0.0}))
    assert losses(tmp_path / "without") != pytest.approx(losses(tmp_path / "all"), rel=1e-3)


def test_a_killed_fine_tuning_that_is_resumed_is_the_same_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tuned(tmp_path / "whole")
    with monkeypatch.context() as patch:
        steps = iter(range(4))
        forward = Classifier.forward
        patch.setattr(Classifier, "forward", lambda *args: (next(steps), forward(*args))[1])
        with pytest.raises(StopIteration):
            tuned(tmp_path / "cut")
    cut = tuned(tmp_path / "cut", resume=True, workers=1)
    assert all(torch.equal(whole[name], cut[name]) for name in whole | cut)


def test_a_batch_reaches_the_classifier_as_bytes_with_whole_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def forward(self: Classifier, batch: Any, noise: Any, progress: Any) -> Any:
        seen.extend(batch)
        return {"loss": self.head.weight.sum()}

    monkeypatch.setattr(Classifier, "forward", forward)
    tuned(tmp_path)
    seen = seen[2:]  # the first batch, of two images, counts the operations
    assert {(part.dtype, part.shape) for part in seen[::2]} == {(torch.uint8, (12, 1, 16, 16))}
    assert {(part.dtype, part.shape) for part in seen[1::2]} == {(torch.int64, (12,))}


ODD = "--finetune.batch-size {}: mixup and cutmix mix pairs, and micro-batches of {} images are odd; use {}"


@pytest.mark.parametrize(
    ("batch", "devices", "device_batch", "sentence"),
    [
        (25, 1, 256, ODD.format(25, 25, "a multiple of 2, or --finetune.mixup 0 --finetune.cutmix 0")),
        (20, 4, 256, ODD.format(20, 5, "a multiple of 8, or")),
        (30, 1, 20, ODD.format(30, 15, "--finetune.device-batch 10, or")),
        (30, 1, 1, ODD.format(30, 1, "--finetune.device-batch 2, or")),
        (25, 2, 256, "a batch of 25 images cannot be shared equally by 2 devices"),
        (31, 1, 256, "30 labeled images do not fill a batch of 31: use a smaller --finetune.batch-size"),
    ],
)
def test_a_batch_that_cannot_be_shared_or_mixed_is_refused_before_anything_is_trained(
    batch: int, devices: int, device_batch: int, sentence: str, tmp_path: Path
) -> None:
    settings = replace(MIXED, optimization=replace(SHORT, batch_size=batch, device_batch=device_batch))
    data = stage(tmp_path).data
    with pytest.raises(SettingsError, match=quoting(sentence)):
        check_finetuning(settings, data, world_size=devices, prefix="finetune.")
    if batch == 30:
        check_finetuning(replace(settings, mixup=0.0, cutmix=0.0), data, world_size=devices)
