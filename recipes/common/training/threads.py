"""The number of threads on a CPU, which is measured: on a busy machine, two can be many times slower than one.

It changes the order of sums in some kernels, and with it the last bits of a result, so it is kept with the settings of
a run and used again when the run is resumed.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from common.config import Run
from common.files import read_json
from common.training.distributed import Processes, cores

import torch
import torch.nn.functional as F

ROUNDS, SECONDS = 15, 1.0  # at most so many measurements of each number, and so long
WORTH = 0.9  # more threads are taken if they need at most this share of the time


def with_threads(run: Run, folder: Path, processes: Processes) -> Run:
    """Set the number of threads of PyTorch on a CPU, and return the settings with this number.

    It is that of the settings or of the run that is resumed, else that of OMP_NUM_THREADS, else the fastest one, which
    is measured within about a second in a single process. On a GPU nothing is changed.

    Args:
        run: settings of the program.
        folder: folder of the run.
        processes: the processes that train together.
    """
    if processes.device.type != "cpu":
        return run
    threads, settings = run.threads, folder / "config.json"
    if threads is None and run.resume and settings.is_file():  # other settings of the preset may be given anew
        before = read_json(settings)
        threads = before.get("run", {}).get("threads") if isinstance(before, dict) else None
    if threads is None:
        known = processes.world_size > 1 or "OMP_NUM_THREADS" in os.environ or cores() == 1
        threads = torch.get_num_threads() if known else measured(processes)
    torch.set_num_threads(threads)
    return replace(run, threads=threads)


def measured(processes: Processes) -> int:
    """Measure which number of threads is fastest, and print it."""
    most = cores()
    candidates = sorted({1, max(1, most // 4), max(1, most // 2), most})
    best, times = fastest(candidates, training_step, use=torch.set_num_threads)
    other = max((n for n in candidates if n != best), key=lambda n: (n > best, n))
    ratio = times[other] / times[best]
    processes.print(
        f"{best} thread(s) of {most} cores, as measured: {other} would take {ratio:.1f} times as long; else --threads N"
    )
    return best


def fastest(
    candidates: Sequence[int],
    work: Callable[[], object],
    *,
    use: Callable[[int], object],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[int, dict[int, float]]:
    """Return the fastest of several numbers of threads, and the median time with each of them.

    They take turns, so that what else the machine does affects all of them. More threads must be clearly faster.

    Args:
        candidates: numbers of threads, in ascending order.
        work: what is measured.
        use: sets the number of threads.
        clock: returns the time in seconds.
    """
    times: dict[int, list[float]] = {number: [] for number in candidates}
    end = clock() + SECONDS
    for turn in range(ROUNDS + 1):
        for number in candidates:
            use(number)
            start = clock()
            work()
            if turn:  # the first time starts the threads
                times[number].append(clock() - start)
        if turn and clock() > end:
            break
    medians = {number: statistics.median(values) for number, values in times.items()}
    best = candidates[0]
    for number in candidates[1:]:
        best = number if medians[number] < WORTH * medians[best] else best
    return best, medians


def training_step(*, dim: int = 192, heads: int = 3, images: int = 16, tokens: int = 49) -> None:
    """Take a small training step of the kind that a transformer block takes, without drawing random numbers."""
    values = torch.linspace(-1, 1, images * tokens * dim).view(images, tokens, dim)
    qkv, wide, narrow = (torch.full(shape, 0.01) for shape in ((3 * dim, dim), (4 * dim, dim), (dim, 4 * dim)))
    for weight in (qkv, wide, narrow):
        weight.requires_grad_()
    normed = F.layer_norm(values, (dim,))
    q, k, v = F.linear(normed, qkv).view(images, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(values.shape)
    hidden = F.gelu(F.linear(values + attended, wide))
    F.linear(hidden, narrow).square().mean().backward()
