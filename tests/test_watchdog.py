"""The watchdog and the clock: late phases leave their stacks, phases in time leave nothing."""

import threading

import pytest

from jaxgrpo.clock import Clock
from jaxgrpo.watchdog import Watchdog


def test_a_late_phase_leaves_the_stacks_of_all_threads(tmp_path):
    late = threading.Event()
    said = []

    def say(line):
        said.append(line)
        late.set()

    def hang_here():
        late.wait(60)

    other = threading.Thread(target=hang_here)
    other.start()
    clock = Clock(watch=Watchdog(tmp_path / "stacks.txt", 0.05, say))
    with clock("sample"):
        late.wait(60)  # until the watchdog barks
    other.join()
    assert clock.take()["sample"] >= 0.05
    (line,) = said
    assert "'sample'" in line
    assert str(tmp_path / "stacks.txt") in line
    stacks = (tmp_path / "stacks.txt").read_text()
    assert " sample for 0 s\n" in stacks
    assert "in hang_here" in stacks
    assert "in test_a_late_phase_leaves_the_stacks_of_all_threads" in stacks


def test_a_phase_may_take_ten_times_its_longest(tmp_path):
    watch = Watchdog(tmp_path / "stacks.txt", 60.0, pytest.fail)
    with watch("sample"):
        pass
    watch._longest["sample"] = 30.0
    threads = set(threading.enumerate())  # the first phase's timer may still be ending
    with watch("sample"):
        (timer,) = set(threading.enumerate()) - threads
        assert timer.interval == 300.0
    timer.join(10)
    assert not timer.is_alive()
    assert not (tmp_path / "stacks.txt").exists()


def test_what_is_raised_before_a_phase_keeps_it_from_starting():
    def stop():
        raise KeyError("stop")

    with pytest.raises(KeyError), Clock(before=stop)("sample"):
        pytest.fail("the phase has started")
