# SPDX-License-Identifier: Apache-2.0
"""KV events by level: SGLang's own trees and recorders, and routers that read what they publish."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sglang.srt.disaggregation.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    StorageMedium,
    kv_event_namespace_seed,
    namespaced_block_hash,
)
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.plugins import load_plugins

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.offload.blocks import blocks_of
from sglang_diffxkv.offload.events import NoEvents
from sglang_diffxkv.patches import kv_events
from sglang_diffxkv.pool.offload import load_back, offload
from sglang_diffxkv.pool.sealing import seal
from tests.support.kv_consumers import Dynamo, LlmD
from tests.support.kv_events import DISK, GPU, HOST, Block, Mirror, block_hashes
from tests.support.machines import walks
from tests.support.pages import write
from tests.support.stores import make_allocator

SALTS = (None, "tenant", "tenant|diffxkv:high")
Path = tuple[int, ...]
"""What is in a page, and in those before it."""
Name = tuple[Path, str | None]
"""A page's path and salt."""


class CachedPages:
    """A radix tree over a pool, and who mirrors its events.

    Attributes:
        known: pages that may be somewhere. on_disk, writing: what the disk that is not there has.
    """

    def __init__(self, core: str, dynamo: bool) -> None:
        self.allocator = make_allocator(mib=16, host_bytes=16 << 20)
        self.store, self.dynamo_format = self.allocator.store, dynamo
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
        assert ("rust" in type(self.tree.tree_core).__module__) == (core == "rust")
        if isinstance(kv_events.level_events(self.tree), NoEvents):  # no plugins are loaded
            kv_events.name_levels(self.tree, self.store)
        self.levels: Any = kv_events.level_events(self.tree)
        self.known: set[Name] = set()
        self.on_disk: set[Name] = set()
        self.writing: set[Name] = set()
        self.mirror, self.dynamo, self.llm_d = Mirror(), Dynamo(PAGE_TOKENS), LlmD()

    def publish(self) -> None:
        events = self.tree.take_events()
        payload = msgspec.msgpack.encode(KVEventBatch(ts=0.0, events=events))
        for consumer in (self.mirror, self.dynamo, self.llm_d):
            consumer.take(payload)

    def insert(self, path: Path, salt: str | None, extra_key: str | None = None) -> None:
        """A sequence that ran and ended: sealed pages, if there is room for it."""
        slots = self.allocator.alloc(len(path) * PAGE_TOKENS)
        if slots is None:
            return
        pages = slots[::PAGE_TOKENS] // PAGE_TOKENS
        names = [(path[:n], salt) for n in range(1, len(path) + 1)]
        self.store.begin_step(decodes=True)
        write(self.store, pages, torch.arange(len(path)), torch.full((len(path),), len(slots)))
        self.store.directory.key[pages] = self.numbers(names)
        key = RadixKey(tokens_of(path), extra_key=extra_key, cache_salt=salt)
        self.tree.insert(InsertParams(key=key, value=slots))  # which frees what is there twice
        seal(self.store, pages[self.store.directory.raw_slot[pages] >= 0])
        self.known.update(names)

    def cached(self) -> dict[Name, int]:
        """Pages in the tree, which may split nodes as it is asked, and their virtual ids."""
        found = {}
        for path, salt in self.known:
            key = RadixKey(tokens_of(path), cache_salt=salt)
            match = self.tree.match_prefix(MatchPrefixParams(key=key))
            if match.device_prefix_len == len(path) * PAGE_TOKENS:
                slots = self.tree.path_device_indices(match.last_device_node)
                found[path, salt] = int(slots[-1]) // PAGE_TOKENS
        self.known = found.keys() | self.on_disk | self.writing
        return found

    def truth(self) -> dict[str, set[Name]]:
        """Pages by medium, as the page directory and the disk have them."""
        cached, on_host = self.cached(), self.store.directory.on_host
        gone = {name for name, page in cached.items() if on_host[page]}
        return {GPU: cached.keys() - gone, HOST: gone, DISK: set(self.on_disk)}

    def offload(self, names: Iterable[Name]) -> None:
        cached = self.cached()
        offload(self.store, torch.tensor([cached[name] for name in names], dtype=torch.int64))

    def load_back(self, names: Iterable[Name]) -> None:
        cached = self.cached()
        load_back(self.store, torch.tensor([cached[name] for name in names], dtype=torch.int64))

    def adopt(self, path: Path, salt: str | None) -> None:
        """Pages of a sequence that are not cached come from the disk, to the host."""
        before = self.cached().keys()
        with self.levels.adopting():
            self.insert(path, salt)
            self.offload(self.cached().keys() - before)

    def hash_of(self, name: Name) -> int:
        path, salt = name
        *_, block = block_hashes(tokens_of(path), PAGE_TOKENS, salt)
        if not self.dynamo_format:
            return block
        seed = kv_event_namespace_seed(extra_key=None, cache_salt=salt)
        return namespaced_block_hash(block, namespace_seed=seed)

    def hashes(self, names: Iterable[Name]) -> set[int]:
        return {self.hash_of(name) for name in names}

    def numbers(self, names: Iterable[Name]) -> torch.Tensor:
        return torch.tensor([[self.hash_of(name), 7] for name in names])

    def keys(self, names: Iterable[Name]) -> list[bytes]:
        return [self.hash_of(name).to_bytes(8, "big", signed=True) + bytes(8) for name in names]


