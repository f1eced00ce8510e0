# SPDX-License-Identifier: Apache-2.0
"""Learning from prompts how much each layer needs."""
