"""A few cases of the fault campaign (`python -m scripts.faults` tries all), and its table."""

import sys

import pytest

from scripts import faults
from scripts.inject.base import JOBS, ROWS, Outcome, Row, run_cases


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """What the rows share is made by the first."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize("number", ["1", "3", "5-log"])
def test_a_case_of_each_row_holds(work, number):
    JOBS.set(1)
    line = faults.run_row(number, work, seed=0, count=1)
    assert line.good, line.outcome.notes


def test_cases_that_fail_are_counted_and_kept(tmp_path):
    def case(place):
        (place / "something").touch()
        if place.name == "b":
            raise OSError("not b")

    outcome = run_cases(tmp_path, [(name, case) for name in "abc"])
    assert outcome == Outcome(2, 3, (f"{tmp_path}/b: OSError: not b",))
    assert [path.name for path in tmp_path.rglob("*")] == ["b", "something"]


def test_the_table_and_the_exit_code_say_what_failed(tmp_path, monkeypatch, capsys):
    outcomes = {"1": Outcome(2, 2), "2": Outcome(1, 2, ("x: not | b",))}
    for number in outcomes:
        monkeypatch.setitem(ROWS, number, Row(f"fault {number}", "all of it", number))
    monkeypatch.setattr(Row, "__call__", lambda row, *_: outcomes[row.function])
    arguments = ["faults", "--rows", "1,2", "--seed", "5", "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--markdown", str(tmp_path / "table.md")])
    with pytest.raises(SystemExit, match=r"failed: rows 2; .*--rows 2 --seed 5"):
        faults.main()
    assert "x: not | b" in capsys.readouterr().out
    table = (tmp_path / "table.md").read_text()
    assert "| 1 | fault 1 | 2/2 | all of it |" in table
    assert "| 2 | fault 2 | 1/2 | all of it |" in table
    assert "- Row 2: x: not &#124; b" in table
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["row_2"]
    monkeypatch.setattr(sys, "argv", ["faults", "--rows", "1,20"])
    with pytest.raises(SystemExit, match="error: no row 20; there are 1, 2, 3"):
        faults.main()