def tokens_of(path: Path) -> array[int]:
    return array("q", [page * PAGE_TOKENS + i for page in path for i in range(PAGE_TOKENS)])


class LevelMachine(RuleBasedStateMachine):
    """Pages leave the device with those behind them, and come back with those before them."""

    core, in_dynamos_format, policy = "rust", False, ""
    paths = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)
    salts = st.sampled_from(SALTS)
    chance = st.randoms(use_true_random=False)

    def __init__(self) -> None:
        super().__init__()
        self.pages = CachedPages(self.core, self.in_dynamos_format)

    @rule(path=paths, salt=salts)
    def insert(self, path: Path, salt: str | None) -> None:
        on_host = self.pages.truth()[HOST]
        self.pages.load_back({(path[:n], salt) for n in range(1, len(path) + 1)} & on_host)
        self.pages.insert(path, salt)

    @rule(pages=st.integers(1, 6))
    def evict(self, pages: int) -> None:
        self.pages.tree.evict(EvictParams(num_tokens=pages * PAGE_TOKENS))

    @rule(chance=chance)
    def offload(self, chance: Any) -> None:
        device = self.pages.truth()[GPU]
        going = {
            (path, salt)
            for start, owner in some(device, chance)
            for path, salt in device
            if salt == owner and path[: len(start)] == start
        }
        self.pages.offload(shuffled(going, chance))

    @rule(chance=chance)
    def load_back(self, chance: Any) -> None:
        on_host = self.pages.truth()[HOST]
        coming = {
            (path[:n], salt)
            for path, salt in some(on_host, chance)
            for n in range(1, len(path) + 1)
        }
        self.pages.load_back(shuffled(coming & on_host, chance))

    @rule(chance=chance)
    def back_up(self, chance: Any) -> None:
        offered = some(self.pages.cached().keys() - self.pages.on_disk, chance)
        self.pages.levels.backing_up(self.pages.keys(offered))
        self.pages.writing |= offered

    @rule(chance=chance, fails=st.booleans())
    def finish_writing(self, chance: Any, fails: bool) -> None:
        done = some(self.pages.writing, chance)
        if fails:
            self.pages.levels.dropped_from_disk(self.pages.keys(done))
        else:
            self.pages.levels.backed_up(self.pages.keys(done))
            self.pages.on_disk |= done
        self.pages.writing -= done

    @rule(chance=chance)
    def fall_off_the_disk(self, chance: Any) -> None:
        gone = some(self.pages.on_disk, chance)
        self.pages.levels.dropped_from_disk(self.pages.keys(gone))
        self.pages.on_disk -= gone

    @rule(chance=chance)
    def adopt(self, chance: Any) -> None:
        """A sequence whose pages the tree or the disk has, the latter's beyond the former's."""
        cached = self.pages.cached().keys()
        for path, salt in shuffled(self.pages.on_disk - cached, chance):
            if {(path[:n], salt) for n in range(1, len(path))} <= cached | self.pages.on_disk:
                self.pages.adopt(path, salt)
                break

    @rule()
    def flush(self) -> None:
        self.pages.tree.reset()
        self.pages.allocator.clear()

    @invariant()
    def consumers_know_the_truth(self) -> None:
        pages, truth = self.pages, self.pages.truth()
        pages.publish()
        for medium, held in truth.items():
            assert pages.mirror.media[medium].keys() == pages.hashes(held), medium
        for path, salt in set.union(*truth.values()):
            name = pages.hash_of((path, salt))
            parent = pages.hash_of((path[:-1], salt)) if len(path) > 1 else None
            block = Block(tuple(tokens_of(path[-1:])), parent, salt)
            assert {blocks.get(name, block) for blocks in pages.mirror.media.values()} == {block}
        assert not pages.mirror.faults
        assert len(pages.levels) == len(set.union(pages.writing, *truth.values()))
        self.check_routers(truth)

    def check_routers(self, truth: dict[str, set[Name]]) -> None:
        pages = self.pages
        for tier, medium in (("device", GPU), ("host", HOST), ("disk", DISK)):
            assert pages.dynamo.on(tier) == pages.hashes(truth[medium])
        assert not pages.dynamo.refused
        for path, salt in truth[GPU] | truth[HOST]:
            on_device = sum((path[:n], salt) in truth[GPU] for n in range(1, len(path) + 1))
            expected = {"device": on_device, "host": len(path) - on_device, "disk": 0}
            assert pages.dynamo.match(tokens_of(path), salt) == expected


