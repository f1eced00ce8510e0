# SPDX-License-Identifier: Apache-2.0
"""Decode against FlashInfer at equal logical length; a step's division, the merge by itself."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import torch

from bench.gpu.device import check_device, kernels
from bench.gpu.inputs import Layers
from bench.gpu.shapes import LLAMA_8B, LLAMA_70B, MIXES, PURE, QWEN_7B, TINY, USUAL, Load, draw
from bench.gpu.timing import baselines
from bench.gpu.timing.timer import (
    L2_SHARE,
    Candidate,
    Deadline,
    Timing,
    copies_needed,
    interleaved,
    l2_bytes,
)
from sglang_diffxkv.kernels.decode.work import divide_work
from sglang_diffxkv.kernels.gpu.launch import recorded
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge.tile_kernels import merge_work_tiles
from sglang_diffxkv.kernels.score import RawTables
from sglang_diffxkv.kernels.softmax import Softmax
from sglang_diffxkv.kernels.step import StepPages

BATCHES = (1, 8, 32, 64, 256)
TOKENS = (1024, 4096, 8192, 32768, 131072)
MEMORY_SHARE = 0.6
"""Of the device's free memory, for all candidates together."""

STEP_LAYERS = 32
"""Layers of the model for which work is divided."""


def loads() -> list[Load]:
    """What is timed, the most telling first: time may run out."""
    first = [Load(LLAMA_8B, 64, 8192, mix) for mix in (*PURE, USUAL)]
    first += [Load(LLAMA_8B, *size, USUAL) for size in ((1, 131072), (64, 4096), (8, 32768))]
    mixes = [Load(LLAMA_8B, 64, 8192, mix) for mix in MIXES]
    heads = [(64, 8192), (8, 32768), (1, 131072), (256, 1024)]
    others = [Load(model, *size, USUAL) for size in heads for model in (QWEN_7B, LLAMA_70B)]
    grid = [Load(LLAMA_8B, batch, tokens, USUAL) for tokens in TOKENS for batch in BATCHES]
    rest = [
        Load(model, batch, tokens, USUAL)
        for tokens in TOKENS
        for batch in BATCHES
        for model in (QWEN_7B, LLAMA_70B)
    ]
    return list(dict.fromkeys((*first, *mixes, *others, *grid, *rest)))


def tiny_loads() -> list[Load]:
    return [Load(TINY, 2, 256, USUAL)]


def our_candidates(load: Load, layers: Layers, copies: int) -> dict[str, Candidate]:
    """The whole operation of a layer whose work is divided already, and its parts."""
    device = layers.arena.device
    triton, softmax = kernels("decode"), Softmax(load.model.dim**-0.5)
    work = divide_work(layers.sequences, layers.heads, layers.layout)
    q = torch.randn(copies, load.batch, load.model.heads, load.model.dim, device=device)
    q = q.to(torch.bfloat16)
    mean = torch.randn(load.model.kv_heads, load.model.dim, device=device)

    def attend(i: int) -> None:
        triton.attend(q[i], q[i], layers.pages(i, mean), work.layer(i), softmax)

    merge = merging(attend, copies)
    return {"diffxkv": attend, "merge": merge, "score_decode": scoring(load, layers, q)}


def scoring(load: Load, layers: Layers, q: torch.Tensor) -> Candidate:
    """What the tokens of open pages receive in the step, for policies that ask at every step."""
    sequences, softmax = layers.sequences, Softmax(load.model.dim**-0.5)
    assert sequences.raw_slot is not None
    device, raw_slot = q.device, sequences.raw_slot
    pages = StepPages(
        table=sequences.pages.view(load.batch, -1),
        lengths=(sequences.count - 1) * PAGE_TOKENS + sequences.last_len,
        count=sequences.count,
        last_len=sequences.last_len,
        rows=torch.zeros(load.batch, dtype=torch.int64, device=device),
    )
    lse = torch.full((load.batch, load.model.heads), 14.0, device=device)
    shape = (layers.k_raw.shape[1], load.model.kv_heads, PAGE_TOKENS)
    accum = torch.zeros(shape, device=device)
    run = kernels("score").score_decode
    return lambda i: run(q[i], lse, pages, RawTables(layers.k_raw[i], raw_slot, accum), softmax)


