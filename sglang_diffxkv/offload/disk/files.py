# SPDX-License-Identifier: Apache-2.0
"""Whole reads and writes at an offset, where the system may do a part of what it is asked."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A descriptor of a file that is none by a link; only its owner may read what is created."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def write_all(fd: int, parts: Sequence[bytes | memoryview], offset: int) -> None:
    """Write parts one behind the other, with one call where the system takes all at once."""
    rest = [memoryview(part) for part in parts]
    while rest:
        done = os.pwritev(fd, rest, offset)
        if done == 0:
            raise OSError(errno.EIO, "nothing was written")
        offset, rest = offset + done, _after(rest, done)


def read_all(fd: int, parts: Sequence[memoryview], offset: int) -> bool:
    """Fill parts one behind the other; False if the file ends before."""
    rest = _after(list(parts), 0)
    while rest:
        done = os.preadv(fd, rest, offset)
        if done == 0:
            return False
        offset, rest = offset + done, _after(rest, done)
    return True


def _after(parts: list[memoryview], done: int) -> list[memoryview]:
    """What is left of parts behind their first bytes."""
    for position, part in enumerate(parts):
        if done < len(part):
            return [part[done:], *parts[position + 1 :]]
        done -= len(part)
    return []
