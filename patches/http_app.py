# SPDX-License-Identifier: Apache-2.0
"""Hook: what we add to SGLang's HTTP application, in each process that serves it.

A request says which quality it wants in a header, in ``custom_params`` or in the model's name. Most
endpoints hand on only the fields that they know, so it is read from the request itself, once for
all of them: the header by a middleware, the body where SGLang parses it. There a mistake is
answered with HTTP 400, in the words of each API. `quality` finds it where the request is tokenized.

With ``--tokenizer-worker-num`` above 1 other processes serve the application. They load no plugins,
but import it by a path that is SGLang's to set, and by which they find `sglang_diffxkv.worker_app`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from sglang.srt.environ import envs
from sglang.srt.plugins.hook_registry import HookType
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.websockets import WebSocket

from sglang_diffxkv.patches import check, dashboard, observability, requests
from sglang_diffxkv.patches.asked import (
    Asked,
    QualityError,
    agreed,
    asked_in_headers,
    asked_in_model,
    asked_in_params,
)
from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.patches.server_args import get_config, is_active
from sglang_diffxkv.patches.validation import WORKER_APP
from sglang_diffxkv.policy.registry import policy_class

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

    from sglang_diffxkv.policy.base import TierPolicy

ASKED: ContextVar[Asked | None] = ContextVar("diffxkv_asked", default=None)
"""What the HTTP request of this context asks for; tasks that serve it inherit it."""


class QualityMiddleware:
    """Reads the header of every request, whatever its endpoint makes of it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and is_active():
            try:
                ASKED.set(asked_in_headers(Headers(scope=scope).items(), server_policy()))
            except QualityError as error:
                await _refuse(error, scope, receive, send)
                return
        await self.app(scope, receive, send)


async def _refuse(error: QualityError, scope: Scope, receive: Receive, send: Send) -> None:
    content = {"error": {"message": str(error), "type": "invalid_request_error", "code": 400}}
    response = JSONResponse(content, status_code=400)
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).send_denial_response(response)
    else:
        await response(scope, receive, send)


async def _read(original: Callable[[Any], Awaitable[Any]], self: Any) -> Any:
    """Parse a request's body, and take out of it what it says of quality."""
    is_first = not hasattr(self, "_json")  # SGLang keeps the parsed body, and asks again for it
    body = await original(self)
    if is_first and isinstance(body, dict) and is_active():
        with _http_400():
            ASKED.set(_asked_in_body(body))
    return body


def _read_form(*args: Any, model: str, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The one endpoint that generates and has no JSON body."""
    if is_active():
        with _http_400():
            model, asked = asked_in_model(model, server_policy())
            ASKED.set(agreed(ASKED.get(), asked))
    return args, {"model": model, **kwargs}


@contextmanager
def _http_400() -> Iterator[None]:
    try:
        yield
    except QualityError as error:
        raise HTTPException(400, str(error)) from error


def _asked_in_body(body: dict[str, Any]) -> Asked | None:
    """What the request asks for as a whole; checks what it says of the prompts of a batch."""
    policy = server_policy()
    asked = ASKED.get()
    if isinstance(body.get("model"), str):
        body["model"], in_model = asked_in_model(body["model"], policy)
        asked = agreed(asked, in_model)
    for fields in (body, body.get("options")):  # the latter is where Ollama's clients put it
        if isinstance(fields, dict):
            asked = agreed(asked, asked_in_params(fields.get("custom_params"), policy))
    for params in _sampling_params(body):
        agreed(asked, asked_in_params(params.get("custom_params"), policy))
    return asked


def _sampling_params(body: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
    given = body.get("sampling_params")
    for params in given if isinstance(given, list) else [given]:
        if isinstance(params, dict):
            yield params


def server_policy() -> type[TierPolicy]:
    """The policy of this process's server, which is on our backend."""
    return policy_class(get_config().policy)


def extend(app: FastAPI) -> None:
    """Add the middleware and our endpoints to SGLang's application, before it serves."""
    for endpoint in (dashboard, observability, requests, check):
        endpoint.add_route(app)
    # Innermost: what it refuses has SGLang's CORS headers, and comes after its API keys.
    app.user_middleware.append(Middleware(QualityMiddleware))


def _before_serving(*args: Any, **kwargs: Any) -> None:
    from sglang.srt.entrypoints import http_server

    extend(http_server.app)
    if is_active():
        envs.SGLANG_HTTP_SERVER_APP_PATH.set(WORKER_APP)  # read where workers are to serve


def install() -> None:
    http = "sglang.srt.entrypoints.http_server"
    hook(f"{http}._setup_and_run_http_server", _before_serving, HookType.BEFORE, ())
    hook(f"{http}.ORJSONRequest.json", _read, HookType.AROUND, ())
    audio = "sglang.srt.entrypoints.openai.serving_transcription.OpenAIServingTranscription"
    hook(f"{audio}.create_transcription", _read_form, HookType.BEFORE, ("model",))
