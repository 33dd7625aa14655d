"""A fingerprint of the images of a run, by which a resumed run notices that they have changed."""

import os
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from common.data.sources import Data, Source
from common.randomness import seed_of

import numpy as np

BLOCKS = 1000  # at most so many hashes per split, so that the fingerprint of millions of images remains small


def fingerprint(data: Data) -> dict[str, Any]:
    """Summarize the names and labels of the images of every split, in their order, as JSON values.

    The contents of the files are not read. The names of files are relative, so the folder may be moved.
    """
    return {split: _summary(source) for split, source in _splits(data).items()}


def changes(data: Data, before: Mapping[str, Any]) -> str:
    """Describe how the images differ from those of an earlier fingerprint; empty if they are the same."""
    splits, found = _splits(data), []
    for split in dict.fromkeys([*before, *splits]):
        then: dict[str, Any] = before.get(split, {"images": 0, "classes": [], "block": 1, "blocks": []})
        now = _summary(splits[split], block=then["block"]) if split in splits else then | {"images": 0, "blocks": []}
        if now == then:
            continue
        counts = now["images"], then["images"]
        same = counts[0] == counts[1]
        found.append(f"{split} has {counts[0]} images" + (" as before, but others" if same else f", not {counts[1]}"))
        for words, classes, others in (("new", now, then), ("missing", then, now)):
            if names := sorted(set(classes["classes"]) - set(others["classes"])):
                found.append(f"{words} classes: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}")
        sides = [now["blocks"], then["blocks"]]
        first = next(
            (i for i, pair in enumerate(zip(*sides, strict=False)) if pair[0] != pair[1]), min(map(len, sides))
        )
        if firsts := [side[first][0] for side in sides if first < len(side)]:
            where = f"among {then['block']} from" if then["block"] > 1 else "at"
            found.append(f"the first change is {where} {min(firsts)}")
    return "; ".join(found)


def _splits(data: Data) -> dict[str, Source]:
    """Return the splits by name, those that are the same images once."""
    labeled = None if data.labeled is data.train else data.labeled
    splits = {"train": data.train, "labeled": labeled, "test": data.test}
    return {name: source for name, source in splits.items() if source is not None}


def _summary(source: Source, *, block: int | None = None) -> dict[str, Any]:
    """Return number and classes of the images, and the first name and a hash of every `block` of them."""
    names, labels = _listing(source)
    block = block or max(1, -(-len(names) // BLOCKS))
    if source.classes:  # a class that is added changes no hash of the others
        labels = np.array([seed_of(name) for name in (*source.classes, "")])[labels]
    blocks = []
    for start in range(0, len(names), block):
        part = slice(start, start + block)
        content = b"\0".join(names[part].tolist()) + b"\0" + labels[part].tobytes()
        blocks.append([os.fsdecode(names[start]), blake2b(content, digest_size=8).hexdigest()])
    return {"images": len(names), "classes": list(source.classes), "block": block, "blocks": blocks}


def _listing(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Return the names of all images, as bytes, and their labels."""
    if (listing := getattr(source, "listing", None)) is not None:
        return listing()
    indices = range(len(source))
    names = np.array([os.fsencode(source.name(index)) for index in indices], dtype=np.bytes_)
    return names, np.array([source.label(index) for index in indices], dtype=np.int64)
