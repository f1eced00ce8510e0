# SPDX-License-Identifier: Apache-2.0
"""Importance that does not depend on the question: predicted from what a token itself holds."""
