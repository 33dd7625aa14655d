"""From views to batches: what a view depends on, workers, and images that cannot be read."""

import os
import pickle
import signal
from pathlib import Path
from typing import Any

from common.config import SettingsError
from common.data import loading
from common.data.augment import Augment
from common.data.loading import Loader, ViewDataset
from common.data.sources import Folder
from common.data.views import CenterCrop, CropFlip

import numpy as np
import pytest
import torch
from pictures import Memory, quoting, unchanged, write
from PIL import Image
from torch import Generator, Tensor


def test_a_view_depends_on_seed_epoch_and_image_and_on_nothing_else():
    views, again, other = (ViewDataset(Memory(), CropFlip((16, 16)), seed=seed) for seed in (0, 0, 1))
    first = views[0, 3]
    assert not torch.equal(first, views[1, 3])
    views.source.images[4] = views.source.images[3]  # pyright: ignore
    assert not torch.equal(first, views[0, 4])
    assert not torch.equal(first, other[0, 3])
    assert torch.equal(first, again[0, 3])


def test_several_views_decode_once():
    source = Memory(classes=4)
    (small, large), label = ViewDataset(source, (CropFlip((8, 8)), CropFlip((16, 12))), labels=True)[0, 5]
    assert (small.shape, large.shape, label) == ((3, 8, 8), (3, 16, 12), 1)
    assert source.decoded == 1


def test_sources_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match=quoting("the source has no image")):
        ViewDataset(Memory(0), unchanged)
    with pytest.raises(ValueError, match=quoting("labels are requested, but the source has none")):
        ViewDataset(Memory(), unchanged, labels=True)
    source = Memory()
    source.channels = 1
    sentence = "memory 2 is torch.uint8 of shape (3, 20, 30), not torch.uint8 of shape (1, H, W)"
    with pytest.raises(ValueError, match=quoting(sentence)):
        ViewDataset(source, unchanged)[0, 2]
    source = Memory()
    source.images = source.images.float()
    sentence = "memory 2 is torch.float32 of shape (3, 20, 30), not torch.uint8 of shape (3, H, W)"
    with pytest.raises(ValueError, match=quoting(sentence)):
        ViewDataset(source, unchanged)[0, 2]


def batches(count: int, size: int = 4, total: int = 12) -> list[list[tuple[int, int]]]:
    flat = [divmod(number, total) for number in range(count * size)]
    return [flat[start : start + size] for start in range(0, len(flat), size)]


@pytest.mark.parametrize("transform", [CropFlip((16, 12)), Augment((16, 12), mean=[0.5] * 3)])
def test_the_number_of_workers_changes_nothing(transform):
    views = ViewDataset(Memory(classes=3), transform, labels=True)
    alone, shared = (list(Loader(views, iter(batches(7)), workers=workers)) for workers in (0, 2))
    assert len(alone) == len(shared) == 7
    for (images_alone, labels_alone), (images_shared, labels_shared) in zip(alone, shared, strict=True):
        assert torch.equal(images_alone, images_shared)
        assert torch.equal(labels_alone, labels_shared)
        assert (images_shared.dtype, labels_shared.dtype) == (torch.uint8, torch.int64)


def test_a_batch_is_what_the_views_are_stacked_and_channels_last():
    views = ViewDataset(Memory(classes=3), (unchanged, CropFlip((16, 12))), labels=True)
    (whole, crops), labels = next(iter(Loader(views, batches(1))))
    assert torch.equal(whole, views.source.images[:4])  # pyright: ignore
    assert all(torch.equal(crop, views[0, index][0][1]) for index, crop in enumerate(crops))
    assert labels.tolist() == [0, 1, 2, 0]
    assert labels.dtype == torch.int64
    assert whole.is_contiguous(memory_format=torch.channels_last)
    assert crops.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_list_of_batches_serves_any_number_of_iterations(workers):
    loader = Loader(ViewDataset(Memory(), unchanged), batches(3), workers=workers)
    one, two = list(loader), list(loader)
    assert len(one) == 3
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_workers_live_as_long_as_their_loader():
    loader = Loader(ViewDataset(Memory(), process), batches(2), workers=1)
    assert torch.equal(next(iter(loader)), next(iter(loader)))


def test_loading_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    list(Loader(ViewDataset(Memory(), CropFlip((8, 8))), batches(2)))
    assert torch.equal(before, torch.get_rng_state())


