# SPDX-License-Identifier: Apache-2.0
"""Asks a server the questions of a cell, and reads what its pool holds afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from typing import Any, NamedTuple, TypeVar

from sglang_diffxkv.eval.client import TOP, Client
from sglang_diffxkv.eval.prompts import Cell, Prompt, Stop
from sglang_diffxkv.kernels.layout import PAGE_TOKENS

AT_ONCE = 16
"""Prompts in flight, and so in the pool at least."""

_In = TypeVar("_In")
_Out = TypeVar("_Out")
Distribution = dict[int, float]
"""Log-probabilities by token id."""


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


class CacheError(RuntimeError):
    """Answers that were not read from the cache, and so tell nothing about it."""


def ask(
    url: str,
    cell: Cell,
    forced: Sequence[list[int]] | None,
    is_ours: bool,
    done: Callable[[], None] = lambda: None,
) -> CellAnswers:
    """Answers to all prompts of `cell`, `AT_ONCE` at a time, from a cache with nothing else in it.

    Args:
        forced: ids of the answers whose tokens' distributions are wanted, one per prompt; None
            stands for the answers that are given here.
        done: called after each request, of which there are `count_requests`.

    Raises:
        CacheError: an answer was computed without the cached pages it was to be read from.
        requests.RequestException: the server refused a request, or is gone.
    """
    client = Client(url)
    answers: list[Answer] = []
    stats = []
    for prompts in _batches(cell):
        client.flush()
        for prompt in _to_warm(prompts):
            # One by one: SGLang splits the last prompt of a full batch, and a policy would judge
            # its two parts by themselves.
            client.warm(prompt.warm, prompt.namespace)
            done()
        given = together(lambda prompt: _answer(client, prompt, cell.stop), prompts, done)
        if is_ours:
            stats.append(client.stats())
        if forced is not None:
            wanted = zip(prompts, forced[len(answers) :], strict=False)
            found = together(lambda item: _forced(client, *item), wanted, done)
            given = [
                answer._replace(distributions=rows)
                for answer, rows in zip(given, found, strict=True)
            ]
        answers += given
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
        prompt.namespace,
        prompt.max_tokens,
        stop=stop,
        return_logprob=True,
        top_logprobs_num=TOP,
    )
    meta = found["meta_info"]
    ids = [token for _, token, _ in meta["output_token_logprobs"]]
    rows = _distributions(meta["output_top_logprobs"])
    return Answer(found["text"], ids, rows, meta["cached_tokens"])


def _forced(client: Client, prompt: Prompt, ids: list[int]) -> list[Distribution]:
    found = client.generate(
        prompt.ids + ids,
        prompt.namespace,
        1,
        return_logprob=True,
        logprob_start_len=len(prompt.ids) - 1,
        top_logprobs_num=TOP,
    )
    # SGLang gives none before the first of these tokens, the prompt's last.
    return _distributions(found["meta_info"]["input_top_logprobs"][1:])


def _distributions(rows: list[Any]) -> list[Distribution]:
    return [{token: logprob for logprob, token, _ in row} for row in rows]


def divergence(full: Distribution, other: Distribution) -> float:
    """KL(full || other) in nats, all tokens that the two do not both list taken as one.

    Merging tokens can only lower it, so this is a lower bound, and exact where both list all. NaN
    where a log-probability is: a model that computes none must not look like full KV.
    """
    listed = full.keys() & other.keys()
    kl = sum(math.exp(full[token]) * (full[token] - other[token]) for token in listed)
    if math.isnan(kl):
        return kl
    rest, other_rest = (
        max(0.0, 1.0 - sum(math.exp(d[token]) for token in listed)) for d in (full, other)
    )
    if rest > 1e-6:
        kl += rest * math.log(rest / max(other_rest, 1e-12))
    return max(0.0, kl)


def together(
    call: Callable[[_In], _Out], items: Iterable[_In], done: Callable[[], None] = lambda: None
) -> list[_Out]:
    """`call` for all items at once, `AT_ONCE` at most; raises what any of them raises.

    `done` is called after each, in the items' order.
    """
    found = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for item in pool.map(call, items):
            found.append(item)
            done()
    return found
