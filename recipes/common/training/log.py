"""Training logs: a line of JSON and TensorBoard scalars per record."""

import contextlib
import json
from pathlib import Path
from typing import Any

from common.config import explained
from common.files import write

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of `metrics.jsonl`, ignoring a truncated last line.

    Raises:
        SettingsError: if the file cannot be read.
    """
    records = []
    with explained(f"{path} cannot be read"):
        lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


class Log:
    """Writer of `metrics.jsonl` and TensorBoard events; records later than the resumed checkpoint are removed.

    Raises:
        SettingsError: if they cannot be written.
    """

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / "metrics.jsonl"
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        write(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self.sentence = f"{path} and the events of TensorBoard cannot be written"
        with explained(self.sentence):
            self.file = path.open("a")
            self.board = SummaryWriter(str(folder), purge_step=step or None)

    def add(self, record: dict[str, Any]) -> None:
        """Append a record, and flush it to disk."""
        with explained(self.sentence):
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
            for name, value in record.items():
                self.board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Close the files."""
        with explained(self.sentence):
            self.file.close()
            self.board.close()


def show_picture(path: Path, step: int) -> None:
    """Add a picture to the TensorBoard events of its folder, under its name.

    Raises:
        SettingsError: if it cannot be read, or the events cannot be written.
    """
    with explained(f"{path} cannot be shown in TensorBoard"):
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        with SummaryWriter(str(path.parent)) as board:
            board.add_image(path.stem, pixels, step, dataformats="HWC")
