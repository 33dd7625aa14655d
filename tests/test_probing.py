"""Judging a frozen encoder: features, linear probe, nearest neighbors, new blocks."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from common.config import Images, Run
from common.data import views as view_module
from common.data.normalize import Normalize
from common.evaluation import features as frozen_features
from common.evaluation import knn as knn_module
from common.evaluation import linear as linear_module
from common.evaluation import nonlinear as nonlinear_module
from common.evaluation import probe as probe_module
from common.evaluation.features import Frozen
from common.evaluation.linear import Heads, Linear
from common.networks.initialization import initialize_mae
from common.networks.vit import ViT
from common.training.distributed import Processes
from common.weights.encoders import export, load_encoder
from common.weights.timm_models import load_timm
from common.weights.timm_names import timm_state

import knn
import linear_probe
import nonlinear_probe
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
RUN = Run(workers=0)
SMALL_IMAGES = Images(image_size=(16, 16), channels=1, flip=0.0, labels_per_class=3)
RECIPES = {
    "linear_probe": (linear_module.linear, linear_probe.PRESETS, "--epochs 20"),
    "knn": (knn_module.knn, knn.PRESETS, ""),
    "nonlinear_probe": (nonlinear_module.nonlinear, nonlinear_probe.PRESETS, "--epochs 2 --warmup-epochs 1"),
}


def small(*, class_token: bool = True) -> ViT:
    torch.manual_seed(0)
    vit = ViT(height=2, width=2, patch=8, channels=1, dim=24, depth=2, heads=3, class_token=class_token)
    initialize_mae(vit)
    return vit


@pytest.fixture
def place() -> Processes:
    return Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    export(tmp_path / "encoder.safetensors", small(), Normalize([0.3], [0.35]))
    return tmp_path / "encoder.safetensors"


def recipe(name: str, *args: object) -> dict[str, Any]:
    """Run a recipe in this process."""
    evaluation, presets, more = RECIPES[name]
    words = [*shlex.split(more), "--workers", "0", "--device", "cpu", *map(str, args)]
    return probe_module.probe(evaluation, presets, name=name, title=name, description=None, args=words)


# Nearest neighbors


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
    votes = knn_module.nearest(features, labels, queries, **how)
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
    votes = knn_module.nearest(features, labels, queries, **how)
    lengths = torch.arange(1.0, 1 + len(features))[:, None]
    torch.testing.assert_close(knn_module.nearest(features * lengths, labels, queries * 1e3, **how), votes)


@given(neighbors())
def test_the_size_of_the_chunks_does_not_matter(arguments: Any) -> None:
    features, labels, queries, how = arguments
    votes = knn_module.nearest(features, labels, queries, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn_module, "CELLS", 2 * len(features))
        torch.testing.assert_close(knn_module.nearest(features, labels, queries, **how), votes)


def test_the_one_nearest_of_the_labeled_images_is_the_image_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(200, 8, generator=generator), torch.randint(7, (200,), generator=generator)
    votes = knn_module.nearest(features, labels, features, classes=7, k=[1], temperature=0.07)
    assert (votes[0].argmax(dim=-1) == labels).all()


def test_a_small_temperature_leaves_the_nearest_alone() -> None:
    features, labels = torch.eye(3), torch.tensor([2, 0, 1])
    votes = knn_module.nearest(features, labels, features, classes=3, k=[3], temperature=1e-3)
    torch.testing.assert_close(votes[0], F.one_hot(labels).float())


# The linear probe


def blobs(count: int = 120, *, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Linearly separable features of very unequal scales and places."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    features = torch.randn(count, 6, generator=generator) + 8 * F.one_hot(labels, 6)
    return features * torch.tensor([1e-2, 1, 10, 1, 1, 1]) + 5, labels


def trained(rates: list[float], settings: Linear, *, batch: int = 30, seed: int = 0) -> Heads:
    features, labels = blobs()
    torch.manual_seed(seed)
    heads = Heads(6, 4, len(rates))
    orders = frozen_features.orders(len(labels), batch, settings.epochs, seed=seed)
    batches = ((features[rows], labels[rows]) for _, rows in orders)
    linear_module.fit(heads, batches, rates=rates, steps=len(labels) // batch, settings=settings)
    return heads


@pytest.mark.parametrize(("optimizer", "rate"), [("lars", 5.0), ("sgd", 0.5)])
def test_a_linear_probe_separates_what_a_line_separates(optimizer: Any, rate: float) -> None:
    settings = Linear(optimizer=optimizer, epochs=40, warmup_epochs=2)
    accuracy, _ = trained([rate], settings).judge(*blobs())
    assert accuracy.tolist() == [100]


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_all_learning_rates_in_one_pass_equal_each_alone(optimizer: Any) -> None:
    settings, rates = Linear(optimizer=optimizer, epochs=5, warmup_epochs=1), [0.1, 1.0, 7.0]
    together = trained(rates, settings)
    for i, rate in enumerate(rates):
        alone = trained([rate], settings)
        torch.testing.assert_close(together.weight[i], alone.weight[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.bias[i], alone.bias[0], rtol=1e-4, atol=1e-5)


def test_one_head_equals_a_module_trained_by_the_optimizer_as_it_is() -> None:
    settings = Linear(epochs=6, warmup_epochs=2)
    heads, (features, labels) = trained([2.0], settings), blobs()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm1d(6, affine=False, eps=1e-6), nn.Linear(6, 4))
    start = Heads(6, 4, 1)
    torch.manual_seed(0)
    plain[1].weight.data, plain[1].bias.data = Heads(6, 4, 1).weight[0].detach().clone(), start.bias[0].detach().clone()
    optimizer = linear_module.LARS(plain.parameters(), lr=0.0)
    for step, (_, rows) in enumerate(frozen_features.orders(120, 30, 6, seed=0)):
        epoch = step / 4
        after = torch.tensor(torch.pi * (epoch - 2) / 4)
        optimizer.param_groups[0]["lr"] = epoch if epoch < 2 else float(1 + after.cos())
        optimizer.zero_grad()
        F.cross_entropy(plain(features[rows]), labels[rows]).backward()
        optimizer.step()
    torch.testing.assert_close(heads.weight[0], plain[1].weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(heads.norm.state_dict(), plain[0].state_dict())


def test_features_are_normalized_by_their_batch_and_later_by_what_was_seen() -> None:
    features, labels = blobs(40)
    heads = Heads(6, 4, 1).train()
    normal = heads.norm(features)
    variance = features.var(dim=0, unbiased=False)
    torch.testing.assert_close(normal, (features - features.mean(dim=0)) / (variance + 1e-6).sqrt())
    torch.testing.assert_close(heads.norm.running_mean, 0.1 * features.mean(dim=0))
    torch.testing.assert_close(heads.norm.running_var, 0.9 + 0.1 * features.var(dim=0))
    before = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    heads.judge(features, labels)
    assert all(torch.equal(before[name], tensor) for name, tensor in heads.state_dict().items())
    assert set(before) == {"weight", "bias", *(f"norm.{n}" for n in ("running_mean", "running_var")), *_counter(before)}


def _counter(state: dict[str, Tensor]) -> Iterator[str]:
    return (name for name in state if name.endswith("num_batches_tracked"))


def test_heads_start_alike_small_and_without_bias() -> None:
    torch.manual_seed(0)
    heads = Heads(64, 100, 3)
    assert float(heads.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert torch.equal(heads.weight[0], heads.weight[2])
    assert not heads.bias.any()


@given(st.lists(st.integers(0, 4), min_size=2, max_size=80), st.integers(0, 9))
def test_a_tenth_of_every_class_is_held_out(labels: list[int], seed: int) -> None:
    counts = {label: labels.count(label) for label in labels}
    if max(counts.values()) == 1:
        with pytest.raises(ValueError, match="several learning rates need labeled images to choose by, but no class"):
            linear_module.hold_out(labels, seed=seed)
        return
    rest, apart = linear_module.hold_out(labels, seed=seed)
    assert sorted(rest + apart) == list(range(len(labels)))
    for label, count in counts.items():
        assert [labels[i] for i in apart].count(label) == (0 if count == 1 else max(1, count // 10))


def test_a_learning_rate_is_chosen_without_the_test_images(
    processes: Processes, tmp_path: Path, monkeypatch: Any
) -> None:
    """Whatever the labels of the test images are, the choice and what is trained stay the same."""
    settings = Linear(base_lrs=(1e-4, 10.0), epochs=20, batch_size=27, warmup_epochs=1, crop_fraction=1.0)

    def run() -> dict[str, Any]:
        shared = {"images": SMALL_IMAGES, "run": RUN, "folder": tmp_path, "processes": processes}
        return linear_module.linear(small(), Normalize([0.3], [0.35]), settings=settings, **shared)  # pyright: ignore

    result, opened, several = run(), linear_module._sources, settings

    def wrong(images: Images, run: Run) -> Any:
        labeled, test = opened(images, run)
        monkeypatch.setattr(test, "label", lambda index: 0)
        return labeled, test

    monkeypatch.setattr(linear_module, "_sources", wrong)
    other = run()
    assert result["base_lr"] == 10.0
    assert result["accuracy"] != other["accuracy"]
    for key in ("base_lr", "held_out", "loss"):
        assert result[key] == other[key]
    # the chosen one is trained again, on all labeled images
    monkeypatch.setattr(linear_module, "_sources", opened)
    settings = replace(several, base_lrs=(10.0,))
    alone = run()
    assert (alone["loss"], alone["accuracy"]) == (result["loss"], result["accuracy"])


@pytest.mark.parametrize("kind", probe_module.JUDGES)
@pytest.mark.parametrize("class_token", [False, True])
def test_a_pre_training_judges_its_encoder(kind: str, class_token: bool, processes: Processes, tmp_path: Path) -> None:
    finetuning = replace(nonlinear_probe.PRESETS["digits"].settings.finetune, pool="class")
    optimization = replace(finetuning.optimization, epochs=1, batch_size=30, warmup_epochs=0)
    finetuning = replace(finetuning, optimization=optimization)
    where: dict[str, Any] = {"images": SMALL_IMAGES, "run": RUN, "folder": tmp_path / kind, "processes": processes}
    encoder = small(class_token=class_token)
    result = probe_module.judge(kind, encoder, Normalize([0.3], [0.35]), finetuning=finetuning, **where, title=kind)
    assert {"accuracy", "labeled", "test", "seconds", "epoch"} <= set(result)
    assert (result["labeled"], result["test"]) == (30, 497)


# Frozen encoders


class Wandering(nn.Module):
    """An encoder that would change if it were left in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = small(), nn.BatchNorm1d(24)
        self.drop = nn.Dropout(0.5)
        for name in ("height", "width", "patch", "channels", "dim", "depth", "heads", "num_prefix", "cls_token"):
            setattr(self, name, getattr(self.inner, name))
        self.blocks, self.pos_embed, self.positions = self.inner.blocks, self.inner.pos_embed, self.inner.positions

    def forward(self, patches: Tensor, positions: Tensor, noise: None = None) -> Tensor:
        return self.drop(self.norm(self.inner(patches, positions).movedim(1, 2)).movedim(1, 2))


