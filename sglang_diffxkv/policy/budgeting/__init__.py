# SPDX-License-Identifier: Apache-2.0
"""How many bytes each layer, head and token gets: solving, learning, plans."""
