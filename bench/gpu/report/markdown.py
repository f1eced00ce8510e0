# SPDX-License-Identifier: Apache-2.0
"""The bench's report in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.gpu.report.records import Record, Records


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; nothing where there are no rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(x) for x in line) + " |" for line in lines)


def report(results: Records, command: str, seconds: float) -> str:
    """The whole page, of whatever is known so far."""
    facts = results.facts()
    parts = [
        f"# {facts.get('device', 'GPU')}",
        f"`{command}`, {seconds:.0f} s",
        ", ".join(f"{key} {value}" for key, value in facts.items()),
        _failures(results),
        "## Memory\n\nRead and written bytes both count for copies.\n\n" + _memory(results),
        "## Checks\n\nAgainst float64 on the dequantised values.\n\n" + _checks(results),
    ]
    copy = max((x["copy"] for x in results.bandwidths()), default=0.0)
    titles: dict[str, tuple[str, Callable[[list[Record], float], str]]] = {
        "decode": (DECODE, _decode),
        "sweep": (SWEEP, _sweep),
        "prefill": (PREFILL, _prefill),
        "arena": (ARENA, _arena),
        "copies": (COPIES, _copies),
    }
    for section, (text, write) in titles.items():
        entries = results.sections.get(section, [])
        if entries:
            timed = [x for x in entries if "times" in x]
            skipped = [f"- {x['skipped']}" for x in entries if "skipped" in x]
            parts += [text, write(timed, copy), "\n".join(skipped)]
    parts += [
        f"- {x['in_cache']} of {x['compiled']} kernels were in Triton's cache; "
        f"the others took {x['seconds']} s"
        for x in results.sections.get("prebuild", [])
        if "in_cache" in x
    ]
    notes = results.sections.get("flashinfer", [])
    parts += [f"- FlashInfer: {x['failed']} was not built: {x['message']}" for x in notes
              if "failed" in x]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


DECODE = """## Decode

One layer of a step: K8V4/K4V2, a window of 65 to 128 bf16 tokens. "MB" are codes, scales and raw
tokens that must be read; "share" is of the best copy. The time is of attention and the merge, in
brackets the tenth and ninetieth percentile; "merge" is its part alone, "plan" that of planning a
step of 32 layers, per layer, "score" what a policy costs that scores every step. FlashInfer at
equal logical length, pages of 64 tokens; "x" says how many times as long it takes."""

SWEEP = """## Launch constants

Time as a share of that of the constants that ship (first line), measured in turn."""

PREFILL = """## Beside prefill

Times of one layer in µs, and as a share of causal attention of the chunk alone; "sealed prefix":
as a share of what attention over the raw prefix adds. "Layer" is attention of the chunk over
everything, and the matrix products. The first table has both ways over a sealed prefix: its codes
in attention itself, or unpacked (alone: "unpack") for dense attention."""

ARENA = "## Free stack\n\nTimes in µs."

COPIES = """## Frames to the host and back

GB/s of the kernel with so many programs, the first of which ship, and of one copy of as many bytes
in a row. The host's memory is pinned."""


def _failures(results: Records) -> str:
    lines = [f"- **{line}**" for line in results.failures()]
    return "## FAILED\n\n" + "\n".join(lines) if lines else ""


def _memory(results: Records) -> str:
    rows = [[x["size"] / 1e6, x["copy"] / 1e9, x["read"] / 1e9] for x in results.bandwidths()]
    exact = results.subnormals().get("exact", "not checked")
    return f"fp16 subnormals exact in products: {exact}\n\n" + table(
        ["buffer, MB", "copy, GB/s", "read, GB/s"], rows
    )


def _checks(results: Records) -> str:
    by_operation: dict[str, list[Record]] = {}
    for check in results.checks():
        by_operation.setdefault(check["operation"], []).append(check)
    rows = []
    for operation, checks in by_operation.items():
        passed = sum(x["passed"] for x in checks)
        worst = [
            max((float(x[key]) for x in checks if key in x), default="–")
            for key in ("error", "lse_error")
        ]
        rows.append([operation, f"{passed} of {len(checks)}", *worst])
    return table(["operation", "passed", "largest error", "largest LSE error"], rows)


