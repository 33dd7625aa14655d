"""Run recipes as `torchrun` runs them, and count what is compiled: `compiled.py REPORT DEPTH -- recipe options -- …`.

Graphs are captured but not lowered, which is cheap. Encoders and decoders have DEPTH blocks, and DDP's buckets are
smaller than a block, as those of a large network are. The first process writes a line of JSON per training: its number
of graphs, and the step in which each was captured.
"""

import json
import os
import runpy
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from common.networks.vit import SIZES
from common.training import engine, parallel

import torch
import torch.distributed as dist

trainings: list[dict[str, Any]] = []
train, step, compile_function = engine.train, torch.optim.AdamW.step, torch.compile


def counting_train(*args: Any, **kwargs: Any) -> Any:
    trainings.append({"title": kwargs["stage"].title, "step": 0, "captured": []})
    return train(*args, **kwargs)


def counting_step(self: Any, *args: Any, **kwargs: Any) -> Any:
    trainings[-1]["step"] += 1
    return step(self, *args, **kwargs)


def counting_backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    trainings[-1]["captured"].append(trainings[-1]["step"])
    return graph.forward


def counting_compile(function: Any, **options: Any) -> Any:
    return compile_function(function, **options, backend=counting_backend)


class SmallBuckets(torch.nn.parallel.DistributedDataParallel):
    """DDP with buckets of a kilobyte."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, bucket_cap_mb=1e-3)  # pyright: ignore


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """Keep the process group for the next recipe: `torchrun` gives its processes one meeting place."""


if __name__ == "__main__":
    report, depth, _, *rest = sys.argv[1:]
    runs = [list(words) for dashes, words in groupby(rest, lambda word: word == "--") if not dashes]
    SIZES["nano"] = {"dim": 12, "depth": int(depth), "heads": 2}
    for module in (engine, *(sys.modules[name] for name in list(sys.modules) if name.startswith("common."))):
        if getattr(module, "train", None) is train:
            module.train = counting_train  # pyright: ignore
    torch.optim.AdamW.step = counting_step
    torch.compile = counting_compile
    parallel.DistributedDataParallel = SmallBuckets
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1000  # pyright: ignore
    dist.init_process_group("gloo")
    dist.init_process_group = dist.destroy_process_group = do_nothing
    for name, *options in runs:
        trainings.clear()
        sys.argv = [str(Path(sys.path[0], f"{name}.py")), *options, "--compile", "on", "--device", "cpu"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        if os.environ.get("RANK", "0") == "0":
            with Path(report).open("a") as file:
                file.write(json.dumps({"recipe": name, "trainings": trainings}) + "\n")
