# SPDX-License-Identifier: Apache-2.0
"""Hook: ``GET /diffxkv`` is a page that shows the pool live.

A browser sends no API key when it opens a page. So this one is let in without: it is a file of this
package that says nothing of the server. It asks for the key where its data need one.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fastapi.responses import HTMLResponse
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.utils.auth import AuthDecision

from sglang_diffxkv.patches.hook import hook

if TYPE_CHECKING:
    from fastapi import FastAPI

PATH = "/diffxkv"


def security_policy(page: str) -> str:
    """A Content-Security-Policy: what is written in ``page`` may run, and ask this server."""
    allowed = {}
    for tag in ("script", "style"):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in found]
        allowed[tag] = " ".join(f"'sha256-{digest.decode()}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
    )


def add_route(app: FastAPI) -> None:
    """Add ``GET /diffxkv``."""
    page = (files("sglang_diffxkv") / "dashboard" / "index.html").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": security_policy(page), "Cache-Control": "no-cache"}

    @app.get(PATH, response_class=HTMLResponse)
    async def diffxkv() -> HTMLResponse:
        """A page that shows the pool live."""
        return HTMLResponse(page, headers=headers)


def _decide(original: Callable[..., AuthDecision], **request: Any) -> AuthDecision:
    if request["method"] == "GET" and request["path"] == PATH:
        return AuthDecision(allowed=True)
    return original(**request)


def install() -> None:
    decide = "sglang.srt.utils.auth.decide_request_auth"
    hook(decide, _decide, HookType.AROUND, ("method", "path"))
