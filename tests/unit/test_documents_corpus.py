# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

from sglang_diffxkv.config import ConfigError
from sglang_diffxkv.eval.documents.corpus import CHARACTERS, Document, load_documents


def test_the_default_corpus_is_long_and_repeats_nothing():
    documents = load_documents(None)
    assert len(documents) >= 24
    assert len({document.name for document in documents}) == len(documents)
    assert all(len(document.text) >= CHARACTERS for document in documents)
    paragraphs = [part for document in documents for part in document.text.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert documents == load_documents(None)


def test_documents_of_the_user(tmp_path):
    prose = tmp_path / "prose.txt"
    prose.write_text("Ein schöner Text.\n", encoding="utf-8")
    lines = tmp_path / "lines.jsonl"
    texts = ["one", "two\u2028still two", "drei"]
    lines.write_text("\n\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts))
    assert load_documents([lines, prose]) == [
        Document("lines.jsonl:1", texts[0]),
        Document("lines.jsonl:3", texts[1]),
        Document("lines.jsonl:5", texts[2]),
        Document("prose.txt", "Ein schöner Text.\n"),
    ]


def test_what_is_no_text_in_a_record_is_replaced(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "cut \\ud83d here"}')
    assert load_documents([path])[0].text == "cut ? here"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text"', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"content": "a"}', 'a.jsonl:1: not an object with text in the field "text"'),
        ("a.jsonl", b"[]", 'a.jsonl:1: not an object with text in the field "text"'),
        ("a.txt", b"\xff\xfe", "a.txt: not text in UTF-8"),
        ("missing.txt", None, "missing.txt: No such file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_a_line(tmp_path, name, content, message):
    path: Path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_documents([path])
    assert message in str(error.value) and "\n" not in str(error.value)
