# SPDX-License-Identifier: Apache-2.0
"""Asks a server the questions of a cell, and reads what its pool holds afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from sglang_diffxkv.client import Client
from sglang_diffxkv.eval.ask import (
    AT_ONCE,
    TOP,
    CacheError,
    Distribution,
    distributions,
    distributions_after,
    together,
    warm,
)
from sglang_diffxkv.eval.questions.prompts import Cell, Prompt, Stop
from sglang_diffxkv.kernels.layout import PAGE_TOKENS


class Answer(NamedTuple):
    text: str
    ids: list[int]
    distributions: list[Distribution]
    """Before each token of the answer that full KV gave."""
    cached_tokens: int


class CellAnswers(NamedTuple):
    answers: list[Answer]
    stats: list[dict[str, Any]]
    """`/diffxkv/stats` after each batch of prompts; none from SGLang's own pool."""


def ask(
    client: Client,
    cell: Cell,
    given: Sequence[list[int]] | None,
    is_ours: bool,
    done: Callable[[], None] = lambda: None,
) -> CellAnswers:
    """Answers to all prompts of `cell`, `AT_ONCE` at a time, from a cache with nothing else in it.

    Args:
        given: ids of the answers whose tokens' distributions are wanted, one per prompt; None
            stands for the answers that are given here.
        is_ours: whether the server's pool is ours.
        done: called after each request, of which there are `count_requests`.

    Raises:
        CacheError: an answer was computed without the cached pages it was to be read from.
        requests.RequestException: the server refused a request, or is gone.
    """
    answers: list[Answer] = []
    stats = []
    for prompts in _batches(cell):
        client.flush_cache()
        for prompt in _to_warm(prompts):
            # One by one: SGLang splits the last prompt of a full batch, and a policy would judge
            # its two parts by themselves.
            warm(client, prompt.warm, prompt.namespace)
            done()
        found = together(lambda prompt: _answer(client, prompt, cell.stop), prompts, done)
        if is_ours:
            stats.append(client.stats())
        if given is not None:
            wanted = zip(prompts, given[len(answers) :], strict=False)
            read = together(
                lambda item: distributions_after(client, item[0].ids, item[1], item[0].namespace),
                wanted,
                done,
            )
            found = [
                answer._replace(distributions=other)
                for answer, other in zip(found, read, strict=True)
            ]
        answers += found
    for prompt, answer in zip(cell.prompts, answers, strict=True):
        check_cached(prompt, answer)
    return CellAnswers(answers, stats)


def count_requests(cell: Cell, is_forced: bool) -> int:
    """Requests that `ask` sends, with answers of full KV or without."""
    warmed = sum(len(_to_warm(prompts)) for prompts in _batches(cell))
    return warmed + (2 if is_forced else 1) * len(cell.prompts)


def _batches(cell: Cell) -> list[list[Prompt]]:
    return [cell.prompts[i : i + AT_ONCE] for i in range(0, len(cell.prompts), AT_ONCE)]


def _to_warm(prompts: Sequence[Prompt]) -> list[Prompt]:
    return list({(p.namespace, tuple(p.warm)): p for p in prompts}.values())


def check_cached(prompt: Prompt, answer: Answer) -> None:
    """All complete pages that the two requests have in common must have been in the cache.

    Raises:
        CacheError: they were not.
    """
    pairs = zip(prompt.warm, prompt.ids[:-1], strict=False)
    common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    if answer.cached_tokens < common // PAGE_TOKENS * PAGE_TOKENS:
        raise CacheError(
            f"of {common} tokens of a prompt sent before, only {answer.cached_tokens} were found "
            "in the prefix cache: the pool is too small for this many prompts of this length"
        )


def _answer(client: Client, prompt: Prompt, stop: Stop) -> Answer:
    found = client.generate(
        prompt.ids,
        max_new_tokens=prompt.max_tokens,
        sampling={
            "ignore_eos": False,
            "stop_token_ids": stop.token_ids,
            "stop": stop.strings,
        },
        extra_key=prompt.namespace,
        return_logprob=True,
        top_logprobs_num=TOP,
    )
    meta = found["meta_info"]
    ids = [token for _, token, _ in meta["output_token_logprobs"]]
    before = distributions(meta["output_top_logprobs"])
    return Answer(found["text"], ids, before, meta["cached_tokens"])
