# SPDX-License-Identifier: Apache-2.0
"""Every process of a server that starts with this folder on its path runs with the shim.

With TRITON_INTERPRET=1 it also takes the CPU for a GPU, and runs the code that serves GPUs.
"""

import os

from bench.gpu.remote.shim import stand_ins

stand_ins.install()
if os.environ.get("TRITON_INTERPRET") == "1":
    import sglang_diffxkv.kernels.gpu.device as device

    device.on_gpu = lambda x: True
