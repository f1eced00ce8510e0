# SPDX-License-Identifier: Apache-2.0
"""The page and the figure of `bench.serving.levels`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median, quantiles

from bench.serving.common import MIB, PAGE_TOKENS, table
from tests.support.harness import Json

NAMES = {
    "device": "M",
    "host": "M + 4M host",
    "disk": "M + 4M host + 16M disk",
    "stock": "stock, 5M",
    "ample": "ample",
    "recomputed": "ample, no prefix cache",
}
PLACES = ("device", "host", "disk", "nowhere")
COUNTERS = ("sealed", "sealed_under_pressure", "demoted", "evicted")
GOAL_HITS, GOAL_TTFT, GOAL_BYTES = 3.0, 3.0, 3.5


def returning(turns: list[Json]) -> list[Json]:
    return [turn for turn in turns if turn["turn"] > 0]


def hits(turns: list[Json]) -> int:
    return sum(turn["cached_tokens"] for turn in turns)


def gains(result: Json, side: str, base: str, where: str | None = None) -> list[float]:
    """How many times shorter a returning chat's time to first token is on `side` than on `base`
    where that had nothing of it; all, or of turns whose history came from `where`."""
    return [
        there["ttft_ms"] / here["ttft_ms"]
        for there, here in zip(result["turns"][base], result["turns"][side], strict=True)
        if there["turn"] > 0 and there["cached_tokens"] == 0 and where in (None, place(here))
    ]


def spread(values: list[float]) -> str:
    """Median, and the quartiles."""
    if len(values) < 2:
        return "-"
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return f"{middle:.3g} ({low:.3g}–{high:.3g})"


def place(turn: Json) -> str:
    """The farthest level that a turn's history came from."""
    if turn["cached_tokens"] == 0:
        return "nowhere"
    if turn["read"]:
        return "disk"
    return "host" if turn["loaded"] else "device"


def partings(result: Json, side: str) -> tuple[int, int]:
    """Chats whose answers part from those of `ample`: before and after some of their tokens had to
    be computed again."""
    computed_again: set[int] = set()
    parted: set[int] = set()
    early = late = 0
    reference = result["turns"]["ample"]
    for expected, turn in zip(reference, result["turns"][side], strict=True):
        chat = turn["chat"]
        if turn["cached_tokens"] < expected["cached_tokens"]:
            computed_again.add(chat)
        if not turn["equal"] and chat not in parted:
            parted.add(chat)
            late += chat in computed_again
            early += chat not in computed_again
    return early, late


def sides_table(result: Json) -> str:
    base = hits(result["turns"]["device"])
    rows: list[list[object]] = [
        [
            "memory",
            "hit tokens",
            "of the prompts",
            "times M's",
            "TTFT of returning chats, ms",
            "times shorter than recomputing with ample memory",
            "with M",
            "equal answers",
            "chats that parted: all found, some computed again",
        ]
    ]
    for side, turns in result["turns"].items():
        back = returning(turns)
        prompts = sum(turn["prompt_tokens"] for turn in back)
        found = hits(back)
        equal = sum(turn["equal"] for turn in turns)
        early, late = partings(result, side)
        rows.append(
            [
                NAMES[side],
                found,
                f"{found / prompts:.1%}",
                found / max(1, base),
                spread([turn["ttft_ms"] for turn in back]),
                spread(gains(result, side, "recomputed")),
                spread(gains(result, side, "device")),
                f"{equal} of {len(turns)}",
                f"{early}, {late}",
            ]
        )
    return table(rows)


def places_table(result: Json) -> str:
    """What it takes to return, by the level that the history lies in."""
    rows: list[list[object]] = [
        ["memory", "history from", "turns", "TTFT, ms", "times shorter than recomputing", "with M"]
    ]
    for side in ("device", "host", "disk"):
        for where in PLACES if side in result["turns"] else ():
            turns = [t for t in returning(result["turns"][side]) if place(t) == where]
            if turns:
                times = spread([turn["ttft_ms"] for turn in turns])
                ratios = [spread(gains(result, side, b, where)) for b in ("recomputed", "device")]
                rows.append([NAMES[side], where, len(turns), times, *ratios])
    return table(rows)


def lengths_table(result: Json) -> str:
    """Median TTFT by turn."""
    sides = list(result["turns"])
    rows: list[list[object]] = [["turn", "prompt tokens", *(NAMES[side] for side in sides)]]
    for number in range(1, result["workload"]["turns"]):
        own = [[t for t in result["turns"][s] if t["turn"] == number] for s in sides]
        prompt = own[0][0]["prompt_tokens"]
        times = (median(turn["ttft_ms"] for turn in turns) for turns in own)
        rows.append([number + 1, prompt, *(f"{ms:.0f}" for ms in times)])
    return table(rows)


def moved_bytes(stats: Json) -> dict[str, float]:
    """Bytes per token of what lies on each level in the end."""
    found = {"device": sum(stats["sealed_bytes_per_token_by_layer"])}
    host, disk = stats.get("host"), stats.get("disk")
    if host and host["pages"]:
        nbytes = host["frames_used"] * stats["frame_bytes"]
        found["host"] = nbytes / (host["pages"] * PAGE_TOKENS)
    if disk and disk["pages"]:
        found["disk"] = disk["bytes_in_use"] / (disk["pages"] * PAGE_TOKENS)
    return found


