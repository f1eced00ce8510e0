# SPDX-License-Identifier: Apache-2.0
"""The tasks in plain English, for models that were trained on language."""
