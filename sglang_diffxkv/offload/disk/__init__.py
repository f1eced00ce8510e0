# SPDX-License-Identifier: Apache-2.0
"""A content-addressed store of page payloads in a folder; nothing here knows SGLang or torch."""
