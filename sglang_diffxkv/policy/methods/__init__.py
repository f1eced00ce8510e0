# SPDX-License-Identifier: Apache-2.0
"""Policies, one a file, each with the settings that it alone has."""
