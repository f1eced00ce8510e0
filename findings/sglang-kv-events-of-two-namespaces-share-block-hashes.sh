#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SGLang's radix tree keeps requests with different extra_key apart, but its KV events in the default
# format hash tokens and cache_salt only: a prompt that is cached in two namespaces is stored twice
# under the same block hashes, and when one of them is evicted a router that mirrors the events drops
# both. With the format "dynamo" the hashes differ.
# Needs uv and Python 3.11; runs on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
uv venv --quiet --python 3.11 "$work/env"
VIRTUAL_ENV=$work/env uv pip install --quiet sglang==0.5.23 torch==2.14.1
cat >"$work/show.py" <<'PYTHON'
from array import array
from importlib.metadata import version

import torch
from sglang.srt.disaggregation.kv_events import BlockRemoved, BlockStored
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

print("sglang", version("sglang"))
PROMPT = array("q", range(8))


class Slots:
    """As much of an allocator as the tree needs where there is no KV pool."""

    device = "cpu"

    def free_segment(self, slots: torch.Tensor, start_pos: int) -> None:
        pass


def mirrored_and_held(dynamo: bool) -> tuple[int, int]:
    """Blocks of the prompt that a router believes in, and that the tree has, after one eviction."""
    tree = RadixCache.create_simulated(
        mock_allocator=Slots(),
        page_size=4,
        enable_kv_cache_events=True,
        dynamo_kv_event_format=dynamo,
    )
    for first, namespace in ((0, "a"), (8, "b")):
        key = RadixKey(PROMPT, extra_key=namespace)
        tree.insert(InsertParams(key=key, value=torch.arange(first, first + 8)))
    tree.evict(EvictParams(num_tokens=8))
    mirror: set[int] = set()
    for event in tree.take_events():
        if isinstance(event, BlockStored):
            mirror.update(event.block_hashes)
        elif isinstance(event, BlockRemoved):
            mirror.difference_update(event.block_hashes)
    found = (MatchPrefixParams(key=RadixKey(PROMPT, extra_key=x)) for x in ("a", "b"))
    held = sum(tree.match_prefix(params).device_prefix_len for params in found)
    return len(mirror), held // 4


for name, dynamo in (("default", False), ("dynamo", True)):
    mirrored, held = mirrored_and_held(dynamo)
    print(f"format {name}: the prompt's 2 blocks cached in two namespaces, those of one evicted:")
    print(f"  the tree holds {held}, a mirror of the events believes in {mirrored}")
    assert (held, mirrored) == (2, 2 if dynamo else 0), "the behaviour has changed"
PYTHON
"$work/env/bin/python" -P "$work/show.py" 2>&1 | grep -v -i -E "warn|CUDA runtime|extension lock"
