"""Draw the difficulty of patches predicted by a trained HPM next to the measured one, as heat maps over images.

    python recipes/hpm.py && python recipes/difficulty_maps.py --run runs/hpm
    python recipes/difficulty_maps.py --run runs/hpm --data DIR --count 16

Predicted: the teacher's prediction from the whole image. Measured: the reconstruction error of each patch when it is
masked, averaged over random masks. Each map ranges from the minimum (blue) to the maximum (red) of its image: only the
order of the values is meaningful.

Paper: HPM, arXiv 2304.05919, figures S1 and S2.
"""

from dataclasses import dataclass
from typing import Any

from common.analysis import AnalysisConfig, central_views, images_to_look_at, load_method
from common.config import Count, program
from common.report import Pictures, draw_pictures, heat_maps
from mimkit.losses import ranking_loss
from mimkit.masking import random_tokens
from mimkit.tokens import patchify, split, take

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Settings of the images and of the measured difficulty."""

    count: Count = 8
    """number of images to draw"""
    masks: Count = 32
    """number of random masks per image"""
    seed: int = 0
    """seed of the masks"""


@torch.no_grad()
def measured_difficulty(method: Any, patches: Tensor, noise: Tensor) -> Tensor:
    """Measure the mean reconstruction error of each patch over random masks.

    Args:
        method: a trained HPM.
        patches: normalized patches (b, n, values).
        noise: uniform in [0, 1), (masks, b, n).

    Returns:
        Mean errors (b, n) over the masks that mask the patch; 0 if none does.
    """
    _, features = method.predict_difficulty(patches)
    total = torch.zeros(patches.shape[:2], device=patches.device)
    times = torch.zeros_like(total)
    for chance in noise:
        visible, masked = split(random_tokens(chance, num_masked=method.num_masked), num_masked=method.num_masked)
        latent = method.encoder(take(patches, visible), method.encoder.positions[visible])
        prediction = method.decoder(latent, visible, masked)
        errors = method.errors(prediction, take(patches, masked), take(features, masked))
        total.scatter_add_(-1, masked, errors)
        times.scatter_add_(-1, masked, torch.ones_like(errors))
    return total / times.clamp(min=1)


def main(config: Config) -> None:
    method, trained = load_method(
        config.run, needs="predict_difficulty", of="hpm.py, whose method predicts how hard patches are"
    )
    source = images_to_look_at(trained.data, config.data)
    images = next(central_views(source, method, trained, batch_size=config.count))
    generator = torch.Generator().manual_seed(config.seed)
    patches = patchify(method.normalize(images), patch=method.patch)
    predicted, _ = method.predict_difficulty(patches)
    measured = measured_difficulty(method, patches, torch.rand(config.masks, *predicted.shape, generator=generator))
    _, right, pairs = ranking_loss(predicted, measured)
    sizes = {"height": method.height, "width": method.width, "patch": method.patch}
    unit = method.normalize.unit(images)
    columns = {"input": unit, "predicted": heat_maps(unit, predicted, **sizes)}
    columns["measured"] = heat_maps(unit, measured, **sizes)
    share = f"{100 * float(right.sum() / pairs.sum()):.1f} % of the pairs of patches are in the right order (chance 50)"
    path = config.run / "difficulty_maps.png"
    draw_pictures(path, Pictures(columns, f"blue: minimum, red: maximum of the image; {share}"))
    print(f"{share}, in {len(images)} images\n{path}")


if __name__ == "__main__":
    program(main, Config, name="difficulty_maps", description=__doc__)
