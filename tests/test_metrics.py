"""The logs of a run: whole lines only, kept while there is no room for them."""

import json
import resource

import pytest

from jaxgrpo.metrics import RunLog


@pytest.fixture
def said():
    return []


@pytest.fixture
def log(tmp_path, said):
    return RunLog(tmp_path, said.append)


@pytest.fixture
def no_more_than(monkeypatch):
    """Lets no file of this process grow beyond a size, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def lines(tmp_path, name="metrics"):
    return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]


def test_records_wait_until_there_is_room(log, said, tmp_path, no_more_than):
    log.write("metrics", [{"step": 1, "text": "a" * 40}])
    no_more_than(100)  # room for a part of the next record
    log.write("metrics", [{"step": 2, "text": "b" * 80}])
    log.write("metrics", [{"step": 3}])
    (line,) = said
    assert "File too large" in line
    assert "metrics.jsonl" in line
    assert lines(tmp_path) == [{"step": 1, "text": "a" * 40}]  # nothing broken behind it
    assert [record["step"] for record in log.read("metrics")] == [1, 2, 3]
    with pytest.raises(OSError, match=r"File too large.*metrics"):
        log.finish()
    no_more_than(10_000)
    log.write("metrics", [{"step": 4}])
    assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3, 4]
    assert said[1].endswith("metrics.jsonl: written, with what was kept")
    log.finish()


def test_what_is_left_is_written_at_the_end(log, tmp_path, no_more_than):
    no_more_than(3)
    log.write("completions", [{"step": 1, "text": "\x7f\ud800"}])
    no_more_than(1000)
    log.finish()
    assert lines(tmp_path, "completions") == [{"step": 1, "text": "\x7f\ud800"}]


def test_rewind_drops_later_steps_and_a_half_line(log, tmp_path):
    log.write("eval", [{"step": step} for step in (0, 2, 4)])
    with (tmp_path / "eval.jsonl").open("a") as file:
        file.write('{"step": 5')
    log.rewind(2)
    assert lines(tmp_path, "eval") == [{"step": 0}, {"step": 2}]
    log.write("eval", [{"step": 3}])
    assert [record["step"] for record in log.read("eval")] == [0, 2, 3]


@pytest.mark.parametrize("line", ["{", "[]", "{}", "null", "\x00", '{"stap": 1}'])
def test_a_line_that_is_no_record_is_named(log, tmp_path, line):
    (tmp_path / "eval.jsonl").write_text('{"step": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"eval\.jsonl:2: no record of a step"):
        log.read("eval")
    with pytest.raises(ValueError, match=r"eval\.jsonl:2"):
        log.rewind(0)
    assert (tmp_path / "eval.jsonl").read_text() == '{"step": 0}\n' + line + "\n"
