# SPDX-License-Identifier: Apache-2.0
"""What is read of a document, and the figures of what is found."""

import math

import numpy as np
import pytest

from sglang_diffxkv.cli import main
from sglang_diffxkv.config import ConfigError
from sglang_diffxkv.eval.documents.corpus import Document
from sglang_diffxkv.eval.documents.passages import Passage, cut, half_of
from sglang_diffxkv.eval.documents.plot import plot
from sglang_diffxkv.eval.documents.read import TASKS, Reading
from sglang_diffxkv.eval.documents.report import markdown
from sglang_diffxkv.eval.documents.run import CONFIGS
from sglang_diffxkv.eval.documents.score import DocumentRecord, compare, score
from sglang_diffxkv.eval.estimate import bootstrap
from sglang_diffxkv.eval.variants import VARIANTS, Variant

LENGTH, WORDS = 1025, 7
PASSAGE = Passage("text", list(range(LENGTH)))
FULL = Variant("full", None)


class Words:
    """A tokenizer whose tokens are words."""

    def encode(self, text: str, verbose: bool) -> list[int]:
        return [hash(word) for word in text.split()]


def test_passages_are_the_beginnings_of_documents_that_are_long_enough(caplog):
    texts = [Document(str(n), " ".join(map(str, range(n)))) for n in (100, 300, 200, 250)]
    found = cut(Words(), texts, 200, 2)
    assert [(passage.name, len(passage.ids), passage.half) for passage in found] == [
        ("300", 200, 64),
        ("200", 200, 64),
    ]
    assert not caplog.text
    assert len(cut(Words(), texts, 200, 4)) == 3
    assert "3 documents have 200 tokens, not 4" in caplog.text
    with pytest.raises(ConfigError, match="no document has 301 tokens; the longest has 300"):
        cut(Words(), texts, 301, 2)
    with pytest.raises(ConfigError, match="no half of 64"):
        half_of(127)


class Log:
    """A session that notes what it is asked for."""

    def __init__(self) -> None:
        self.sealed: list[list[int]] = []
        self.read_from: list[tuple[int, int]] = []

    def seal(self, ids: list[int]) -> None:
        self.sealed.append(ids)

    def read(self, ids: list[int], start: int) -> Reading:
        assert ids == PASSAGE.ids[: len(ids)]
        self.read_from.append((start, len(ids)))
        return random_reading(np.arange(start + 1, len(ids)))


@pytest.mark.parametrize(
    ("task", "read_from"),
    [
        ("half", [(512, 1025)]),
        # The last step is a token longer than the others, not a token long.
        ("grow", [(512, 768), (768, 1025)]),
        ("shared", [(512, 1025)]),
    ],
)
def test_how_documents_are_read(task, read_from):
    log, other = Log(), Passage("other", [-1] * LENGTH)
    reading = TASKS[task](log, PASSAGE, other)
    assert log.read_from == read_from
    assert log.sealed == [PASSAGE.ids[:512] + ([-1] * 256 if task == "shared" else [])]
    left_out = {start for start, _ in read_from}
    assert reading.places.tolist() == [i for i in range(512, LENGTH) if i not in left_out]


def test_all_that_is_read_is_sealed_by_all_policies_but_streaming():
    windows = {name: config.window for name, config in CONFIGS.items() if config is not None}
    assert windows.pop("streaming") == VARIANTS["streaming"].window
    assert set(windows.values()) == {0}


def random_reading(places: np.ndarray, seed: int = 0) -> Reading:
    """Distributions over `WORDS` tokens, all of them listed; the tokens read are random."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((len(places), WORDS))
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    order = np.argsort(-logprobs, 1)
    top = np.take_along_axis(logprobs, order, 1).astype(np.float32)
    tokens = np.random.default_rng(1).integers(WORDS, size=len(places))
    own = logprobs[np.arange(len(places)), tokens].astype(np.float32)
    return Reading(places.astype(np.int32), own, order.astype(np.int32), top)


def dense(reading: Reading) -> np.ndarray:
    out = np.zeros((len(reading.places), WORDS))
    np.put_along_axis(out, reading.top_ids.astype(int), reading.top_logprobs.astype(float), 1)
    return out


def test_figures_of_two_readings():
    places = np.arange(513, LENGTH)
    full, other = random_reading(places), random_reading(places, 2)
    a, b = dense(full), dense(other)
    kl = (np.exp(a) * (a - b)).sum(1)
    row = score(FULL, "half", LENGTH, [compare(PASSAGE, full, other)], [])
    assert (row.documents, row.tokens) == (1, 512)
    assert row.whole.mean_kl.mean == pytest.approx(kl.mean(), rel=1e-5)
    assert row.whole.p99_kl.mean == pytest.approx(np.quantile(kl, 0.99), rel=1e-5)
    same = a.argmax(1) == b.argmax(1)
    assert row.whole.agreement.mean == same.mean()
    assert row.whole.perplexity.mean == pytest.approx(math.exp(-other.logprobs.mean()), rel=1e-5)
    more = (full.logprobs - other.logprobs).mean()
    assert row.whole.perplexity_ratio.mean == pytest.approx(math.exp(more), rel=1e-5)
    # A quarter of 513 tokens, of which the first has nothing before it.
    quarters = [(places - 512) * 4 // 513 == i for i in range(4)]
    assert [int(q.sum()) for q in quarters] == [128, 128, 128, 128]
    for part, inside in zip(row.parts, quarters, strict=True):
        assert part.mean_kl.mean == pytest.approx(kl[inside].mean(), rel=1e-5)


def test_a_reading_does_not_differ_from_itself():
    reading = random_reading(np.arange(513, LENGTH))
    whole = score(FULL, "half", LENGTH, [compare(PASSAGE, reading, reading)], []).whole
    assert whole.mean_kl == whole.p99_kl == (0, 0, 0)
    assert whole.agreement == whole.perplexity_ratio == (1, 1, 1)


def test_intervals_are_over_documents_and_not_over_tokens():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        centres = rng.standard_normal(20)
        documents = [c + 0.1 * rng.standard_normal(50) for c in centres]
        found = bootstrap(documents, np.mean)
        assert found.low <= found.mean <= found.high
        held += found.low <= 0 <= found.high
    # 95 %, a little less for 20 documents; over tokens it would be some 20 %.
    assert 0.86 <= held / 200 <= 0.99


def row(policy: str, task: str, target: float | None = None) -> DocumentRecord:
    reading, other = (random_reading(np.arange(513, LENGTH), seed) for seed in (0, 3))
    compared = [compare(PASSAGE, reading, reading if policy == "full" else other)] * 3
    return score(Variant(policy, None, target), task, LENGTH, compared, [])


def test_page_and_plot(tmp_path):
    variants = [("full", None), ("diffxkv", 4.0), ("diffxkv", 8.0), ("int4", None)]
    rows = [row(name, task, target) for name, target in variants for task in ("half", "grow")]
    page = markdown(rows, "about")
    assert "## 1,025 tokens" in page
    for start in ("| full | half | 3 |", "| diffxkv at 4× | grow | 3 |", "| int4 | half | 3 |"):
        assert start in page
    plot(tmp_path / "rows.png", rows)
    assert (tmp_path / "rows.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["/nowhere.txt"], "/nowhere.txt: No such file"),
        (["--tasks", "vt"], "unknown task 'vt' on documents; one of: half, grow, shared"),
        (["--lengths", "127"], "documents of 127 tokens have no half of 64"),
        (["--samples", "1"], "task 'shared' needs two documents"),
    ],
)
def test_eval_refuses_in_one_line(options, message, capsys):
    assert main(["eval", "--documents", *options]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
