#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs `python -m MODULE ARGS` of this checkout with whatever Python has torch and Triton: neither
# SGLang nor an installation of this package is needed. kernels/ and patches/ are linked to where
# they are imported, inside the package (see setup.py).
#
#   bench/gpu/run.sh bench.gpu --seconds 540
#   PYTHON=python3.12 RUN="compute-sanitizer --tool memcheck" bench/gpu/run.sh bench.gpu.verify pack
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
tree=$root/build/gpu

link() { # as it is where it is right: another run may be using it
    [ "$(readlink "$2")" = "$1" ] || ln -sfn "$1" "$2"
}

mkdir -p "$tree/sglang_diffxkv"
link "$root/bench" "$tree/bench"
link "$root/tests" "$tree/tests"
for part in "$root"/sglang_diffxkv/* "$root/kernels" "$root/patches"; do
    link "$part" "$tree/sglang_diffxkv/$(basename "$part")"
done
export PYTHONSAFEPATH=1 PYTHONPATH="$tree${PYTHONPATH:+:$PYTHONPATH}"
exec ${RUN:-} "${PYTHON:-python3}" -m "$@"