@pytest.mark.parametrize("make", [small, Wandering])
@pytest.mark.parametrize("evaluation", [name for name in RECIPES if name != "knn"])
@pytest.mark.parametrize("augment", [False, True])
def test_frozen_means_bit_for_bit(
    make: Any, evaluation: str, augment: bool, processes: Processes, tmp_path: Path
) -> None:
    function, presets, _ = RECIPES[evaluation]
    settings = presets["digits"].settings
    if evaluation == "linear_probe":
        settings = replace(settings, epochs=2, base_lrs=(0.1,), augment=augment)
    else:
        optimization = replace(settings.finetune.optimization, epochs=2, batch_size=30, warmup_epochs=0)
        settings = replace(settings, finetune=replace(settings.finetune, train_positions=augment))
        settings = replace(settings, finetune=replace(settings.finetune, optimization=optimization))
    encoder = make()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    shared = {"images": SMALL_IMAGES, "run": RUN, "folder": tmp_path, "processes": processes, "title": "probe"}
    function(encoder, Normalize([0.3], [0.35]), settings=settings, **shared)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_new_blocks_are_trained_behind_the_frozen_ones() -> None:
    encoder = small()
    encoder.blocks = nn.ModuleList(nonlinear_module.Block(24, 3, mlp_ratio=1.5) for _ in range(2))
    deepened = nonlinear_module.Deepened(encoder, blocks=3, drop=0.2).train()
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


