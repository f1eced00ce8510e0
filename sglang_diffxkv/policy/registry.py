# SPDX-License-Identifier: Apache-2.0
"""Policies by name."""

import difflib

from sglang_diffxkv.config import ConfigError, DiffXKVConfig
from sglang_diffxkv.kernels.layout import make_layout
from sglang_diffxkv.policy.base import TierPolicy
from sglang_diffxkv.policy.diffkv import DiffKVPolicy
from sglang_diffxkv.policy.diffxkv import DiffXKVPolicy
from sglang_diffxkv.policy.lossless import LosslessPolicy
from sglang_diffxkv.policy.snapkv import SnapKVPolicy
from sglang_diffxkv.policy.streaming import StreamingPolicy
from sglang_diffxkv.policy.uniform import UniformPolicy
from sglang_diffxkv.policy.xkv import XKVPolicy

POLICIES: dict[str, type[TierPolicy]] = {
    policy.name: policy
    for policy in (
        DiffXKVPolicy,
        DiffKVPolicy,
        XKVPolicy,
        LosslessPolicy,
        SnapKVPolicy,
        StreamingPolicy,
        UniformPolicy,
    )
}


def policy_class(name: str) -> type[TierPolicy]:
    """The policy of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in POLICIES:
        near = difflib.get_close_matches(name, POLICIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"unknown policy {name!r}; {hint}one of: {', '.join(POLICIES)}")
    return POLICIES[name]


def make_policy(
    config: DiffXKVConfig,
    *,
    head_dim: int,
    num_kv_heads: int,
    raw_itemsize: int,
    num_layers: int,
) -> TierPolicy:
    """The configured policy, its `layout` built for a model of these dimensions on this rank.

    Args:
        raw_itemsize: bytes of an element of the model's dtype.

    Raises:
        ConfigError: unknown policy, or `layer_caps` that do not fit it or the model.
    """
    policy = policy_class(config.policy)
    high, low = policy.formats(config)
    layout = make_layout(
        head_dim=head_dim, num_kv_heads=num_kv_heads, raw_itemsize=raw_itemsize, high=high, low=low
    )
    return policy(config, layout, num_layers)
