# SPDX-License-Identifier: Apache-2.0
"""The embedded model: a Hugging Face checkpoint in this folder; README.md says what it can do."""

from pathlib import Path

BUNDLED = Path(__file__).parent
