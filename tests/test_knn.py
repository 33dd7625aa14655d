"""Nearest neighbors among frozen features."""

from pathlib import Path
from typing import Any

from common.config import SettingsError
from common.evaluation import knn as knn_module
from common.evaluation.knn import Neighbors, knn, leave_one_out, nearest

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from probes import NORMALIZE, small, stage
from torch import Tensor


@st.composite
def neighbors(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    n, q, classes = (draw(st.integers(1, 9)) for _ in range(3))
    d = draw(st.integers(2, 9))  # along a line, all are equally near
    features, queries = torch.randn(n, d, generator=generator), torch.randn(q, d, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    k = draw(st.lists(st.integers(1, n), min_size=1, max_size=3))
    return features, labels, queries, {"classes": classes, "k": k, "temperature": draw(st.sampled_from([0.07, 1.0]))}


@given(neighbors())
def test_each_neighbor_votes_with_the_exponential_of_its_similarity(arguments: Any) -> None:
    features, labels, queries, how = arguments
    votes = nearest(features, labels, queries, **how)
    assert votes.shape == (len(how["k"]), len(queries), how["classes"])
    for i, k in enumerate(how["k"]):
        for j, query in enumerate(queries):
            similar = [float(F.cosine_similarity(query, feature, dim=0)) for feature in features]
            right = torch.zeros(how["classes"], dtype=torch.float64)
            for index in sorted(range(len(features)), key=lambda index: -similar[index])[:k]:
                right[labels[index]] += torch.tensor(similar[index] / how["temperature"]).double().exp()
            torch.testing.assert_close(votes[i, j] / votes[i, j].sum(), (right / right.sum()).float())


@given(neighbors())
def test_the_length_of_features_does_not_matter(arguments: Any) -> None:
    features, labels, queries, how = arguments
    votes = nearest(features, labels, queries, **how)
    lengths = torch.arange(1.0, 1 + len(features))[:, None]
    torch.testing.assert_close(nearest(features * lengths, labels, queries * 1e3, **how), votes)


@given(neighbors())
def test_the_size_of_the_chunks_does_not_matter(arguments: Any) -> None:
    features, labels, queries, how = arguments
    votes = nearest(features, labels, queries, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn_module, "CELLS", 2 * len(features))
        torch.testing.assert_close(nearest(features, labels, queries, **how), votes)


def test_the_one_nearest_of_the_labeled_images_is_the_image_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(200, 8, generator=generator), torch.randint(7, (200,), generator=generator)
    votes = nearest(features, labels, features, classes=7, k=[1], temperature=0.07)
    assert (votes[0].argmax(dim=-1) == labels).all()


def test_leaving_one_out_of_a_pair_finds_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = torch.eye(4).repeat(2, 1), torch.tensor([0, 1, 2, 3, 0, 1, 2, 0])
    how: Any = {"classes": 4, "k": [1], "temperature": 0.07}
    assert leave_one_out(features, labels, **how) == [75.0]  # all but the last pair, whose labels differ
    monkeypatch.setattr(knn_module, "LEFT_OUT", 2)  # the first and the fifth
    assert leave_one_out(features, labels, **how) == [100.0]


def test_a_small_temperature_leaves_the_nearest_alone() -> None:
    features, labels = torch.eye(3), torch.tensor([2, 0, 1])
    votes = nearest(features, labels, features, classes=3, k=[3], temperature=1e-3)
    torch.testing.assert_close(votes[0], F.one_hot(labels).float())


@given(neighbors())
def test_left_out_features_vote_for_all_but_themselves(arguments: Any) -> None:
    features, labels, _, how = arguments
    features, labels = torch.cat([features, -features]), torch.cat([labels, labels])  # two at least
    own = torch.arange(len(features))
    votes = nearest(features, labels, features, own=own, **how)
    for i in range(len(features)):
        others = own != i
        k = [min(count, len(features) - 1) for count in how["k"]]
        alone = nearest(features[others], labels[others], features[i : i + 1], **(how | {"k": k}))
        torch.testing.assert_close(votes[:, i], alone[:, 0])


def test_the_result_is_that_of_the_best_number_of_neighbors_on_the_labeled_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So nothing is chosen on the test images; of equals, the smallest is chosen."""
    for left_out, chosen in (([50.0, 70.0, 60.0], 5), ([70.0, 50.0, 70.0], 1)):
        monkeypatch.setattr(knn_module, "leave_one_out", lambda *_, left_out=left_out, **__: left_out)
        result = knn(small(), NORMALIZE, settings=Neighbors(k=(1, 5, 20, 99)), stage=stage(tmp_path))
        assert set(result["by_k"]) == {"1", "5", "20"}
        assert (result["k"], result["accuracy"]) == (chosen, result["by_k"][str(chosen)])
        assert list(result["leave_one_out"].values()) == left_out
    with pytest.raises(SettingsError, match=r"^30 labeled images are fewer than --k 31 neighbors$"):
        knn(small(), NORMALIZE, settings=Neighbors(k=(31, 99)), stage=stage(tmp_path))
