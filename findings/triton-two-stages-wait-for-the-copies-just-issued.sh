#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# In Triton, a loop with num_stages=2 issues the asynchronous copies of the next tile behind products
# of this one, and begins its next iteration by waiting until none is under way: a copy has less than
# an iteration to arrive, and a loop with little work per tile, such as attention of one token over a
# KV cache, waits nearly the whole latency of memory for each. From three stages on, one group of
# copies stays under way while the loop works. The same in two versions, for two architectures.
# Needs uv and Python 3.11; compiles without a GPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/show.py" <<'PYTHON'
import re
import subprocess
import tempfile

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def attend(q, k, out, n, D: tl.constexpr, N: tl.constexpr):
    row, column, dim = tl.arange(0, 16), tl.arange(0, N), tl.arange(0, D)
    query = tl.load(q + row[:, None] * D + dim[None, :])
    total = tl.zeros((16, D), tl.float32)
    for first in range(0, n, N):
        keys = tl.load(k + (first + column)[:, None] * D + dim[None, :])
        total += tl.dot(tl.dot(query, keys.T).to(tl.float16), keys)
    tl.store(out + row[:, None] * D + dim[None, :], total)


def loop(arch, stages):
    """The machine code of the loop."""
    types = {"q": "*fp16", "k": "*fp16", "out": "*fp32", "n": "i32"}
    source = ASTSource(
        attend,
        types | {"D": "constexpr", "N": "constexpr"},
        {(4,): 128, (5,): 64},
        {(i,): [["tt.divisibility", 16]] for i in range(4)},
    )
    options = {"num_warps": 4, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = [(int(at, 16), x) for at, x in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)]
    jumps = [(int(m[1], 16), at) for at, x in code if (m := re.search(r"BRA.* 0x([0-9a-f]+)", x))]
    first, last = max((j for j in jumps if j[0] < j[1]), key=lambda jump: jump[1] - jump[0])
    return [x for at, x in code if first <= at <= last]


print("triton", triton.__version__)
for arch in (80, 90):
    for stages in (2, 3, 4):
        body = loop(arch, stages)
        waits = [(i, x) for i, x in enumerate(body) if x.startswith("DEPBAR")]
        copies = [i for i, x in enumerate(body) if "LDGSTS" in x]
        products = [i for i, x in enumerate(body) if "MMA" in x]
        place, wait = waits[0]
        allowed = int(re.search(r"SB0, 0x(\d)", wait)[1])
        print(
            f"sm_{arch}, num_stages={stages}: of {len(body)} instructions, copies are issued at "
            f"{copies[0]} to {copies[-1]}, products from {products[0]} on; instruction {place} "
            f"waits until {allowed} groups of copies are under way"
        )
        assert len(waits) == 1 and place < products[0] < copies[0], "the order has changed"
        assert allowed == stages - 2, "the number of groups has changed"
print("so two stages leave no copy under way when the products of a tile begin")
PYTHON
for version in 3.8.0 3.6.0; do
    uv venv --quiet --python 3.11 "$work/$version"
    VIRTUAL_ENV=$work/$version uv pip install --quiet "triton==$version"
    "$work/$version/bin/python" -P "$work/show.py"
done
