# SPDX-License-Identifier: Apache-2.0
"""The launches that are shipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sglang_diffxkv.kernels.gpu.launch import Launch


def cases(only: Sequence[str] | None = None) -> Iterator[tuple[str, Launch]]:
    """Name and launch of every kernel that a shipped configuration runs."""
    yield from ()
