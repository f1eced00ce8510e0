#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# sglang-router's policy power_of_two sends a request to that of two workers which has fewer tokens in
# work, and asks workers for them at /get_load. SGLang 0.5.23 has no such route (it has /v1/loads, of
# another form). The router starts all the same, workers are healthy, /get_loads says -1 of each, and
# requests go by what the router itself has under way: a worker that is busy with others' is not spared.
# The policy cache_aware, the default, asks for no loads: it counts what it sends itself.
# The router stands before two workers that answer at once, one of which has 9000 tokens in work.
# Needs uv and Python 3.11; runs on a CPU, for a bit more than a minute.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
uv venv --quiet --python 3.11 "$work/env"
VIRTUAL_ENV=$work/env uv pip install --quiet sglang-router==0.3.2 requests==2.34.2
VIRTUAL_ENV=$work/env uv pip install --quiet --no-deps sglang==0.5.23
cat >"$work/show.py" <<'PYTHON'
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import files, version

import requests

print("sglang-router", version("sglang-router"), "sglang", version("sglang"))
(http,) = [f for f in files("sglang") or [] if str(f).endswith("srt/entrypoints/http_server.py")]
package = http.locate().parents[1]
found = {
    route
    for file in package.rglob("*.py")
    for route in re.findall(r'"(/get_load|/v1/loads)"', file.read_text())
}
print("routes for loads in sglang:", sorted(found))
REQUESTS, CHECKED_EVERY = 40, 30


def worker(tokens: int, tells: bool) -> tuple[ThreadingHTTPServer, Counter[str]]:
    """With so many tokens in work, as older SGLang told at /get_load, or without that route."""
    seen: Counter[str] = Counter()

    class Worker(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen[self.path] += 1
            if self.path == "/get_load" and not tells:
                self.send_error(404)
            elif self.path == "/get_load":
                self.answer([{"dp_rank": 0, "num_reqs": 1, "num_tokens": tokens}])
            elif self.path == "/v1/models":
                self.answer({"object": "list", "data": [{"id": "m", "object": "model"}]})
            else:
                self.answer({"model_path": "m"})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            seen["requests"] += 1
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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Worker)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, seen


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def sent_to_busy(tells: bool) -> tuple[int, list[int]]:
    """Of 40 requests those that the busy worker got, and the loads that the router tells."""
    (busy, of_busy), (idle, _) = worker(9000, tells), worker(10, tells)
    port = free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--prometheus-port", str(free_port()), "--policy"]
    command += ["power_of_two", "--log-level", "error", "--worker-urls"]
    command += [f"http://127.0.0.1:{x.server_port}" for x in (busy, idle)]
    router = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            try:
                if requests.get(url + "/readiness", timeout=2).ok:
                    break
            except requests.ConnectionError:
                pass
            time.sleep(0.2)
        time.sleep(CHECKED_EVERY + 3)  # so that it has asked once
        assert of_busy["/get_load"] > 0, "the router no longer asks /get_load"
        for i in range(REQUESTS):
            body = {"model": "m", "prompt": f"{i} hi"}
            requests.post(url + "/v1/completions", json=body, timeout=30).raise_for_status()
        loads = requests.get(url + "/get_loads", timeout=9).json()["workers"]
        return of_busy["requests"], sorted(worker["load"] for worker in loads)
    finally:
        router.terminate()
        router.wait(30)


results = {}
for name, tells in (("tell", True), ("do not know the route", False)):
    results[tells] = sent_to_busy(tells)
    got, loads = results[tells]
    print(f"workers {name}: the busy one gets {got} of {REQUESTS} requests; loads are {loads}")
assert found == {"/v1/loads"}, "SGLang's routes have changed"
assert results[True] == (0, [10, 9000]), "the behaviour has changed"
assert results[False][0] > REQUESTS // 4 and results[False][1] == [-1, -1], "it has changed"
PYTHON
"$work/env/bin/python" -P "$work/show.py"
