# SPDX-License-Identifier: Apache-2.0
"""What makes pages on disk foreign to a server, and what does not."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.offload.identity import (
    SAMPLE_BYTES,
    SAMPLES,
    of_layout,
    of_model,
    of_settings,
)
from sglang_diffxkv.policy.settings import Tiers
from tests.support.layouts import layout_of

SIZE = 5 * SAMPLES * SAMPLE_BYTES


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"rope_theta": 10000}')
    (tmp_path / "README.md").write_text("a model")
    (tmp_path / "model.safetensors").write_bytes(bytes(SIZE))
    os.utime(tmp_path / "model.safetensors", (1, 1))
    return tmp_path


def rewrite(file: Path, change: Callable[[bytearray], None]) -> None:
    """Change what is in a file, and nothing else that is seen of it."""
    status, content = file.stat(), bytearray(file.read_bytes())
    change(content)
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def set_byte(index: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        content[index] ^= 1

    return change


@pytest.mark.parametrize("index", [0, SAMPLE_BYTES - 1, SIZE - SAMPLE_BYTES, SIZE - 1])
def test_other_weights_of_the_same_size(checkpoint: Path, index: int) -> None:
    before = of_model(checkpoint)
    assert before == of_model(checkpoint)
    rewrite(checkpoint / "model.safetensors", set_byte(index))
    assert of_model(checkpoint) != before


def test_what_else_changes_a_model(checkpoint: Path) -> None:
    before, weights = of_model(checkpoint), checkpoint / "model.safetensors"
    seen = [before]
    rewrite(checkpoint / "config.json", set_byte(3))
    seen.append(of_model(checkpoint))
    os.utime(weights, (2, 2))
    seen.append(of_model(checkpoint))
    weights.write_bytes(bytes(SIZE + 1))
    seen.append(of_model(checkpoint))
    weights.rename(checkpoint / "other.safetensors")
    seen.append(of_model(checkpoint))
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
    (checkpoint / "README.md").write_text("a good model")
    assert of_model(checkpoint) == seen[-1]


def test_a_model_in_one_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    assert len(of_model(file)["weights"]) == 1
    file.rename(tmp_path / "model.txt")
    with pytest.raises(ValueError, match="no weights"):
        of_model(tmp_path)


def settings(**changed: Any) -> dict[str, Any]:
    return of_settings(asdict(DiffXKVConfig(**changed)))


@pytest.mark.parametrize(
    "changed",
    [
        {"policy": "uniform"},
        {"target": 0.9},
        {"sink": 8},
        {"tiers": Tiers("K8V8", "K4V4")},
        {"layer_caps": 0.5},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_settings_that_change_pages(changed: dict[str, Any]) -> None:
    assert settings(**changed) != settings()


@pytest.mark.parametrize(
    "changed",
    [{"memory_bytes": 1 << 30}, {"raw_share": 0.5}, {"window": 128}, {"save_plan": "plan.json"}],
    ids=lambda changed: next(iter(changed)),
)
def test_settings_that_do_not(changed: dict[str, Any]) -> None:
    assert settings(**changed) == settings()


@pytest.mark.parametrize("name", ["plan", "importance"])
def test_files_go_by_content(tmp_path: Path, name: str) -> None:
    a, b, c = (tmp_path / x for x in "abc")
    a.write_text("one")
    b.write_text("one")
    c.write_text("two")
    assert settings(**{name: str(a)}) == settings(**{name: str(b)}) != settings()
    assert settings(**{name: str(a)}) != settings(**{name: str(c)})
    with pytest.raises(OSError):
        settings(**{name: str(tmp_path / "d")})


def test_layouts() -> None:
    layouts = [
        of_layout(layout_of()),
        of_layout(layout_of("K8V8")),
        of_layout(layout_of(kv_heads=4)),
    ]
    assert layouts[0] == of_layout(layout_of())
    assert all(a != b for i, a in enumerate(layouts) for b in layouts[:i])