def test_new_blocks_are_fine_tuned_without_layer_decay(processes: Processes, tmp_path: Path, monkeypatch: Any) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(nonlinear_module, "finetune", lambda *_, **arguments: seen.update(arguments) or {})
    settings = nonlinear_probe.PRESETS["folder"].settings
    where: dict[str, Any] = {"images": SMALL_IMAGES, "run": RUN, "folder": tmp_path, "processes": processes}
    nonlinear_module.nonlinear(small(), Normalize([0.3], [0.35]), settings=settings, **where)
    assert settings.finetune.optimization.layer_decay < 1
    optimization = replace(settings.finetune.optimization, layer_decay=1.0)
    assert seen["settings"] == replace(settings.finetune, train_positions=False, optimization=optimization)


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_cached_features_equal_those_of_each_image_alone(pool: Any, processes: Processes) -> None:
    frozen, fraction = Frozen(small(), Normalize([0.3], [0.35]), pool), 0.9
    labeled, _ = linear_module._sources(SMALL_IMAGES, RUN)
    only = [3, 0, 7, 29]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen_features, "AT_A_TIME", 3)
        features, labels = frozen_features.encode(
            frozen, labeled, SMALL_IMAGES, fraction, only=only, run=RUN, processes=processes
        )
    crop = view_module.CenterCrop((16, 16), crop_fraction=fraction)
    for i, index in enumerate(only):
        image = (crop(labeled.image(index)).float() / 255 - 0.3) / 0.35
        patches = image.unfold(1, 8, 8).unfold(2, 8, 8).reshape(1, 4, 64)
        tokens = frozen.encoder(patches, frozen.encoder.positions)[0]
        torch.testing.assert_close(features[i], tokens[0] if pool == "class" else tokens[1:].mean(dim=0))
        assert labels[i] == labeled.label(index)


