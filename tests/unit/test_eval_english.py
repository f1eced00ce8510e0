# SPDX-License-Identifier: Apache-2.0
"""Tasks in plain English: answers follow from their text, and prompts have RULER's form."""

import json
import re
from itertools import islice
from random import Random

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.config import ConfigError
from sglang_diffxkv.eval.questions.prompts import Stop, find_stop, make_cells
from sglang_diffxkv.eval.tasks.base import Question, Sample, Scene
from sglang_diffxkv.eval.tasks.fillers import FILLERS
from sglang_diffxkv.eval.tasks.registry import (
    BUNDLED_SUITE,
    ENGLISH_TASKS,
    NAMES,
    TASKS,
    Suite,
    choose_suite,
)

SIZE = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
RULER_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50, "recall": 32, "copy": 120}
"""Of an answer; of all others 128."""


def size(text: str) -> int:
    return len(SIZE.encode(text).ids)


def make(task: str, filler: str, budget: int, seed: int) -> Sample:
    return ENGLISH_TASKS[task](Scene(Random(seed), FILLERS[filler], budget, 6, size))


def solve(task: str, text: str, question: Question) -> list[str]:
    """The answer, found by a reader that knows the task's form."""
    if task.startswith("niah"):
        keys = re.findall(r"\w+-\w+", question.text)
        return [value for key in keys for value in re.findall(rf"\b{key} is (\d+)\.", text)]
    if task == "kv_lookup":
        (key,) = re.findall(r'"(.*)"', question.text)
        return [json.loads(text[text.index("{") :])[key]]
    if task == "vt":
        known = re.findall(r"\d{5}", question.text)
        found = []
        for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
            if value in known:
                known.append(name)
                found.append(name)
        return found
    if task == "recall":
        (fact,) = re.findall(r"(\w+ of my \w+)", question.text)
        return re.findall(rf"The {fact} is (\w+)\.", text)
    name = (re.findall(r"of ([A-Z]\w+)", question.text) or [""])[0]
    if task == "copy":
        return re.findall(rf"The shopping list of {name} is: ([\w, ]+)\.", text)
    if task in ("record", "records"):
        (record,) = re.findall(rf"Record of {name}: ([\w ,=]+)\.", text)
        return [field.split(" = ")[1] for field in record.split(", ")]
    words = re.findall(r"[a-z]+", text.partition("\n\n")[2])
    return sorted(set(words), key=words.count, reverse=True)[: 10 if task == "cwe" else 3]


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("task", ENGLISH_TASKS)
def test_answers_follow_from_the_context(task, filler):
    for seed, budget in enumerate((200, 700, 2100)):
        sample = make(task, filler, budget, seed)
        assert 1 <= len(sample.questions) <= 6
        text = "\n\n".join(text for _, text in sample.context)
        assert "I will ask" in text or "Memorize" in text or "Keep track" in text
        for question in sample.questions:
            assert sorted(solve(task, text, question)) == sorted(question.references)
            assert all(reference in question.answer for reference in question.references)
            assert question.max_tokens == RULER_TOKENS.get(task, 128)
            assert question.prefix and not question.prefix.endswith(" ")
            role, last = sample.messages(question)[-1]
            assert role == "user" and last.endswith(question.text)
            if task != "recall":
                assert last.endswith(f"\n\n{question.text}")


@pytest.mark.parametrize("task", ENGLISH_TASKS)
def test_a_context_has_the_budgeted_length(task):
    for budget in (600, 2000):
        text = " ".join(text for _, text in make(task, "noise", budget, 3).context)
        assert 0.75 * budget < size(text) < 1.15 * budget + 120


def test_tasks_are_the_same_in_both_languages():
    assert list(ENGLISH_TASKS) == list(TASKS)


def test_fillers_never_end():
    noise, prose, words, other = (
        list(islice(FILLERS[name](Random(seed)), 5000))
        for name, seed in (("noise", 0), ("documentation", 0), ("words", 0), ("documentation", 1))
    )
    assert noise[:6] == [*noise[:5], noise[0]] and len(set(noise)) == 5
    assert len(set(prose)) > 1000 and prose != other
    assert all(re.fullmatch(r"[A-Z].*[.!?]", sentence) for sentence in prose)
    assert not any(mark in sentence for mark in ("::", ">>>", "**", "==") for sentence in prose)
    assert len(set(words)) > 3000


def test_the_bundled_model_keeps_its_language(tmp_path):
    assert choose_suite(BUNDLED) == choose_suite(BUNDLED, "words") == BUNDLED_SUITE
    with pytest.raises(ConfigError, match="words alone"):
        choose_suite(BUNDLED, "noise")
    other = choose_suite(tmp_path)
    assert other == Suite(ENGLISH_TASKS, FILLERS["documentation"])
    assert choose_suite(tmp_path, "noise").filler is FILLERS["noise"]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED, local_files_only=True)


@pytest.mark.parametrize("has_template", [True, False])
def test_the_assistant_has_begun_to_answer(has_template, tokenizer, tmp_path):
    if not has_template:
        tokenizer.chat_template = None
    for cell in make_cells(tokenizer, list(NAMES), [600], 3, 0, choose_suite(tmp_path, "words")):
        for prompt in cell.prompts:
            text = tokenizer.decode(prompt.ids)
            question = prompt.question
            turn = "<|end|><|assistant|>" if has_template else "\n"
            assert text.endswith(f"{question.text}{turn}{question.prefix}")
            assert prompt.max_tokens == question.max_tokens


def test_answers_end_where_the_template_ends_a_turn(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert find_stop(tokenizer) == Stop([end], [])
    # A checkpoint may name another token as the end of a sequence than ends its turns.
    tokenizer.eos_token = "<|user|>"
    assert find_stop(tokenizer) == Stop([end], [])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert find_stop(tokenizer) == Stop([], [])
    tokenizer.chat_template = None
    assert find_stop(tokenizer) == Stop([], ["\n\n"])
