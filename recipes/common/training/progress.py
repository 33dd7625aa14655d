"""What a user sees of a training while it runs: a progress bar, how long it will take, and what limits its speed."""

import time
from collections.abc import Callable

from tqdm import tqdm

MEASURED_SECONDS = 5.0  # of steps from which the time left is estimated, unless an epoch ends before
WORTH_SAYING = 20.0  # seconds left, below which there is no need to say so
FAR_OFF = 1.5  # factor by which an estimate must be wrong to be said again
BAR = "{desc} {percentage:3.0f}%|{bar}| {remaining} left{postfix}"


def in_words(seconds: float) -> str:
    """Return a duration in the unit in which it is spoken of, for example "14 minutes"."""
    for unit, length in (("day", 86400.0), ("hour", 3600.0), ("minute", 60.0)):
        if seconds >= 1.5 * length:
            count = (
                f"{seconds / length:.1f}" if seconds < 9.5 * length and unit != "minute" else f"{seconds / length:.0f}"
            )
            return f"{count.removesuffix('.0')} {unit}s"
    return f"{max(1, round(seconds))} seconds"


def limited_by(waiting: float) -> str:
    """Return what limits the speed of a training that spends a fraction of its time waiting for data."""
    if waiting > 0.3:
        return (
            f"the data limit the speed: {waiting:.0%} of the time is spent waiting for images; "
            "more --workers on a machine with more cores, or smaller image files, are faster"
        )
    return f"computing limits the speed: {waiting:.0%} of the time is spent waiting for images"


class Progress:
    """A progress bar of 80 columns or more, and the estimated time left, which is said once and when it is far off.

    Args:
        title: title of the training.
        steps: number of steps of the training.
        done: number of steps done before.
        per_epoch: number of steps per epoch.
        say: prints a line; None in all processes but the main one.
        shorter: returns what would take less time than a number of seconds; empty: nothing.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        title: str,
        *,
        steps: int,
        done: int,
        per_epoch: int,
        say: Callable[[str], None] | None,
        shorter: Callable[[float], str] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.steps, self.first, self.per_epoch, self.clock = steps, done, per_epoch, clock
        self.say, self.shorter = say, shorter
        self.measured_from: tuple[int, float] | None = None  # the first step is not typical: it starts the workers
        self.said: float | None = None  # seconds per step of the last estimate
        self.bar = tqdm(
            desc=title.split(",")[0][:14],
            total=steps,
            initial=done,
            disable=None if say is not None else True,
            leave=False,
            dynamic_ncols=True,
            bar_format=BAR,
            mininterval=0.2,
        )

    @property
    def hidden(self) -> bool:
        """Return whether there is no bar, as in a file or a pipe."""
        return bool(self.bar.disable)

    def advance(self, step: int, wait: Callable[[], object]) -> None:
        """Count a step, and estimate the time left after the first ones.

        Args:
            step: number of steps done.
            wait: waits until the device has done them; called twice in a training.
        """
        self.bar.update()
        if self.say is None or self.said is not None:
            return
        if self.measured_from is None:
            wait()
            self.measured_from = step, self.clock()
            return
        # at least one step before the end of the epoch, so that the line stands before it
        early = self.clock() - self.measured_from[1] < MEASURED_SECONDS
        if early and (step + 1) % self.per_epoch and step + 1 < self.steps:
            return
        wait()
        self.estimate(step)

    def estimate(self, step: int) -> None:
        """Say how long the rest will take, if that has not been said or was far off."""
        if self.say is None or self.measured_from is None or step == self.measured_from[0]:
            return
        start, since = self.measured_from
        each = (self.clock() - since) / (step - start)
        left, again = each * (self.steps - step), self.said is not None
        if again and (1 / FAR_OFF < each / (self.said or each) < FAR_OFF or left < 60):
            return
        self.said = each
        if left >= WORTH_SAYING:
            shorter = self.shorter(left) if self.shorter is not None and not again else ""
            now = "now about" if again else "about"
            self.say(f"{now} {in_words(left)} {'left' if again or self.first else 'on this machine'}{shorter}")

    def show(self, text: str) -> None:
        """Show losses and speed behind the bar."""
        self.bar.set_postfix_str(text)

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()
