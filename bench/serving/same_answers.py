# SPDX-License-Identifier: Apache-2.0
"""Whether policy `lossless` answers a checkpoint's prompts as stock SGLang does, token for token.

    python -m bench.serving.same_answers CHECKPOINT [--memory 300MiB] [--name same_answers]

Both in fp32, prompts cut from documents at lengths around pages, windows and chunks. Stock answers
them one by one; ours each of them twice, the second time from its cache, then eight at a time in
too little memory, where prefixes are evicted and requests retracted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer

from bench.serving.common import PAGE_TOKENS, command_line, retractions, table, write_results
from sglang_diffxkv.eval.documents.corpus import load_documents
from tests.support.harness import Json, Server
from tests.support.workload import assert_healthy, is_tie, outputs

LENGTHS = (1, 2, 63, 64, 65, 127, 300, 511, 512, 513, 577, 1000, 1500, 2047, 2500, 3000)
NEW_TOKENS = 32
CHUNK = 512
SHARED = 640
"""Tokens of a prefix that a third of the crowd shares."""
CROWD, CROWD_NEW = 16, 96
ENVIRONMENT = {"SGLANG_DISABLED_MODEL_ARCHS": "", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}


class Phase(NamedTuple):
    """Answers to the same prompts: how many were equal, or parted at a tie of stock's."""

    name: str
    prompts: int
    equal: int
    ties: int
    cached_tokens: int


def lone_prompts(texts: Sequence[list[int]]) -> list[list[int]]:
    return [texts[i % len(texts)][:length] for i, length in enumerate(LENGTHS)]


def crowd_prompts(texts: Sequence[list[int]]) -> list[list[int]]:
    """Of 200 to 1,600 tokens; every third begins with the same ones."""
    made = []
    for i in range(CROWD):
        text = texts[(i + 1) % len(texts)][100 * i % 1000 :]
        own = text[: 200 + 200 * (i % 8)]
        made.append(texts[0][:SHARED] + own[:200] if i % 3 == 2 else own)
    return made


def ask(server: Server, prompts: Sequence[list[int]], new: int, at_once: int) -> list[Json]:
    # Where EOS ends answers SGLang admits on an estimate of their length, here far too low.
    sampling = {"ignore_eos": False, "min_new_tokens": new}
    items = [{"prompt": x, "max_new_tokens": new, "sampling": sampling} for x in prompts]
    return server.generate_many(items, workers=at_once)


class Compared(NamedTuple):
    """What stock has answered, and the server to ask about ties."""

    stock: Server
    prompts: list[list[int]]
    expected: list[list[int]]

    def phase(self, name: str, answers: Sequence[Json]) -> Phase:
        pairs = list(zip(self.prompts, self.expected, outputs(answers), strict=True))
        parted = [pair for pair in pairs if pair[1] != pair[2]]
        ties = sum(is_tie(self.stock, *pair) for pair in parted)
        cached = sum(answer["meta_info"]["cached_tokens"] for answer in answers)
        return Phase(name, len(pairs), len(pairs) - len(parted), ties, cached)


def run(model: Path, memory: str) -> tuple[list[Phase], Json]:
    """All phases, and the statistics of our pool in the end."""
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    texts = [tokenizer(document.text, verbose=False).input_ids for document in load_documents(None)]
    texts = [ids for ids in texts if len(ids) > max(LENGTHS)]
    config = {"policy": "lossless", "memory_bytes": memory, "raw_share": 0.3}
    flags = ("--chunked-prefill-size", CHUNK, "--schedule-conservativeness", 0.1)
    # Its pages are as long as ours, so that it, too, reads prefixes in whole pages.
    pages = ("--attention-backend", "torch_native", "--page-size", PAGE_TOKENS)
    stock = Server(model, *pages, "--max-total-tokens", 16384, env=ENVIRONMENT)
    own = ("--attention-backend", "diffxkv", "--diffxkv-config", json.dumps(config))
    ours = Server(model, *own, *flags, env=ENVIRONMENT)
    with stock:
        lone, crowd = (
            Compared(stock, prompts, outputs(ask(stock, prompts, new, 1)))
            for prompts, new in (
                (lone_prompts(texts), NEW_TOKENS),
                (crowd_prompts(texts), CROWD_NEW),
            )
        )
        with ours:
            twice = [prompt for prompt in lone.prompts for _ in range(2)]
            answers = ask(ours, twice, NEW_TOKENS, 1)
            phases = [
                lone.phase("one by one", answers[::2]),
                lone.phase("the same again", answers[1::2]),
                crowd.phase("eight at a time", ask(ours, crowd.prompts, CROWD_NEW, 8)),
                lone.phase("once more", ask(ours, lone.prompts, NEW_TOKENS, 4)),
            ]
            assert_healthy(ours)
            stats = ours.stats() | {"retractions": retractions(ours.log_text())}
    return phases, stats


def main() -> None:
    made = command_line(__doc__ or "", "same_answers")
    made.add_argument("model", type=Path)
    made.add_argument("--memory", default="300MiB", help="of our pool; too little for the crowd")
    args = made.parse_args()
    phases, stats = run(args.model, args.memory)
    rows = table([Phase._fields, *phases])
    counters = stats["counters"]
    text = (
        f"{rows}\n\nOf greedy answers in fp32: {NEW_TOKENS} new tokens each, {CROWD_NEW} of the "
        f"crowd's. Chunks of {CHUNK} tokens. In the end {counters['sealed']} pages had been "
        f"sealed, {counters['evicted']} evicted, {stats['retractions']} requests retracted."
    )
    result = {"phases": [phase._asdict() for phase in phases], "stats": stats}
    write_results(args.name, f"Policy lossless against stock: {args.model.name}", result, text)


if __name__ == "__main__":
    main()
