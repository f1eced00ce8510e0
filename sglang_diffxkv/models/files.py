# SPDX-License-Identifier: Apache-2.0
"""Folders that are whole or not there, and checksums."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sglang_diffxkv.models.known import ModelError


def cache_folder() -> Path:
    """Where this package keeps what it has downloaded: `sglang_diffxkv` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # As the XDG specification has it: a relative path counts as unset.
    home = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return home / "sglang_diffxkv"


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder, which becomes `target` at the end of the block and is removed on an error."""
    target = target.resolve()  # `.` has no name
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_sha256(path: Path, expected: str) -> None:
    """Compare the file's checksum.

    Raises:
        ModelError: it is another.
    """
    found = sha256(path)
    if found != expected:
        raise ModelError(f"{path.name} has the SHA-256 {found}, not the expected {expected}")


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
