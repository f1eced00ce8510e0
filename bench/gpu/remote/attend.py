# SPDX-License-Identifier: Apache-2.0
"""One decode attention per mix of tiers, for a profiler to look at."""

from __future__ import annotations

import torch

from bench.gpu.shapes import LLAMA_8B, PURE, TINY, USUAL, Load, draw
from bench.gpu.timing.decode import our_candidates
from sglang_diffxkv.kernels.gpu.launch import is_interpreted


def main() -> None:
    device = torch.device("cpu" if is_interpreted() else "cuda")
    torch.manual_seed(0)
    model, size = (TINY, (2, 192)) if is_interpreted() else (LLAMA_8B, (64, 8192))
    for mix in (*PURE, USUAL):
        load = Load(model, *size, mix)
        our_candidates(load, draw(load, 1, device), 1)["diffxkv"](0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(load.name, flush=True)


if __name__ == "__main__":
    main()
