# SPDX-License-Identifier: Apache-2.0
"""Operations on sealed pages, imported as `sglang_diffxkv.kernels`: one folder per operation."""
