# SPDX-License-Identifier: Apache-2.0
"""Importance models as safetensors files, which `sglang-diffxkv calibrate` writes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sglang_diffxkv.kernels.layout import PageLayout
from sglang_diffxkv.policy.importance.features import Rotary, feature_count
from sglang_diffxkv.policy.importance.model import ImportanceModel
from sglang_diffxkv.policy.settings import ConfigError

FORMAT = "1"
"""Of files; raised whenever their meaning changes."""


class SavedImportance(NamedTuple):
    """An importance model, and the hash of its file, which plans solved with it carry."""

    model: ImportanceModel
    sha256: str


def save_importance(model: ImportanceModel, path: Path) -> None:
    """Write it in one step: a reader never sees half of it."""
    rotary = model.rotary
    about = {
        "format": FORMAT,
        "rotary_dims": str(rotary.dims),
        "interleaved": str(int(rotary.interleaved)),
    }
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(save({k: v.contiguous() for k, v in model.tensors().items()}, about))
    part.replace(path)


def load_importance(path: Path, layout: PageLayout, num_layers: int) -> SavedImportance:
    """Read a file, onto the host.

    Raises:
        ConfigError: no such file, not an importance model, or one of another model.
    """
    path = path.expanduser()
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["format"] != FORMAT:
            raise ConfigError(
                f"importance {path}: format {about['format']}, expected {FORMAT}: calibrate again"
            )
        rotary = Rotary(int(about["rotary_dims"]), about["interleaved"] == "1")
        model = ImportanceModel(rotary, **tensors)
        layers, heads, inputs, columns = model.weight.shape
        fits = model.bias.shape == (layers, heads, columns)
        if not fits or model.output.shape != (layers, heads, columns - 1):
            raise ValueError("tensors of different shapes")
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ValueError("no numbers")
    except OSError as error:
        raise ConfigError(f"importance {path}: {error.strerror or error}") from None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"importance {path} is not a file that `sglang-diffxkv calibrate` writes"
        ) from None
    dim = layout.head_dim
    expected = (num_layers, layout.num_kv_heads, feature_count(dim, rotary))
    if (layers, heads, inputs) != expected:
        raise ConfigError(
            f"importance {path} is of {layers} layers of {heads} KV heads, this model has "
            f"{num_layers} of {layout.num_kv_heads} of {dim}: calibrate with this model"
        )
    return SavedImportance(model, digest)
