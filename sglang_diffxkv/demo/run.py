# SPDX-License-Identifier: Apache-2.0
"""The demo as a whole: runs a load on both pools, and prints the table."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from openai import OpenAIError
from tokenizers import Tokenizer

from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.config import ConfigError
from sglang_diffxkv.demo.agreement import compare, distributions, side_by_side, summary
from sglang_diffxkv.demo.chats import Answers, run_chats
from sglang_diffxkv.demo.measure import Probe
from sglang_diffxkv.demo.serve import OURS, POOLS, STOCK, Load, Setup, serve
from sglang_diffxkv.demo.table import Run, table
from sglang_diffxkv.demo.workload import Stage, run_load
from sglang_diffxkv.eval.ask import Distribution
from sglang_diffxkv.eval.dtype import fast_dtype
from sglang_diffxkv.eval.model import load_model
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.launch import ServerError, default_device

MEMORY_BYTES = 20 * 2**20
CHATS_STOCK_TOKENS = 64 * PAGE_TOKENS
"""That stock SGLang has room for when it serves another model: about half of what is said."""

NOTE = (
    "The embedded model knows nothing but to look up what its prompts say: answers are compared "
    "with what was said."
)
CHATS_NOTE = (
    "Five users talk about chapters of Python's documentation. Nobody knows the right answers: "
    "they are compared with those that full KV gives, and all histories have the latter."
)


def run_demo(device: str | None, model: Path = BUNDLED) -> None:
    """Run it on `device`; None: cuda where there is one, else cpu.

    Raises:
        ConfigError: the model cannot be served, or cannot chat.
        ServerError: a server did not start, or refused a request.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    device = device or default_device()
    try:
        if model == BUNDLED:
            _look_up(device)
        else:
            _chat(device, model)
    except OpenAIError as error:
        raise ServerError(str(error)) from error


def _look_up(device: str) -> None:
    """The embedded model's load, of questions whose answers are known."""
    # Both servers alike: more threads than this gain nothing on matrices as small as this model's.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    dense_bytes = load_model(BUNDLED).token_bytes
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    setup = Setup(BUNDLED, device, "bfloat16", dense_bytes, MEMORY_BYTES)

    def load(url: str, probe: Probe) -> Iterator[Stage]:
        return run_load(url, probe, lambda text: len(tokenizer.encode(text)))

    print(f"\n{table(_serve_both(setup, NOTE, dict.fromkeys(POOLS, load)))}\n\n{NOTE}")


def _chat(device: str, path: Path) -> None:
    """Any other model's load, of conversations that are compared with those on full KV."""
    model = load_model(path, fast_dtype(device))
    if model.tokenizer.chat_template is None:
        raise ConfigError(f"{path}: its tokenizer has no chat template, so it cannot chat")
    memory_bytes = CHATS_STOCK_TOKENS * model.token_bytes
    setup = Setup(path, device, model.dtype, model.token_bytes, memory_bytes)
    full: Answers = {}
    given: Answers = {}
    read: dict[str, list[Distribution]] = {}

    def load(name: str, url: str, probe: Probe) -> Iterator[Stage]:
        yield from run_chats(url, probe, full, full if name == STOCK else given)
        read[name] = distributions(url, model.tokenizer, full)

    runs = _serve_both(setup, CHATS_NOTE, {name: partial(load, name) for name in POOLS})
    found = compare(full, given, read[STOCK], read[OURS])
    print(f"\n{side_by_side(full, given)}\n\n{table(runs)}\n\n{summary(found)}\n\n{CHATS_NOTE}")


def _serve_both(setup: Setup, note: str, loads: Mapping[str, Load]) -> list[Run]:
    memory = f"{setup.memory_bytes / 2**20:.0f} MiB"
    print(f"{note}\nDevice: {setup.device}. KV memory of each server: {memory}.")
    with tempfile.TemporaryDirectory(prefix="diffxkv-demo-") as folder:
        return [serve(name, setup, loads[name], Path(folder)) for name in POOLS]
