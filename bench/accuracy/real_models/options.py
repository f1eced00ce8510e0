# SPDX-License-Identifier: Apache-2.0
"""The command line of benches that read a checkpoint's own states."""

from __future__ import annotations

import argparse
from pathlib import Path


def parse(description: str, documents: int) -> argparse.Namespace:
    """``model``, ``--documents`` and ``--length``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path, help="folder of a Hugging Face checkpoint")
    parser.add_argument("--documents", type=int, default=documents)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a document")
    return parser.parse_args()
