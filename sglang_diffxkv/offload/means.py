# SPDX-License-Identifier: Apache-2.0
"""The means that sealed keys on disk lack: pages are nothing without them, so they are kept beside.

A server learns them from what it seals first (`pool.key_means`). One that finds pages on disk takes
over theirs instead, before it has sealed anything.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from sglang_diffxkv.offload.records import MEANS_ID_BYTES
from sglang_diffxkv.pool.key_means import KeyMeans

NO_MEANS = bytes(MEANS_ID_BYTES)
"""Names those of pages that do not rotate."""
_DIGEST_BYTES = hashlib.sha256().digest_size


class SavedMeans:
    """Attributes:
    id: names those that are in force and saved; None: there are none yet.
    """

    def __init__(self, path: Path, means: KeyMeans, rotates: bool) -> None:
        """``rotates``: of the layout; where it does not, there is nothing to keep."""
        self._path, self._means = path, means
        self.id: bytes | None = None if rotates else NO_MEANS

    def restore(self) -> bool:
        """Have the saved ones in force; False: there are none, or others are in force already."""
        if self.id is not None:
            return True
        saved = self._read()
        if saved is None:
            return False
        if self._means.are_set:
            if not torch.equal(saved, self._means.by_layer.cpu()):
                return False
        else:
            self._means.set(saved)
        self.id = _id(saved)
        return True

    def save(self) -> bool:
        """Save those in force, unless that has been done; False: none are. Raises OSError."""
        if self.id is None and self._means.are_set:
            means = self._means.by_layer.cpu()
            content, beside = means.numpy().tobytes(), self._path.with_suffix(".new")
            with beside.open("wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
                file.flush()
                os.fsync(file.fileno())
            beside.rename(self._path)
            self.id = _id(means)
        return self.id is not None

    def _read(self) -> torch.Tensor | None:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        shape = self._means.by_layer.shape
        if len(content) != 4 * shape.numel() or hashlib.sha256(content).digest() != digest:
            return None
        return torch.from_numpy(np.frombuffer(content, dtype=np.float32).copy()).view(shape)


def _id(means: torch.Tensor) -> bytes:
    return hashlib.sha256(means.numpy().tobytes()).digest()[:MEANS_ID_BYTES]
