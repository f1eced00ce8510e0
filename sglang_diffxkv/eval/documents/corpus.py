# SPDX-License-Identifier: Apache-2.0
"""Documents to measure on: the user's own, or Python's documentation, which is on every machine."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from sglang_diffxkv.config import ConfigError

CHARACTERS = 18_500
"""Of a document of the default corpus at least: 4,096 tokens of most tokenizers."""
_MODULES = [
    "configparser",
    "difflib",
    "doctest",
    "smtplib",
    "socketserver",
    "statistics",
    "threading",
    "typing",
]
"""Whose docstrings are long and mostly prose."""


class Document(NamedTuple):
    name: str
    text: str


def load_documents(files: Sequence[Path] | None) -> list[Document]:
    """All documents of `files`, or the default corpus where None: the same in the same order.

    A file that ends in `.jsonl` has a document per line, the field `text` of a JSON object; any
    other file is one document, as it is.

    Raises:
        ConfigError: a file that cannot be read, or is not what its name says.
    """
    if files is None:
        return _python_documentation()
    return list(chain.from_iterable(map(_read, files)))


def _read(path: Path) -> list[Document]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text in UTF-8"
        raise ConfigError(f"{path}: {reason}") from None
    if path.suffix != ".jsonl":
        return [Document(path.name, content)]
    lines = [(i, line) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
    return [Document(f"{path.name}:{i}", _text(line, f"{path}:{i}")) for i, line in lines]


def _text(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ConfigError(f'{where}: not an object with text in the field "text"')
    # Half of a pair of UTF-16 is a valid escape in JSON, but no text that a tokenizer takes.
    return text.encode("utf-8", "replace").decode()


def _python_documentation() -> list[Document]:
    """The language reference as `help()` has it, then docstrings, cut at paragraphs."""
    documents: list[Document] = []
    parts: list[str] = []
    first = ""
    for topic, paragraph in _paragraphs():
        first = first or topic
        parts.append(paragraph)
        if sum(map(len, parts)) >= CHARACTERS:
            name = f"python-{len(documents) + 1:02d}-{first}"
            documents.append(Document(name, "\n\n".join(parts)))
            parts, first = [], ""
    return documents


def _paragraphs() -> Iterator[tuple[str, str]]:
    """Each paragraph once, with its topic: some topics contain others."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    docstrings = ((name, _docstrings(name)) for name in _MODULES)
    for topic, text in chain(sorted(topics.items()), docstrings):
        for paragraph in text.strip("\n").split("\n\n"):
            if paragraph not in seen:
                seen.add(paragraph)
                yield topic, paragraph


def _docstrings(module: str) -> str:
    """All docstrings of `module`, which is read and not imported."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, module
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return "\n\n".join(filter(None, found))
