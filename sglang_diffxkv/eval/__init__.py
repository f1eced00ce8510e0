# SPDX-License-Identifier: Apache-2.0
"""What a policy costs in accuracy: tasks, a run on real servers, figures and a report."""