def _decode(entries: list[Record], copy: float) -> str:
    baselines = [
        name for name in ("flashinfer bf16", "flashinfer fp8", "sdpa bf16")
        if any(name in x["times"] for x in entries)
    ]  # fmt: skip
    head = [
        "load",
        "high/low, %",
        "MB",
        "µs",
        "GB/s",
        "share",
        "merge, µs",
        "plan, µs",
        "score, µs",
    ]
    for name in baselines:
        head += [f"{name}, µs", "x"]
    rows = []
    for x in entries:
        ours = x["times"]["diffxkv"]
        rate = x["bytes"] / ours["median"]
        drawn = "/".join(f"{100 * share:.0f}" for share in x["drawn"])
        row = [
            x["load"] + ("" if x["cold"] else " (in L2)"), drawn, x["bytes"] / 1e6, _spread(ours),
            rate / 1e9, _share(rate, copy), _us(x["times"]["merge"]),
            _us(x["times"]["plan"]) / x["plan_layers"],
            _us(x["times"]["score_decode"]) if "score_decode" in x["times"] else "–",
        ]  # fmt: skip
        for name in baselines:
            theirs = x["times"].get(name)
            row += [_us(theirs), theirs["median"] / ours["median"]] if theirs else ["–", "–"]
        rows.append(row)
    return table(head, rows)


def _sweep(entries: list[Record], copy: float) -> str:
    mixes = list(dict.fromkeys(x["mix"] for x in entries))
    by_constants: dict[tuple[int, ...], dict[str, Record]] = {}
    for x in entries:
        by_constants.setdefault(tuple(x["constants"].values()), {})[x["mix"]] = x
    rows = []
    for constants, found in by_constants.items():
        row: list[Any] = list(constants)
        for mix in mixes:
            if mix not in found:
                row += ["–", "–"]
                continue
            x = found[mix]
            shipped, changed = (x["times"][name]["median"] for name in ("shipped", "changed"))
            row += [changed / shipped, x["bytes"] / changed / 1e9]
        rows.append(row)
    head = ["tokens", "warps", "stages", "registers", "items/SM"]
    for mix in mixes:
        head += [mix, "GB/s"]
    return table(head, rows)


def _crossover(entries: list[Record]) -> str:
    """Sealed prefixes with few new tokens and many."""
    names = ("fused", "unpacked", "unpack")
    rows = [[x["crossover"], *(_us(x["times"][name]) for name in names)] for x in entries]
    return table(["new tokens after sealed ones", *names], rows)


def _prefill(entries: list[Record], copy: float) -> str:
    crossings = [x for x in entries if "crossover" in x]
    rows = []
    for x in entries:
        if "crossover" in x:
            continue
        times = {name: _us(t) for name, t in x["times"].items()}
        own, whole = times["prefill of the chunk"], times["prefill over all"]
        layer = whole + times["products of the layer"]
        row: list[Any] = [x["chunk"], x["baseline"], own, whole, layer]
        for name, base in (
            ("extend_sealed", whole - own), ("extend_open", own), ("open_prefill", own),
            ("score_open", own), ("pack", own),
        ):  # fmt: skip
            row += [f"{times[name]:.4g} ({times[name] / base:.1%})"] if name in times else ["–"]
        both = [times[name] for name in ("score_open", "pack") if name in times]
        row.append(f"{sum(both) / layer:.2%}" if len(both) == 2 else "–")
        rows.append(row)
    head = ["chunk", "baseline", "chunk alone", "over all", "layer", "sealed prefix", "extend_open",
            "open_prefill", "score", "pack", "score + pack of layer"]  # fmt: skip
    return _crossover(crossings) + "\n\n" + table(head, rows)


def _arena(entries: list[Record], copy: float) -> str:
    rows = [
        [x["stack"], x["owners"], x["frames"], *(_us(t) for t in x["times"].values())]
        for x in entries
    ]
    names = list(entries[0]["times"]) if entries else []
    return table(["stack", "owners", "frames", *names], rows)


def _copies(entries: list[Record], copy: float) -> str:
    rows = [
        [x["frame_bytes"], x["direction"], x["bytes"] / 1e6]
        + [x["bytes"] / t["median"] / 1e9 for t in x["times"].values()]
        for x in entries
    ]
    names = list(entries[0]["times"]) if entries else []
    return table(["frame, bytes", "direction", "MB", *names], rows)


def _us(timing: Record) -> float:
    return timing["median"] * 1e6


def _spread(timing: Record) -> str:
    low, high = (timing[key] * 1e6 for key in ("low", "high"))
    return f"{_us(timing):.4g} ({low:.4g}–{high:.4g})"


def _share(rate: float, copy: float) -> str:
    return f"{rate / copy:.1%}" if copy else "–"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