class AnyOrderMachine(LevelMachine):
    """Any page leaves the device, whatever lies before and behind it: nobody believes too much."""

    @rule(path=LevelMachine.paths, salt=LevelMachine.salts)
    def insert(self, path: Path, salt: str | None) -> None:
        self.pages.insert(path, salt)

    @rule(chance=LevelMachine.chance)
    def offload(self, chance: Any) -> None:
        self.pages.offload(shuffled(some(self.pages.truth()[GPU], chance), chance))

    @rule(chance=LevelMachine.chance)
    def load_back(self, chance: Any) -> None:
        self.pages.load_back(shuffled(some(self.pages.truth()[HOST], chance), chance))

    def check_routers(self, truth: dict[str, set[Name]]) -> None:
        pages = self.pages
        for tier, medium in (("host", HOST), ("disk", DISK)):
            assert pages.dynamo.on(tier) == pages.hashes(truth[medium])
        assert pages.dynamo.on("device") <= pages.hashes(truth[GPU])


def some(names: Iterable[Name], chance: Any) -> set[Name]:
    return {name for name in sorted(names, key=str) if chance.random() < 0.4}


def shuffled(names: Iterable[Name], chance: Any) -> list[Name]:
    return sorted(sorted(names, key=str), key=lambda _: chance.random())


def of_kind(machine: type[LevelMachine], core: str, dynamo: bool) -> Any:
    kind = {"core": core, "in_dynamos_format": dynamo}
    return walks(type(f"{machine.__name__}_{core}", (machine,), kind), "", examples=30, steps=25)


TestLevelsOfRustTree = of_kind(LevelMachine, "rust", dynamo=False)
TestLevelsOfPythonTree = of_kind(LevelMachine, "python", dynamo=False)
TestLevelsInDynamosFormat = of_kind(LevelMachine, "rust", dynamo=True)
TestPythonTreeInDynamosFormat = of_kind(LevelMachine, "python", dynamo=True)
TestAnyOrder = of_kind(AnyOrderMachine, "rust", dynamo=False)


def cached_chat(pages: int, salt: str | None = None) -> tuple[CachedPages, list[Name]]:
    made = CachedPages("rust", dynamo=False)
    path = tuple(range(pages))
    made.insert(path, salt)
    made.publish()
    return made, [(path[:n], salt) for n in range(1, pages + 1)]


def test_events_are_those_of_hicache() -> None:
    """Stored where a chain goes, in one event, before it is removed where it was."""
    made, names = cached_chat(4, "tenant")
    hashes = [made.hash_of(name) for name in names]
    made.offload([names[3], names[1], names[2]])
    stored, removed = made.tree.take_events()
    assert isinstance(stored, BlockStored) and isinstance(removed, BlockRemoved)
    assert (stored.medium, removed.medium) == (StorageMedium.CPU, StorageMedium.GPU)
    assert stored.block_hashes == removed.block_hashes == hashes[1:]
    assert stored.parent_block_hash == hashes[0]
    assert stored.token_ids == list(tokens_of((1, 2, 3)))
    assert (stored.block_size, stored.cache_salt) == (PAGE_TOKENS, "tenant")
    assert (stored.lora_id, stored.lora_name, stored.session_id) == (None, None, None)
    made.load_back(names[1:])
    stored, removed = made.tree.take_events()
    assert (stored.medium, removed.medium) == (StorageMedium.GPU, StorageMedium.CPU)
    assert stored.block_hashes == removed.block_hashes == hashes[1:]


