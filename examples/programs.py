# SPDX-License-Identifier: Apache-2.0
"""A program of many branches over one document, in SGLang's frontend language.

A tree of thoughts: each question about a document is a branch, each branch forks into drafts of an
answer, of which a regex has the model name the best one, and a select gives the verdict over all.
The document is computed and sealed once, at the first fork; how many tokens the branches then read
from the cache is printed, and what the server's pool holds. For any server, and any text:
`python examples/programs.py --url http://127.0.0.1:30000 --document README.md`.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import requests
import sglang as sgl

QUESTIONS = (
    "What is this text about?",
    "What would surprise a beginner?",
    "Which term does it use without explaining it?",
    "What is missing?",
)
DRAFTS = 3
VERDICTS = ("clear", "unclear")


class Review(NamedTuple):
    answers: list[str]
    """The best draft to each question."""
    verdict: str
    calls: list[dict[str, Any]]
    """SGLang's `meta_info` of each generation."""


@sgl.function
def review(s: Any, document: str, questions: Sequence[str]) -> Review:
    """Draft answers to all questions about the document, keep the best ones, and judge by them."""
    s += sgl.system(f"You review this text, one sentence at a time.\n\n{document}")

    branches = s.fork(len(questions))
    for branch, question in zip(branches, questions, strict=True):
        branch += sgl.user(question)

    drafts = [branch.fork(DRAFTS) for branch in branches]
    for draft in flat(drafts):  # all of them run at once: nothing waits until a result is read
        draft += sgl.assistant(sgl.gen("answer", max_tokens=48, temperature=0.8))

    for branch, group in zip(branches, drafts, strict=True):
        listed = "\n".join(f"{n}. {draft['answer'].strip()}" for n, draft in enumerate(group, 1))
        branch += sgl.assistant(listed)
        branch += sgl.user("Which of these answers is best?")
        branch += sgl.assistant(sgl.gen("best", regex=f"[1-{DRAFTS}]"))

    pairs = zip(branches, drafts, strict=True)
    answers = [group[int(branch["best"]) - 1]["answer"].strip() for branch, group in pairs]
    s += sgl.user("\n".join(["A review said:", *answers, "Is the text clear or unclear?"]))
    s += sgl.assistant(sgl.select("verdict", choices=list(VERDICTS)))

    calls = [draft.get_meta_info("answer") for draft in flat(drafts)]
    calls += [branch.get_meta_info("best") for branch in branches]
    return Review(answers, s["verdict"], calls)


def flat(groups: Iterable[Iterable[Any]]) -> list[Any]:
    return [state for group in groups for state in group]


def main(argv: Sequence[str] | None = None) -> Review:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--document", type=Path, help="a text; default: one of Python's manual")
    options = parser.parse_args(argv)
    document = options.document.read_text() if options.document else topics["slicings"]

    backend = sgl.RuntimeEndpoint(options.url)
    found: Review = review.run(document, QUESTIONS, backend=backend, temperature=0).ret_value
    for question, answer in zip(QUESTIONS, found.answers, strict=True):
        print(f"{question}\n    {answer}")
    print(f"The text is {found.verdict}.\n")

    prompt = sum(call["prompt_tokens"] for call in found.calls)
    cached = sum(call["cached_tokens"] for call in found.calls)
    print(f"{len(found.calls)} generations: {cached} of {prompt} prompt tokens came from the cache")
    stats = requests.get(f"{options.url}/diffxkv/stats", timeout=60)
    if stats.ok:  # stock SGLang has no such page
        pool = stats.json()
        held, mib = pool["tokens_held"], pool["bytes_in_use"] / 2**20
        times = pool["physical_compression"]
        print(f"The pool holds {held} tokens in {mib:.1f} MiB, {times:.1f} times denser than raw")
    return found


if __name__ == "__main__":
    main()
