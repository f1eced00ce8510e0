# SPDX-License-Identifier: Apache-2.0
"""Compressed KV cache for stock SGLang: sealed pages that keep RadixAttention prefix sharing."""
