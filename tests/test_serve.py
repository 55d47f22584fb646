"""The chat server: on the tiny model through the openai client, its batches, and as a process."""

import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import jax
import jax.numpy as jnp
import openai
import pytest
import uvicorn

import jaxgrpo.serve
from jaxgrpo.batching import Batcher, Draw, FullError
from jaxgrpo.chat import Chat, ChatConfig, open_chat
from jaxgrpo.chat_api import ApiError, read_request
from jaxgrpo.chat_app import make_app
from jaxgrpo.config import MeshConfig, SamplingConfig, ScoringConfig
from jaxgrpo.data import load_problems
from jaxgrpo.drawing import NO_TRUNCATION, Truncation
from jaxgrpo.endpoint import EndpointConfig, connect
from jaxgrpo.evaluate import Evaluation, evaluate, evaluate_heldout
from jaxgrpo.policy import find_policy
from jaxgrpo.rewards.json_schema import SchemaReward, load_schema
from jaxgrpo.rewards.pool import Pool
from jaxgrpo.rollout import Sampler
from jaxgrpo.sharding import FSDP, make_mesh
from jaxgrpo.tokenizer import load_tokenizer
from jaxgrpo.types import Problem

CONFIGS = Path(__file__).parent.parent / "configs"
TINY = CONFIGS / "tiny_qwen3"
LIMIT = 64
INVOICE = "Ledger: 11 February 2024, Blue Fjord GmbH, 294.76 GBP"
ASK = [{"role": "user", "content": f"{INVOICE}\nReturn valid JSON only."}]


@pytest.fixture(scope="module")
def chat():
    with open_chat(str(TINY), ChatConfig(max_tokens=LIMIT)) as chat:
        yield chat


@pytest.fixture(scope="module")
def url(chat):
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(chat), log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def complete(client, **options):
    return client.chat.completions.create(
        **{"model": "tiny_qwen3", "messages": ASK, "temperature": 0} | options
    )


def test_an_openai_client_gets_completions(client, chat):
    assert [model.id for model in client.models.list()] == ["tiny_qwen3"]
    answer = complete(client)
    [choice] = answer.choices
    assert json.loads(choice.message.content)["date"] == "2024-02-11"
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
    prompt = chat.tokenizer.encode_chat(ASK)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.total_tokens == len(prompt) + answer.usage.completion_tokens

    turns = [*ASK, {"role": "assistant", "content": "{}<|im_end|>"}, *ASK]
    longer = complete(client, messages=turns, max_tokens=1)
    assert longer.usage.prompt_tokens == len(chat.tokenizer.encode_chat(turns))

    # Fewer tokens are the first ones of the same.
    length = answer.usage.completion_tokens
    [cut] = complete(client, max_tokens=length - 5).choices
    assert cut.finish_reason == "length"
    assert 0 < len(cut.message.content) < len(choice.message.content)
    assert choice.message.content.startswith(cut.message.content)
    same = complete(client, max_completion_tokens=length)
    assert (same.choices[0], same.usage) == (choice, answer.usage)


def test_a_seed_gives_the_same_whatever_else_is_asked(client):
    def texts(**options):
        answer = complete(client, temperature=1.5, **options)
        return [choice.message.content for choice in answer.choices]

    alone = texts(seed=-7, n=3)
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(8) as threads:
        others = [threads.submit(texts, n=2) for _ in range(4)]
        again = threads.submit(texts, seed=-7, n=3).result()
        together = {text for other in others for text in other.result()}
    assert again == alone
    assert len(together) == 8  # without a seed each is another
    assert texts(seed=-7) == alone[:1]


def test_a_stream_has_the_same_in_events(client):
    options = {"temperature": 1, "seed": 3, "n": 2}
    plain = complete(client, **options)
    *chunks, last = complete(client, stream=True, stream_options={"include_usage": True}, **options)
    assert (last.choices, last.usage) == ([], plain.usage)
    for index, choice in enumerate(plain.choices):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(one.delta.content or "" for one in mine) == choice.message.content
        assert mine[-1].finish_reason == choice.finish_reason
    assert all(chunk.usage is None for chunk in chunks)


