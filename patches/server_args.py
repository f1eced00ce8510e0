# SPDX-License-Identifier: Apache-2.0
"""Hook: `--attention-backend diffxkv` and `--diffxkv-config`, their defaults and their refusals.

The configuration travels as the attribute `_diffxkv` of ServerArgs: pickling it for the scheduler
processes keeps attributes that are no fields, and new fields cannot be added to it. The hooks let
everything pass as it is unless the backend is ours.
"""

import logging
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sglang.srt.arg_groups.choices import add_attention_backend_choices
from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_exec, get_server_args

from sglang_diffxkv.config import ENV_VAR, DiffXKVConfig, load_config
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.patches.capabilities import check_capabilities
from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.patches.model_validation import (
    check_disk,
    check_model_config,
    check_prefix_cache,
)
from sglang_diffxkv.patches.speculation import (
    check_speculation,
    choose_chains,
    choose_draft_attention,
)
from sglang_diffxkv.patches.validation import (
    BACKEND,
    FP8_DTYPES,
    captures_decode,
    check_kv_dtype,
    check_resolution,
    check_server_args,
    is_requested,
)
from sglang_diffxkv.policy.registry import policy_class
from sglang_diffxkv.pool.host_memory import available_memory, too_much

logger = logging.getLogger(__name__)

_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_FROM_CLI = "_diffxkv_from_cli"
_FRACTION_GIVEN = "_diffxkv_fraction_given"


def install() -> None:
    """Register the backend's name, the flag and the resolution hooks; once per process."""
    add_attention_backend_choices([BACKEND])
    hook(f"{_SERVER_ARGS}.add_cli_args", _add_flag, HookType.AFTER, ("parser",))
    hook(f"{_SERVER_ARGS}.from_cli_args", _carry_config, HookType.AFTER, ("args",))
    hook(f"{_SERVER_ARGS}.check_server_args", _check_resolved_with_us, HookType.BEFORE, ())
    # Early: before SGLang derives anything from the flags that we set or refuse.
    register_resolution_hook("handle_missing_default_values")(_set_defaults)
    # Before SGLang refuses, in other words, models that need one of its own backends.
    register_resolution_hook("handle_model_specific_adjustments")(_check_model)
    # Late: the last step that may still change the backend or the KV cache for the model's sake.
    register_resolution_hook("handle_model_capability_adjustments")(_check_resolved)


def is_active() -> bool:
    """Whether the server of this process runs on our backend (its arguments are published)."""
    return get_exec().kernel.attention_backend == BACKEND


def get_config() -> DiffXKVConfig:
    """Configuration of this process's server, in whichever of its processes; needs `is_active`."""
    config: DiffXKVConfig = get_server_args()._diffxkv
    return config


def fraction_is_given() -> bool:
    """Whether the user chose `--mem-fraction-static`, which SGLang gives a default."""
    return bool(getattr(get_server_args(), _FRACTION_GIVEN))


