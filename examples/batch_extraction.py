# SPDX-License-Identifier: Apache-2.0
"""Structured extraction from many documents at once, behind one instruction that all share.

Every prompt starts with the same instruction, which the server computes and seals once, and every
answer is JSON by the schema of `Card`. Printed are the cards, tokens per second, and how much of
the prompts came from the cache. For any server that runs with `--enable-cache-report`:
`python examples/batch_extraction.py --url http://127.0.0.1:30000 *.txt`.
"""

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Literal, NamedTuple

from openai import AsyncOpenAI
from openai.types import CompletionUsage
from pydantic import BaseModel, Field

INSTRUCTION = """You index the manual of a programming language. Read a page and fill in its card.

kind: what the page is about. A "statement" does something and has no value, an "expression" has a
value, a "type" is what values are of, and a "concept" is all else.
level: who needs the page. A "beginner" in the first week, a "practitioner" at work, an
"implementer" only to write an interpreter.
examples: how many pieces of code it shows, 9 if more.
title: a few words by which a reader would look for the page. Do not repeat its first line.

Judge by the page alone. Answer with the card as JSON, and with nothing else."""


class Card(BaseModel):
    """What is extracted from a document."""

    kind: Literal["statement", "expression", "type", "concept"]
    level: Literal["beginner", "practitioner", "implementer"]
    examples: Annotated[int, Field(ge=0, le=9)]
    title: Annotated[str, Field(max_length=40)]


class Extraction(NamedTuple):
    card: Card
    usage: CompletionUsage


async def extract(client: AsyncOpenAI, document: str) -> Extraction:
    answer = await client.chat.completions.parse(
        model="default",
        messages=[
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": document},
        ],
        response_format=Card,
        temperature=0,
    )
    card, usage = answer.choices[0].message.parsed, answer.usage
    assert card is not None and usage is not None
    return Extraction(card, usage)


async def extract_all(url: str, documents: Sequence[str], at_once: int) -> list[Extraction]:
    """In the order of the documents."""
    gate = asyncio.Semaphore(at_once)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

        async def one(document: str) -> Extraction:
            async with gate:
                return await extract(client, document)

        # One goes ahead: requests sent together cannot share what none of them has computed yet.
        first = await one(documents[0])
        return [first, *await asyncio.gather(*map(one, documents[1:]))]


def main(argv: Sequence[str] | None = None) -> list[Extraction]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--at-once", type=int, default=16, help="requests")
    parser.add_argument("documents", nargs="*", type=Path, help="default: Python's manual, in part")
    options = parser.parse_args(argv)
    documents = {path.name: path.read_text() for path in options.documents}
    documents = documents or {name: text for name, text in topics.items() if len(text) < 1200}

    begin = time.monotonic()
    found = asyncio.run(extract_all(options.url, list(documents.values()), options.at_once))
    seconds = time.monotonic() - begin
    for name, extraction in zip(documents, found, strict=True):
        print(f"{name}: {extraction.card.model_dump_json()}")

    usages = [extraction.usage for extraction in found]
    prompt = sum(usage.prompt_tokens for usage in usages)
    output = sum(usage.completion_tokens for usage in usages)
    details = [usage.prompt_tokens_details for usage in usages]
    cached = sum(detail.cached_tokens or 0 for detail in details if detail)
    print(f"{len(found)} documents in {seconds:.1f} s: {output / seconds:.0f} output tokens/s")
    print(f"{cached} of {prompt} prompt tokens ({cached / prompt:.0%}) came from the cache")
    return found


if __name__ == "__main__":
    main()