def test_the_class_token_is_read_where_there_is_one() -> None:
    normalize = Normalize([0.3], [0.35])
    assert Frozen(small(), normalize).pool == "class"
    assert Frozen(small(class_token=False), normalize).pool == "mean"
    with pytest.raises(ValueError, match="pool=class needs an encoder with a class token"):
        Frozen(small(class_token=False), normalize, "class")


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_a_crop_of_the_linear_probe_depends_on_its_chance_alone(H: int, W: int, seed: int) -> None:
    image = torch.arange(H * W).view(1, H, W).remainder(256).to(torch.uint8)
    plain, again, flipped = (
        view_module.OneShotCrop((4, 6), (0.08, 1.0), flip)(image, torch.Generator().manual_seed(seed))
        for flip in (0.0, 0.0, 1.0)
    )
    assert plain.shape == (1, 4, 6)
    assert torch.equal(plain, again)
    assert torch.equal(plain, flipped.flip(-1))


@given(st.integers(0, 999))
def test_a_crop_of_the_linear_probe_has_the_area_and_the_aspect_asked_for(seed: int) -> None:
    image = (torch.arange(200)[:, None] + torch.arange(100)).to(torch.uint8)[None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view_module, "resize", lambda part, height, width: part)
        view = view_module.OneShotCrop((8, 4), (0.25, 0.25), 0.0)(image, torch.Generator().manual_seed(seed))
    _, h, w = view.shape
    assert h * w == pytest.approx(200 * 100 / 4, rel=0.03)
    assert 0.74 < w / h * 2 < 1.36
    top_left, bottom_right = int(view[0, 0, 0]), int(view[0, -1, -1])
    assert (bottom_right - top_left) % 256 == h + w - 2  # one piece of the image


def test_a_crop_of_the_linear_probe_lies_anywhere_down_and_across() -> None:
    rows = torch.arange(200, dtype=torch.uint8).view(1, 200, 1).expand(1, 200, 200)
    corners = torch.empty(2, 300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view_module, "resize", lambda part, height, width: part)
        crop = view_module.OneShotCrop((8, 8), (0.25, 0.25), 0.0)
        for seed in range(300):
            for axis, image in enumerate((rows, rows.mT)):
                corners[axis, seed] = crop(image, torch.Generator().manual_seed(seed))[0, 0, 0]
    assert abs(float(corners.corrcoef()[0, 1])) < 0.2
    assert ((corners.mean(dim=1) - 50).abs() < 6).all()  # of 0 … 100, for a side of about 100


def test_augmented_features_are_new_every_epoch_and_those_of_their_labels(processes: Processes) -> None:
    frozen = Frozen(small(), Normalize([0.3], [0.35]))
    labeled, _ = linear_module._sources(SMALL_IMAGES, RUN)
    views = frozen_features.Views(labeled, view_module.OneShotCrop((16, 16), flip=0.0), labels=True)
    only = [2, 3, 5, 7, 11, 13]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen_features, "AT_A_TIME", 2)
        steps = list(frozen_features.augmented(frozen, views, only, batch=3, epochs=2, run=RUN, processes=processes))
    chosen = list(frozen_features.orders(6, 3, 2, seed=RUN.seed))
    assert len(steps) == len(chosen) == 4
    for (features, labels), (epoch, rows) in zip(steps, chosen, strict=True):
        pictures, truth = zip(*(views[epoch, only[int(row)]] for row in rows), strict=True)
        torch.testing.assert_close(features, frozen(torch.stack(pictures)))
        assert labels.tolist() == list(truth)
    assert not torch.equal(steps[0][0].sort(dim=0).values, steps[2][0].sort(dim=0).values)