def test_eviction_names_the_level_of_each_page() -> None:
    made, names = cached_chat(4)
    made.offload(names[2:])
    made.publish()
    made.tree.evict(EvictParams(num_tokens=4 * PAGE_TOKENS))
    events = made.tree.take_events()
    assert {event.medium: len(event.block_hashes) for event in events} == {GPU: 2, HOST: 2}
    assert len(made.levels) == 0


def test_disk_outlives_a_flush() -> None:
    """Whoever was told to forget all blocks hears of those on disk again, parents first."""
    made, names = cached_chat(4)
    made.levels.backed_up(made.keys(names[::-1]))
    made.levels.backed_up(made.keys(names))
    made.publish()
    made.tree.reset()
    cleared, stored = made.tree.take_events()
    assert isinstance(cleared, AllBlocksCleared)
    assert stored.block_hashes == [made.hash_of(name) for name in names]
    assert stored.medium == StorageMedium.DISK


def test_what_is_written_too_late_is_known_all_the_same() -> None:
    """The tree evicts pages while they are written to disk."""
    made, names = cached_chat(2)
    made.levels.backing_up(made.keys(names))
    made.tree.evict(EvictParams(num_tokens=2 * PAGE_TOKENS))
    made.publish()
    assert not made.mirror.blocks and len(made.levels) == 2
    made.levels.backed_up(made.keys(names))
    made.publish()
    assert made.mirror.media[DISK].keys() == made.hashes(names)


def test_pages_without_a_key_stay_where_they_were_said_to_be() -> None:
    made, names = cached_chat(2)
    made.store.directory.key[:] = 0
    made.offload(names)
    assert made.tree.take_events() == []
    made.tree.evict(EvictParams(num_tokens=2 * PAGE_TOKENS))
    made.publish()
    assert not made.mirror.faults and not made.mirror.blocks


def test_equal_hashes_of_two_namespaces_are_counted() -> None:
    """SGLang's default format leaves ``extra_key`` out: a consumer that counts stays right."""
    made = CachedPages("rust", dynamo=False)
    for extra_key in ("a", "b"):
        made.insert((0,), None, extra_key)
    page = made.store.directory.key[:, 0].nonzero().flatten()
    offload(made.store, page[:1])
    made.publish()
    assert [len(made.dynamo.on(tier)) for tier in ("device", "host")] == [1, 1]
    offload(made.store, page[1:])
    made.publish()
    assert [len(made.dynamo.on(tier)) for tier in ("device", "host")] == [0, 1]


def test_routers_weigh_levels() -> None:
    """llm-d knows media by their names in lower case, and its default weights have no such host."""
    made, names = cached_chat(4)
    made.offload(names[2:])
    made.publish()
    prompt = tokens_of((0, 1, 2, 3))
    assert made.dynamo.match(prompt, None) == {"device": 2, "host": 2, "disk": 0}
    assert made.llm_d.score(prompt, PAGE_TOKENS) == 4.0
    made.llm_d.weights = {"gpu": 1.0, "cpu_pinned": 0.8, "disk": 0.5}
    assert made.llm_d.score(prompt, PAGE_TOKENS) == pytest.approx(3.6)
    made.levels.backing_up(made.keys(names))
    made.levels.backed_up(made.keys(names))
    made.tree.evict(EvictParams(num_tokens=4 * PAGE_TOKENS))
    made.publish()
    assert made.dynamo.match(prompt, None) == {"device": 0, "host": 0, "disk": 4}
    assert made.llm_d.score(prompt, PAGE_TOKENS) == pytest.approx(2.0)
    assert not made.llm_d.refused


def test_pairs_of_tokens_are_kept() -> None:
    """EAGLE's trees are of bigrams."""
    event = BlockStored([5], None, [(7, 8), (8, 9)], 2, None, medium=StorageMedium.GPU)
    (block,) = blocks_of(event)
    assert block.stored(StorageMedium.GPU) == event


@pytest.mark.parametrize("core", ["rust", "python"])
def test_loaded_plugins_name_the_levels_of_a_tree(core: str) -> None:
    """Once: a recorder before a recorder would tell each move twice."""
    load_plugins()
    made = CachedPages(core, dynamo=False)
    with pytest.raises(AssertionError, match="already"):
        kv_events.name_levels(made.tree, made.store)
    made.insert((0,), None)
    made.offload(made.cached())
    made.publish()
    assert not made.mirror.faults
    assert made.mirror.media[HOST].keys() == made.hashes(made.known)
