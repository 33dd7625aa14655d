"""Images in memory and on the disk, for the tests of what reads them."""

import re
from pathlib import Path

import torch
from PIL import Image
from torch import Generator, Tensor


class Memory:
    """Images in memory; some of them may be unreadable."""

    def __init__(self, count: int = 12, *, channels: int = 3, broken: tuple[int, ...] = (), classes: int = 0) -> None:
        self.channels, self.classes, self.broken = channels, [str(number) for number in range(classes)], broken
        self.images = torch.randint(256, (count, channels, 20, 30), dtype=torch.uint8, generator=Generator())
        self.decoded = 0

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        self.decoded += 1
        if index in self.broken:
            raise OSError("the file is truncated")
        return self.images[index]

    def label(self, index: int) -> int:
        return index % len(self.classes) if self.classes else -1

    def name(self, index: int) -> str:
        return f"memory {index}"


def unchanged(image: Tensor, generator: Generator) -> Tensor:
    return image


def chance(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def quoting(sentence: str) -> str:
    return f"^{re.escape(sentence)}"


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(path)