# Encoders of timm


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of ours that is timm's vit_tiny_patch16_224, for images of 32 × 48."""
    torch.manual_seed(0)
    vit = ViT(height=2, width=3, patch=16, channels=1, dim=192, depth=12, heads=3)
    initialize_mae(vit)
    path = tmp_path_factory.mktemp("tiny") / "encoder.safetensors"
    export(path, vit, Normalize([0.3], [0.35]))
    return path


@pytest.mark.parametrize("image_size", [None, (48, 32)])
@pytest.mark.parametrize("pool", ["class", "mean"])
def test_a_timm_model_equals_our_export_of_the_same_weights(pool: Any, image_size: Any, tiny: Path) -> None:
    ours = Frozen(*load_encoder(tiny, image_size=image_size), pool)
    theirs = Frozen(*load_timm(tiny, "vit_tiny_patch16_224", image_size=image_size), pool)
    images = torch.randint(256, (2, 1, *(image_size or (32, 48))), dtype=torch.uint8)
    torch.testing.assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-5)
    for name in ("height", "width", "patch", "channels", "dim", "depth", "heads", "num_prefix"):
        assert getattr(theirs.encoder, name) == getattr(ours.encoder, name)
    deeper = [nonlinear_module.Deepened(frozen.encoder, blocks=1) for frozen in (ours, theirs)]
    deeper[1].blocks.load_state_dict(deeper[0].blocks.state_dict())
    patches = torch.rand(2, 6, 256)
    torch.testing.assert_close(*(new(patches, new.positions) for new in deeper), rtol=1e-4, atol=1e-5)


def test_a_timm_model_reads_its_own_weights_mean_and_std(tmp_path: Path, capsys: Any) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, global_pool="token").eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    frozen = Frozen(*load_timm(tmp_path / "weights.pth", "vit_tiny_patch16_224"))
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(frozen(images), cast(Any, model).forward_features((images - 0.5) / 0.5)[:, 0])
    assert "mean [0.5, 0.5, 0.5]" in capsys.readouterr().out.replace("(", "[")


# Each recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_judges_an_encoder_on_the_digits(name: str, exported: Path, tmp_path: Path, capsys: Any) -> None:
    result = recipe(name, "--encoder", exported, "--runs", tmp_path)
    written = json.loads((tmp_path / name / "result.json").read_text())
    assert written == {"recipe": name, "encoder": str(exported), **result}
    assert {"accuracy", "labeled", "test", "seconds", "epoch"} <= set(result)
    assert (result["labeled"], result["test"]) == (100, 497)
    assert 12 < result["accuracy"] <= 100  # better than chance even with random weights
    out = capsys.readouterr().out
    assert f"{result['accuracy']:.1f} % of 497 test images are right" in out
    assert str(tmp_path / name / "result.json") in out
    if name == "knn":
        assert set(result["by_k"]) == {"10", "20", "100"}
        assert result["accuracy"] == result["by_k"]["20"]
    else:
        assert (tmp_path / name / "curves.png").stat().st_size
    with pytest.raises(SystemExit) as ended:
        recipe(name, "--encoder", exported, "--runs", tmp_path)
    assert "holds a run already" in str(ended.value.code)


def test_recipes_judge_a_timm_model(tiny: Path, tmp_path: Path) -> None:
    args = ["--encoder", tiny, "--image-size", "16", "16", "--labels-per-class", "2", "--runs", tmp_path]
    ours = recipe("knn", *args)
    theirs = recipe("knn", *args, "--timm", "vit_tiny_patch16_224", "--name", "theirs")
    assert theirs["by_k"] == ours["by_k"]


@pytest.mark.parametrize("published", [False, True])
def test_a_folder_of_images_is_judged(published: bool, exported: Path, tmp_path: Path) -> None:
    if published:  # a checkpoint of the MAE family, as its authors store it
        vit = ViT(height=2, width=2, patch=8, channels=3, dim=96, depth=1, heads=3)
        initialize_mae(vit)
        exported = tmp_path / "mae.pth"
        torch.save({"model": {**timm_state(vit), "mask_token": torch.zeros(1, 1, 8)}}, exported)
    for split, count in (("train", 12), ("val", 3)):
        for gray, name in ((40, "dark"), (200, "light")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (20 + i, 30), gray + i).save(tmp_path / split / name / f"{i}.png")
    result = recipe("knn", "--encoder", exported, "--data", tmp_path, "--runs", tmp_path / "runs", "--k", "1", "99")
    assert result["by_k"] == {"1": 100.0}
    assert (result["labeled"], result["test"], result["k"]) == (24, 6, 1)


