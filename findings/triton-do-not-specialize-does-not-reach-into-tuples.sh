#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Triton kernels take NamedTuples, and `do_not_specialize` takes their names without a word, but does
# nothing about them: each number in a tuple is specialised all the same, as 1, as a multiple of 16 or
# as neither, where an argument of its own in the same list is not. A kernel that takes its batch as a
# tuple (how many sequences, how many pages), as attention over a paged KV cache might, is compiled up
# to three times for each such field, in the middle of serving, whenever a batch has one sequence or
# sixteen. What varies with the batch has to stay an argument. The same in two versions.
# Needs uv and Python 3.11, and no GPU: asks the function by which Triton tells launches apart.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/show.py" <<'PYTHON'
from typing import NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature


class Batch(NamedTuple):
    sequences: int
    pages: int


@triton.jit(do_not_specialize=["batch", "sequences", "pages"])
def kernel(batch, sequences, pages, out):
    tl.store(out, batch.sequences + batch.pages + sequences + pages)


backend = make_backend(GPUTarget("cuda", 90, 32))
bind = create_function_from_signature(kernel.signature, kernel.params, backend)
print("triton", triton.__version__, "do_not_specialize =", kernel.do_not_specialize)
in_tuple, alone = set(), set()
for sequences, pages in ((1, 1), (16, 32), (17, 33), (1, 48), (3, 5)):
    _, specialisation, _ = bind(
        batch=Batch(sequences, pages), sequences=sequences, pages=pages, out=0
    )
    in_tuple.add(str(specialisation[0]))
    alone.add(str(specialisation[1:3]))
    print(f"{sequences} sequences, {pages} pages: in a tuple {specialisation[0]}")
    print(f"{sequences} sequences, {pages} pages: arguments  {specialisation[1:3]}")
print(f"five batches: compiled {len(in_tuple)} times for the tuple, {len(alone)} time without it")
assert len(alone) == 1, "plain arguments are specialised now"
assert len(in_tuple) == 4, "do_not_specialize reaches into tuples now"
PYTHON
for version in 3.8.0 3.6.0; do
    uv venv --quiet --python 3.11 "$work/$version"
    VIRTUAL_ENV=$work/$version uv pip install --quiet "triton==$version"
    "$work/$version/bin/python" -P "$work/show.py"
done
