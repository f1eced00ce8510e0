# SPDX-License-Identifier: Apache-2.0
"""Learning from texts what their tokens matter, and from prompts what each layer needs."""
