# SPDX-License-Identifier: Apache-2.0
"""One server per variant, which is measured while it runs."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import ByteSize

from sglang_diffxkv.eval.dtype import ITEMSIZE
from sglang_diffxkv.eval.model import Model
from sglang_diffxkv.eval.progress import Progress
from sglang_diffxkv.eval.variants import Variant, served
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.launch import ServerProcess

_SLACK = 256
"""Tokens beside a prompt: its answer."""
_ROOM = 1.5
"""Times the prompts in flight that a pool holds, so that no page is sealed for want of memory."""

_Record = TypeVar("_Record")


class Servers(NamedTuple):
    """What the servers of all variants have in common."""

    model: Model
    device: str
    longest: int
    """Tokens of a prompt at most."""
    at_once: int
    """Prompts that a pool holds, with room to spare."""

    def arguments(self, variant: Variant) -> list[object]:
        """Arguments of `sglang serve`."""
        model = self.model
        whole = -(-(self.longest + _SLACK) // PAGE_TOKENS) * PAGE_TOKENS
        tokens = int(_ROOM * self.at_once) * whole
        options: list[object] = ["--model-path", model.path, "--device", self.device]
        options += ["--dtype", model.dtype]
        options += ["--max-running-requests", self.at_once, "--page-size", PAGE_TOKENS]
        # A prompt is compressed once it is whole, as the papers have it.
        options += ["--chunked-prefill-size", whole]
        if self.device == "cpu":
            options += ["--sleep-on-idle"]
        if variant.config is None:
            options += ["--max-total-tokens", tokens]
            cpu = self.device == "cpu"
            return [*options, *(["--attention-backend", "torch_native"] if cpu else [])]
        # Half for raw pages: here prompts wait together, uncompressed, to be sealed.
        layers = model.layers + model.window_layers
        token_bytes = layers * model.layer_token_bytes * model.itemsize // ITEMSIZE
        memory = ByteSize(2 * tokens * token_bytes)
        config = replace(served(variant.config, model.itemsize), memory_bytes=memory, raw_share=0.5)
        return [*options, "--attention-backend", "diffxkv", "--diffxkv-config", config.to_json()]


def measure_each(
    servers: Servers,
    variants: Sequence[Variant],
    progress: Progress,
    measure: Callable[[ServerProcess, Variant], Iterator[_Record]],
    outcome: Callable[[Sequence[_Record], float], str],
) -> Iterator[_Record]:
    """Records of all variants in their order, as soon as each is measured.

    Args:
        measure: yields the records of a variant, from its server.
        outcome: a line about a variant's records and the seconds that they took.

    Raises:
        ServerError: a server did not start. Whatever else is raised while one runs has the end of
            its log as a note.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(prefix="diffxkv-eval-") as folder, progress:
        for variant in variants:
            begin, records = time.monotonic(), []
            progress.describe(f"{variant.name}: start")
            log = Path(folder) / "server.log"
            with ServerProcess(*servers.arguments(variant), log=log) as server:
                try:
                    for record in measure(server, variant):
                        records.append(record)
                        yield record
                except Exception as error:
                    error.add_note(server.log_tail())
                    raise
            progress.line(outcome(records, time.monotonic() - begin))
