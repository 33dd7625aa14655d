"""Operations are counted as on paper, whatever attention runs, and leave the method as it was."""

import importlib
from typing import Any

from common.config import DataSettings
from common.data.loading import ViewDataset
from common.data.normalize import normalization
from common.data.sources import open_data
from common.data.views import CropFlip
from common.recipe import changed
from common.training.operations import operations_per_image

import pytest
import torch
from torch import Tensor, nn

MODULES = [
    "mae",
    "simmim",
    "beyond_masking",
    "beyond_masking_integrated",
    "droppos",
    "hpm",
    "lut",
    "lut_simmim",
    "lomar",
]


ONE = ViewDataset(open_data(DataSettings(path="digits", channels=1), seed=0).train, CropFlip((8, 8)))


class Linear(nn.Module):
    """A loss of one matrix product, or of attention."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.weight, self.attention = nn.Parameter(torch.randn(5, 7)), attention
        self.frozen = nn.Parameter(torch.randn(7, 3), requires_grad=False)

    def noise(self, rand: Any, batch: int) -> dict[str, Tensor]:
        return {"x": rand(batch, 11, 5)}

    def forward(self, batch: Tensor, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        x = noise["x"] @ self.weight
        if self.attention:
            x = nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])
        return {"loss": (x @ self.frozen).sum()}


@pytest.mark.parametrize("attention", [False, True])
def test_operations_are_those_of_the_matrix_products_forward_and_backward(attention: bool) -> None:
    """The input needs no gradient, the frozen factor neither: two products with the weight, two with the factor."""
    expected = 2 * (2 * 11 * 5 * 7) + 2 * (2 * 11 * 7 * 3)
    expected += 3 * 2 * (2 * 11 * 11 * 7) if attention else 0  # each of two products has two gradients
    assert operations_per_image(Linear(attention), ONE) == expected


@pytest.mark.parametrize("name", MODULES)
def test_counting_leaves_a_method_as_it_was_and_grows_with_the_images_pixels(name: str) -> None:
    module = importlib.import_module(name)
    counted = []
    for side in (32, 64):
        config = changed(module.PRESETS["digits"], image_size=(side, side))
        if hasattr(config, "view_size"):
            config = changed(config, view_size=(side + 14, side + 14))
        data = open_data(config.data, seed=0)
        torch.manual_seed(0)
        method = module.RECIPE.method(config, normalization(config.data, data.train))
        method.train()
        views = ViewDataset(data.train, getattr(method, "views", CropFlip(method.view_size)))
        before = {key: tensor.clone() for key, tensor in method.state_dict().items()}
        counted.append(operations_per_image(method, views))
        assert all(torch.equal(tensor, before[key]) for key, tensor in method.state_dict().items())
        assert all(parameter.grad is None for parameter in method.parameters())
    small, large = counted
    assert 0 < small <= large <= 6 * small