def json_schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def test_a_schema_is_met_whatever_the_model_would_say(client):
    amount = {"type": "object", "properties": {"amount": {"type": "integer", "maximum": 99}}}
    amount |= {"required": ["amount"], "additionalProperties": False}
    words = {"enum": ["yes", "no"]}
    formats = [json_schema(amount), json_schema(words), {"type": "json_object"}]

    def texts(response_format):
        answer = complete(client, temperature=1, seed=1, n=2, response_format=response_format)
        assert all(choice.finish_reason == "stop" for choice in answer.choices)
        return [choice.message.content for choice in answer.choices]

    alone = [texts(each) for each in formats]
    for schema, each in zip([amount, words, {"type": "object"}], alone, strict=True):
        assert [SchemaReward(schema)(text) for text in each] == [1.0, 1.0]
    with ThreadPoolExecutor(3) as threads:  # in one batch
        assert [*threads.map(texts, formats)] == alone
    with pytest.raises(openai.BadRequestError, match="cannot be constrained to this schema"):
        complete(client, response_format=json_schema({"not": {"type": "string"}}))


def test_evaluation_of_the_server_is_that_of_the_model(url, tmp_path):
    data = tmp_path / "data.jsonl"
    lines = (CONFIGS / "invoices" / "heldout_50.jsonl").read_text("utf-8").splitlines(True)
    data.write_text("".join(lines[:12]), "utf-8")
    schema = load_schema(CONFIGS / "invoices" / "schema.json")
    what, tokenizer, mesh = Evaluation(str(data)), load_tokenizer(TINY), make_mesh(MeshConfig())
    sampling = SamplingConfig(temperature=0, max_tokens=LIMIT)
    by_model, by_server = [], []
    with Pool(schema, {}, ScoringConfig(workers=1)) as pool:
        with jax.set_mesh(mesh):
            model = evaluate_heldout(
                Sampler(tokenizer, sampling, 4096, mesh),
                pool,
                find_policy(str(TINY)).load(mesh, jnp.dtype("float32"), FSDP),
                {what.data: load_problems(data, tokenizer, 4096)},
                what,
                batch=12,
                seed=0,
                seen=by_model.append,
            )
        endpoint = connect(EndpointConfig(url), "tiny_qwen3", sampling, 0, schema)
        problems = load_problems(data, None, 0)
        server = evaluate(lambda: endpoint(problems, 1), pool, what, by_server.append)
    for (ours, reasons), (theirs, their_reasons) in zip(by_model, by_server, strict=True):
        assert (ours.problem.id, ours.texts, reasons) == (
            theirs.problem.id,
            theirs.texts,
            their_reasons,
        )
    del model["seconds"], server["seconds"]
    assert model == server
    assert 0 < model["schema_valid"]["count"] < 12

    with Pool(schema, {}, ScoringConfig(workers=1)) as pool:
        config = EndpointConfig(url, response_format="json_schema")
        endpoint = connect(config, "tiny_qwen3", sampling, 0, schema)
        held = evaluate(lambda: endpoint(problems, 1), pool, what)
    assert held["parses"]["count"] == 12
    assert held["schema_valid"]["count"] > model["schema_valid"]["count"]


def test_what_is_not_supported_is_refused(client, url):
    def error(kind, **options):
        with pytest.raises(kind) as refused:
            complete(client, **options)
        return refused.value.body["message"], refused.value.param, refused.value.code

    assert error(openai.NotFoundError, model="gpt") == (
        "no model 'gpt' here, only 'tiny_qwen3'",
        "model",
        "model_not_found",
    )
    message, *rest = error(openai.BadRequestError, stop=["}"])
    assert message == "stop with this value is not supported"
    assert rest == ["stop", "unsupported_parameter"]
    assert error(openai.BadRequestError, max_tokens=LIMIT + 1)[0] == (
        "max_tokens is 65; this server's limit is 64, which --max-tokens sets"
    )
    long = [{"role": "user", "content": "word " * 2000}]
    message, *rest = error(openai.BadRequestError, messages=long)
    assert "; this server's limit is 960" in message
    assert rest == ["messages", "context_length_exceeded"]

    def post(**what):
        return httpx2.post(f"{url}/chat/completions", trust_env=False, **what)

    answer = post(content=b"{\x1b")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("the body: not JSON")
    assert post(content=b" " * (5 << 20)).status_code == 413
    body = {"model": "tiny_qwen3", "messages": ASK}
    answer = post(json=body, headers={"Origin": "http://127.0.0.1:8000"})
    assert answer.status_code == 403
    assert answer.json()["error"]["message"] == "requests of web pages are not answered"
    for path in ("/chat/completions", "/completions"):
        answer = httpx2.get(url + path, trust_env=False)
        assert answer.status_code == (405 if path == "/chat/completions" else 404)
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_fault_of_the_model_costs_its_batch(client, url, chat, monkeypatch, capfd):
    def fail(*_):
        raise RuntimeError("out of memory \x1b[2J\n")

    with monkeypatch.context() as patched:
        patched.setattr(chat.batcher, "_answer", fail)
        with pytest.raises(openai.InternalServerError) as failed:
            complete(client)
    assert failed.value.body["message"] == r"the model failed: out of memory \x1b[2J\n"
    said = capfd.readouterr().err
    assert r"RuntimeError: out of memory \x1b[2J" in said
    assert "\x1b" not in said
    assert complete(client).choices[0].message.content
    health = url.replace("/v1", "/health")
    assert httpx2.get(health, trust_env=False).json() == {"status": "ok"}