def merging(attend: Candidate, copies: int) -> Candidate:
    """The merge's launches alone, over parts that hold anything."""
    launches = []
    for i in range(copies):
        with recorded() as made:
            attend(i)
        launches.append(next(x for x in made if x.kernel is merge_work_tiles))
    for launch in launches:
        for x in launch.arguments["parts"]:
            x.zero_()

    def merge(i: int) -> None:
        x = launches[i]
        x.kernel[x.grid](**x.arguments, num_warps=x.num_warps, num_stages=x.num_stages)

    return merge


def division_of_step(layers: Layers, copies: int) -> Timing:
    """Dividing the work of a step of STEP_LAYERS layers, whose records repeat."""
    repeats = -(-STEP_LAYERS // copies)
    heads = layers.heads.repeat(repeats, 1, 1, 1)[:STEP_LAYERS]
    run = partial(_divide, layers, heads)
    return interleaved({"plan": run}, 1, layers.arena.device, seconds=0.1)["plan"]


def _divide(layers: Layers, heads: torch.Tensor, _: int) -> None:
    divide_work(layers.sequences, heads, layers.layout)


def stock_candidates(
    load: Load, copies: int, ready: Collection[str], device: torch.device
) -> dict[str, Candidate]:
    """FlashInfer with each kind of cache that it was built for; SDPA where there is none."""
    model = load.model
    shape = (load.batch, load.tokens, model.heads, model.kv_heads, model.dim, copies, device)
    found: dict[str, Candidate] = {}
    for cache in baselines.DTYPES:
        if f"decode {cache}" in ready:
            try:
                candidate = baselines.flashinfer_decode(cache, *shape)
                candidate(0)
            except Exception:  # FlashInfer's, which shall not cost our own numbers
                traceback.print_exc()
                continue
            found[f"flashinfer {cache}"] = candidate
    return found or {"sdpa bf16": baselines.sdpa_decode(*shape)}


def measure(
    load: Load, ready: Collection[str], red: Collection[str], device: torch.device
) -> dict[str, Any]:
    """One record of a load."""
    compressed = load.raw_bytes / 5
    copies = copies_needed(compressed, device)
    layers = draw(load, copies, device)
    high, low = layers.shares()
    record = {
        "load": load.name,
        "model": load.model.name,
        "batch": load.batch,
        "tokens": load.tokens,
        "mix": load.mix.name,
        "drawn": [round(high, 4), round(low, 4)],
        "copies": copies,
        "cold": copies * layers.payload_bytes() >= L2_SHARE * l2_bytes(device),
        "bytes": layers.payload_bytes(),
        "raw_bytes": load.raw_bytes,
        "plan_layers": STEP_LAYERS,
    }
    candidates = our_candidates(load, layers, copies)
    if "score_decode" in red:
        del candidates["score_decode"]
    candidates |= stock_candidates(load, copies, ready, device)
    timed = interleaved(candidates, copies, device)
    timed["plan"] = division_of_step(layers, copies)
    return record | {"times": {name: timing._asdict() for name, timing in timed.items()}}


def fits(load: Load, device: torch.device) -> bool:
    """Whether all candidates' inputs fit: the compressed ones, bf16 and fp8."""
    if device.type != "cuda":
        return True
    copies = copies_needed(load.raw_bytes / 5, device)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return copies * load.raw_bytes * 2 < MEMORY_SHARE * free


def run(
    device: torch.device, deadline: Deadline, ready: Collection[str], red: Collection[str],
    first: int = 0,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One record per load in order, for as long as there is time.

    Args:
        first: how many loads are left out.

    Raises:
        DeviceLost: after the record of the load that lost it.
    """
    if "decode" in red or "pack" in red:
        yield {"skipped": "decode, or pack which makes its inputs, crashed or gave NaN"}
        return
    for load in (loads() if device.type == "cuda" else tiny_loads())[first:]:
        if deadline.left() < 15:
            yield {"skipped": f"no time left from {load.name} on"}
            return
        if not fits(load, device):
            yield {"skipped": f"{load.name} does not fit into memory"}
            continue
        try:
            yield measure(load, ready, red, device)
        except torch.OutOfMemoryError:
            yield {"skipped": f"{load.name}: out of memory"}
        except Exception as error:  # of FlashInfer, say, on this shape alone
            traceback.print_exc()
            yield {"failed": load.name, "message": f"{type(error).__name__}: {error}"[-300:]}
            check_device(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
