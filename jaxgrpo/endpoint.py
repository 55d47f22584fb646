"""Answers from a server that speaks OpenAI's chat completions, in place of a sampler's.

Each completion is a request of its own, because not all servers know `n`. What passes is retried:
no connection, no answer in time, 408, 429 and 5xx, after a wait that doubles and is as long as the
server asks for. Of the environment only the key leaves, and only to the server that is named.
"""

import asyncio
import email.utils
import ipaddress
import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import httpx2
import numpy as np

from jaxgrpo.config import SamplingConfig
from jaxgrpo.json_file import parse_object
from jaxgrpo.redact import is_secret, printable
from jaxgrpo.rewards.strict_json import dumps, loads
from jaxgrpo.types import Problem

_RETRIED = (408, 429)  # and 5xx
_TRIES = 6
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 600.0  # that a server may ask for
_LARGEST_ANSWER = 1 << 24  # bytes
_CONNECT_S = 10.0


@dataclass(frozen=True)
class EndpointConfig:
    """A server that answers in place of a model that is loaded here."""

    endpoint: str = ""
    """URL of an OpenAI-compatible server, as in http://127.0.0.1:8000/v1."""
    concurrency: int = 8
    """Requests at once."""
    timeout: float = 600.0
    """Seconds for one answer."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; no key is sent if it is not set."""
    response_format: Literal["none", "json_schema"] = "none"
    """`json_schema` sends the schema, so that a server which can holds answers to it."""
    token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls the limit of a completion; OpenAI's reasoning models take the second
    name only."""
    extra_body: str = ""
    """JSON object with further members of each request, such as
    {"chat_template_kwargs": {"enable_thinking": false}} for vLLM."""


@dataclass(frozen=True)
class Replies:
    """One problem's completions from a server; see `Answered`."""

    problem: Problem
    texts: list[str]
    length_G: np.ndarray
    stopped_G: np.ndarray


class _Reply(NamedTuple):
    text: str
    tokens: int
    stopped: bool


class _PassingError(Exception):
    """What may go well the next time, and the seconds that the server asks to wait before."""

    def __init__(self, text: str, wait: float = 0.0):
        super().__init__(text)
        self.wait = wait


@dataclass(frozen=True)
class Endpoint:
    """Answers problems by asking a server.

    Attributes:
      url: of the chat completions.
      key: sent as a bearer token, if there is one.
      body: members of every request.
      schema: that of problems without one of their own.
      sends_schema: whether a problem's schema goes with it.
      seed: each request's is made of it, the problem's number and the sample's.
      concurrency: requests at once.
      timeout: seconds for one answer.
      tries: times that a request is sent at most.
      first_wait: seconds before the second time; each wait after it is twice as long.
    """

    url: httpx2.URL
    key: str = field(repr=False)
    body: dict[str, Any]
    schema: Any
    sends_schema: bool
    seed: int
    concurrency: int
    timeout: float
    tries: int = _TRIES
    first_wait: float = _FIRST_WAIT_S

    def __call__(self, problems: Sequence[Problem], samples: int) -> list[Replies]:
        """Has `samples` completions of each problem written.

        Raises:
          ValueError: the server cannot be asked, refuses, or answers what is no answer; one line.
            The other requests end at once.
        """
        if self.sends_schema and self.schema is True:
            for problem in problems:
                if "schema" not in problem.row:
                    raise ValueError(
                        f"--response-format json_schema: the problem {problem.id!r} has no schema;"
                        " give a --schema"
                    )
        try:
            return asyncio.run(self._ask_all(problems, samples))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _ask_all(self, problems: Sequence[Problem], samples: int) -> list[Replies]:
        turn = asyncio.Semaphore(self.concurrency)
        limits = httpx2.Limits(max_connections=self.concurrency)
        timeout = httpx2.Timeout(self.timeout, connect=min(self.timeout, _CONNECT_S))
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        # The environment's proxies and certificates are honoured, but no proxy leads to this
        # machine's loopback.
        trust_env = not _is_loopback(self.url.host)
        try:
            client = httpx2.AsyncClient(
                headers=headers, timeout=timeout, limits=limits, trust_env=trust_env
            )
        except ImportError as error:  # for a SOCKS proxy
            raise ValueError(f"the environment's proxy: {error}") from error

        async def ask(problem: Problem, sample: int) -> _Reply:
            async with turn:
                return await self._ask(client, problem, sample)

        async with client, asyncio.TaskGroup() as group:
            tasks = [
                [group.create_task(ask(problem, sample)) for sample in range(samples)]
                for problem in problems
            ]
        return [
            Replies(
                problem,
                [reply.text for reply in replies],
                np.array([reply.tokens for reply in replies]),
                np.array([reply.stopped for reply in replies]),
            )
            for problem, replies in zip(
                problems, ([task.result() for task in each] for each in tasks), strict=True
            )
        ]

    async def _ask(self, client: httpx2.AsyncClient, problem: Problem, sample: int) -> _Reply:
        content = self._request(problem, sample)
        for tried in range(1, self.tries + 1):
            try:
                async with asyncio.timeout(self.timeout):
                    return await self._send(client, content)
            except TimeoutError:
                failure = _PassingError(f"no answer in {self.timeout:g} s")
            except _PassingError as error:
                failure = error
            if failure.wait > _LONGEST_WAIT_S:
                raise self._error(f"{failure}; it asks to wait {failure.wait:.0f} s")
            if tried < self.tries:
                backoff = self.first_wait * 2 ** (tried - 1) * random.uniform(0.5, 1)
                await asyncio.sleep(failure.wait + backoff)
        raise self._error(f"{failure}; given up after {self.tries} tries")

    async def _send(self, client: httpx2.AsyncClient, content: bytes) -> _Reply:
        """One try.

        Raises:
          _PassingError: it may go well the next time.
          ValueError: it will not.
        """
        body = bytearray()
        try:
            async with client.stream("POST", self.url, content=content) as response:
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > _LARGEST_ANSWER:
                        raise self._error(f"its answer has more than {_LARGEST_ANSWER >> 20} MB")
        except httpx2.TransportError as error:
            raise _PassingError(f"{type(error).__name__} {printable(str(error))}".strip()) from None
        except httpx2.HTTPError as error:
            raise self._error(f"{type(error).__name__} {printable(str(error))}") from None
        status = response.status_code
        if status == 200:
            try:
                return _read_reply(bytes(body))
            except ValueError as error:
                raise self._error(str(error)) from None
        said = f"it answers {status}: {_message(bytes(body))}"
        if status in _RETRIED or status >= 500:
            raise _PassingError(said, _seconds(response.headers.get("Retry-After", "")))
        raise self._error(said)

    def _request(self, problem: Problem, sample: int) -> bytes:
        schema = problem.row.get("schema", self.schema)
        # 31 bits: more are not a seed everywhere.
        bits = np.random.SeedSequence([self.seed, problem.number, sample]).generate_state(1)[0]
        body = {"messages": problem.row["messages"], "seed": int(bits) >> 1, **self.body}
        if self.sends_schema:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": schema, "strict": True},
            }
        return dumps(body).encode()

    def _error(self, text: str) -> ValueError:
        return ValueError(f"{self.url}: {text}")


