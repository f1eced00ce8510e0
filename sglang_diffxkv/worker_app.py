# SPDX-License-Identifier: Apache-2.0
"""SGLang's HTTP application as its tokenizer workers serve it (``--tokenizer-worker-num``).

They are started with the path of an application to import, and do nothing about plugins.
"""

from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.entrypoints.http_server import app  # noqa: E402

from sglang_diffxkv.patches.http_app import extend  # noqa: E402

extend(app)

__all__ = ["app"]
