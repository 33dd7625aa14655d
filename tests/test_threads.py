"""The number of threads on a CPU: measured unless it is known, and kept with the run."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from common.config import Run
from common.training import threads
from common.training.distributed import ALONE
from common.training.threads import fastest, training_step, with_threads

import pytest
import torch
from small_runs import SMALL, pretrained


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine of four cores where nothing is known, and the numbers of threads that were measured."""
    tried: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads, "cores", lambda: 4)
    monkeypatch.setattr(
        threads, "fastest", lambda numbers, *_, **__: (tried.extend(numbers), (2, {1: 2, 2: 1, 4: 3}))[1]
    )
    return tried


class Machine:
    """A machine that needs these seconds with each number of threads, and more for the first time."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = {int(name[1:]): value for name, value in seconds.items()}
        self.now, self.number, self.used = 0.0, 0, list[int]()

    def fastest(self) -> int:
        def use(number: int) -> None:
            self.number = number

        def work() -> None:
            self.now += self.seconds[self.number] + (0.0 if self.number in self.used else 5.0 - self.number)
            self.used.append(self.number)

        return fastest(list(self.seconds), work, use=use, clock=lambda: self.now)[0]


def test_the_fastest_number_is_taken_and_more_threads_only_if_they_are_clearly_faster() -> None:
    assert Machine(n1=0.03, n2=0.02, n4=0.015).fastest() == 4
    assert Machine(n1=0.03, n2=0.02, n4=0.019).fastest() == 2
    assert Machine(n1=0.03, n2=0.029, n4=0.028).fastest() == 1
    assert Machine(n1=0.03, n2=0.9).fastest() == 1


def test_a_slow_machine_is_measured_only_for_about_a_second() -> None:
    slow = Machine(n1=0.4, n2=0.5)
    assert slow.fastest() == 1
    assert slow.used == [1, 2, 1, 2]  # the first time takes so long that each is measured once


def test_what_is_measured_takes_a_step_and_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    training_step()
    assert torch.equal(before, torch.get_rng_state())


def test_it_is_measured_once_and_printed(unset: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert with_threads(Run(), tmp_path, ALONE) == Run(threads=2)
    assert unset == [1, 2, 4]
    assert torch.get_num_threads() == 2
    said = "2 thread(s) of 4 cores, as measured: 4 would take 3.0 times as long; else --threads N\n"
    assert capsys.readouterr().out == said


@pytest.mark.usefixtures("unset")
def test_a_setting_and_the_environment_and_the_run_before_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert with_threads(Run(threads=3), tmp_path, ALONE).threads == torch.get_num_threads() == 3
    (tmp_path / "config.json").write_text(json.dumps({"run": {"threads": 1}}))
    assert with_threads(Run(resume=True), tmp_path, ALONE).threads == torch.get_num_threads() == 1
    assert with_threads(Run(resume=True, threads=3), tmp_path, ALONE).threads == 3
    assert with_threads(Run(), tmp_path, ALONE).threads == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)
    assert with_threads(Run(), tmp_path, ALONE).threads == 3
    assert with_threads(Run(), tmp_path, replace(ALONE, device=torch.device("cuda"))) == Run()


def test_several_processes_keep_what_torchrun_gave_them(unset: list[int], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert with_threads(Run(), tmp_path, replace(ALONE, world_size=2)).threads == 1
    assert unset == []


def test_a_resumed_run_goes_on_with_the_threads_that_it_was_started_with(tmp_path: Path) -> None:
    args = [*SMALL, "--epochs", "1", "--evaluate", "--device", "cpu", "--runs", tmp_path]
    pretrained("mae", *args, "--threads", "1")
    assert json.loads((tmp_path / "mae" / "config.json").read_text())["run"]["threads"] == 1
    for again in ([], ["--preset", "digits", *args]):
        torch.set_num_threads(2)
        pretrained("mae", "--runs", tmp_path, "--resume", *again)
        assert torch.get_num_threads() == 1
