"""Networks: the ViT, decoders, projectors and the EMA teacher, with their construction and initialization."""

from common.networks.building import (
    build_predictor,
    build_vit,
    count_masked,
    decoder_sizes,
    encoder_and_decoder,
    masking_encoder,
    whole_cells,
)
from common.networks.decoder import PixelHead, Predictor
from common.networks.ema import Teacher, cosine_momentum, ema_copy, ema_update
from common.networks.initialization import initialize_mae, initialize_simmim, initialize_truncated
from common.networks.projectors import HeadNorm, mlp, refuse_single_images, share_statistics

__all__ = [
    "HeadNorm",
    "PixelHead",
    "Predictor",
    "Teacher",
    "build_predictor",
    "build_vit",
    "cosine_momentum",
    "count_masked",
    "decoder_sizes",
    "ema_copy",
    "ema_update",
    "encoder_and_decoder",
    "initialize_mae",
    "initialize_simmim",
    "initialize_truncated",
    "masking_encoder",
    "mlp",
    "refuse_single_images",
    "share_statistics",
    "whole_cells",
]
