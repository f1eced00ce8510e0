# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels share: launching, the device, addresses of sealed bytes."""
