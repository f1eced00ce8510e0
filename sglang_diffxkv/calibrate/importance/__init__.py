# SPDX-License-Identifier: Apache-2.0
"""Learning from texts what of a cache the texts themselves need, when they are read again."""
