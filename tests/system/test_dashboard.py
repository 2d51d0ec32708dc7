"""The dashboard and the alerts ask for metrics and labels that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.monitoring.metrics import METRICS

DEPLOY = Path(__file__).parents[2] / "deploy"
LABELS = {
    name: {*m.labels, "le"} if m.buckets else {*m.labels} for m in METRICS for name in m.shown
}


def panels() -> list[dict[str, Any]]:
    found = json.loads((DEPLOY / "grafana" / "rayward.json").read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def alerts() -> list[str]:
    rules = yaml.safe_load((DEPLOY / "prometheus-rules.yml").read_text())
    return [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]] + alerts()


@pytest.mark.parametrize("query", queries())
def test_a_query_asks_for_what_there_is(query: str) -> None:
    names = re.findall(r"ray_\w+", query)
    assert names
    assert set(names) <= LABELS.keys()
    known = set.intersection(*(LABELS[name] for name in names))
    by = [
        label.strip() for found in re.findall(r"by \((.*?)\)", query) for label in found.split(",")
    ]
    matched = re.findall(r"[{,]\s*(\w+)\s*=", query)
    assert {*by} <= known
    assert all(any(label in LABELS[name] for name in names) for label in matched)
    for name in names:
        if name.endswith("_total"):
            assert re.search(rf"(rate|increase)\({name}", query), (
                "a counter by itself tells nothing"
            )


def test_every_metric_is_shown() -> None:
    asked = " ".join(queries())
    for metric in METRICS:
        assert any(re.search(rf"{name}\b", asked) for name in metric.shown), metric.name


def test_the_panels_do_not_overlap_and_take_any_data_source() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (column, line)
            for column in range(place["x"], place["x"] + place["w"])
            for line in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["description"]


def test_prometheus_reads_the_file_that_the_service_writes() -> None:
    from serve.monitoring.metrics import _TARGETS_FILE

    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    [scrape] = config["scrape_configs"]
    [files] = scrape["file_sd_configs"]
    assert files["files"] == [f"/tmp/ray/session_latest/{_TARGETS_FILE}"]
    [keep] = scrape["metric_relabel_configs"]
    assert all(re.fullmatch(keep["regex"], name) for name in LABELS)
    assert all((DEPLOY / name).exists() for name in config["rule_files"])
