# SPDX-License-Identifier: Apache-2.0
"""A program in SGLang's frontend language: fork over a shared context, join, select."""

import sglang as sgl

TOPICS = ("its cause", "its cost", "its remedy")
VERDICTS = ("urgent", "routine", "unclear")


def review(url: str, document: str) -> str:
    """Ask about three aspects of `document` at once, then choose a verdict; return it.

    Raises:
        RuntimeError: the server at `url` gave no answer or a verdict that was not offered.
    """
    state = _review.run(document=document, backend=sgl.RuntimeEndpoint(url), temperature=0)
    verdict = str(state["verdict"])
    if verdict not in VERDICTS:
        raise RuntimeError(f"sgl.select chose {verdict!r}, which was not among {VERDICTS}")
    return verdict


@sgl.function
def _review(s, document):  # type: ignore[no-untyped-def]  # the names are SGLang's convention
    s += document
    branches = s.fork(len(TOPICS))
    for branch, topic in zip(branches, TOPICS, strict=True):
        branch += f"\nThe report says about {topic}: "
        branch += sgl.gen("aspect", max_tokens=16, ignore_eos=True)
    for branch, topic in zip(branches, TOPICS, strict=True):
        s += f"\n- {topic}: {branch['aspect']}"
    s += "\nVerdict: " + sgl.select("verdict", choices=list(VERDICTS))
