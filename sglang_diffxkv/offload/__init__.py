# SPDX-License-Identifier: Apache-2.0
"""Sealed pages beyond device memory: in host memory, and on disk."""
