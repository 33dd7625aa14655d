"""Signals that stop a run: SIGTERM, SIGINT (Ctrl-C) and SIGHUP.

A run that is stopped prints how to go on, and ends with the exit code 75, by which queues tell it from one that is
done. Outside of training there is nothing to save, so it ends at once. A training ends after a step, with a checkpoint.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, to be tried again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SECONDS = 1.0  # between two exchanges among processes


class Stopped(SystemExit):
    """The end of a run that was stopped by a signal.

    Args:
        said: whether the user has been told.
    """

    def __init__(self, *, said: bool = False) -> None:
        super().__init__(STOPPED)
        self.said = said


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """End the block at once when a signal arrives, and say how to go on."""
    try:
        with _handled(_stop):
            yield
    except Stopped as stopped:
        if not stopped.said and os.environ.get("RANK", "0") == "0":
            print("stopped by a signal; go on with --resume", flush=True)
        raise


def _stop() -> None:
    raise Stopped


@contextlib.contextmanager
def _handled(handle: Callable[[], None]) -> Iterator[None]:
    """Call a function when a signal arrives in this process; a second SIGINT ends the process without further ado."""
    process, before = os.getpid(), {}

    def call(number: int, _: Any) -> None:
        """Handle one signal."""
        if os.getpid() == process:  # a forked worker leaves signals to its parent
            if number == signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
            handle()

    with contextlib.suppress(ValueError):  # signals can only be handled in the main thread
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
                before[number] = signal.signal(number, call)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignal:
    """Notes a signal within a `with` block, and lets all processes agree on the step after which they stop.

    Signals reach the processes at different times, and a process does not know how far the hosts of others have run
    ahead of their devices. So all processes exchange whether they have a signal, always after the same steps, about
    once per second: each exchange takes the maximum over the processes of the seconds per step since the last one, from
    which all compute the same next step. The hosts exchange two numbers; no device is waited for.

    Args:
        maximum: returns the maximum of each number over all processes.
        world_size: number of processes.
        step: completed steps.
    """

    def __init__(self, maximum: Callable[[list[float]], list[float]], *, world_size: int, step: int) -> None:
        self.maximum, self.seconds = maximum, SECONDS if world_size > 1 else 0.0
        self.requested = self.deferred = False  # whether a signal arrived, and whether it waits for the end of a step
        self.step, self.next, self.since = step, step + 1, time.perf_counter()
        self.handled = _handled(self.note)

    def note(self) -> None:
        """Record a signal or, if nothing has been done that could be lost, stop at once."""
        self.requested = True
        if not self.deferred:
            raise Stopped

    def agreed(self, step: int, *, last: bool) -> bool:
        """Return whether all processes stop after this step, the last one or not."""
        if step < self.next and not last:
            return False
        now = time.perf_counter()
        own = [float(self.requested), (now - self.since) / (step - self.step)]
        requested, pace = self.maximum(own)
        # at most twice as many steps as before: the first ones only fill the queue of the device
        ahead = min(2 * (step - self.step), max(1, int(self.seconds / max(pace, 1e-9))))
        self.step, self.next, self.since = step, step + ahead, now
        return bool(requested)

    def __enter__(self) -> "StopSignal":
        self.handled.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.handled.__exit__(None, None, None)
        if self.requested and kind is None:  # it arrived after the last step
            raise Stopped
