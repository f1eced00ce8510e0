# SPDX-License-Identifier: Apache-2.0
"""`sglang-diffxkv model`: small models that people use, from the package registry, to try with."""