def test_a_client_that_hangs_up_and_a_bug(url, chat, monkeypatch, caplog):
    address = httpx2.URL(url)
    with socket.create_connection((address.host, address.port)) as half:
        half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
    monkeypatch.setattr(Chat, "_limit", None)
    answer = httpx2.post(
        f"{url}/chat/completions", json={"model": chat.name, "messages": ASK}, trust_env=False
    )
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    for _ in range(500):  # it is logged after the answer
        if caplog.records:
            break
        time.sleep(0.01)
    [bug] = caplog.records  # and nothing about the other
    assert "NoneType" in str(bug.exc_info[1])
    bug.msg = "\x1b[2J"
    assert r"\x1b[2J" in jaxgrpo.serve._HarmlessFormatter().format(bug)


def test_what_nobody_waits_for_is_not_drawn(client, url, chat, monkeypatch):
    draw, drawn, go = chat.batcher._answer, [], threading.Event()

    def slow(how, problems):
        drawn.extend(problem.row["messages"][0]["content"] for _, problem in problems)
        assert go.wait(30)
        return draw(how, problems)

    def ask(name):
        return {"messages": [{"role": "user", "content": name}], "max_tokens": 1}

    def until(there):
        for _ in range(3000):
            if there():
                return
            time.sleep(0.01)
        raise AssertionError

    address = httpx2.URL(url)
    body = json.dumps(ask("gone") | {"model": chat.name, "temperature": 0, "n": 2})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    monkeypatch.setattr(chat.batcher, "_answer", slow)
    with ThreadPoolExecutor(1) as thread:
        try:
            first = thread.submit(complete, client, **ask("first"))
            until(lambda: drawn)
            with socket.create_connection((address.host, address.port)) as gone:
                gone.sendall(f"{head}{body}".encode())
                until(lambda: len(chat.batcher._waiting) == 2)
            waiting = [*chat.batcher._waiting]
            until(lambda: all(one.answers.cancelled() for one in waiting))
        finally:
            go.set()
        assert first.result().choices
    assert complete(client, **ask("last")).choices
    assert drawn == ["first", "last"]


def request(**options):
    return read_request(json.dumps({"model": "m", "messages": ASK} | options).encode())


