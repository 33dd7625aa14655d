"""Weight initialization, as in the papers."""

import math
from typing import cast

from common.networks.vit import Block, PatchEmbed, ViT

import torch
from torch import nn


def initialize_mae(module: nn.Module) -> None:
    """Initialize as in MAE: Xavier uniform for every stored matrix (qkv as one), tokens normal with std 0.02.

    The bias of the patch embedding keeps PyTorch's default. Source: MAE, arXiv 2111.06377 (published code).
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, PatchEmbed):
            nn.init.xavier_uniform_(part.proj.weight.flatten(1))
    for name, parameter in module.named_parameters():
        if name.split(".")[-1] in ("cls_token", "mask_token", "position_token"):
            nn.init.normal_(parameter, std=0.02)


def initialize_truncated(module: nn.Module) -> None:
    """Initialize as in Beyond Masking: matrices and mask token normal with std 0.02, truncated at one std.

    The patch embedding keeps PyTorch's default. Source: Beyond Masking, arXiv 2203.14313 (published code).
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02, a=-0.02, b=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for name, parameter in module.named_parameters():
        if name.split(".")[-1] in ("cls_token", "mask_token"):
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.02, b=0.02)


def initialize_simmim(vit: ViT) -> None:
    """Initialize as in SimMIM: matrices and tokens normal with std 0.02, truncated at one std, biases zero.

    The output projections of the residual branches of block k, counted from 1, are divided by √(2k). Source: SimMIM,
    arXiv 2111.09886 (published code, derived from BEiT's).
    """
    for part in vit.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(part.weight, std=0.02, a=-0.02, b=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for token in (vit.cls_token, vit.mask_token):
        if token is not None:
            nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)
    with torch.no_grad():
        for k, block in enumerate(cast(list[Block], vit.blocks), start=1):
            for end in (block.attn.proj, block.mlp.fc2):
                end.weight.div_(math.sqrt(2 * k))
