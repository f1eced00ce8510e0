# SPDX-License-Identifier: Apache-2.0
"""Makes every process that starts with this folder on its path take the CPU for a GPU.

With TRITON_INTERPRET=1 it then runs the code that serves GPUs, kernels included, interpreted.
"""

import sys

import sglang_diffxkv.kernels.gpu.device as device

device.on_gpu = lambda x: True
print("as_gpu: the CPU is taken for a GPU", file=sys.stderr)
