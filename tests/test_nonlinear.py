"""New blocks behind a frozen encoder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import SettingsError
from common.evaluation import nonlinear as module
from common.evaluation.nonlinear import DeepenedEncoder, nonlinear
from common.networks.vit import Block

import nonlinear_probe
import pytest
import torch
from probes import NORMALIZE, small, stage
from torch import nn


def test_new_blocks_are_trained_behind_the_frozen_ones() -> None:
    encoder = small()
    encoder.blocks = nn.ModuleList(Block(24, 3, mlp_ratio=1.5) for _ in range(2))
    deepened = DeepenedEncoder(encoder, blocks=3, drop=0.2).train()
    shapes = [
        {name: p.shape for name, p in block.named_parameters()} for block in (encoder.blocks[1], deepened.blocks[1])
    ]
    assert shapes[0] == shapes[1]
    assert not any(block.mlp.fc1.bias.any() for block in deepened.blocks)  # pyright: ignore
    assert [float(block.drop) for block in deepened.blocks] == pytest.approx([0, 0.1, 0.2])  # pyright: ignore
    patches = torch.rand(2, 4, 64)
    deepened(patches, deepened.positions, torch.rand(2, 3, 2)).square().sum().backward()
    learning = {name for name, parameter in deepened.named_parameters() if parameter.grad is not None}
    assert learning == {name for name, _ in deepened.named_parameters() if not name.startswith("encoder.")}
    assert not deepened.encoder.training


def test_without_a_new_block_it_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"^--blocks 0: without a new block it is a linear probe$"):
        DeepenedEncoder(small(), blocks=0)


def test_new_blocks_are_fine_tuned_without_layer_decay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(module, "finetune", lambda *_, **arguments: seen.update(arguments) or {})
    settings = nonlinear_probe.PRESETS["folder"].settings
    here = stage(tmp_path)
    assert nonlinear(small(), NORMALIZE, settings=settings, stage=here) == {"blocks": 2}
    assert settings.finetune.optimization.layer_decay < 1
    optimization = replace(settings.finetune.optimization, layer_decay=1.0)
    assert seen["settings"] == replace(
        settings.finetune, train_positions=False, measurements=1, optimization=optimization
    )
    assert seen["stage"] is here
