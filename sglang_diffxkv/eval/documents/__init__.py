# SPDX-License-Identifier: Apache-2.0
"""What a policy costs on running text: how far it is from full KV after a sealed beginning."""
