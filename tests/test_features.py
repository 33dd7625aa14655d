"""Features of a frozen encoder: those of each image alone, cached or new in every epoch."""

from pathlib import Path
from typing import Any

from common.config import SettingsError
from common.data.loading import ViewDataset
from common.data.views import CenterCrop, OneShotCrop
from common.evaluation import features as module
from common.evaluation.features import FeatureExtractor, augmented, extract, orders

import pytest
import torch
from probes import NORMALIZE, RUN, small, stage


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_cached_features_equal_those_of_each_image_alone(
    pool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor, fraction, here = FeatureExtractor(small(), NORMALIZE, pool), 0.9, stage(tmp_path)
    labeled, _ = here.data.splits()
    only = [3, 0, 7, 29]
    monkeypatch.setattr(module, "AT_A_TIME", 3)
    features, labels = extract(extractor, labeled, here, fraction, only=only)
    crop = CenterCrop((16, 16), crop_fraction=fraction)
    for i, index in enumerate(only):
        image = (crop(labeled.image(index)).float() / 255 - 0.3) / 0.35
        patches = image.unfold(1, 8, 8).unfold(2, 8, 8).reshape(1, 4, 64)
        tokens = extractor.encoder(patches, extractor.encoder.positions)[0]
        torch.testing.assert_close(features[i], tokens[0] if pool == "class" else tokens[1:].mean(dim=0))
        assert labels[i] == labeled.label(index)
    every, _ = extract(extractor, labeled, here, fraction)
    assert every.shape == (30, 24)
    torch.testing.assert_close(every[only], features)


def test_the_class_token_is_read_where_there_is_one() -> None:
    assert FeatureExtractor(small(), NORMALIZE).pool == "class"
    assert FeatureExtractor(small(class_token=False), NORMALIZE).pool == "mean"
    with pytest.raises(SettingsError, match=r"^--pool class needs an encoder with a class token$"):
        FeatureExtractor(small(class_token=False), NORMALIZE, "class")


def test_augmented_features_are_new_every_epoch_and_those_of_their_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor, here = FeatureExtractor(small(), NORMALIZE), stage(tmp_path)
    views = ViewDataset(here.data.splits()[0], OneShotCrop((16, 16), flip=0.0), labels=True)
    only = [2, 3, 5, 7, 11, 13]
    monkeypatch.setattr(module, "AT_A_TIME", 2)
    steps = list(augmented(extractor, views, only, batch=3, epochs=2, stage=here))
    chosen = list(orders(6, 3, 2, seed=RUN.seed))
    assert len(steps) == len(chosen) == 4
    for (features, labels), (epoch, rows) in zip(steps, chosen, strict=True):
        pictures, truth = zip(*(views[epoch, only[int(row)]] for row in rows), strict=True)
        torch.testing.assert_close(features, extractor(torch.stack(pictures)))
        assert labels.tolist() == list(truth)
    assert not torch.equal(steps[0][0].sort(dim=0).values, steps[2][0].sort(dim=0).values)