def test_two_processes_equal_one(exported: Path, tmp_path: Path) -> None:
    args = ["--augment", "--labels-per-class", "4", "--base-lrs", "1", "10", "--batch-size", "13"]
    args += ["--encoder", str(exported), "--runs", str(tmp_path), "--epochs", "3", "--warmup-epochs", "1"]
    one = recipe("linear_probe", *args, "--name", "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    command += [str(ROOT / "recipes" / "linear_probe.py"), *args, "--name", "two", "--device", "cpu", "--workers", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["held_out"] == one["held_out"]
    assert two["accuracy"] == pytest.approx(one["accuracy"], abs=0.3)


def test_new_blocks_resume_behind_their_own_encoder_only(exported: Path, tmp_path: Path) -> None:
    first = recipe("nonlinear_probe", "--encoder", exported, "--runs", tmp_path)
    again = recipe("nonlinear_probe", "--encoder", exported, "--runs", tmp_path, "--resume")
    assert again["accuracy"] == first["accuracy"]
    with pytest.raises(SystemExit) as ended:
        recipe("nonlinear_probe", "--encoder", exported, "--runs", tmp_path, "--resume", "--blocks", "4")
    assert "was started with blocks=2 and cannot be resumed with 4" in str(ended.value.code)


@pytest.mark.parametrize(
    ("name", "args", "sentence"),
    [
        ("knn", "--encoder nowhere.pth", "nowhere.pth is not a file"),
        ("knn", "--timm nix", "timm knows no model called nix"),
        ("knn", "--timm resnet18", "timm's resnet18 is not a vision transformer"),
        ("knn", "--timm vit_base_patch16_224", "in the file but"),
        ("knn", "--image-size 20 16", "images of 20 × 16 pixels are not made of patches of 8 × 8"),
        ("knn", "--timm vit_tiny_patch16_224 --image-size 20 16", "images of 20 × 16 pixels are not made of patches"),
        ("knn", "--data nowhere", "nowhere is not a folder"),
        ("knn", "--k 200 300", "100 labeled images are fewer than --k 200 neighbors"),
        ("knn", "--k 0 1", "--k 0 1: give one or more positive numbers"),
        ("knn", "--temperature 0", "--temperature 0.0 is not a positive number"),
        ("knn", "--crop-fraction 2", "crop_fraction=2.0 is to be above 0 and at most 1"),
        ("linear_probe", "--base-lrs", "--base-lrs : give one or more positive numbers"),
        ("linear_probe", "--base-lrs 1 -1", "--base-lrs 1.0 -1.0: give one or more positive numbers"),
        ("linear_probe", "--batch-size 1", "--batch-size 1 has no statistics to normalize by: at least 2 images"),
        ("linear_probe", "--epochs 0", "--epochs 0 trains nothing"),
        ("linear_probe", "--labels-per-class 1", "several learning rates need labeled images to choose by"),
        ("linear_probe", "--labels-per-class 999", "per_class=999 of the"),
        ("nonlinear_probe", "--blocks 0", "--blocks 0: without a new block it is a linear probe"),
    ],
)
def test_a_wrong_setting_is_one_sentence(name: str, args: str, sentence: str, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        recipe(name, "--encoder", exported, "--runs", tmp_path, *shlex.split(args))
    assert str(ended.value.code).startswith(f"{name}: ")
    assert sentence in str(ended.value.code)


def test_weights_that_are_no_vision_transformer_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(SystemExit, match=r"is not a plain ViT, which has patch_embed\.proj\.weight and pos_embed"):
        recipe("knn", "--encoder", tmp_path / "weights.safetensors", "--timm", "vit_tiny_patch16_224")


def test_features_that_are_not_finite_are_refused(exported: Path, tmp_path: Path) -> None:
    state = timm_state(small())
    state["norm.bias"] = torch.full((24,), torch.nan)
    vit = small()
    vit.load_state_dict(state)
    export(exported, vit, Normalize([0.3], [0.35]))
    with pytest.raises(SystemExit, match="knn: the encoder's features are not finite"):
        recipe("knn", "--encoder", exported, "--runs", tmp_path)
