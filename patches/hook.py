# SPDX-License-Identifier: Apache-2.0
"""Registering hooks with a guard: what is not as we know it is refused, not patched."""

from __future__ import annotations

import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

SGLANG_VERSION = "0.5.23"

_targets: list[str] = []


class HookError(RuntimeError):
    """The installed SGLang is not the one that this package was written against."""


def check_version() -> None:
    """
    Raises:
        HookError: SGLang has another version than the one that we know.
    """
    version = importlib.metadata.version("sglang")
    if version != SGLANG_VERSION:
        raise HookError(
            f"diffxkv works with sglang=={SGLANG_VERSION}, but {version} is installed: "
            f"pip install sglang=={SGLANG_VERSION}"
        )


def hook(
    target: str, function: Callable[..., Any], kind: HookType, parameters: tuple[str, ...]
) -> None:
    """Register ``function`` on a function or method of SGLang (``HookRegistry.register``).

    Args:
        target: dotted path.
        parameters: the names of the target's parameters that ``function`` relies on.

    Raises:
        HookError: the target is gone or lacks one of them.
    """
    try:
        signature = inspect.signature(pkgutil.resolve_name(target))
    except (ImportError, AttributeError) as error:
        raise HookError(f"diffxkv: SGLang has no {target}") from error
    missing = [name for name in parameters if name not in signature.parameters]
    if missing:
        raise HookError(f"diffxkv: {target} has no parameter {', '.join(missing)}")
    HookRegistry.register(target, function, kind)
    _targets.append(target)


def apply_now() -> None:
    """Apply hooks that were registered after SGLang had applied those of plugins.

    Raises:
        HookError: as `check_applied`.
    """
    HookRegistry.apply_hooks()
    check_applied()


def check_applied() -> None:
    """
    Raises:
        HookError: SGLang, which only logs it, failed to apply one of our hooks.
    """
    failed = [target for target in _targets if target not in HookRegistry._patched]
    if failed:
        raise HookError(f"diffxkv: SGLang did not apply the hooks of {', '.join(failed)}")


def refuse_backend(problem: HookError) -> None:
    """Let ``--attention-backend diffxkv`` be parsed, and stop the launch with ``problem``."""
    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    add_attention_backend_choices(["diffxkv"])

    @register_resolution_hook("handle_missing_default_values")
    def refuse(server_args: Any, previous: Callable[[Any], None]) -> None:
        if server_args.attention_backend == "diffxkv":
            raise SystemExit(f"sglang_diffxkv: {problem}")
        previous(server_args)
