"""Training logs: a line of JSON and TensorBoard scalars per record."""

import contextlib
import json
from pathlib import Path
from typing import Any

from common.files import write

from torch.utils.tensorboard import SummaryWriter


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of `metrics.jsonl`, ignoring a truncated last line."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


class Log:
    """Writer of `metrics.jsonl` and TensorBoard events; records later than the resumed checkpoint are removed."""

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / "metrics.jsonl"
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        write(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self.file = path.open("a")
        self.board = SummaryWriter(str(folder), purge_step=step or None)

    def add(self, record: dict[str, Any]) -> None:
        """Append a record, and flush it to disk."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for name, value in record.items():
            self.board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Close the files."""
        self.file.close()
        self.board.close()
