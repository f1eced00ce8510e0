# SPDX-License-Identifier: Apache-2.0
"""How a server's answers differ from those of full KV, in words and token by token."""

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from sglang_diffxkv.client import Client
from sglang_diffxkv.demo.chats import Answers, messages
from sglang_diffxkv.eval.ask import Distribution, agrees, distributions_after, divergence


class Agreement(NamedTuple):
    same_answers: int
    answers: int
    same_tokens: int
    """Tokens of full KV's answers before which both find the same token the likeliest."""
    tokens: int
    kl: float
    """KL(full || other), the mean over these tokens, in nats."""


def distributions(url: str, tokenizer: Any, full: Answers) -> list[Distribution]:
    """Before each token of all answers that full KV gave, from what the server's cache holds."""
    client = Client(url)
    found: list[Distribution] = []
    for asked, answer in full.items():
        prompt = tokenizer.apply_chat_template(
            messages(asked, full), add_generation_prompt=True, tokenize=False
        )
        ids, said = (_ids(tokenizer, text) for text in (prompt, answer))
        # Chat requests have no namespace either: the two share cached pages.
        found += distributions_after(client, ids, said)
    return found


def compare(
    full: Answers, given: Answers, found: Sequence[Distribution], others: Sequence[Distribution]
) -> Agreement:
    """Of the answers that another server has `given`, and of its distributions, the `others`."""
    pairs = list(zip(found, others, strict=True))
    return Agreement(
        sum(given[asked] == answer for asked, answer in full.items()),
        len(full),
        sum(agrees(a, b) for a, b in pairs),
        len(pairs),
        sum(divergence(a, b) for a, b in pairs) / max(1, len(pairs)),
    )


def summary(found: Agreement) -> str:
    """The agreement in two lines."""
    return (
        f"answers word for word as with full KV: {found.same_answers} of {found.answers}\n"
        f"likeliest token as with full KV: {found.same_tokens / max(1, found.tokens):.1%} of "
        f"{found.tokens:,}, KL {found.kl:.4f} nats per token"
    )


def side_by_side(full: Answers, given: Answers) -> str:
    """Every question with both answers, those of one document together."""
    lines = []
    for topic, questions in sorted(full, key=lambda asked: asked[0]):
        theirs, ours = full[topic, questions], given[topic, questions]
        lines += [f"[{topic}] {questions[-1]}", _indented("full KV", theirs)]
        lines += [_indented("sealed", "the same" if ours == theirs else ours)]
    return "\n".join(lines)


def _indented(who: str, answer: str) -> str:
    return textwrap.fill(
        " ".join(answer.split()), 100, initial_indent=f"  {who:<9}", subsequent_indent=" " * 11
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids
