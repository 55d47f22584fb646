"""The chat completions of `jaxgrpo.chat_api` over HTTP."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxgrpo.chat import Chat
from jaxgrpo.chat_api import ApiError, events, read_request, reply

T = TypeVar("T")

_LARGEST_REQUEST = 4 << 20  # bytes


def make_app(chat: Chat) -> Starlette:
    """The routes of OpenAI's API, and /health."""
    created = int(time.time())

    async def completions(request: Request) -> Response:
        if "origin" in request.headers:  # a page in a browser, perhaps of someone else
            raise ApiError(403, "requests of web pages are not answered")
        body = await _body(request)
        asked = await asyncio.to_thread(read_request, body)  # a schema may take its time
        prompt_tokens, choices = await _while_heard(request, chat(asked))
        if asked.stream:
            lines = events(chat.name, prompt_tokens, choices, asked.include_usage)
            return StreamingResponse(_each(lines), media_type="text/event-stream")
        return JSONResponse(reply(chat.name, prompt_tokens, choices))

    async def models(_: Request) -> Response:
        model = {"id": chat.name, "object": "model", "created": created, "owned_by": "jaxgrpo"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(_: Request) -> Response:
        alive = chat.batcher.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body(), error.status, headers)

    async def failed(_: Request, __: Exception) -> Response:
        return JSONResponse(ApiError(500, "a bug; the server's stderr says more").body(), 500)

    async def no_such_path(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(what.body(), error.status_code, error.headers)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", completions, methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
        ],
        exception_handlers={
            ApiError: refused,
            HTTPException: no_such_path,
            Exception: failed,
        },
    )


async def _body(request: Request) -> bytes:
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > _LARGEST_REQUEST:
                raise ApiError(413, f"the body has more than {_LARGEST_REQUEST >> 20} MB")
    except ClientDisconnect as error:
        raise ApiError(400, "the body breaks off") from error  # which nobody hears
    return bytes(body)


async def _while_heard(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """What `answer` returns; it is cancelled when the client hangs up.

    Args:
      request: whose body has been read.
      answer: what the client waits for.

    Raises:
      ApiError: the client hung up.
    """
    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ApiError(400, "the client hung up")  # which nobody hears
        return answering.result()
    finally:
        answering.cancel()
        leaving.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _each(lines: Iterable[str]) -> AsyncIterator[str]:
    for line in lines:
        yield line
