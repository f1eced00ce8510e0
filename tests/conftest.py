# SPDX-License-Identifier: Apache-2.0
"""The same random numbers in each run, and failures told of when they happen."""

from __future__ import annotations

import random
import sys

import pytest
import torch
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("long", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = "of random numbers (default 0); hypothesis: --hypothesis-profile=random or long"
    parser.addoption("--seed", type=int, default=0, help=help_text)


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.getoption('seed')}"


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Of everything that is random in a test and is given no generator of its own."""
    found: int = request.config.getoption("seed")
    random.seed(found)
    torch.manual_seed(found)
    return found


class _Failures:
    """Prints failures to stderr at once: stdout may be kept for later (`make test`)."""

    def __init__(self, config: pytest.Config) -> None:
        self._capture = config.pluginmanager.getplugin("capturemanager")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._print(f"FAILED {report.nodeid} ({report.when})", report.longreprtext)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._print(f"FAILED {report.nodeid} (collection)", report.longreprtext)

    def _print(self, title: str, text: str) -> None:
        with self._capture.global_and_fixture_disabled():
            print(f"\n{title}\n{text}", file=sys.stderr, flush=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Failures(config), "failures-at-once")