def process(image: Tensor, generator: Generator) -> Tensor:
    return torch.tensor([os.getpid(), torch.get_num_threads()]).view(2, 1, 1)


def test_workers_use_one_thread_and_leave_signals_to_the_parent():
    loader = iter(Loader(ViewDataset(Memory(), process), iter(batches(20)), workers=2))
    worker, threads = next(loader)[0].flatten().tolist()
    assert worker != os.getpid()
    assert threads == 1
    assert os.getpgid(worker) != os.getpgid(0)  # so what is sent to the group, by ctrl-c say, does not reach it
    assert len(list(loader)) == 19


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_workers_go_on_after_a_signal_to_every_process_of_a_job(number: signal.Signals, capfd: Any):
    loader = iter(Loader(ViewDataset(Memory(), process), iter(batches(20)), workers=1))
    worker = int(next(loader)[0].flatten()[0])
    os.kill(worker, number)
    assert len(list(loader)) == 19
    assert capfd.readouterr().err == ""


def test_a_worker_ends_some_time_after_a_sigterm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "LAST_SECONDS", 1)
    loader: Any = Loader(ViewDataset(Memory(), process), batches(20), workers=1)
    stream = iter(loader._loader)
    worker = stream._workers[0]
    next(stream)
    worker.terminate()
    worker.join()
    assert worker.exitcode == -signal.SIGALRM
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(stream)


def test_views_can_be_sent_to_workers_that_are_not_forked(tmp_path):
    write(tmp_path / "1.png")
    for transform in (CropFlip((8, 8)), CenterCrop((8, 8)), Augment((8, 8), mean=[0.5] * 3)):
        views = ViewDataset(Folder(tmp_path, "train"), transform)
        assert torch.equal(pickle.loads(pickle.dumps(views))[0, 0], views[0, 0])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_replaced_by_the_next_counted_once_and_named(workers):
    views = ViewDataset(Memory(200, broken=(3, 4), classes=7), unchanged, labels=True)
    loader = Loader(views, iter(batches(150, total=200)), workers=workers)
    loaded = list(loader)
    assert len(loaded) == 150
    assert torch.equal(loaded[0][0][3], views.source.images[5])  # pyright: ignore
    assert torch.equal(loaded[1][0][0], views.source.images[5])  # pyright: ignore
    assert loaded[0][1].tolist() == [0, 1, 2, 5]
    assert loader.unreadable == dict.fromkeys(("memory 3", "memory 4"), "OSError: the file is truncated")


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_one_percent_unreadable_stops(workers):
    views = ViewDataset(Memory(200, broken=(3, 70, 90, 110)), unchanged)
    loader = Loader(views, iter(batches(150, total=200)), workers=workers)
    sentence = (
        "3 of 200 images (1.5%) cannot be read: memory 3, memory 70, memory 90; the first: OSError: the file is trunc"
    )
    with pytest.raises(SettingsError, match=quoting(sentence)):
        list(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_are_all_unreadable_stop_at_once(workers):
    source = Memory(500, broken=tuple(range(500)))
    sentence = "6 of 500 images (1.2%) cannot be read: memory 0, memory 1, memory 2, …; the first: OSError"
    with pytest.raises(SettingsError, match=quoting(sentence)):
        list(Loader(ViewDataset(source, unchanged), batches(2), workers=workers))
    with pytest.raises(ValueError, match=quoting(sentence)):
        ViewDataset(source, unchanged)[0, 0]
    assert source.decoded <= 12


def test_broken_files_are_unreadable(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for suffix in ("jpg", "png", "webp"):
        Image.fromarray(pixels).save(tmp_path / f"truncated.{suffix}")
        data = (tmp_path / f"truncated.{suffix}").read_bytes()
        (tmp_path / f"truncated.{suffix}").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    for number in range(500):
        os.link(tmp_path / "good.png", tmp_path / f"{number}.png") if number else write(tmp_path / "good.png")
    source = Folder(tmp_path, "train")
    loader = Loader(ViewDataset(source, CropFlip((8, 8))), [[(0, index) for index in range(len(source))]])
    assert next(iter(loader)).shape == (505, 3, 8, 8)
    assert sorted(Path(name).name for name in loader.unreadable) == [
        "empty.png",
        "text.jpg",
        "truncated.jpg",
        "truncated.png",
        "truncated.webp",
    ]
