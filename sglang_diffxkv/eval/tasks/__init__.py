# SPDX-License-Identifier: Apache-2.0
"""Synthetic long-context tasks with known answers, in the manner of RULER (arXiv 2404.06654)."""
