"""OpenAI's chat completions, as far as they are answered here: requests read, replies written.

What a request asks for and does not get would change its answer without a word. So whatever is not
supported is refused by name, unless it has the value that changes nothing.
"""

import json
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxgrpo.data import messages_of, parse_row
from jaxgrpo.drawing import NO_TRUNCATION, Truncation
from jaxgrpo.redact import printable
from jaxgrpo.rewards.json_schema import check_schema

MOST_CHOICES = 8
_ROLES = ("system", "user", "assistant")

# Values that say what is done here anyway; so does null.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "chat_template_kwargs": ({}, {"enable_thinking": False}),
    "frequency_penalty": (0,),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "stop": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
# What is about the request and not about its answer.
_NOTES = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")
_ASKED = (
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "min_p",
    "model",
    "n",
    "response_format",
    "seed",
    "stream",
    "stream_options",
    "temperature",
    "top_k",
    "top_p",
)


class ApiError(Exception):
    """A request that is not answered.

    Attributes:
      status: of HTTP.
      message: what is wrong and what to do.
      param: the request's member at fault.
      code: what it is for programs.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The error object of OpenAI."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": printable(self.message, 1000), "type": kind}
        return {"error": error | {"param": self.param, "code": self.code}}


@dataclass(frozen=True)
class ChatRequest:
    """What is asked for.

    Attributes:
      model: by name.
      messages: of roles system, user and assistant, a user's last.
      temperature: 0 is greedy.
      truncation: which tokens may be drawn.
      max_tokens: of a completion; None is the server's limit.
      seed: of the random keys; None is any.
      n: completions.
      schema: that the completions must meet; None is none.
      stream: whether the reply is a stream of events.
      include_usage: whether the stream ends with the number of tokens.
    """

    model: str
    messages: list[dict[str, str]]
    temperature: float
    truncation: Truncation
    max_tokens: int | None
    seed: int | None
    n: int
    schema: dict[str, Any] | None
    stream: bool
    include_usage: bool


class Choice(NamedTuple):
    """A completion.

    Attributes:
      text: without the token that ended it.
      tokens: with it.
      stopped: whether the model ended it; False means cut at the limit.
    """

    text: str
    tokens: int
    stopped: bool


def read_request(body: bytes) -> ChatRequest:
    """The request that a body of JSON is.

    Raises:
      ApiError: it is none, or asks for what is not supported.
    """
    try:
        given = {name: value for name, value in parse_row(body).items() if value is not None}
    except ValueError as error:
        raise ApiError(400, f"the body: {error}") from error
    for name, value in given.items():
        if name in _ASKED or name in _NOTES or value in _NEUTRAL.get(name, ()):
            continue
        what = f"{name} with this value" if name in _NEUTRAL else name
        raise ApiError(400, f"{what} is not supported", name, "unsupported_parameter")

    if not isinstance(given.get("model"), str):
        raise ApiError(400, "model is not a string", "model")
    try:
        messages = messages_of(given, _ROLES)
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from error
    temperature = _number(given, "temperature", 1.0, 0, math.inf)
    truncation = Truncation(
        _integer(given, "top_k", 0, -1, 2**31 - 1) or 0,
        _number(given, "top_p", 1.0, 0, 1),
        _number(given, "min_p", 0.0, 0, 1),
    )
    if truncation.top_k == -1:  # vLLM's way to say all
        truncation = truncation._replace(top_k=0)
    if truncation.top_p == 0:
        raise ApiError(400, "top_p is 0; it must be above 0 and at most 1", "top_p")
    if "max_tokens" in given and "max_completion_tokens" in given:
        raise ApiError(400, "max_tokens and max_completion_tokens are one; give one", "max_tokens")
    limit = "max_tokens" if "max_tokens" in given else "max_completion_tokens"
    stream = _flag(given, "stream")
    return ChatRequest(
        given["model"],
        messages,
        temperature,
        truncation if temperature else NO_TRUNCATION,  # the likeliest token is never cut off
        _integer(given, limit, None, 1, 2**31 - 1),
        _integer(given, "seed", None, -(2**63), 2**63 - 1),
        _integer(given, "n", 1, 1, MOST_CHOICES) or 1,
        _schema(given.get("response_format", {"type": "text"})),
        stream,
        _include_usage(given, stream),
    )


def _number(given: dict[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = given.get(name, default)
    if type(value) not in (int, float) or not (least <= value <= most and value < math.inf):
        span = f"from {least} to {most}" if most < math.inf else f"at least {least}"
        raise ApiError(400, f"{name} is {value!r:.40}; it must be a number {span}", name)
    return float(value)


def _integer(
    given: dict[str, Any], name: str, default: int | None, least: int, most: int
) -> int | None:
    value = given.get(name, default)
    if value is not default and (type(value) is not int or not least <= value <= most):
        raise ApiError(
            400, f"{name} is {value!r:.40}; it must be an integer from {least} to {most}", name
        )
    return value


def _flag(given: dict[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise ApiError(400, f"{name} is {value!r:.40}; it must be true or false", name)
    return value


def _include_usage(given: dict[str, Any], stream: bool) -> bool:
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise ApiError(400, "stream_options may have include_usage only", "stream_options")
    if options and not stream:
        raise ApiError(400, "stream_options is for stream = true", "stream_options")
    return _flag(options, "include_usage")


def _schema(response_format: Any) -> dict[str, Any] | None:
    match response_format:
        case {"type": "text", **rest} if not rest:
            return None
        case {"type": "json_object", **rest} if not rest:
            return {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}, **rest} if not rest:
            try:
                check_schema(schema, "response_format.json_schema.schema")
            except ValueError as error:
                raise ApiError(400, str(error), "response_format") from error
            return schema
    raise ApiError(
        400,
        "response_format is none of text, json_object, and json_schema with its"
        " json_schema.schema, an object",
        "response_format",
    )


def reply(model: str, prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, Any]:
    """The reply to a request.

    Args:
      model: by name.
      prompt_tokens: of the prompt.
      choices: the completions.
    """
    return _head(model, "chat.completion") | {
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": None,
                "finish_reason": _finish_reason(choice),
            }
            for index, choice in enumerate(choices)
        ],
        "usage": _usage(prompt_tokens, choices),
    }


def events(
    model: str, prompt_tokens: int, choices: Sequence[Choice], include_usage: bool
) -> Iterator[str]:
    """The same as server-sent events; a completion comes whole, in one of them."""
    head = _head(model, "chat.completion.chunk") | ({"usage": None} if include_usage else {})

    def event(**members: Any) -> str:
        return f"data: {json.dumps(head | members)}\n\n"

    def chunk(index: int, delta: dict[str, str], finish_reason: str | None) -> str:
        one = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event(choices=[one])

    for index, choice in enumerate(choices):
        yield chunk(index, {"role": "assistant", "content": choice.text}, None)
        yield chunk(index, {}, _finish_reason(choice))
    if include_usage:
        yield event(choices=[], usage=_usage(prompt_tokens, choices))
    yield "data: [DONE]\n\n"


def _head(model: str, kind: str) -> dict[str, Any]:
    name = f"chatcmpl-{secrets.token_hex(16)}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


def _finish_reason(choice: Choice) -> str:
    return "stop" if choice.stopped else "length"


def _usage(prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, int]:
    completion_tokens = sum(choice.tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
