# SPDX-License-Identifier: Apache-2.0
"""Keys of pages: SGLang's own block hashes, and different wherever its radix tree divides."""

from __future__ import annotations

import random
from array import array
from itertools import product

import pytest
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.offload.keys import KEY_BYTES, PageKeys, from_numbers, to_numbers
from tests.support.kv_events import block_hashes
from tests.support.stores import make_allocator

NAMESPACES = list(product((None, "", "a", "ab"), (None, "", "|diffxkv:high", "b")))


def tokens_of(count: int, seed: int = 0) -> array[int]:
    rng = random.Random(seed)
    return array("q", (rng.randrange(rng.choice((256, 1 << 32))) for _ in range(count)))


def keys_of(
    tokens: array[int],
    extra_key: str | None = None,
    salt: str | None = None,
    dynamo: bool = False,
) -> PageKeys:
    keys = PageKeys(extra_key, salt, dynamo=dynamo)
    keys.extend(tokens)
    return keys


def published(tokens: array[int], extra_key: str | None, salt: str | None, dynamo: bool) -> list:
    """Block hashes of the events by which SGLang's tree takes up a sequence."""
    allocator = make_allocator("lossless")
    tree = UnifiedRadixCache(
        CacheInitParams(
            disable=False,
            req_to_token_pool=ReqToTokenPool(1, 64, "cpu", False),
            token_to_kv_pool_allocator=allocator,
            page_size=PAGE_TOKENS,
            tree_components=(ComponentType.FULL,),
            enable_kv_cache_events=True,
            dynamo_kv_event_format=dynamo,
        )
    )
    tree.take_events()
    key = RadixKey(tokens, extra_key, cache_salt=salt)
    tree.insert(InsertParams(key=key, value=allocator.alloc(len(tokens))))
    return [block for event in tree.take_events() for block in event.block_hashes]


@pytest.mark.parametrize("dynamo", [False, True], ids=["default", "dynamo"])
@pytest.mark.parametrize(("extra_key", "salt"), NAMESPACES)
def test_the_hash_in_an_event_is_the_first_number(
    extra_key: str | None, salt: str | None, dynamo: bool
) -> None:
    tokens = tokens_of(5 * PAGE_TOKENS)
    numbers = keys_of(tokens, extra_key, salt, dynamo).numbers(0, 5)
    assert numbers[:, 0].tolist() == published(tokens, extra_key, salt, dynamo)


def test_as_a_router_computes_them() -> None:
    tokens = tokens_of(3 * PAGE_TOKENS)
    for salt in (None, "mine"):
        found = keys_of(tokens, salt=salt).numbers(0, 3)[:, 0].tolist()
        assert found == list(block_hashes(tokens, PAGE_TOKENS, salt))


def test_namespaces_have_no_key_in_common() -> None:
    tokens = tokens_of(4 * PAGE_TOKENS)
    namespaces = {(extra_key, salt or None) for extra_key, salt in NAMESPACES}
    for dynamo in (False, True):
        keys = [key for names in namespaces for key in keys_of(tokens, *names, dynamo).span(0, 4)]
        assert len(set(keys)) == 4 * len(namespaces)


def test_a_key_tells_all_tokens_before() -> None:
    tokens = tokens_of(6 * PAGE_TOKENS)
    other = array("q", tokens)
    other[2 * PAGE_TOKENS] ^= 1
    a, b = keys_of(tokens), keys_of(other)
    assert a.span(0, 2) == b.span(0, 2)
    assert not set(a.span(2, 6)) & set(b.span(2, 6))


def test_a_sequence_grows() -> None:
    tokens = tokens_of(7 * PAGE_TOKENS + 13)
    whole, grown = keys_of(tokens, "a", "b"), PageKeys("a", "b", dynamo=False)
    rng = random.Random(3)
    end = 0
    while end < len(tokens):
        end = min(len(tokens), end + rng.randrange(100))
        grown.extend(tokens[:end])
        assert len(grown) == end // PAGE_TOKENS
    grown.extend(tokens[: 2 * PAGE_TOKENS])  # nothing new
    assert len(whole) == 7 and grown.span(0, 7) == whole.span(0, 7)
    assert grown.span(3, 5) == whole.span(0, 7)[3:5]


def test_keys_as_numbers_and_back() -> None:
    keys = keys_of(tokens_of(4 * PAGE_TOKENS))
    numbers = keys.numbers(1, 4)
    assert numbers.shape == (3, 2) and all(len(key) == KEY_BYTES for key in keys.span(0, 4))
    assert from_numbers(numbers) == keys.span(1, 4)
    assert to_numbers(b"".join(keys.span(1, 4))).tolist() == numbers.tolist()
    numbers[1] = 0
    assert from_numbers(numbers)[1] is None
