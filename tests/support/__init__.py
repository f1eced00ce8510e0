# SPDX-License-Identifier: Apache-2.0
"""What tests and benches share: stores and pages made to order, toy models, real servers."""
