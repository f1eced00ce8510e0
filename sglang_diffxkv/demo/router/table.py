# SPDX-License-Identifier: Apache-2.0
"""The router demo's table, and its lines about the replica that came back."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from sglang_diffxkv.demo.router.measure import WINDOW, Return, by_replica, hit_rate
from sglang_diffxkv.demo.router.workload import Answered


class Run(NamedTuple):
    """The load behind the router with one policy."""

    turns: list[list[Answered]]
    """Of each turn of all chats."""
    evicted_tokens: int
    """Tokens that the replicas' prefix caches dropped meanwhile."""

    @property
    def answers(self) -> list[Answered]:
        return [answer for turn in self.turns for answer in turn]


def table(runs: Mapping[str, Run], replicas: Sequence[str]) -> str:
    """A column for each policy."""
    rows = [["", *runs], *([label, *map(text, runs.values())] for label, text in _ROWS)]
    for name in replicas:
        own = [by_replica(run.answers, replicas)[name] for run in runs.values()]
        rows.append([f"  {name}", *(f"{hit_rate(x):.1%} of {len(x)} requests" for x in own)])
    for turn, answers in enumerate(zip(*(run.turns for run in runs.values()), strict=True), 1):
        rows.append([f"  turn {turn}", *(f"{hit_rate(x):.1%}" for x in answers)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def summary(found: Return) -> str:
    """What the return was like, before, meanwhile and after."""
    first = found.after[:WINDOW]
    cached, prompt = (
        sum(getattr(x, field) for x in first) for field in ("cached_tokens", "prompt_tokens")
    )
    last = found.before[-WINDOW:]
    return (
        f"{found.replica} was killed, and the router sent it requests again after "
        f"{found.returned_at - found.killed_at:.0f} s; meanwhile {len(found.meanwhile)} requests "
        f"were answered, {hit_rate(found.meanwhile):.1%} of their tokens from cache.\n"
        f"Its last {len(last)} requests before: {hit_rate(last):.1%} of prompt tokens from cache.\n"
        f"Its first {len(first)} requests after, of {len(found.after)}: {hit_rate(first):.1%}, "
        f"{cached:,} of {prompt:,} prompt tokens; from cache of each: "
        + ", ".join(str(answer.cached_tokens) for answer in first)
    )


def _prompt_tokens(run: Run) -> int:
    return sum(answer.prompt_tokens for answer in run.answers)


_ROWS: Sequence[tuple[str, Callable[[Run], str]]] = (
    ("requests", lambda run: f"{len(run.answers)}"),
    ("prompt tokens", lambda run: f"{_prompt_tokens(run):,}"),
    (
        "prompt tokens computed",
        lambda run: f"{_prompt_tokens(run) - sum(x.cached_tokens for x in run.answers):,}",
    ),
    ("tokens evicted from the prefix caches", lambda run: f"{run.evicted_tokens:,}"),
    ("seconds to an answer, median", lambda run: f"{median(x.seconds for x in run.answers):.2f}"),
    ("prefix-hit rate", lambda run: f"{hit_rate(run.answers):.1%}"),
)
