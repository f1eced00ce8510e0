# SPDX-License-Identifier: Apache-2.0
"""What to keep of sealed pages, and in which tier; no file here imports SGLang."""
