"""Evaluation of a server: what is asked, what is retried, what is refused; against a small stub."""

import json
import os
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from jaxgrpo.cli import explain
from jaxgrpo.config import SamplingConfig
from jaxgrpo.endpoint import EndpointConfig, connect
from jaxgrpo.evaluate import main
from jaxgrpo.types import Problem

CONFIGS = Path(__file__).parent.parent / "configs"
SCHEMA = CONFIGS / "invoices" / "schema.json"
KEY = "sk-a-secret-that-nobody-sees"


def completion(text, tokens=3, reason="stop"):
    """A server's answer: status, headers, body."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    choices = [choice | {"finish_reason": reason}]
    return 200, {}, json.dumps({"choices": choices, "usage": {"completion_tokens": tokens}})


def problems(count):
    return [
        Problem(i, str(i), (), {"messages": [{"role": "user", "content": f"question {i}"}]})
        for i in range(count)
    ]


class Stub:
    """A server that answers what `reply(request's number, its JSON)` says; None hangs up."""

    def __init__(self):
        self.reply = lambda number, body: completion("{}")
        self.requests = []  # time, path, headers, JSON
        self.now = self.most = 0
        stub, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(stub.requests)
                    stub.requests.append((time.monotonic(), self.path, dict(self.headers), body))
                    stub.now += 1
                    stub.most = max(stub.most, stub.now)
                answer = stub.reply(number, body)
                with lock:
                    stub.now -= 1
                if answer is None:
                    self.close_connection = True
                    return
                status, headers, text = answer
                data = text.encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": len(data)}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_):  # the client has gone
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Stub()
    yield server
    server.close()


def endpoint(stub, schema=True, seed=0, sampling=SamplingConfig(), **options):  # noqa: B008
    """Asks the stub, with waits too short to notice."""
    config = EndpointConfig(stub.url, **options)
    return replace(connect(config, "some/model", sampling, seed, schema), first_wait=0.01)


def test_each_completion_is_asked_for_by_itself_and_several_at_once(stub):
    together = threading.Barrier(3)

    def reply(number, body):
        if number < 3:
            together.wait(10)
        question = body["messages"][0]["content"]
        return completion(
            question + " answered", len(question), "length" if "1" in question else "stop"
        )

    stub.reply = reply
    sampling = SamplingConfig(temperature=0.5, max_tokens=40, top_p=0.9)
    replies = endpoint(stub, sampling=sampling, concurrency=3)(problems(4), 2)
    assert stub.most == 3
    assert [each.problem.id for each in replies] == ["0", "1", "2", "3"]
    for i, each in enumerate(replies):
        assert each.texts == [f"question {i} answered"] * 2
        np.testing.assert_array_equal(each.length_G, [10, 10])
        np.testing.assert_array_equal(each.stopped_G, [i != 1] * 2)
    assert {path for _, path, _, _ in stub.requests} == {"/v1/chat/completions"}
    bodies = [body for *_, body in stub.requests]
    seeds = {body.pop("seed") for body in bodies}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    asked = {"model": "some/model", "temperature": 0.5, "max_tokens": 40, "top_p": 0.9}
    assert all(body == asked | {"messages": body["messages"]} for body in bodies)

    # The same seed asks the same again, another asks something else.
    def seeds_of(seed):
        first = len(stub.requests)
        endpoint(stub, seed=seed)(problems(4), 2)
        return {body["seed"] for *_, body in stub.requests[first:]}

    assert seeds_of(0) == seeds
    assert not seeds_of(1) & seeds


def test_the_schema_of_the_row_or_the_file_goes_along(stub):
    own, other = problems(2)
    own.row["schema"] = {"type": "array"}
    endpoint(stub, schema={"minimum": 0.25}, response_format="json_schema")([own, other], 1)
    sent = {
        body["messages"][0]["content"]: body["response_format"]["json_schema"]
        for *_, body in stub.requests
    }
    assert sent == {
        "question 0": {"name": "answer", "schema": {"type": "array"}, "strict": True},
        "question 1": {"name": "answer", "schema": {"minimum": 0.25}, "strict": True},
    }
    endpoint(stub, response_format="json_schema")([own], 1)
    with pytest.raises(ValueError, match="the problem '1' has no schema; give a --schema"):
        endpoint(stub, response_format="json_schema")([own, other], 1)


def test_other_names_and_members(stub):
    extra = '{"chat_template_kwargs": {"enable_thinking": false}, "n": 1.50}'
    endpoint(stub, token_limit="max_completion_tokens", extra_body=extra)(problems(1), 1)
    [(*_, body)] = stub.requests
    assert body["max_completion_tokens"] == 256
    assert "max_tokens" not in body
    assert (body["chat_template_kwargs"], body["n"]) == ({"enable_thinking": False}, 1.5)


def test_what_passes_is_retried(stub):
    faults = [
        (429, {"Retry-After": "1"}, ""),
        (500, {}, "oops"),
        None,
        (503, {"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}, ""),
        (408, {"Retry-After": "soon"}, ""),
    ]
    stub.reply = lambda number, body: faults[number] if number < 5 else completion("[]")
    [replies] = endpoint(stub)(problems(1), 1)
    assert replies.texts == ["[]"]
    times = [request[0] for request in stub.requests]
    assert len(times) == 6
    assert times[1] - times[0] >= 1  # as the server asked
    assert times[5] - times[1] < 1
    bodies = [request[3] for request in stub.requests]
    assert all(body == bodies[0] for body in bodies)


def test_giving_up_takes_one_line(stub):
    stub.reply = lambda number, body: (503, {}, '{"error": {"message": "over\\nloaded"}}')
    line = r"chat/completions: it answers 503: over loaded; given up after 6 tries$"
    with pytest.raises(ValueError, match=line):
        endpoint(stub)(problems(1), 1)
    assert len(stub.requests) == 6

    stub.reply = lambda number, body: (429, {"Retry-After": "86400"}, "")
    with pytest.raises(ValueError, match=r"429: nothing more; it asks to wait 86400 s$"):
        endpoint(stub)(problems(1), 1)
    assert len(stub.requests) == 7


def test_no_server_and_no_answer(stub):
    stub.reply = lambda number, body: time.sleep(0.3)
    with pytest.raises(ValueError, match=r"no answer in 0\.05 s; given up after 6 tries"):
        endpoint(stub, timeout=0.05)(problems(1), 1)
    stub.url = "http://127.0.0.1:1/v1"  # where nobody listens
    with pytest.raises(ValueError, match=r"ConnectError .*; given up after 6 tries"):
        endpoint(stub)(problems(1), 1)


def test_a_refusal_ends_all_requests_at_once(stub):
    waiting = threading.Event()

    def reply(number, body):
        if body["messages"][0]["content"] == "question 2":
            return 400, {}, '{"error": {"message": "no such model"}}'
        waiting.wait(20)
        return None

    stub.reply = reply
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"it answers 400: no such model$"):
        endpoint(stub)(problems(5), 1)
    assert time.monotonic() - start < 10
    assert len(stub.requests) <= 5
    waiting.set()


def test_the_key_goes_to_the_server_and_nowhere_else(stub, monkeypatch, capfd):
    endpoint(stub)(problems(1), 1)
    assert "Authorization" not in stub.requests[0][2]
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")  # as from a file
    monkeypatch.setenv("OPENAI_ORG_ID", "org-somebody")
    asked = endpoint(stub)
    asked(problems(1), 1)
    assert stub.requests[1][2]["Authorization"] == f"Bearer {KEY}"
    assert "org-somebody" not in str(stub.requests)
    assert KEY not in repr(asked)

    stub.reply = lambda number, body: (401, {}, f'{{"error": {{"message": "bad key {KEY}"}}}}')
    with pytest.raises(ValueError, match="401") as refused:
        endpoint(stub)(problems(1), 1)
    assert KEY not in explain(refused.value)[1]
    assert "bad key [OPENAI_API_KEY]" in explain(refused.value)[1]

    monkeypatch.setenv("OTHER_TOKEN", "tok-12345678")
    stub.reply = lambda number, body: (401, {}, "bad tok-12345678")
    with pytest.raises(ValueError, match=r"bad \[OTHER_TOKEN\]"):
        endpoint(stub, key_env="OTHER_TOKEN")(problems(1), 1)
    assert stub.requests[-1][2]["Authorization"] == "Bearer tok-12345678"
    monkeypatch.setenv("OTHER_TOKEN", "tök\n-12345678")
    with pytest.raises(ValueError, match="the value of OTHER_TOKEN is no key") as refused:
        endpoint(stub, key_env="OTHER_TOKEN")
    assert "12345678" not in str(refused.value)
    assert KEY not in "".join(capfd.readouterr())


def test_what_a_server_says_is_shown_as_text(stub):
    said = json.dumps({"error": {"message": "\x1b]0;title\x07 \u202eturned\nlines"}})
    stub.reply = lambda number, body: (400, {}, said)
    with pytest.raises(ValueError, match="400") as refused:
        endpoint(stub)(problems(1), 1)
    code, line = explain(refused.value)
    assert code == 2
    assert line.isprintable()
    assert r"\x1b]0;title\x07 \u202eturned lines" in line


@pytest.mark.parametrize(
    "body",
    [
        "<html>",
        "{}",
        "[]",
        '{"choices": []}',
        '{"choices": [{"message": {"content": "{}"}, "finish_reason": "stop"}]}',  # no usage
        '{"choices": [{"message": {"content": [1]}, "finish_reason": "stop"}],'
        ' "usage": {"completion_tokens": 1}}',
    ],
)
def test_an_answer_that_is_none(stub, body):
    stub.reply = lambda number, _: (200, {}, body)
    with pytest.raises(ValueError, match="chat/completions: its answer"):
        endpoint(stub)(problems(1), 1)
    assert len(stub.requests) == 1


def test_answers_are_read_within_bounds(stub, monkeypatch):
    monkeypatch.setattr("jaxgrpo.endpoint._LARGEST_ANSWER", 1 << 20)
    stub.reply = lambda number, _: completion("x" * (2 << 20))
    with pytest.raises(ValueError, match="its answer has more than 1 MB"):
        endpoint(stub)(problems(1), 1)


def test_no_content_is_an_empty_answer(stub):
    stub.reply = lambda number, _: completion(None, 256, "length")
    [replies] = endpoint(stub)(problems(1), 1)
    assert (replies.texts, replies.stopped_G.tolist()) == ([""], [False])


def test_proxies_of_the_environment(stub, monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # where nobody listens
    endpoint(stub)(problems(1), 1)  # none leads to the loopback
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, stub.url.removesuffix("/v1"))
    stub.url = "http://api.example.invalid/v1"
    endpoint(stub)(problems(1), 1)
    assert stub.requests[1][1] == "http://api.example.invalid/v1/chat/completions"


def test_the_command(stub, monkeypatch, tmp_path, capsys):
    lines = (CONFIGS / "invoices" / "heldout_50.jsonl").read_text("utf-8").splitlines(True)[:6]
    data, out = tmp_path / "data.jsonl", tmp_path / "result.json"
    data.write_text("".join(lines), "utf-8")
    rows = [json.loads(line) for line in lines]
    truth = {row["messages"][1]["content"]: json.dumps(row["ground_truth"]) for row in rows}
    hostile, fenced = (row["messages"][1]["content"] for row in rows[3:5])

    def reply(number, body):
        text = truth[body["messages"][1]["content"]]
        if body["messages"][1]["content"] == fenced:
            return completion(f"```json\n{text}\n```", 7, "length")
        if body["messages"][1]["content"] == hostile:
            return completion('{"\x1b[2J\ud800": 1e999}', 3)
        return completion(text, 3)

    stub.reply = reply
    options = ("--data", data, "--schema", SCHEMA, "--output", out, "--samples", "2")
    system = tmp_path / "system.txt"
    system.write_text("Extract.\n")
    options += ("--sampling.temperature", "1", "--system", system)
    arguments = ("--endpoint", stub.url, "--model", "m", *options)
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    main()
    record = json.loads(out.read_text())
    assert (record["data"], record["temperature"], record["n"]) == (str(data), 1.0, 12)
    assert (record["schema_valid"]["count"], record["exact"]["count"]) == (8, 8)
    assert record["reasons"] == {"valid": 8, "not_json": 2, "fenced": 2}
    assert record["truncated"] == 2 / 12
    assert record["tokens"] == (10 * 3 + 2 * 7) / 12
    assert "schema valid" in capsys.readouterr().out
    systems = [body["messages"][0] for *_, body in stub.requests]
    assert systems == [{"role": "system", "content": "Extract."}] * 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--endpoint", "x", "--batch", "4"], "--batch is of no use here: it is for a model that"),
        (["--endpoint", "x", "--mesh.tp", "2"], "--mesh is of no use"),
        (["--endpoint", "x", "--sampling.draft", "2"], r"--sampling\.draft is of no use"),
        (["--endpoint", "x", "--sampling.constrain"], r"--sampling\.constrain is of no use"),
        (["--concurrency", "4"], "--concurrency is of no use here: it is for an --endpoint"),
        (["--endpoint", "127.0.0.1:8000"], "it must be a URL such as"),
        (["--endpoint", "http://me:pw@host/v1"], "--endpoint has a user, a query or a fragment"),
        (["--endpoint", "http://h/v1?key=1"], "--endpoint has a user, a query or a fragment"),
        (["--endpoint", "http://h", "--key-env", "MINE"], "must have KEY, TOKEN, SECRET"),
        (["--endpoint", "http://h", "--key-env", "MY_KEY"], "no MY_KEY in the environment"),
        (["--endpoint", "http://h", "--concurrency", "0"], "--concurrency is at least 1"),
        (["--endpoint", "http://h", "--timeout", "nan"], "--timeout above 0"),
        (["--endpoint", "http://h", "--extra-body", "[]"], "--extra-body is not a JSON object"),
        (["--endpoint", "http://h", "--extra-body", '{"seed": 1}'], "'seed' is set by another"),
        (["--endpoint", "http://h", "--seed", "-1"], "seed is -1"),
    ],
)
def test_mistakes_are_named_before_anything_is_sent(monkeypatch, tmp_path, options, message):
    data = tmp_path / "data.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "?"}]}\n')
    assert "MY_KEY" not in os.environ
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model", "m", "--data", str(data), *options])
    with pytest.raises(ValueError, match=message) as error:
        main()
    assert "pw" not in str(error.value)
