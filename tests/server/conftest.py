# SPDX-License-Identifier: Apache-2.0
"""Models and servers that test files share. Servers are forked from a process that has imported
SGLang; `ColdServer`s are started as users do."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.launch import ServerProcess
from sglang_diffxkv.models.prepare import prepare
from tests.support import warm_start
from tests.support.demo_model import write_demo_model
from tests.support.harness import Server
from tests.support.workload import assert_healthy


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session", autouse=True)
def forked() -> Iterator[None]:
    """Servers are, those of our commands included."""

    def launch(server: ServerProcess) -> Any:
        return warm_start.start(server._command, server._env, server.log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServerProcess, "_launch", launch)
        yield


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_model(**arguments of write_demo_model)`: the folder, written once per session."""
    made: dict[str, Path] = {}

    def make(**arguments: object) -> Path:
        key = repr(sorted(arguments.items()))
        if key not in made:
            made[key] = write_demo_model(tmp_path_factory.mktemp("model"), **arguments)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[..., Path]) -> Path:
    """The default demo model: 4 layers, 8 heads, 2 KV heads, head_dim 64."""
    return make_model()


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SmolLM2-135M-Instruct in bf16, downloaded and converted as users have it done."""
    folder = tmp_path_factory.mktemp("smollm2")
    yield prepare("smollm2", folder / "checkpoint", cache=folder / "cache")
    # pytest keeps the folders of several sessions.
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def stock_server(model: Path) -> Iterator[Server]:
    """Stock SGLang: its own pool and torch_native attention, float32, page size 64."""
    options = ["--attention-backend", "torch_native", "--page-size", 64]
    # A random model asked for JSON would otherwise write blanks until its limit.
    options += ["--max-total-tokens", 65536, "--constrained-json-disable-any-whitespace"]
    with Server(model, *options) as server:
        yield server


@pytest.fixture(scope="session")
def workers_server() -> Iterator[Server]:
    """Ours with the bundled model and the default policy, which has every quality; two processes
    serve HTTP.

    Of the parsers of tool calls "pythonic" constrains required ones by a JSON schema; others do it
    by structural tags, in which this model writes blanks until its limit.
    """
    args = ["--attention-backend", "diffxkv", "--tokenizer-worker-num", 2]
    args += ["--diffxkv-config", json.dumps({"memory_bytes": "24MiB"})]
    args += ["--served-model-name", "default", "--enable-cache-report"]
    args += ["--tool-call-parser", "pythonic", "--constrained-json-disable-any-whitespace"]
    with Server(BUNDLED, *args, dtype="bfloat16") as server:
        yield server
        assert_healthy(server)
