# SPDX-License-Identifier: Apache-2.0
"""What an evaluation asks a server for: sealed pages, and distributions read from them."""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sglang_diffxkv.client import Client

TOP = 256
"""Likeliest tokens of each distribution that are compared; the others count as one."""
WARM_TOKENS = 4
"""Generated while the cache is filled: a page is sealed once a later step has scored it."""
AT_ONCE = 16
"""Requests in flight."""

_In = TypeVar("_In")
_Out = TypeVar("_Out")
Distribution = dict[int, float]
"""Log-probabilities by token id."""


class CacheError(RuntimeError):
    """Answers that were not read from the cache, and so tell nothing about it."""


def warm(client: Client, ids: Sequence[int], namespace: str) -> None:
    """Fill the cache with the KV of `ids`, sealed as far as the policy seals it.

    Requests of one `namespace` share cached pages.
    """
    client.generate(ids, max_new_tokens=WARM_TOKENS, extra_key=namespace)


def distributions(rows: Iterable[Sequence[Any]]) -> list[Distribution]:
    """SGLang's lists of top log-probabilities, one for each token."""
    return [{token: logprob for logprob, token, _ in row} for row in rows]


def distributions_after(
    client: Client, prompt: Sequence[int], ids: Sequence[int], namespace: str | None = None
) -> list[Distribution]:
    """Before each of the tokens `ids`, which follow `prompt`."""
    found = client.generate(
        [*prompt, *ids],
        max_new_tokens=1,
        sampling={"ignore_eos": False},
        extra_key=namespace,
        return_logprob=True,
        logprob_start_len=len(prompt) - 1,
        top_logprobs_num=TOP,
    )
    # SGLang gives none before the first of these tokens, the prompt's last.
    return distributions(found["meta_info"]["input_top_logprobs"][1:])


def agrees(full: Distribution, other: Distribution) -> bool:
    """Whether both find the same token the likeliest."""
    return max(full, key=full.__getitem__) == max(other, key=other.__getitem__)


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
