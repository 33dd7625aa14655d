"""Non-linear probing: new transformer blocks on top of a frozen encoder."""

from dataclasses import dataclass, field, replace
from typing import Any, cast

from common.config import Count, Flat, SettingsError
from common.data.normalize import Normalize
from common.evaluation import finetuning
from common.evaluation.finetuning import Finetuning, finetune
from common.networks.encoder import Encoder
from common.networks.initialization import initialize_mae
from common.networks.vit import Block
from common.runs import Stage

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Nonlinear:
    """Settings of non-linear probing: those of fine-tuning, without layer-wise learning-rate decay."""

    blocks: Count = 2
    """number of new transformer blocks between the encoder and the head, 2 or 4 in the paper"""
    finetune: Flat[Finetuning] = field(default_factory=Finetuning)


DIGITS, FOLDER = Nonlinear(finetune=finetuning.DIGITS), Nonlinear(finetune=finetuning.FOLDER)


def fitted(settings: Nonlinear, stage: Stage) -> Nonlinear:
    """Return settings with a batch that fits the images, unless theirs does: filled by images, shared by processes."""
    (labeled, _), world_size, tuning = stage.data.splits(), stage.processes.world_size, settings.finetune
    batch = tuning.optimization.batch_size
    if batch is not None and (batch > len(labeled) or batch % world_size):
        tuning = finetuning.of(tuning, batch_size=None)
    return replace(settings, finetune=finetuning.resolved(tuning, stage.data, world_size))


class DeepenedEncoder(nn.Module):
    """A frozen encoder followed by new blocks, with the interface of a `TrainableEncoder`."""

    def __init__(self, encoder: Encoder, *, blocks: int, drop: float = 0.0) -> None:
        super().__init__()
        if blocks < 1:
            raise SettingsError(f"--blocks {blocks}: without a new block it is a linear probe")
        self.encoder = encoder.requires_grad_(False)
        self.height, self.width, self.patch, self.channels = (
            encoder.height,
            encoder.width,
            encoder.patch,
            encoder.channels,
        )
        self.dim, self.depth, self.heads, self.num_prefix = encoder.dim, blocks, encoder.heads, encoder.num_prefix
        ratio = cast(Any, encoder.blocks[0]).mlp.fc1.out_features / encoder.dim
        drops = torch.linspace(0, drop, blocks).tolist()
        self.blocks = nn.ModuleList(Block(encoder.dim, encoder.heads, mlp_ratio=ratio, drop=rate) for rate in drops)
        initialize_mae(self.blocks)
        self.norm = nn.LayerNorm(encoder.dim, eps=1e-6)

    @property
    def cls_token(self) -> Tensor | None:
        """Return the class token of the frozen encoder."""
        return self.encoder.cls_token

    @property
    def pos_embed(self) -> Tensor | None:
        """Return the position table of the frozen encoder."""
        return self.encoder.pos_embed

    @property
    def positions(self) -> Tensor:
        """Return the positions of the frozen encoder."""
        return self.encoder.positions

    def train(self, mode: bool = True) -> "DeepenedEncoder":
        """Set the mode of the new blocks; the frozen encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def unnormalized(self, patches: Tensor, positions: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode patches without the final norm of the new blocks."""
        x = self.encoder(patches, positions)
        for i, block in enumerate(self.blocks):
            x = block(x, None if noise is None else noise[:, i])
        return x

    def forward(self, patches: Tensor, positions: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode patches."""
        return self.norm(self.unnormalized(patches, positions, noise))


def nonlinear(encoder: Encoder, normalize: Normalize, *, settings: Nonlinear, stage: Stage) -> dict[str, Any]:
    """Train new blocks and a head on top of a frozen encoder, and measure the accuracy on the test images.

    The new blocks have the width of the encoder, and process all of its tokens after its final norm.

    Returns:
        The result of `finetune`, and the number of blocks.

    Raises:
        SettingsError: if there are no labeled images or no test images.
    """
    torch.manual_seed(stage.run.seed)
    deepened = DeepenedEncoder(encoder, blocks=settings.blocks, drop=settings.finetune.drop_path)
    optimization = replace(settings.finetune.optimization, layer_decay=1.0)
    tuning = replace(settings.finetune, train_positions=False, optimization=optimization)
    if tuning.measurements is None:  # without a backward pass through the encoder, measuring would take a larger share
        tuning = replace(tuning, measurements=1)
    return finetune(deepened, normalize, settings=tuning, stage=stage) | {"blocks": settings.blocks}
