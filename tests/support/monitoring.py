# SPDX-License-Identifier: Apache-2.0
"""What `deploy/monitoring` holds: the dashboard, the alerts, and what they ask Prometheus for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

FOLDER = Path(__file__).parents[2] / "deploy" / "monitoring"

Labels = Mapping[str, str]


def load(path: str) -> Any:
    """A YAML or JSON file of the folder."""
    text = (FOLDER / path).read_text()
    return json.loads(text) if path.endswith(".json") else yaml.safe_load(text)


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = load("grafana/dashboards/diffxkv.json")
    return found


def alerts() -> list[dict[str, Any]]:
    groups = load("prometheus/alerts.yml")["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Each PromQL expression, with the name of what shows it."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for rule in alerts():
        yield rule["alert"], rule["expr"]


def filled_in(expression: str, interval: str) -> str:
    """An expression of the dashboard as Grafana asks it, of all servers."""
    for name, value in {"$__rate_interval": interval, "$instance": ".*"}.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


def asked(expression: str) -> Iterator[tuple[str, dict[str, str]]]:
    """SGLang's metrics and ours in an expression, each with the labels that it is to have; those
    that Prometheus adds, or that the user chooses, are left out."""
    for name, selector in re.findall(r"(sglang:[A-Za-z0-9_:]+)(?:\{([^}]*)\})?", expression):
        labels = dict(re.findall(r'(\w+)\s*=~?\s*"([^"]*)"', selector))
        labels.pop("instance", None)
        yield name, labels


def exposed(text: str) -> dict[str, list[Labels]]:
    """Samples of the text of ``/metrics``, by their names: the labels of each."""
    found: dict[str, list[Labels]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found
