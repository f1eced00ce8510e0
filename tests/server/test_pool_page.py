# SPDX-License-Identifier: Apache-2.0
"""`GET /diffxkv` in a real browser, and `GET /diffxkv/requests` that it asks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from sglang_diffxkv import bundled_model
from tests.support.browser import CHROMIUM, Browser
from tests.support.harness import Server
from tests.support.workload import assert_healthy, quality

API_KEY = "a key"
HOSTILE = "<img src=x onerror='document.title=1'>\"&'"
CHAT = "The ship left the harbour at dawn, and nobody on the quay knew its name. " * 12

with_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no browser here: apt-get install chromium"
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The bundled model, behind an API key."""
    args = ["--attention-backend", "diffxkv", "--api-key", API_KEY]
    args += ["--diffxkv-config", json.dumps({"memory_bytes": "24MiB"})]
    model = Path(bundled_model.__file__).parent
    with Keyed(model, *args, "--max-running-requests", 8) as server:
        for number in range(6):
            server.generate(f"{CHAT}{number}", max_new_tokens=4)
            server.generate(f"{number}{CHAT}", max_new_tokens=4, sampling=quality("high"))
        yield server
        assert_healthy(server)


class Keyed(Server):
    """A server that is asked with its API key."""

    def _request(self, method: str, path: str, **options: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {API_KEY}"}
        return super()._request(method, path, headers=headers, **options)


@pytest.fixture
def running(server: Server) -> Iterator[list[dict[str, Any]]]:
    """Two requests that run meanwhile, as `/diffxkv/requests` knows them."""
    stop = threading.Event()

    def generate(rid: str, **body: Any) -> None:
        while not stop.is_set():  # an answer may be over before both of them are seen
            for _ in server.stream(CHAT + "1", max_new_tokens=1500, rid=rid, **body):
                if stop.is_set():
                    return

    bodies: list[dict[str, Any]] = [{"rid": HOSTILE}, {"rid": "plain"}]
    threads = [threading.Thread(target=generate, kwargs=body) for body in bodies]
    for thread in threads:
        thread.start()
    try:
        yield _wait_for_requests(server, 2)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    _wait_for_requests(server, 0)


def held(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.get("/diffxkv/requests").json()
    return found


def _wait_for_requests(server: Server, number: int) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 60
    while len(found := held(server)) != number or not all(x["tokens"] for x in found):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


def numbers(browser: Browser) -> dict[str, float]:
    """What the page says, by its names for it."""
    script = "Object.fromEntries(Array.from(document.querySelectorAll('data[data-key]'), "
    shown = browser.run(script + "x => [x.dataset.key, x.value]))")
    return {key: float(value) for key, value in shown.items() if value != "null"}


@pytest.fixture
def browser(server: Server) -> Iterator[Browser]:
    """Shows the page, with the key entered as a user does."""
    with Browser() as browser:
        browser.show(1200, 900, "light")
        browser.open(server.url + "/diffxkv")
        browser.wait_for("document.readyState == 'complete' && !find('login').hidden")
        enter_key(browser, API_KEY)
        browser.wait_for("!find('content').hidden")
        browser.problems.clear()  # the browser reports that the first request wanted a key
        yield browser
        assert browser.problems == []


def enter_key(browser: Browser, key: str) -> None:
    browser.run(f"find('key').value = {json.dumps(key)}; find('login').requestSubmit()")


def test_requests_are_what_runs(server: Server, running: list[dict[str, Any]]) -> None:
    assert {request["rid"] for request in running} == {HOSTILE, "plain"}
    for request in running:
        pages = request["open_pages"] + request["sealed_pages"]
        assert pages == -(-request["tokens"] // 64)
        assert request["quality"] == "balanced" and request["bytes"] > 0
        assert request["cached_tokens"] >= 64, "the prompt was prefilled before"
    later = _wait_for_requests(server, 2)
    before = {request["rid"]: request["tokens"] for request in running}
    assert all(request["tokens"] >= before[request["rid"]] for request in later)


def test_the_state_has_no_requests_in_it(server: Server) -> None:
    """They cost only those who ask for them."""
    assert "diffxkv_requests" not in server.server_info()["internal_states"][0]
    assert held(server) == []


def test_prefix_hits_are_those_of_the_answers(server: Server) -> None:
    before = server.stats()["prefix"]
    answers = [server.generate(CHAT + text, max_new_tokens=2) for text in ("x", "y", "z")]
    after = server.stats()["prefix"]
    for name in ("prompt_tokens", "cached_tokens"):
        expected = sum(answer["meta_info"][name] for answer in answers)
        assert after[name] - before[name] == expected > 0


@pytest.mark.parametrize("path", ["/diffxkv/stats", "/diffxkv/requests", "/diffxkv/", "/diffxkv?"])
def test_data_need_the_key(server: Server, path: str) -> None:
    wanted = 200 if path == "/diffxkv?" else 401
    assert requests.get(server.url + path, timeout=30).status_code == wanted
    assert requests.post(server.url + path, timeout=30).status_code == 401


def test_the_page_needs_none_and_loads_nothing_else(server: Server) -> None:
    answer = requests.get(server.url + "/diffxkv", timeout=30)
    assert answer.ok and answer.headers["Content-Type"].startswith("text/html")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "http" not in answer.text.replace("HTTP", "")
    assert "innerHTML" not in answer.text


@with_browser
def test_the_page_says_what_the_statistics_say(server: Server, browser: Browser) -> None:
    stats = server.stats()
    shown = browser.wait_for(
        "document.querySelector('data[data-key=tokens_held]').value",
        lambda value: value == str(stats["tokens_held"]),
    )
    shown = numbers(browser)
    for name in ("tokens_held", "physical_compression", "sealed_pages", "open_pages"):
        assert shown[name] == stats[name]
    assert shown["prefix_hits"] == pytest.approx(
        stats["prefix"]["cached_tokens"] / stats["prefix"]["prompt_tokens"]
    )
    assert shown["device.bytes_in_use"] == stats["bytes_in_use"]
    assert shown["device.bytes_total"] == stats["bytes_total"]
    for name, tokens in stats["tier_tokens"].items():
        assert shown[f"tier_tokens.{name}"] == tokens
    for name in ("opened", "sealed", "sealed_under_pressure", "demoted", "evicted"):
        assert shown[f"counters.{name}"] == stats["counters"][name]
        assert shown[f"rate.counters.{name}"] == 0
    for layer, size in enumerate(stats["sealed_bytes_per_token_by_layer"]):
        assert shown[f"layer.{layer}.bytes"] == pytest.approx(size)
        assert shown[f"layer.{layer}.retention"] == stats["retention_by_layer"][layer]
        assert shown[f"layer.{layer}.demoted"] == stats["retention_demoted_by_layer"][layer]
    for level in ("host", "disk"):
        for name, value in (stats.get(level) or {}).items():
            if name not in ("frames", "frames_used"):
                assert shown[f"{level}.{name}"] == value
    text = browser.run("document.querySelector('data[data-key=physical_compression]').textContent")
    assert text == f"{stats['physical_compression']:.2f}×"


@with_browser
def test_the_page_shows_requests_as_text(browser: Browser, running: list[dict[str, Any]]) -> None:
    browser.wait_for("find('requests').rows.length", lambda rows: rows == 2)
    rids = browser.run("Array.from(find('requests').rows, r => r.cells[0].textContent)")
    assert set(rids) == {HOSTILE, "plain"}
    assert browser.run("document.images.length") == 0
    assert browser.run("document.title") == "KV pool"
    assert numbers(browser)["running"] == 2
    tokens = "Number(find('requests').rows[0].cells[2].firstChild.value)"
    first = browser.run(tokens)
    assert browser.wait_for(tokens, lambda now: now > first), "it polls"


@with_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_and_can_be_read(browser: Browser, width: int, scheme: str) -> None:
    browser.show(width, 900, scheme)
    assert browser.wait_for("innerWidth") == width
    assert browser.run("document.documentElement.scrollWidth") <= width
    for place in ("body", "section", ".soft", "th", "td"):
        colours = browser.run(
            f"[getComputedStyle(document.querySelector('{place}')).color, "
            "getComputedStyle(document.querySelector('section')).backgroundColor]"
        )
        assert contrast(*colours) >= 4.5, place
    bright = luminance(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert bright < 0.1 if scheme == "dark" else bright > 0.8


def luminance(colour: str) -> float:
    """WCAG's relative luminance of ``rgb(…)``."""
    parts = [int(x) / 255 for x in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@with_browser
def test_a_wrong_key_is_refused(server: Server) -> None:
    with Browser() as browser:
        browser.open(server.url + "/diffxkv")
        browser.wait_for("document.readyState == 'complete' && !find('login').hidden")
        enter_key(browser, "another key")
        browser.wait_for("find('problem').textContent")
        assert browser.run("find('content').hidden")
        enter_key(browser, API_KEY)
        browser.wait_for("!find('content').hidden")
