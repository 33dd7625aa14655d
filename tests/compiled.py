"""Run programs one after another in this process, or in those of `torchrun`, and count what is compiled.

    compiled.py REPORT RUNS

RUNS is JSON, a list of runs `{"program": …, "options": [words], "backend": …, "size": null or that of the nano
encoder}`. The program is a path below the root of the repository. The backend is one of the compiler's; "eager"
captures graphs and does not lower them, which is cheap. DDP's buckets are smaller than a block, as those of a large
network are. The first process writes a line of JSON per run to REPORT: for
each of its trainings the number of steps, and the step in which each graph was captured. In one process a second graph
is an error.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from common.networks.vit import SIZES
from common.training import engine, parallel

import torch
import torch.distributed as dist
from torch._dynamo import config as dynamo
from torch._dynamo.backends.registry import lookup_backend

train, step, compile_, nano = engine.train, torch.optim.AdamW.step, torch.compile, SIZES["nano"]
trainings: list[dict[str, Any]] = []


def counting_train(*args: Any, **kwargs: Any) -> Any:
    trainings.append({"title": kwargs["stage"].title, "step": 0, "captured": []})
    return train(*args, **kwargs)


def counting_step(self: Any, *args: Any, **kwargs: Any) -> Any:
    trainings[-1]["step"] += 1
    return step(self, *args, **kwargs)


def counting_compile(backend: str) -> Any:
    """Return `torch.compile` with this backend, which also notes the step of each graph that it accepts.

    Inductor rejects the first trace of a graph that reads a 0-d float64 tensor on the CPU, such as a drop rate, and has
    it traced again, unless its cache on disk knows the graph.
    """

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        lowered = lookup_backend(backend)(graph, inputs)
        trainings[-1]["captured"].append(trainings[-1]["step"])
        return lowered

    return lambda model, **options: compile_(model, **options, backend=counting)


class SmallBuckets(torch.nn.parallel.DistributedDataParallel):
    """DDP with buckets of a kilobyte."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, bucket_cap_mb=1e-3)  # pyright: ignore


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """Keep the process group for the next program: `torchrun` gives its processes one meeting place."""


def main(report: Path, runs: list[dict[str, Any]]) -> None:
    for module in (engine, *(sys.modules[name] for name in list(sys.modules) if name.startswith("common."))):
        if getattr(module, "train", None) is train:
            module.train = counting_train  # pyright: ignore
    torch.optim.AdamW.step = counting_step
    if "RANK" in os.environ:
        parallel.DistributedDataParallel = SmallBuckets
        dist._DEFAULT_FIRST_BUCKET_BYTES = 1000  # pyright: ignore
        dist.init_process_group("gloo")
        dist.init_process_group = dist.destroy_process_group = do_nothing
    else:
        dynamo.error_on_recompile = True
    for run in runs:
        trainings.clear()
        torch.compile, SIZES["nano"] = counting_compile(run["backend"]), run["size"] or nano
        sys.argv = [str(Path(__file__).parents[1] / run["program"]), *run["options"]]
        runpy.run_path(sys.argv[0], run_name="__main__")
        if os.environ.get("RANK", "0") == "0":
            with report.open("a") as file:
                file.write(json.dumps(trainings) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