def test_a_request_is_read():
    plain = request()
    assert (plain.temperature, plain.truncation, plain.n) == (1.0, NO_TRUNCATION, 1)
    assert (plain.max_tokens, plain.seed, plain.schema) == (None, None, None)
    assert (plain.stream, plain.include_usage) == (False, False)
    same = request(
        stop=None,
        logprobs=False,
        presence_penalty=0.0,
        user="me",
        tools=[],
        top_k=-1,
        response_format={"type": "text"},
        chat_template_kwargs={"enable_thinking": False},
    )
    assert same == plain
    assert request(top_k=5, top_p=0.5, min_p=0.25).truncation == Truncation(5, 0.5, 0.25)
    assert request(top_p=0.5, temperature=0).truncation == NO_TRUNCATION
    assert request(response_format={"type": "json_object"}).schema == {"type": "object"}
    schema = {"name": "a", "strict": True, "schema": {"type": "array"}}
    json_schema = {"type": "json_schema", "json_schema": schema}
    assert request(response_format=json_schema).schema == {"type": "array"}


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"model": 1}, "model", "model is not a string"),
        ({"messages": []}, "messages", "no messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "not system or user or ass"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "is not a user's"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages", "both strings"),
        ({"temperature": "1"}, "temperature", "must be a number at least 0"),
        ({"temperature": -1}, "temperature", "must be a number at least 0"),
        ({"temperature": True}, "temperature", "must be a number"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_p": 1.1}, "top_p", "from 0 to 1"),
        ({"top_k": 1.5}, "top_k", "must be an integer"),
        ({"min_p": -1}, "min_p", "from 0 to 1"),
        ({"max_tokens": 0}, "max_tokens", "from 1"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "give one"),
        ({"seed": 2**63}, "seed", "must be an integer"),
        ({"n": 9}, "n", "from 1 to 8"),
        ({"n": True}, "n", "from 1 to 8"),
        ({"stream": 1}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream = true"),
        ({"stream_options": {"other": 1}}, "stream_options", "include_usage only"),
        ({"logprobs": True}, "logprobs", "logprobs with this value is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "with this value is not supported"),
        ({"tools": [{}]}, "tools", "with this value is not supported"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs", "not supp"),
        ({"\x1b[2J": 1}, "\x1b[2J", r"\x1b\[2J is not supported"),
        ({"response_format": {"type": "xml"}}, "response_format", "is none of text"),
        ({"response_format": "text"}, "response_format", "is none of text"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 1}}}},
            "response_format",
            "schema",
        ),
    ],
)
def test_a_request_that_is_at_fault(options, param, message):
    with pytest.raises(ApiError, match=message) as refused:
        request(**options)
    error = refused.value.body()["error"]
    assert (refused.value.status, error["type"], error["param"]) == (
        400,
        "invalid_request_error",
        param,
    )
    assert error["message"].isprintable()


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"\xff", b'{"n": 1, "n": 2}', b'{"n": NaN}', b"[" * 99999]
)
def test_a_body_that_is_no_request(body):
    with pytest.raises(ApiError, match="the body: "):
        read_request(body)


def test_few_programs_are_compiled_for_requests():
    chat = Chat("m", None, 1, 1, None, None)
    for i in range(1, 9):
        assert chat._draw(request(top_k=i)).truncation.top_k == i
    assert chat._draw(request(top_k=8)).truncation.top_k == 8
    assert chat._draw(request()).truncation == NO_TRUNCATION
    with pytest.raises(ApiError, match="its fill of top_k"):
        chat._draw(request(top_k=9))


GREEDY = Draw(0.0, NO_TRUNCATION, False)
SAMPLED = Draw(1.0, NO_TRUNCATION, False)


def numbered(*numbers):
    return [(number, Problem(0, "x", (1,), {})) for number in numbers]


@contextmanager
def batcher(answer=None):
    """One of three places whose first batch waits for `go`; with the batches that it answered."""
    batches, go = [], threading.Event()

    def number(draw, problems):
        assert go.wait(10)
        batches.append((draw, [number for number, _ in problems]))
        return answer(problems) if answer else [number for number, _ in problems]

    one = Batcher(number, 3)
    try:
        yield one, batches, go
    finally:
        go.set()
        one.close()
    assert not one.alive


def test_what_waits_goes_together_if_it_agrees():
    with batcher() as (one, batches, go):
        first = one.submit(GREEDY, numbered(0))
        while one._waiting:
            time.sleep(0.001)
        rest = one.submit(GREEDY, numbered(1, 2)) + one.submit(SAMPLED, numbered(3))
        rest += one.submit(GREEDY, numbered(4, 5))
        go.set()
        assert [each.result(10) for each in first + rest] == [0, 1, 2, 3, 4, 5]
    assert batches == [
        (GREEDY, [0]),
        (GREEDY, [1, 2, 4]),  # before the third, which came earlier but is drawn otherwise
        (SAMPLED, [3]),
        (GREEDY, [5]),
    ]


