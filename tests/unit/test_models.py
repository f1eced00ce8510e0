# SPDX-License-Identifier: Apache-2.0
"""`sglang-diffxkv model`, with a package registry and a conversion of the tests' own."""

import hashlib
import sys
from pathlib import Path

import pytest

from sglang_diffxkv.cli import main
from sglang_diffxkv.models import checkpoint, known, prepare, wheels
from sglang_diffxkv.models.files import cache_folder
from sglang_diffxkv.models.known import KNOWN, KnownModel, ModelError

PARTS = {"tiny.gguf.part00": b"GGUF, the first", "tiny.gguf.part01": b" and the second part"}
WEIGHTS = b"weights"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


TINY = KnownModel(
    name="tiny",
    about="two parts",
    source="the tests",
    wheels=("tiny-part1==1.0", "tiny-part2==1.0"),
    megabytes=1,
    gguf_sha256=sha256(b"".join(PARTS.values())),
    weights_sha256=sha256(WEIGHTS),
    licence="its own",
    licence_file="TERMS",
)

INSTALLER = f"""#!{sys.executable}
import pathlib, sys
target = pathlib.Path(sys.argv[sys.argv.index("--target") + 1])
for number, (name, data) in enumerate({PARTS!r}.items()):
    (target / f"part{{number}}").mkdir(parents=True)
    (target / f"part{{number}}" / name).write_bytes(data)
(target / "TERMS").write_text("use it well")
"""


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A known model, a program `uv` that unpacks its wheels, and a cache of the test's own."""
    monkeypatch.setattr(known, "KNOWN", (*KNOWN, TINY))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    put_uv(monkeypatch, tmp_path, INSTALLER)
    monkeypatch.setattr(checkpoint, "write_checkpoint", write_tiny)


def put_uv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir(exist_ok=True)
    uv.write_text(text)
    uv.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))


def write_tiny(model: KnownModel, gguf: Path, folder: Path) -> None:
    assert gguf.read_bytes() == b"".join(PARTS.values())
    (folder / "model.safetensors").write_bytes(WEIGHTS)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_model_is_made_of_its_wheels_parts(tmp_path: Path) -> None:
    folder = prepare.prepare("tiny")
    assert folder == cache_folder() / "tiny" / "checkpoint"
    assert files(folder) == {"model.safetensors", "TERMS"}
    assert files(cache_folder() / "tiny" / "gguf") == {"model.gguf", "TERMS"}
    assert not [path for path in cache_folder().rglob("*") if path.name.startswith((".", "tmp"))]


def test_what_is_there_is_not_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()  # an empty folder is as good as none
    prepare.prepare("tiny", output)
    put_uv(monkeypatch, tmp_path, "#!/bin/sh\nexit 1\n")
    assert prepare.prepare("tiny", tmp_path / "other") == tmp_path / "other"
    monkeypatch.setattr(checkpoint, "write_checkpoint", None)
    assert prepare.prepare("tiny", output) == output


def test_the_current_folder_may_be_the_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    prepare.prepare("tiny", Path())
    assert files(here) == {"model.safetensors", "TERMS"}


def test_another_file_than_the_known_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_uv(monkeypatch, tmp_path, INSTALLER.replace("second", "changed"))
    with pytest.raises(ModelError, match=r"model\.gguf has the SHA-256 \w+, not the expected"):
        prepare.prepare("tiny", tmp_path / "output")
    assert not files(cache_folder()) and not (tmp_path / "output").exists()
    put_uv(monkeypatch, tmp_path, INSTALLER)
    prepare.prepare("tiny", tmp_path / "output")


def test_other_weights_than_the_known_ones_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def write(model: KnownModel, gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"other weights")

    monkeypatch.setattr(checkpoint, "write_checkpoint", write)
    with pytest.raises(ModelError, match=r"model\.safetensors has the SHA-256"):
        prepare.prepare("tiny", tmp_path / "output")
    assert not list(tmp_path.glob("*output*"))


def test_an_interrupted_conversion_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def write(model: KnownModel, gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_checkpoint", write)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare("tiny", tmp_path / "output")
    assert not list(tmp_path.glob("*output*")) and not list(tmp_path.glob(".output*"))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ModelError, match="holds something else"):
        prepare.prepare("tiny", tmp_path)
    assert (tmp_path / "notes").read_text() == "mine"


def test_what_the_installer_says_is_shown_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_uv(monkeypatch, tmp_path, "#!/bin/sh\necho no such package >&2\nexit 2\n")
    with pytest.raises(ModelError, match=r"^tiny-part1==1\.0 .* installed: no such package$"):
        prepare.prepare("tiny")


def test_pip_takes_the_place_of_uv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin" / "uv").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(wheels, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="neither uv nor pip is here"):
        prepare.prepare("tiny")
    pip = tmp_path / "bin" / "pip"
    pip.write_text(INSTALLER)
    pip.chmod(0o755)
    prepare.prepare("tiny")


def test_the_command_shows_the_licence_and_how_to_serve(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    assert main(["model", "tiny", "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "Licence: its own." in said and "its licence: TERMS" in said
    assert f"--model-path {output} --attention-backend diffxkv" in said


def test_the_command_names_what_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "unknown"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("sglang-diffxkv model: no model 'unknown' here; one of: smollm2, ")
    assert said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("model", KNOWN, ids=lambda model: model.name)
def test_known_models_are_pinned(model: KnownModel) -> None:
    assert all(wheel.count("==") == 1 for wheel in model.wheels)
    assert all(len(sha) == 64 for sha in (model.gguf_sha256, model.weights_sha256))