def connect(
    config: EndpointConfig, model: str, sampling: SamplingConfig, seed: int, schema: Any
) -> Endpoint:
    """The server that a configuration names; nothing is sent yet.

    Args:
      config: see there.
      model: its name there.
      sampling: how completions are drawn; what is as it is by default is left to the server, but
        for temperature and limit.
      seed: of the requests.
      schema: that of problems without one of their own; True if they have none.

    Raises:
      ValueError: a setting is at fault.
    """
    if config.concurrency < 1 or not 0 < config.timeout < math.inf:
        raise ValueError("--concurrency is at least 1, --timeout above 0 and finite")
    body = {
        "model": model,
        "temperature": sampling.temperature,
        config.token_limit: sampling.max_tokens,
    }
    for name in ("top_k", "top_p", "min_p"):
        if (value := getattr(sampling, name)) != getattr(SamplingConfig, name):
            body[name] = value
    if config.extra_body:
        extra = _extra(config.extra_body)
        if twice := extra.keys() & (body.keys() | {"messages", "seed", "response_format"}):
            raise ValueError(f"--extra-body: {min(twice)!r} is set by another option")
        body |= extra
    return Endpoint(
        _url(config.endpoint),
        _key(config.key_env),
        body,
        schema,
        config.response_format == "json_schema",
        seed,
        config.concurrency,
        config.timeout,
    )


def _extra(text: str) -> dict[str, Any]:
    try:
        value = loads(text)
    except ValueError as error:
        raise ValueError(f"--extra-body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("--extra-body is not a JSON object")
    return value


def _url(endpoint: str) -> httpx2.URL:
    try:
        url = httpx2.URL(endpoint)
    except httpx2.InvalidURL as error:
        raise ValueError(f"--endpoint is no URL: {error}") from error
    if url.userinfo or url.query or url.fragment:  # not quoted: it may be a secret
        raise ValueError(
            "--endpoint has a user, a query or a fragment in it; give the plain URL, and the key"
            " in the variable that --key-env names"
        )
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(
            f"--endpoint is {endpoint!r}; it must be a URL such as http://127.0.0.1:8000/v1"
        )
    return url.copy_with(path=url.path.rstrip("/") + "/chat/completions")


def _key(name: str) -> str:
    if not is_secret(name):
        raise ValueError(
            f"--key-env is {name!r}; its name must have KEY, TOKEN, SECRET or PASSWORD in it, by"
            " which its value is known as a secret"
        )
    key = os.environ.get(name, "").strip()
    if not key and name != EndpointConfig.key_env:
        raise ValueError(f"--key-env: there is no {name} in the environment")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"the value of {name} is no key: it has characters that no header may")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _seconds(retry_after: str) -> float:
    """What a Retry-After header asks for: seconds or a date; 0 if it is neither."""
    if retry_after.isdecimal():
        return float(retry_after[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _read_reply(body: bytes) -> _Reply:
    match parse_object(body, "its answer"):
        case {
            "choices": [{"message": dict(message), "finish_reason": reason}],
            "usage": {"completion_tokens": int(tokens)},
        } if isinstance(message.get("content"), str | None):
            # No content: a refusal, or thinking that was cut.
            return _Reply(message.get("content") or "", tokens, reason != "length")
    raise ValueError(
        "its answer is no chat completion with message.content, finish_reason and"
        f" usage.completion_tokens: {printable(body.decode(errors='replace'))}"
    )


def _message(body: bytes) -> str:
    """What the server says of an error, as one harmless line."""
    text = body.decode(errors="replace")
    try:
        match parse_object(body, "it"):
            case {"error": {"message": str(message)}}:
                text = message
    except ValueError:
        pass
    return printable(" ".join(text.split()) or "nothing more", 500)
