# SPDX-License-Identifier: Apache-2.0
"""Quality: how much of a request's KV is to survive sealing."""

from enum import IntEnum


class Quality(IntEnum):
    """Levels, by the names that requests give; a page keeps its request's as this number."""

    BALANCED = 0
    """What the server is configured for; the default, so its number is that of a fresh page."""
    LOSSLESS = 1
    HIGH = 2
    SMALL = 3
