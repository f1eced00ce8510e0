# SPDX-License-Identifier: Apache-2.0
"""C++ kernels for the CPU: compiling, loading and the headers that the operations share."""
