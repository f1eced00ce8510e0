# SPDX-License-Identifier: Apache-2.0
"""The files of `deploy/monitoring`, as far as no server is needed to check them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.monitoring import FOLDER, alerts, dashboard, expressions, filled_in, load

PROMTOOL = shutil.which("promtool")
ROWS = {"row"}

with_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="no promtool here: apt-get install prometheus"
)


def promtool(*arguments: object) -> None:
    command = [str(PROMTOOL), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_images_are_pinned_and_files_are_there() -> None:
    compose = load("compose.yml")
    for service in compose["services"].values():
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            is_ours = source.startswith("./")
            assert (FOLDER / source).exists() if is_ours else source in compose["volumes"]


def test_paths_and_addresses_agree() -> None:
    services = load("compose.yml")["services"]
    provider = load("grafana/provider.yml")["providers"][0]["options"]["path"]
    assert f"./grafana/dashboards:{provider}:ro" in services["grafana"]["volumes"]
    listens = "--web.listen-address=127.0.0.1:9090"
    assert listens in services["prometheus"]["command"]
    assert load("grafana/datasource.yml")["datasources"][0]["url"] == "http://127.0.0.1:9090"


def test_the_dashboard_has_what_an_import_needs() -> None:
    board = dashboard()
    assert board["uid"] == "diffxkv" and board["title"] and board["schemaVersion"] >= 36
    assert "id" not in board, "it would overwrite another dashboard"
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) > 20
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
        assert panel["title"] and panel["type"] in {"timeseries", "stat"} | ROWS
        if panel["type"] in ROWS:
            continue
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(s == {"type": "prometheus", "uid": "${datasource}"} for s in sources)
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) > 0


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_alerts_say_what_they_mean_and_what_to_do() -> None:
    rules = alerts()
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 5
    for rule in rules:
        assert rule["labels"]["severity"] in {"info", "warning"}
        assert "{{ $labels.instance }}" in rule["annotations"]["summary"]
        assert len(rule["annotations"]["description"].split()) > 20


def test_each_alert_is_tried() -> None:
    expected: list[dict[str, Any]] = load("prometheus/alerts_test.yml")["tests"]
    samples = expected[0]["promql_expr_test"][0]["exp_samples"]
    tried = {re.findall(r'"(.*)"', sample["labels"])[0] for sample in samples}
    assert tried == {rule["alert"] for rule in alerts()}


@with_promtool
def test_prometheus_takes_configuration_and_alerts() -> None:
    promtool("check", "config", FOLDER / "prometheus" / "prometheus.yml")
    promtool("test", "rules", FOLDER / "prometheus" / "alerts_test.yml")


@with_promtool
def test_prometheus_takes_every_expression(tmp_path: Path) -> None:
    """Of the dashboard, too: as recording rules, with Grafana's variables filled in."""
    rules = [
        {"record": f"rule:{number}", "expr": filled_in(expression, "1m")}
        for number, (_, expression) in enumerate(expressions())
    ]
    assert len(rules) > 40
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    promtool("check", "rules", path)
