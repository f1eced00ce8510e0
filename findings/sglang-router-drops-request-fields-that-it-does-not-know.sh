#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# sglang-router parses the body of a chat and sends on what it has names for. SGLang's own field
# custom_params, which custom logit processors read, does not arrive, and the client is told nothing: the
# status is 200. The same field passes in a completion. Of headers, too, only known ones arrive.
# The router stands before a worker that notes what it is sent; no model is needed.
# Needs uv and Python 3.11; runs on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
uv venv --quiet --python 3.11 "$work/env"
VIRTUAL_ENV=$work/env uv pip install --quiet sglang-router==0.3.2 requests==2.34.2
cat >"$work/show.py" <<'PYTHON'
import json
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

import requests

print("sglang-router", version("sglang-router"))
seen: list[tuple[dict[str, object], dict[str, str]]] = []


class Worker(BaseHTTPRequestHandler):
    """Healthy, and answers every prompt with an empty object."""

    def do_GET(self) -> None:
        models = {"object": "list", "data": [{"id": "m", "object": "model"}]}
        self.answer(models if self.path.startswith("/v1/models") else {"model_path": "m"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        seen.append((body, dict(self.headers)))
        self.answer({})

    def answer(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


worker = ThreadingHTTPServer(("127.0.0.1", 0), Worker)
threading.Thread(target=worker.serve_forever, daemon=True).start()
port = free_port()
command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1"]
command += ["--port", str(port), "--prometheus-port", str(free_port())]
command += ["--worker-urls", f"http://127.0.0.1:{worker.server_port}", "--log-level", "error"]
router = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
PROMPTS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
}
try:
    url = f"http://127.0.0.1:{port}"
    for _ in range(200):
        try:
            if requests.get(url + "/readiness", timeout=2).ok:
                break
        except requests.ConnectionError:
            pass
        time.sleep(0.2)
    arrived = {}
    for path, prompt in PROMPTS.items():
        body = {"model": "m", "custom_params": {"thinking_budget": 5}} | prompt
        headers = {"X-Tenant": "a", "X-Request-Id": "b"}
        status = requests.post(url + path, json=body, headers=headers, timeout=30).status_code
        got, got_headers = seen[-1]
        names = {name.lower() for name in got_headers}
        arrived[path] = "custom_params" in got
        print(f"{path}: status {status}; the worker got custom_params: {arrived[path]},")
        print(f"  x-request-id: {'x-request-id' in names}, x-tenant: {'x-tenant' in names}")
        assert status == 200 and "x-tenant" not in names, "the behaviour has changed"
    assert arrived == {"/v1/chat/completions": False, "/v1/completions": True}, "it has changed"
finally:
    router.terminate()
    router.wait(30)
PYTHON
"$work/env/bin/python" -P "$work/show.py"