def pools_table(result: Json) -> str:
    full = result["token_bytes"]
    rows: list[list[object]] = [
        ["memory", "tokens on the device", "bytes per token (times less than bf16)", *COUNTERS]
    ]
    rows[0] += ["host", "disk"]
    for side, stats in result["stats"].items():
        if stats:
            sizes = ", ".join(
                f"{level} {nbytes:.0f} ({full / nbytes:.2f})"
                for level, nbytes in moved_bytes(stats).items()
                if nbytes
            )
            counters = [stats["counters"][name] for name in COUNTERS]
            levels = [_counts(stats.get(level)) for level in ("host", "disk")]
            rows.append([NAMES[side], stats["tokens_held"], sizes, *counters, *levels])
    return table(rows)


def _counts(level: Json | None) -> str:
    shown = {k: v for k, v in (level or {}).items() if not k.startswith("bytes_")}
    return ", ".join(f"{name} {value}" for name, value in shown.items()) or "-"


def restart_table(result: Json) -> str:
    rows: list[list[object]] = [
        ["memory", "hit tokens", "of ample's", "TTFT, ms", "the first TTFT, ms", "equal answers"]
    ]
    most = hits(result["restarted"]["ample"])
    for side, turns in result["restarted"].items():
        times = [turn["ttft_ms"] for turn in turns]
        equal = f"{sum(turn['equal'] for turn in turns)} of {len(turns)}"
        found = hits(turns)
        row = [NAMES[side], found, f"{found / most:.1%}", spread(times), f"{times[0]:.0f}", equal]
        rows.append(row)
    return table(rows)


def goals(result: Json) -> str:
    """What the levels are for, and what they do."""
    turns, stats = result["turns"], result["stats"]
    head = ["memory", "hit tokens, times M's", "TTFT, times shorter than recomputing", "with M"]
    rows: list[list[object]] = [[*head, "bytes moved per token"]]
    rows.append(["goal", GOAL_HITS, GOAL_TTFT, GOAL_TTFT, f"1/{GOAL_BYTES} of bf16's"])
    for side in ("host", "disk"):
        if side in turns:
            least = result["token_bytes"] / moved_bytes(stats[side]).get("host", float("inf"))
            ratio = hits(turns[side]) / max(1, hits(turns["device"]))
            found = [spread(gains(result, side, base)) for base in ("recomputed", "device")]
            rows.append([NAMES[side], ratio, *found, f"1/{least:.2f}"])
    return table(rows)


def report(result: Json) -> str:
    load, memory = result["workload"], result["memory_bytes"] / MIB
    sections = [
        f"{result['model']}, {result['dtype']}, threads of a server: {result['threads']}, "
        f"M = {memory:g} MiB. {load['chats']} chats of {load['turns']} turns: {load['first']} "
        f"tokens of Python's documentation, then {load['user']} a turn, {load['answer']} answered "
        "greedily. Whose "
        "turn it is is random; first turns, which hit nothing, are left out of shares and times. "
        "Every server gets each turn before the next one, in rotating order, and each chat goes on "
        f"with that server's own answers. Ours: `{json.dumps(result['config'])}`, with M alone "
        f"graded eviction (`demote`) as by default; chunks of {result['chunk']} tokens. Stock: "
        f"`torch_native`, page size 64. *Ample* is {result['ample']} times M, which holds all. "
        "*Recomputing* is the same turn there without a prefix cache, in one chunk; *with M* it is "
        "that on the server with M where it had nothing of the chat. *Times shorter* is its time "
        "to first token over this one's, turn by turn. Medians and quartiles. Equal answers: "
        "ample's.",
        section("Goals", goals(result)),
        sides_table(result),
        section("By level", places_table(result)),
        section("Time to first token by turn, ms", lengths_table(result)),
        section("In the end", pools_table(result)),
    ]
    if result["restarted"]:
        about = (
            "The server with a disk was stopped and started again, and every chat returned once "
            "more, to all servers."
        )
        sections.append(section("Warm start", f"{about}\n\n{restart_table(result)}"))
    return "\n\n".join(sections)


def section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


def plot(path: Path, result: Json) -> None:
    """Write a picture: hit tokens, and time to first token over the length of the prompt."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    sides = list(result["turns"])
    prompts = sum(t["prompt_tokens"] for t in returning(result["turns"][sides[0]]))
    shares = [100 * hits(result["turns"][side]) / prompts for side in sides]
    left.barh([NAMES[side] for side in sides], shares)
    left.invert_yaxis()
    left.set(title="prompt tokens of returning chats", xlabel="% from the cache")
    shown = {NAMES[side]: returning(result["turns"][side]) for side in sides}
    for name, turns in shown.items():
        x, y = ([turn[key] for turn in turns] for key in ("prompt_tokens", "ttft_ms"))
        right.scatter(x, y, s=8, alpha=0.5, label=name)
    right.set(title=result["model"], xlabel="prompt tokens", ylabel="time to first token, ms")
    right.set_yscale("log")
    right.grid(alpha=0.3)
    right.legend(fontsize="small")
    figure.savefig(path)
