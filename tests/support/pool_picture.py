# SPDX-License-Identifier: Apache-2.0
"""Takes the picture of `GET /diffxkv` for the docs: `python -m tests.support.pool_picture`.

Needs Chromium. The bundled model serves chats that share prefixes and fill a small pool.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from sglang_diffxkv import bundled_model
from tests.support.browser import Browser
from tests.support.harness import Server
from tests.support.workload import quality

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "pool-page.png"
CONFIG = {"memory_bytes": "12MiB", "target": 4, "host_bytes": "3MiB", "disk_bytes": "64MiB"}
TEXT = "The ship left the harbour at dawn, and nobody on the quay knew its name. "
SHARED = TEXT * 8
WIDTH, HEIGHT = 1180, 820
WARM_UP_S = 45
LEVELS = ("balanced", "balanced", "high", "balanced", "small")


def chats(server: Server, user: int, until: threading.Event) -> None:
    """One after the other: a prefix that all share, and then each user's own."""
    for turn in range(10**6):
        if until.is_set():
            return
        prompt = SHARED + f"{user} {turn % 7} " + TEXT * (2 + user)
        sampling = quality(LEVELS[user % len(LEVELS)])
        rid = f"chat-{user}-turn-{turn}"
        server.generate(prompt, max_new_tokens=120, sampling=sampling, rid=rid)


def serve(model: Path, disk: str) -> Server:
    config = json.dumps(CONFIG | {"disk_path": disk})
    args = ["--attention-backend", "diffxkv", "--diffxkv-config", config]
    return Server(model, *args, "--max-running-requests", 5)


def main() -> None:
    model, until = Path(bundled_model.__file__).parent, threading.Event()
    with TemporaryDirectory() as disk, Browser() as browser, serve(model, disk) as server:
        threads = [threading.Thread(target=chats, args=(server, user, until)) for user in range(5)]
        for thread in threads:
            thread.start()
        browser.show(WIDTH, HEIGHT, "light")
        browser.open(server.url + "/diffxkv")
        time.sleep(WARM_UP_S)
        browser.wait_for("find('requests').rows.length", lambda rows: rows >= 4)
        PICTURE.parent.mkdir(exist_ok=True)
        browser.screenshot(PICTURE)
        until.set()
        for thread in threads:
            thread.join()
    print(f"{PICTURE}; the browser's problems: {browser.problems}")


if __name__ == "__main__":
    main()
