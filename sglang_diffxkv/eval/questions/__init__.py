# SPDX-License-Identifier: Apache-2.0
"""What a policy costs on tasks with known answers."""
