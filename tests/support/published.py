# SPDX-License-Identifier: Apache-2.0
"""Server arguments as a scheduler process has them, for tests of SGLang's own objects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import publish, restore_context, snapshot_context
from sglang.srt.server_args import prepare_server_args

from tests.support.demo_model import write_demo_model


@contextmanager
def published(model: Path, *args: str) -> Iterator[None]:
    """Those of a server of ours on a CPU, and all our hooks.

    Args:
        model: an empty folder, for its model.
    """
    state = snapshot_context()
    load_plugins()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SGLANG_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"):
            patch.setenv(name, "1")  # which the CPU platform would set for good
        path = str(write_demo_model(model, layers=2))
        argv = ["--model-path", path, "--device", "cpu", "--attention-backend", "diffxkv"]
        server_args = prepare_server_args([*argv, *args])
        server_args.resolve_once()
        publish(server_args, role="scheduler")
        yield
    restore_context(state)
