# SPDX-License-Identifier: Apache-2.0
"""The basis that sealed keys and values are stored in: rotated, and keys without their mean."""
