# SPDX-License-Identifier: Apache-2.0
"""Whose pages a folder holds: each identity has a sub-folder, and a file name is our mark.

An identity is all that decides a page's bytes beside its tokens. Sub-folders of other identities
are *abandoned* if no process has them: a model or setting that is not served now.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sglang_diffxkv.offload.disk.lock import FolderInUse, FolderLock

_SUBFOLDER = re.compile(r"diffxkv-[0-9a-f]{32}")
_SEGMENT = re.compile(r"[0-9a-f]{16}\.segment")


def identity_of(parts: Mapping[str, object]) -> str:
    """One text for what decides a page's bytes (model, layout, plan, settings, rank), as JSON."""
    return json.dumps(parts, sort_keys=True, separators=(",", ":"))


def digest(identity: bytes | str) -> bytes:
    """16 bytes that stand for an identity in names, headers and checksums."""
    text = identity.encode() if isinstance(identity, str) else identity
    return hashlib.sha256(text).digest()[:16]


def subfolder(folder: Path, identity: bytes) -> Path:
    return folder / f"diffxkv-{identity.hex()}"


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"{number:016x}.segment"


def segment_number(path: Path) -> int:
    return int(path.stem, 16)


def segment_paths(folder: Path) -> list[Path]:
    """Segments in an identity's sub-folder, the oldest first; other files are not ours."""
    found = (path for path in folder.iterdir() if _SEGMENT.fullmatch(path.name))
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


class _Aged(NamedTuple):
    written: float
    path: Path
    nbytes: int


class Abandoned:
    """Segments of identities that no process had at the start, to be deleted before our own."""

    def __init__(self, folder: Path, own: Path) -> None:
        others = [path for path in folder.iterdir() if _SUBFOLDER.fullmatch(path.name)]
        found: list[_Aged] = []
        for other in others:
            if other != own and other.is_dir() and not other.is_symlink():
                with _held(other) as held:
                    found += [_aged(path) for path in segment_paths(other) if held]
        self._segments = sorted(found, reverse=True)
        self.nbytes = sum(segment.nbytes for segment in found)

    def remove_oldest(self) -> None:
        """Forget the oldest, and delete it if still nobody has it."""
        oldest = self._segments.pop()
        self.nbytes -= oldest.nbytes
        with _held(oldest.path.parent) as held:
            if held:
                oldest.path.unlink(missing_ok=True)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Whether this process may change the folder in between: no other has it, nor is it another
    user's."""
    try:
        lock = FolderLock(folder)
    except (FolderInUse, OSError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _aged(path: Path) -> _Aged:
    found = path.stat()
    return _Aged(found.st_mtime, path, found.st_size)
