# SPDX-License-Identifier: Apache-2.0
"""Policies by name: those of this package, and those that other packages bring."""

import difflib
from dataclasses import fields
from importlib.metadata import EntryPoint, entry_points

from sglang_diffxkv.kernels.layout import make_layout
from sglang_diffxkv.policy.base import TierPolicy
from sglang_diffxkv.policy.methods.diffkv import DiffKVPolicy
from sglang_diffxkv.policy.methods.diffxkv import DiffXKVPolicy
from sglang_diffxkv.policy.methods.lossless import LosslessPolicy
from sglang_diffxkv.policy.methods.snapkv import SnapKVPolicy
from sglang_diffxkv.policy.methods.streaming import StreamingPolicy
from sglang_diffxkv.policy.methods.uniform import UniformPolicy
from sglang_diffxkv.policy.methods.xkv import XKVPolicy
from sglang_diffxkv.policy.settings import ConfigError, PolicySettings

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


ENTRY_POINTS = "sglang_diffxkv.policies"
"""Group in which an installed package names its policies (``docs/policies.md``)."""
_ASKED = ("target", "plan", "importance", "save_plan", "high_layers")
"""Settings that ask for what only some policies do, so that others must not ignore them."""


def policy_class(name: str) -> type[TierPolicy]:
    """The policy of that name, of this package or else of another one that is installed.

    Raises:
        ConfigError: there is none, or it cannot be loaded.
    """
    if name in POLICIES:
        return POLICIES[name]
    others = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name in others:
        return _load(others[name])
    known = [*POLICIES, *others]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown policy {name!r}; {hint}one of: {', '.join(known)}")


def _load(point: EntryPoint) -> type[TierPolicy]:
    try:
        found = point.load()
    except Exception as error:
        raise ConfigError(
            f"policy {point.name!r} ({point.value}) cannot be loaded: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, TierPolicy)):
        raise ConfigError(f"policy {point.name!r} ({point.value}) is not a TierPolicy")
    return found


def make_policy(
    config: PolicySettings,
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
        ConfigError: unknown policy, settings that it has no use for, or `layer_caps` that do not
            fit it or the model.
    """
    policy = policy_class(config.policy)
    _check_use(policy, config)
    high, low = policy.formats(config)
    layout = make_layout(
        head_dim=head_dim, num_kv_heads=num_kv_heads, raw_itemsize=raw_itemsize, high=high, low=low
    )
    return policy(config, layout, num_layers)


def _check_use(policy: type[TierPolicy], config: PolicySettings) -> None:
    known = {field.name for field in fields(policy.settings)}
    for field in fields(config):
        asked = field.name in _ASKED and getattr(config, field.name) != field.default
        if asked and field.name not in known:
            raise ConfigError(
                f"policy {policy.name!r} has no use for {field.name!r}: leave it out or choose "
                "another policy"
            )
