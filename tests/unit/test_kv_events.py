# SPDX-License-Identifier: Apache-2.0
"""KV events by level: SGLang's own trees and recorders, and routers that read what they publish."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

import msgspec
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sglang.srt.disaggregation.kv_events import (
    KVEventBatch,
    kv_event_namespace_seed,
    namespaced_block_hash,
)
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.offload.recorder import LevelRecorder
from tests.support.kv_consumers import Dynamo, LlmD
from tests.support.kv_events import DISK, GPU, HOST, Block, Mirror, block_hashes
from tests.support.machines import walks
from tests.support.stores import make_allocator

SALTS = (None, "tenant", "tenant|diffxkv:high")
Path = tuple[int, ...]
"""A page, by what is in it and in those before it."""


class CachedPages:
    """A radix tree over a pool, whose pages' levels its test decides, and who mirrors its events.

    Attributes:
        on_host, on_disk, writing: pages there, with their salts.
    """

    def __init__(self, core: str, dynamo: bool) -> None:
        self.allocator = make_allocator(mib=4)
        self.tree = UnifiedRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=ReqToTokenPool(2, 1 << 12, "cpu", False),
                token_to_kv_pool_allocator=self.allocator,
                page_size=PAGE_TOKENS,
                enable_kv_cache_events=True,
                dynamo_kv_event_format=dynamo,
                tree_components=(ComponentType.FULL,),
                tree_core_backend=core,
            )
        )
        assert core in type(self.tree.tree_core).__module__ or core == "python"
        self.levels = LevelRecorder(self.tree.tree_core.kv_events, PAGE_TOKENS)
        self.tree.tree_core.kv_events = self.levels
        self.dynamo_format = dynamo
        self.known: set[tuple[Path, str | None]] = set()
        self.on_host: set[tuple[Path, str | None]] = set()
        self.on_disk: set[tuple[Path, str | None]] = set()
        self.writing: set[tuple[Path, str | None]] = set()
        self.mirror, self.dynamo, self.llm_d = Mirror(), Dynamo(PAGE_TOKENS), LlmD()

    def publish(self) -> None:
        events = self.tree.take_events()
        payload = msgspec.msgpack.encode(KVEventBatch(ts=0.0, events=events))
        for consumer in (self.mirror, self.dynamo, self.llm_d):
            consumer.take(payload)

    def insert(self, path: Path, salt: str | None, extra_key: str | None = None) -> None:
        """As much of the sequence as there is room for."""
        slots = self.allocator.alloc(len(path) * PAGE_TOKENS)
        if slots is None:
            return
        key = RadixKey(tokens_of(path), extra_key=extra_key, cache_salt=salt)
        self.tree.insert(InsertParams(key=key, value=slots))  # which frees what is there twice
        self.known |= {(path[:n], salt) for n in range(1, len(path) + 1)}

    def cached(self) -> set[tuple[Path, str | None]]:
        """Pages in the tree, which may split nodes as it is asked."""
        found = set()
        for path, salt in self.known:
            key = RadixKey(tokens_of(path), cache_salt=salt)
            match = self.tree.match_prefix(MatchPrefixParams(key=key))
            if match.device_prefix_len == len(path) * PAGE_TOKENS:
                found.add((path, salt))
        self.known = found | self.on_disk | self.writing
        self.on_host &= found
        return found

    def hash_of(self, page: tuple[Path, str | None]) -> int:
        path, salt = page
        *_, block = block_hashes(tokens_of(path), PAGE_TOKENS, salt)
        if not self.dynamo_format:
            return block
        seed = kv_event_namespace_seed(extra_key=None, cache_salt=salt)
        return namespaced_block_hash(block, namespace_seed=seed)

    def numbers(self, pages: Iterable[tuple[Path, str | None]]) -> torch.Tensor:
        return torch.tensor([[self.hash_of(page), 7] for page in pages]).view(-1, 2)

    def keys(self, pages: Iterable[tuple[Path, str | None]]) -> list[bytes]:
        return [self.hash_of(page).to_bytes(8, "big", signed=True) + b"8 bytes." for page in pages]

    def names(self, pages: Iterable[tuple[Path, str | None]]) -> set[int]:
        return {self.hash_of(page) for page in pages}


def tokens_of(path: Path) -> array[int]:
    return array("q", [page * PAGE_TOKENS + i for page in path for i in range(PAGE_TOKENS)])


class LevelMachine(RuleBasedStateMachine):
    """Pages leave the device with those behind them, and come back with those before them."""

    core, dynamo, policy = "rust", False, ""
    paths = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)
    salts = st.sampled_from(SALTS)
    chance = st.randoms(use_true_random=False)

    def __init__(self) -> None:
        super().__init__()
        self.pages = CachedPages(self.core, self.dynamo)

    @rule(path=paths, salt=salts)
    def insert(self, path: Path, salt: str | None) -> None:
        self.bring_back({(path, salt)})
        self.pages.insert(path, salt)

    @rule(pages=st.integers(1, 6))
    def evict(self, pages: int) -> None:
        self.pages.tree.evict(EvictParams(num_tokens=pages * PAGE_TOKENS))

    @rule(chance=chance)
    def offload(self, chance: Any) -> None:
        device = self.pages.cached() - self.pages.on_host
        picked = self.some(device, chance)
        going = {
            (path, salt)
            for path, salt in device
            if any(salt == s and path[: len(p)] == p for p, s in picked)
        }
        self.pages.levels.offloaded(self.pages.numbers(self.shuffled(going, chance)))
        self.pages.on_host |= going

    @rule(chance=chance)
    def load_back(self, chance: Any) -> None:
        self.pages.cached()
        self.bring_back(self.some(self.pages.on_host, chance), chance)

    def bring_back(self, pages: set[tuple[Path, str | None]], chance: Any = None) -> None:
        self.pages.cached()
        before = {(path[:n], salt) for path, salt in pages for n in range(1, len(path) + 1)}
        coming = before & self.pages.on_host
        self.pages.levels.loaded_back(self.pages.numbers(self.shuffled(coming, chance)))
        self.pages.on_host -= coming

    @rule(chance=chance)
    def back_up(self, chance: Any) -> None:
        picked = self.some(self.pages.cached() - self.pages.on_disk, chance)
        self.pages.levels.backing_up(self.pages.keys(picked))
        self.pages.writing |= picked

    @rule(chance=chance, fails=st.booleans())
    def finish_writing(self, chance: Any, fails: bool) -> None:
        done = self.some(self.pages.writing, chance)
        keys = self.pages.keys(done)
        if fails:
            self.pages.levels.dropped_from_disk(keys)
        else:
            self.pages.levels.backed_up(keys)
            self.pages.on_disk |= done
        self.pages.writing -= done

    @rule(chance=chance)
    def fall_off_the_disk(self, chance: Any) -> None:
        gone = self.some(self.pages.on_disk, chance)
        self.pages.levels.dropped_from_disk(self.pages.keys(gone))
        self.pages.on_disk -= gone

    @rule(chance=chance)
    def adopt(self, chance: Any) -> None:
        """A sequence whose pages the tree or the disk has, the latter's beyond the former's."""
        cached = self.pages.cached()
        there = cached | self.pages.on_disk
        for path, salt in sorted(self.pages.on_disk - cached, key=str)[:1]:
            if all((path[:n], salt) in there for n in range(1, len(path))):
                with self.pages.levels.adopting():
                    self.pages.insert(path, salt)
                self.pages.on_host |= self.pages.cached() - cached

    @rule()
    def flush(self) -> None:
        self.pages.tree.reset()
        self.pages.allocator.clear()
        self.pages.on_host.clear()

    @invariant()
    def consumers_know_the_truth(self) -> None:
        pages = self.pages
        cached = pages.cached()
        pages.publish()
        truth = {GPU: cached - pages.on_host, HOST: pages.on_host, DISK: pages.on_disk}
        for medium, held in truth.items():
            assert pages.mirror.media[medium].keys() == pages.names(held), medium
        for path, salt in cached | pages.on_disk:
            name = pages.hash_of((path, salt))
            parent = pages.hash_of((path[:-1], salt)) if len(path) > 1 else None
            block = Block(tuple(tokens_of(path[-1:])), parent, salt)
            assert {blocks.get(name, block) for blocks in pages.mirror.media.values()} == {block}
        assert not pages.mirror.faults
        assert len(pages.levels) == len(cached | pages.on_disk | pages.writing)
        self.check_routers(truth)

    def check_routers(self, truth: dict[str, set[tuple[Path, str | None]]]) -> None:
        pages = self.pages
        for tier, medium in (("device", GPU), ("host", HOST), ("disk", DISK)):
            assert pages.dynamo.on(tier) == pages.names(truth[medium])
        assert not pages.dynamo.refused
        for path, salt in truth[GPU] | truth[HOST]:
            lengths = range(1, len(path) + 1)
            on_device = sum((path[:n], salt) in truth[GPU] for n in lengths)
            expected = {"device": on_device, "host": len(path) - on_device, "disk": 0}
            assert pages.dynamo.match(tokens_of(path), salt) == expected

    @staticmethod
    def some(pages: set[tuple[Path, str | None]], chance: Any) -> set[tuple[Path, str | None]]:
        return {page for page in sorted(pages, key=str) if chance.random() < 0.4}

    @staticmethod
    def shuffled(pages: set[tuple[Path, str | None]], chance: Any) -> list[Any]:
        ordered = sorted(pages, key=str)
        if chance is not None:
            chance.shuffle(ordered)
        return ordered


class AnyOrderMachine(LevelMachine):
    """Any page leaves the device, whatever lies before and behind it: nobody believes too much."""

    def bring_back(self, pages: set[tuple[Path, str | None]], chance: Any = None) -> None:
        coming = pages & self.pages.on_host
        self.pages.levels.loaded_back(self.pages.numbers(self.shuffled(coming, chance)))
        self.pages.on_host -= coming

    @rule(chance=LevelMachine.chance)
    def offload(self, chance: Any) -> None:
        going = self.some(self.pages.cached() - self.pages.on_host, chance)
        self.pages.levels.offloaded(self.pages.numbers(self.shuffled(going, chance)))
        self.pages.on_host |= going

    def check_routers(self, truth: dict[str, set[tuple[Path, str | None]]]) -> None:
        pages = self.pages
        for tier, medium in (("host", HOST), ("disk", DISK)):
            assert pages.dynamo.on(tier) == pages.names(truth[medium])
        assert pages.dynamo.on("device") <= pages.names(truth[GPU])


def of_kind(machine: type[LevelMachine], core: str, dynamo: bool) -> Any:
    made = type(f"{machine.__name__}_{core}", (machine,), {"core": core, "dynamo": dynamo})
    return walks(made, "", examples=40, steps=25)


TestLevelsOfRustTree = of_kind(LevelMachine, "rust", dynamo=False)
TestLevelsOfPythonTree = of_kind(LevelMachine, "python", dynamo=False)
TestLevelsInDynamosFormat = of_kind(LevelMachine, "rust", dynamo=True)
TestPythonTreeInDynamosFormat = of_kind(LevelMachine, "python", dynamo=True)
TestAnyOrder = of_kind(AnyOrderMachine, "rust", dynamo=False)
