# SPDX-License-Identifier: Apache-2.0
"""Every task's questions can be answered from its context, and from it alone."""

import json
import re
from dataclasses import astuple
from random import Random

import pytest
from tokenizers import Tokenizer

from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.eval.questions.prompts import SHARED_QUESTIONS, make_cells
from sglang_diffxkv.eval.tasks.base import Sample, Scene
from sglang_diffxkv.eval.tasks.registry import NAMES, SHARED_TASKS, TASKS
from sglang_diffxkv.eval.tasks.words import HELD_OUT, TRAIN, WORDS
from tests.support.demo_model import write_demo_model

BUDGETS = (60, 400, 1700)
TOKENIZER = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))


def size(text: str) -> int:
    return len(TOKENIZER.encode(text).ids)


def make(task: str, budget: int, seed: int, questions: int = 6) -> Sample:
    return TASKS[task](Scene(Random(seed), HELD_OUT, budget, questions, size))


def text_of(sample: Sample) -> str:
    return " ".join(text for _, text in sample.context)


def value_after(text: str, phrase: str) -> str:
    found = re.findall(rf"\b{re.escape(phrase)} (\w+)", text)
    assert len(found) == 1, f"{phrase!r} occurs {len(found)} times"
    return found[0]


def solve(task: str, text: str, question: str) -> str:
    """The answer, found by a reader that knows the task's form."""
    words = re.findall(r"\w+", question)
    if task in ("niah_single", "niah_multikey"):
        return value_after(text, f"The code of {words[-1]} is")
    if task == "niah_multiquery":
        keys = [word for word in words[5:] if word != "and"]
        return ", ".join(f"{key} is {value_after(text, f'The code of {key} is')}" for key in keys)
    if task == "kv_lookup":
        return value_after(text, f"{words[-1]} =")
    if task == "vt":
        chain = [words[-1]]
        while found := re.findall(rf"Copy {chain[-1]} to (\w+)", text):
            (hop,) = found
            chain.append(hop)
        return " ".join(chain[1:])
    if task == "recall":
        return value_after(text, f"The {' '.join(words[3:])} is")
    if task == "copy":
        (items,) = re.findall(rf"List {words[-1]}: ([\w ]+)\.", text)
        return items
    if task in ("record", "records"):
        (record,) = re.findall(rf"Record of {words[4]}: ([\w ,=]+)\.", text)
        return json.dumps(dict(f.split("=") for f in record.split(", ")), separators=(",", ":"))
    listed = re.findall(r"\w+", text)[1:]
    most = sorted(set(listed), key=listed.count, reverse=True)
    if task == "fwe":
        return most[0]
    return " ".join(most[:3])


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("task", TASKS)
def test_answers_follow_from_the_context(task, budget):
    for seed in range(8):
        sample = make(task, budget, seed)
        assert sample.questions
        assert len({q.text for q in sample.questions}) == len(sample.questions) <= 6
        text = text_of(sample)
        for question in sample.questions:
            solved = solve(task, text, question.text)
            if task == "fwe" and solved != question.answer:  # a tie
                assert text.count(f" {solved} ") == text.count(f" {question.answer} ")
                continue
            assert solved == question.answer
            assert all(reference in question.answer for reference in question.references)
            assert sample.messages(question)[-1][0] == "user"
            assert sample.messages(question)[-1][1].endswith(question.text)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "kv_lookup"])
def test_a_context_has_the_budgeted_length(task):
    for budget in (300, 1000, 2000):
        length = size(text_of(make(task, budget, seed=3)))
        assert 0.75 * budget < length < 1.1 * budget + 20


def test_a_table_ends_where_keys_do():
    sample = make("kv_lookup", 100_000, seed=0)
    assert sample.context[0][1].count("=") == len(WORDS)


def test_filler_of_evaluation_is_not_that_of_training():
    for held_out, trained in zip(astuple(HELD_OUT), astuple(TRAIN), strict=True):
        assert held_out and trained and not set(held_out) & set(trained)


@pytest.mark.parametrize("task", TASKS)
def test_the_bundled_tokenizer_knows_every_word(task):
    first = TOKENIZER.token_to_id("<|assistant|>") + 1
    for seed in range(4):
        sample = make(task, 300, seed)
        texts = [text for _, text in sample.context] + [q.text for q in sample.questions]
        for text in [*texts, *(q.answer for q in sample.questions if q.answer[0] != "{")]:
            encoded = TOKENIZER.encode(f" {text}")
            spelt = [token for token in encoded.tokens if len(token.strip("Ġ")) == 1]
            assert all(id >= first for id in encoded.ids if id >= 256)
            assert not [token for token in spelt if token.isalpha()], text
            assert TOKENIZER.decode(encoded.ids) == f" {text}"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BUNDLED)


@pytest.mark.parametrize("task", NAMES)
def test_prompts(task, tokenizer):
    (cell,) = make_cells(tokenizer, [task], [500], samples=11, seed=5)
    assert cell == make_cells(tokenizer, [task], [500], samples=11, seed=5)[0]
    assert cell != make_cells(tokenizer, [task], [500], samples=11, seed=6)[0]
    assert len(cell.prompts) == 11
    end = tokenizer.convert_tokens_to_ids("<|assistant|>")
    for prompt in cell.prompts:
        assert prompt.ids[-1] == end
        assert 350 < len(prompt.ids) < 620
        assert prompt.max_tokens >= 18
        assert (prompt.warm == prompt.ids) == (task != "shared_prefix")
    if task not in SHARED_TASKS:
        assert len({prompt.namespace for prompt in cell.prompts}) == 11


def test_shared_and_recomputed_prefixes_ask_the_same(tokenizer):
    shared, recomputed = make_cells(tokenizer, list(SHARED_TASKS), [500], samples=14, seed=1)
    assert [prompt.ids for prompt in shared.prompts] == [p.ids for p in recomputed.prompts]
    assert len({prompt.namespace for prompt in recomputed.prompts}) == 14
    assert len({prompt.namespace for prompt in shared.prompts}) == 2
    assert len({tuple(prompt.warm) for prompt in shared.prompts}) == 2
    assert 2 * (SHARED_QUESTIONS - 1) == 14
    for prompt in shared.prompts:
        common = sum(1 for _ in takewhile_equal(prompt.warm, prompt.ids))
        assert common > 450


@pytest.mark.parametrize("has_template", [True, False])
def test_prompts_for_another_tokenizer(has_template, tmp_path):
    """One whose tokens are bytes: a word takes several, and fewer of them fill the length."""
    from transformers import AutoTokenizer

    folder = write_demo_model(tmp_path, layers=1, heads=2, kv_heads=1, hidden=64)
    other = AutoTokenizer.from_pretrained(folder)
    if not has_template:
        other.chat_template = None
    for cell in make_cells(other, list(NAMES), [1200], samples=3, seed=0):
        for prompt in cell.prompts:
            assert 800 < len(prompt.ids) < 1700, cell.task
            text = other.decode(prompt.ids)
            assert prompt.question.text in text
            assert text.endswith("<|assistant|>" if has_template else "?\n")


def takewhile_equal(a, b):
    for x, y in zip(a, b, strict=False):
        if x != y:
            return
        yield x
