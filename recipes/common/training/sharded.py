"""Tensors of a checkpoint as safetensors, by torch.distributed.checkpoint: each process writes and reads its own part.

A folder can be read whatever wrote it: one process, several of them, or `common.files.write_tensors`.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, load, save


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, of which each process holds a part, as one file per process; collective.

    Tensors that are not sharded are written once.
    """
    save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in the files of a folder, by name."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    return {name: tuple(entry.size) for name, entry in metadata.state_dict_metadata.items()}  # pyright: ignore


def read_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, or the parts of them that this process holds, from the files of a folder; not collective."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
