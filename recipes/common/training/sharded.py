"""Tensors of a checkpoint as safetensors, by torch.distributed.checkpoint: each process writes and reads its own part.

A folder can be read whatever wrote it: one process, several of them, or `common.files.write_tensors`.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

from common.config import explained

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, of which each process holds a part, as one file per process; collective.

    Tensors that are not sharded are written once.

    Raises:
        SettingsError: on every process, if the disk is full or read-only, or permission is denied.
    """
    try:
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        with explained(f"{folder} cannot be written"):
            raise next(iter(error.failures.values()))[0] from error


def stored(folder: Path) -> dict[str, Tensor]:
    """Return the tensors in the files of a folder by name, on the meta device: shapes and dtypes, without values."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")  # pyright: ignore
        for name, entry in metadata.items()
    }


def read_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, or the parts of them that this process holds, from the files of a folder; not collective."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
