"""Atomic file writes: a temporary file is flushed, then renamed. Tensors are safetensors, settings are JSON."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from common.config import SettingsError, explained

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def write(path: Path, content: bytes) -> None:
    """Write a file atomically: after an interruption it holds either the old or the new content.

    Raises:
        SettingsError: if the disk is full or read-only, or permission is denied; the old content is kept.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with explained(f"{path} cannot be written"):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """Open a text file that gets its name only when the block ends without an error, so that it is complete.

    Raises:
        SettingsError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with explained(f"{path} cannot be written"):
        try:
            with temporary.open("w", newline="") as file:
                yield file
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write settings or results as JSON, atomically."""
    write(path, json.dumps(value, indent=1).encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        SettingsError: if it is missing, damaged or not readable.
    """
    with explained(f"{path} cannot be read"):
        return json.loads(path.read_text())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write a safetensors file atomically; the values of `metadata` are stored as JSON."""
    apart = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    content = save(apart, metadata={key: json.dumps(value) for key, value in (metadata or {}).items()})
    write(path, _sorted(content) if metadata else content)


def _sorted(content: bytes) -> bytes:
    """Sort the metadata of a safetensors file, whose order is random, so that equal files are equal bytes."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little") + text + content[end:]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a safetensors file by name, and its metadata.

    Raises:
        SettingsError: if the file is missing, damaged or not a safetensors file.
    """
    try:
        with explained(f"{path} cannot be read"), safe_open(path, framework="pt") as file:
            metadata = {key: _json_or_text(value) for key, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise SettingsError(f"{path} is damaged or not a safetensors file: {error}") from error


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:  # a file written by another program
        return value


def sync(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
