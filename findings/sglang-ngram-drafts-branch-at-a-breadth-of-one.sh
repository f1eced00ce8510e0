#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SGLang's NGRAM speculation drafts trees. With `--speculative-ngram-min-bfs-breadth 1` and
# `--speculative-ngram-max-bfs-breadth 1` one expects chains, which are what attention backends and KV
# caches without custom masks can verify. The breadth bounds the branches of one match, though, and the
# corpus merges the matches of all suffixes of the text: where a long and a short suffix were followed by
# different tokens, both follow the last token. Nodes that no match has filled are tokens 0 below it, too.
# Who wants a chain has to take one branch of the tree and leave the rest.
# Needs uv, Python 3.11 and a C++ compiler; runs on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
uv venv --quiet --python 3.11 "$work/env"
VIRTUAL_ENV=$work/env uv pip install --quiet sglang==0.5.23 torch==2.14.1
cat >"$work/show.py" <<'PYTHON'
from importlib.metadata import version

import numpy as np
from sglang.srt.speculative.cpp_ngram.ngram_corpus import NgramCorpus

NODES = 8
print("sglang", version("sglang"), "- breadth 1, at least and at most")
corpus = NgramCorpus(
    min_bfs_breadth=1, max_bfs_breadth=1, match_type="BFS", capacity=10_000, max_trie_depth=18,
    draft_token_num=NODES, external_sam_budget=0, external_corpus_max_tokens=10_000,
)
corpus.batch_put([[11, 12, 13, 14, 15, 16], [17, 18, 14, 50, 51, 52, 53]])
corpus.synchronize()
drafts, mask = corpus.batch_get(["request"], [[11, 12, 13, 14]], [4])
ancestors = np.asarray(mask).reshape(NODES, NODES).astype(bool)
print("seen: 11 12 13 14 15 16, and 17 18 14 50 51 52 53; now: 11 12 13 14")
children = {}
for node in range(1, NODES):
    parent = int(np.flatnonzero(ancestors[node, :node])[-1])
    children.setdefault(parent, []).append(int(drafts[node]))
    print(f"  node {node}: token {int(drafts[node])}, below token {int(drafts[parent])}")
print(f"children of the last token: {children[0]}; expected: one")
assert sorted(children[0]) == [0, 15, 50], "another tree"
PYTHON
cd "$work"
"$work/env/bin/python" -P "$work/show.py" 2>"$work/log" || { tail -n 5 "$work/log"; exit 1; }
