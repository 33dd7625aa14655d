"""Learning-rate schedules."""

import math
from collections.abc import Sequence

from common.config import Optimization, known

from torch import Tensor


def epoch_of(progress: Tensor, epochs: int) -> Tensor:
    """Return the epoch, counted from 0, as a 0-d tensor, for schedules that are constant within an epoch."""
    return (progress * epochs + 1e-6).floor()  # rounding may place the product just below the start of the epoch


def by_epoch(epoch: float, *, lr: float, min_lr: float, warmup: float, epochs: float) -> float:
    """Return the learning rate at a fractional epoch: linear warm-up from 0, then half a cosine.

    Source: MAE (published code).
    """
    if epoch < warmup:
        return lr * epoch / warmup
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def by_step(step: int, *, lr: float, min_lr: float, warmup: int, steps: int) -> float:
    """Return the learning rate at a step: linear warm-up that reaches `lr` at its last step, then half a cosine.

    Source: Beyond Masking (published code).
    """
    if step < warmup:
        return lr * step / max(1, warmup - 1)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def by_last_step(
    step: int, *, lr: float, min_lr: float, start_lr: float, warmup: int, steps: int, milestones: Sequence[int] = ()
) -> float:
    """Return the learning rate that SimMIM's code uses: warm-up from `start_lr`, then a cosine or milestones.

    The cosine starts at step 0, so the learning rate drops abruptly at the end of the warm-up. Each milestone divides
    it by 10. The published code sets the rate after a step, from the number of that step, so the schedule lags by one
    step and the first two steps have the same rate. Source: SimMIM (published code).
    """
    done = max(step - 1, 0)
    if done < warmup:
        return start_lr + (lr - start_lr) * done / warmup
    if milestones:
        return lr * 0.1 ** sum(milestone <= done for milestone in milestones)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * done / steps))


def following_warmup(epochs: int) -> float:
    """Return the length of a warm-up that follows the length of the training: a tenth, at most 20 epochs."""
    return min(epochs / 10, 20.0)


def peak_rate(settings: Optimization) -> float:
    """Return the peak learning rate, scaled with the batch size or with its square root."""
    size, reference = known(settings.batch_size), settings.sqrt_rule_at
    return settings.base_lr * (size if reference is None else math.sqrt(size * reference)) / 256


def learning_rate(step: int, settings: Optimization, steps_per_epoch: int) -> float:
    """Return the learning rate of a step, before the scale of the parameter group is applied."""
    lr, end = peak_rate(settings), settings.epochs
    warmup = min(known(settings.warmup_epochs), end)
    if settings.schedule == "epoch":
        return by_epoch(step / steps_per_epoch, lr=lr, min_lr=settings.min_lr, warmup=warmup, epochs=end)
    steps, warmup = end * steps_per_epoch, int(warmup * steps_per_epoch)
    if settings.schedule == "step":
        return by_step(step, lr=lr, min_lr=settings.min_lr, warmup=warmup, steps=steps)
    return by_last_step(
        step,
        lr=lr,
        min_lr=settings.min_lr,
        start_lr=settings.warmup_lr,
        warmup=warmup,
        steps=steps,
        milestones=[int(epoch * steps_per_epoch) for epoch in settings.milestones],
    )
