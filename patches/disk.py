# SPDX-License-Identifier: Apache-2.0
"""Hook: a scheduler opens its disk, and clears or closes it.

Each data-parallel replica has a folder of its own; ranks of one share it, each with its own pages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sglang.srt.disaggregation.kv_events import uses_dynamo_format
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_observability, get_parallel, get_server_args

from sglang_diffxkv.offload.disk.identity import identity_of
from sglang_diffxkv.offload.identity import of_layout, of_model, of_settings
from sglang_diffxkv.offload.level import DiskLevel
from sglang_diffxkv.patches.hook import SGLANG_VERSION, hook
from sglang_diffxkv.patches.kv_events import level_events
from sglang_diffxkv.patches.page_keys import give_keys
from sglang_diffxkv.patches.server_args import get_config, is_active
from sglang_diffxkv.pool.allocator import find_allocator
from sglang_diffxkv.pool.store import PageStore

logger = logging.getLogger(__name__)

_DISK = "diffxkv_disk"
_OF_LOADING = (
    *("load_format", "model_loader_extra_config", "model_impl", "json_model_override_args"),
    *("dtype", "quantization", "modelopt_quant", "custom_weight_loader"),
)
"""Fields of ServerArgs that decide what becomes of a checkpoint's files."""


def has_disk(tree: Any) -> bool:
    """Whether a radix tree has a disk behind it, on or off."""
    return hasattr(tree, _DISK)


def disk_of(tree: Any) -> DiskLevel | None:
    """The disk behind a radix tree, unless there is none or it is off."""
    level: DiskLevel | None = getattr(tree, _DISK, None)
    return level if level is not None and level.is_on else None


def disk_stats(tree: Any) -> dict[str, Any] | None:
    level: DiskLevel | None = getattr(tree, _DISK, None)
    return None if level is None else level.stats


def _open(self: Any) -> None:
    """The scheduler is complete, and has done nothing yet."""
    allocator = find_allocator(self.token_to_kv_pool_allocator)
    if allocator is None or not is_active():
        return
    config = get_config()
    if config.disk_path is None or config.disk_bytes is None:
        return
    parallel, folder = get_parallel(), Path(config.disk_path).expanduser()
    if parallel.dp_size > 1:
        folder /= f"dp{parallel.dp_rank}"
    store = allocator.store
    _check_size(config.disk_bytes, store)
    try:
        identity = _identity(self, store.layout)
        level = DiskLevel(store, level_events(self.tree_cache), folder, config.disk_bytes, identity)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"diffxkv: disk_path = {config.disk_path!r}: {error}") from error
    found, tree = level.stats["pages"], self.tree_cache
    logger.info("diffxkv: %d pages found in %s", found, folder)
    setattr(tree, _DISK, level)
    give_keys(tree, dynamo=uses_dynamo_format(get_observability().kv_events_config))
    _open_gates(self)


def _check_size(disk_bytes: int, store: PageStore) -> None:
    """
    Raises:
        ValueError: it is less than what is cached, which idle servers would write over and over.
    """
    assert store.host is not None
    least = store.arena.buffer.nbytes + store.host.arena.buffer.nbytes
    if disk_bytes < least:
        raise ValueError(
            f"diffxkv: disk_bytes of {disk_bytes / 2**20:.0f} MiB is less than the pages that the "
            f"device and the host hold: raise it to at least {least / 2**20:.0f} MiB, or lower "
            "host_bytes"
        )


def _open_gates(scheduler: Any) -> None:
    """Have SGLang's scheduler ask the tree for what is in storage: it does so for LMCache, too.

    What else that means to it: it asks for what is pending before it calls itself idle, and says in
    the details of cached tokens what the storage is.
    """
    scheduler.enable_lmcache = True
    scheduler.tree_cache.has_pending_cache_operations = lambda: False  # but those of who waits


def _identity(scheduler: Any, layout: Any) -> str:
    parallel, args, model = get_parallel(), get_server_args(), scheduler.model_config
    rank, ranks = parallel.attn_tp_rank, parallel.attn_tp_size
    return identity_of(
        {
            "sglang": SGLANG_VERSION,
            "model": of_model(_checkpoint(model)),
            "config": str(model.hf_config.to_json_string()),
            "loading": {name: str(getattr(args, name)) for name in _OF_LOADING},
            "dtype": str(model.dtype),
            "layout": of_layout(layout),
            "settings": of_settings(asdict(get_config().of_rank(rank, ranks))),
            "rank": [rank, ranks],
        }
    )


def _checkpoint(model: Any) -> Path:
    """Where its files are; raises ValueError where that is no folder of this machine."""
    path = Path(model.model_path)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(model.model_path, revision=model.revision, local_files_only=True)
        )
    except Exception as error:
        raise ValueError(f"the files of {model.model_path} are not on this machine") from error


def _clear(result: bool, self: Any, *args: Any, **kwargs: Any) -> None:
    level = disk_of(self.tree_cache)
    if result and level is not None:
        _without_files(level.clear)


def _clear_storage(original: Callable[[Any], bool], self: Any) -> bool:
    level = disk_of(self)
    return original(self) if level is None else _without_files(level.clear)


def _switch_off(self: Any, source: str) -> None:
    level = disk_of(self.scheduler.tree_cache)
    if level is not None:
        _without_files(lambda: level.switch_off(f"weights were updated ({source})"))


def _without_files(clear: Callable[[], None]) -> bool:
    """Whether it went well: what could not be deleted is not read, either."""
    try:
        clear()
    except OSError as error:
        logger.warning("diffxkv: the disk cannot be cleared: %s", error)
        return False
    return True


def _close(result: None, self: Any) -> None:
    level: DiskLevel | None = getattr(self, _DISK, None)
    if level is not None:
        with suppress(OSError):
            level.close()


def install() -> None:
    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    hook(f"{scheduler}.get_init_info", _open, HookType.BEFORE, ())
    hook(f"{scheduler}.flush_cache", _clear, HookType.AFTER, ())
    tree = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
    hook(f"{tree}.clear_storage_backend", _clear_storage, HookType.AROUND, ())
    hook(f"{tree}.release_host_resources", _close, HookType.AFTER, ())
    components = "sglang.srt.managers.scheduler_components"
    updater = f"{components}.weight_updater.SchedulerWeightUpdaterManager"
    hook(
        f"{updater}._observe_weight_load",
        _switch_off,
        HookType.BEFORE,
        ("source",),
    )