def test_what_is_cancelled_takes_no_place():
    with batcher() as (one, batches, go):
        first = one.submit(GREEDY, numbered(0))
        while one._waiting:
            time.sleep(0.001)
        rest = one.submit(GREEDY, numbered(*range(1, 257)))
        for each in rest[:250]:
            each.cancel()
        rest = [*rest[250:], *one.submit(SAMPLED, numbered(257))]  # there is room again
        go.set()
        assert [each.result(10) for each in first + rest] == [0, *range(251, 258)]
        [gone] = one.submit(GREEDY, numbered(258))  # alone; that it is cancelled ends nothing
        gone.cancel()
        [last] = one.submit(GREEDY, numbered(259))
        assert last.result(10) == 259
    assert [numbers for _, numbers in batches][:4] == [
        [0],
        [251, 252, 253],
        [254, 255, 256],
        [257],
    ]


def test_a_failed_batch_is_the_only_one():
    def answer(problems):
        return [1 // number for number, _ in problems]

    with batcher(answer) as (one, _, go):
        bad = one.submit(GREEDY, numbered(1, 0))
        good = one.submit(SAMPLED, numbered(1))
        go.set()
        assert isinstance(bad[0].exception(10), ZeroDivisionError)
        assert isinstance(bad[1].exception(10), ZeroDivisionError)
        assert good[0].result(10) == 1


def test_too_many_and_the_end():
    with batcher() as (one, batches, _):
        [first] = one.submit(GREEDY, numbered(0))
        while one._waiting:
            time.sleep(0.001)
        waiting = one.submit(GREEDY, numbered(*range(1, 256)))
        with pytest.raises(FullError):
            one.submit(GREEDY, numbered(1, 2))
        waiting[0].cancel()
    assert first.result(0) == 0
    assert all(each.cancelled() for each in waiting)
    assert batches == [(GREEDY, [0])]
    with pytest.raises(FullError):
        one.submit(GREEDY, numbered(1))


def test_the_process():
    command = [sys.executable, "-m", "jaxgrpo.serve", str(TINY), "--port", "0", "--name", "tiny"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("tiny at http://127.0.0.1:")
        url = line.split()[2].rstrip(";")
        body = {"model": "tiny", "messages": ASK, "temperature": 0}
        with ThreadPoolExecutor(1) as thread:
            # The first answer takes some seconds, in which its program is compiled.
            answer = thread.submit(
                httpx2.post, f"{url}/chat/completions", json=body, trust_env=False, timeout=60
            )
            time.sleep(1.5)
            process.send_signal(signal.SIGTERM)
            assert answer.result().json()["choices"][0]["finish_reason"] == "stop"
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (143, "", "SIGTERM: stopped\n")
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def serve(monkeypatch):
    """The command in this process, with a model that is not there."""

    @contextmanager
    def no_model(path, config):
        yield Chat("m", None, 1, 1, None, None)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["serve", "nowhere", *options])
        jaxgrpo.serve.main()

    before = signal.getsignal(signal.SIGTERM)
    log = logging.getLogger("uvicorn")
    handlers, propagate = [*log.handlers], log.propagate
    monkeypatch.setattr(jaxgrpo.serve, "open_chat", no_model)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    yield run
    signal.signal(signal.SIGTERM, before)
    log.handlers, log.propagate = handlers, propagate


def test_who_is_let_in_is_said(serve, capsys):
    serve("--port", "0")
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("m at http://127.0.0.1:")
    serve("--port", "0", "--host", "0.0.0.0")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("no authentication: whoever reaches 0.0.0.0 port ")
    assert second.startswith("m at http://0.0.0.0:")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "65536"], "--port is 65536"),
        (["--host", "no.such.host.invalid", "--port", "0"], r"--host no\.such\.host\.invalid: "),
        (["--max-tokens", "0"], "--max-tokens is 0"),
        (["--batch", "0"], "--batch is 0"),
    ],
)
def test_mistakes_are_named(serve, options, message):
    with pytest.raises(ValueError, match=message):
        serve(*options)


def test_a_port_that_is_taken(serve):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port}: Address already in use; name another"):
            serve("--port", str(port))


def test_a_package_that_is_missing(serve, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match=r"serving takes uvicorn: pip install 'jaxgrpo\[serve\]'"):
        serve()


def test_limits_must_fit_the_model():
    fits_not = replace(ChatConfig(), max_tokens=1024)
    with (
        pytest.raises(ValueError, match="beyond the model's 1024 positions"),
        open_chat(str(TINY), fits_not),
    ):
        pass
