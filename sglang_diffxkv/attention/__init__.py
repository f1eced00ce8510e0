# SPDX-License-Identifier: Apache-2.0
"""The attention backend: prefills, and decode steps on the host and on the device."""
