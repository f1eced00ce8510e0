#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Triton kernels take NamedTuples whose fields may be None, which they tell by `is None`: an optional
# mask or bound of attention, say. In 3.6.0 such a tuple may be made and handed on, but a function
# that returns one is refused: "cannot convert None of type NoneType to tensor". In 3.8.0 it compiles.
# So a helper that moves a view of queries on to its head works or not by the version; what does in both
# is a helper that returns the moved pointer, and a tuple made where it is called.
# Needs uv and Python 3.11, and no GPU: compiles only.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/show.py" <<'PYTHON'
from typing import NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class View(NamedTuple):
    data: tl.tensor
    bound: tl.tensor | None


@triton.jit
def total(view):
    value = tl.load(view.data)
    if view.bound is not None:
        value = tl.minimum(value, view.bound)
    return value


@triton.jit
def moved(view):
    return View(view.data + 1, view.bound)


@triton.jit
def handing_on(x, out):
    tl.store(out, total(View(x + 1, None)))


@triton.jit
def returning(x, out):
    tl.store(out, total(moved(View(x, None))))


def compiles(kernel) -> bool:
    source = ASTSource(kernel, {"x": "*fp32", "out": "*fp32"})
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
    except Exception as error:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        print(f"  {kernel.__name__}: {type(error).__name__}: {str(cause).splitlines()[-1]}")
        return False
    print(f"  {kernel.__name__}: compiled")
    return True


print("triton", triton.__version__)
found = compiles(handing_on), compiles(returning)
assert found == (True, triton.__version__ != "3.6.0"), f"another behaviour: {found}"
PYTHON
for version in 3.8.0 3.6.0; do
    uv venv --quiet --python 3.11 "$work/$version"
    VIRTUAL_ENV=$work/$version uv pip install --quiet "triton==$version"
    TRITON_CACHE_DIR=$work/cache-$version "$work/$version/bin/python" -P "$work/show.py"
done
echo "expected: what may be handed on may be returned"
