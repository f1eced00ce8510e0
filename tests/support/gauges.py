# SPDX-License-Identifier: Apache-2.0
"""What a server exposes to Prometheus, and what expressions ask for."""

from __future__ import annotations

import re
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

Labels = Mapping[str, str]


def exposed(text: str) -> dict[str, list[Labels]]:
    """Samples of the text of ``/metrics``, by their names: the labels of each."""
    found: dict[str, list[Labels]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def asked(expression: str) -> dict[str, dict[str, str]]:
    """SGLang's metrics and ours in a PromQL expression, each with what it says of their labels."""
    found: dict[str, dict[str, str]] = {}
    for name, selector in re.findall(r"(sglang:[A-Za-z0-9_:]+)(?:\{([^}]*)\})?", expression):
        labels = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', selector)
        found.setdefault(name, {}).update(labels)
    return found