def ranks_per_host(sizes: Any) -> int:
    """Scheduler processes on each host; `sizes` are server arguments, or `get_parallel()`."""
    return int(max(1, sizes.tp_size * sizes.dp_size // sizes.nnodes))


def _add_flag(result: None, parser: ArgumentParser) -> None:
    parser.add_argument(
        "--diffxkv-config",
        metavar="JSON",
        help="Configuration of --attention-backend diffxkv: JSON text, or the path of a JSON file. "
        f"Without it, the environment variable {ENV_VAR} is read.",
    )


def _carry_config(server_args: Any, cls: type, args: Namespace) -> None:
    """Mark arguments that come from a command line, and keep what the flag says."""
    text = getattr(args, "diffxkv_config", None)
    setattr(server_args, _FROM_CLI, True)
    if is_requested(server_args):
        _load(server_args, text)
    elif text is not None:
        raise SystemExit("sglang_diffxkv: --diffxkv-config needs --attention-backend diffxkv")


def _set_defaults(server_args: Any, previous: Callable[[Any], None]) -> None:
    if is_requested(server_args):
        if not hasattr(server_args, "_diffxkv"):  # sgl.Engine, which parses no command line
            _load(server_args, None)
        given = resolving_view(server_args).mem_fraction_static is not None
        setattr(server_args, _FRACTION_GIVEN, given)
        with _refusing(server_args):
            check_server_args(server_args)
            choose_chains(server_args)
            check_speculation(server_args)
        _keep_model_dtype(server_args)
        if resolving_view(server_args).page_size is None:
            declare_resolution(server_args, BACKEND, page_size=PAGE_TOKENS)
        # Declared before SGLang reads them, so that no memory is set aside for these graphs.
        declare_resolution(server_args, BACKEND, disable_prefill_cuda_graph=True)
    previous(server_args)
    # Which device it is, where the user does not say, is among the defaults that were just set.
    if is_requested(server_args) and not captures_decode(server_args):
        declare_resolution(server_args, BACKEND, disable_decode_cuda_graph=True)


def _keep_model_dtype(server_args: Any) -> None:
    """Raw pages keep the model's dtype where fp8 was asked for: to keep more is to lose less."""
    asked = resolving_view(server_args).kv_cache_dtype
    if asked in FP8_DTYPES:
        logger.warning(
            "diffxkv: --kv-cache-dtype %s: raw pages stay in the model's dtype, sealed ones are "
            "compressed by their tiers",
            asked,
        )
        declare_resolution(server_args, BACKEND, kv_cache_dtype="auto")


def _check_resolved_with_us(self: Any) -> None:
    """SGLang calls it once it has loaded plugins itself, which may be too late."""
    if is_requested(self) and not hasattr(self, "_diffxkv"):
        raise ValueError(
            f"--attention-backend {BACKEND}: the server arguments were resolved before SGLang's "
            "plugins were loaded; call sglang.srt.plugins.load_plugins() first"
        )


def _check_model(server_args: Any, previous: Callable[[Any], None]) -> None:
    if is_requested(server_args):
        with _refusing(server_args):
            view, model = resolving_view(server_args), model_config_of(server_args)
            check_kv_dtype(view.kv_cache_dtype, model.dtype)
            check_model_config(model, server_args._diffxkv, view.tp_size)
            check_prefix_cache(view, model)
            if server_args._diffxkv.disk_path is not None:
                check_disk(view, model)
        choose_draft_attention(server_args, model)
        if model.is_hybrid_swa:
            _standing_in(server_args, previous)
            return
    previous(server_args)


def _standing_in(server_args: Any, previous: Callable[[Any], None]) -> None:
    """SGLang has lists of its own backends that do windows and sinks; Triton is on all of them."""
    view = resolving_view(server_args)
    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    ours = {name: BACKEND for name in names if getattr(view, name) == BACKEND}
    declare_resolution(server_args, BACKEND, **dict.fromkeys(ours, "triton"))
    previous(server_args)
    declare_resolution(server_args, BACKEND, **ours)


def _check_resolved(server_args: Any, previous: Callable[[Any], None]) -> None:
    previous(server_args)
    if is_requested(server_args):
        with _refusing(server_args):
            check_resolution(server_args)
            check_server_args(server_args)
            check_speculation(server_args)
            check_capabilities(server_args, policy_class(server_args._diffxkv.policy))
            _check_memory(server_args)


def _check_memory(server_args: Any) -> None:
    view, memory = resolving_view(server_args), server_args._diffxkv.memory_bytes
    if view.device != "cpu" or memory is None:
        return
    problem = too_much(memory, available_memory(), ranks_per_host(view))
    if problem is not None:
        raise ValueError(problem)


def _load(server_args: Any, text: str | None) -> None:
    with _refusing(server_args):
        server_args._diffxkv = load_config(text, os.environ)
        policy_class(server_args._diffxkv.policy)


@contextmanager
def _refusing(server_args: Any) -> Iterator[None]:
    """Stop a command line with one line on stderr, as argparse does, not with a traceback."""
    try:
        yield
    except ValueError as error:
        if hasattr(server_args, _FROM_CLI):
            raise SystemExit(f"sglang_diffxkv: {error}") from None
        raise
