# SPDX-License-Identifier: Apache-2.0
"""A configuration of every policy, for tests that run them all."""

from typing import Any

from sglang_diffxkv.config import DiffXKVConfig


def config_of(policy: str, **fields: Any) -> DiffXKVConfig:
    """The policy's configuration with the given fields; the defaults, where it can do with them."""
    if policy == "snapkv":
        fields = {"layer_caps": 0.25} | fields
    return DiffXKVConfig(policy=policy, **fields)
