"""The board and the alert rules speak of what a live server shows, and of all of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml
from live_server import Server, graph
from processes import REPOSITORY
from prometheus_client.parser import text_string_to_metric_families
from runpod_house import eventually

from common.contract import EmbeddingReport, Report
from control_plane.jobs.store import Waiting
from control_plane.nexus.metrics import NexusMetrics
from control_plane.operations.metrics import Metrics

RULES = [
    rule
    for group in yaml.safe_load((REPOSITORY / "deploy" / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
BOARD: dict[str, Any] = json.loads((REPOSITORY / "deploy" / "grafana.json").read_text(encoding="utf-8"))
PANELS = [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", [])]
OF_PROMETHEUS = {"instance", "job"}
"""Labels that it puts to each series itself."""


def parsed(expression: str) -> Any:
    """By the parser of Prometheus' language; Grafana's variables stand for values."""
    plain = re.sub(r"\$__(rate_interval|interval|range)", "5m", expression)
    return promql_parser.parse(plain)


def selectors(node: Any) -> Iterator[Any]:
    """All selectors of series in an expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
        inner = getattr(node, name, None)
        if inner is not None and not isinstance(inner, str | int | float):
            yield from selectors(inner)
    for inner in getattr(node, "args", None) or ():
        yield from selectors(inner)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Every series that a live server shows after an export and a document, with its labels; what it could show besides
    (another backend, failures, engines, limits, webhooks) is made to show in a registry of the same class."""
    server = Server(tmp_path_factory.mktemp("shown") / "root", worker_slots=1)
    try:
        server.start()
        assert server.wait(server.submit(graph()))["type"] == "job_completed"
        server.client.put("/v1/collections/notes", json={"dimension": 2}).raise_for_status()
        server.client.put("/v1/collections/notes/documents/a", json={"vector": [1, 1]}).raise_for_status()
        eventually(lambda: "vectorizer_nexus_sync_total" in server.client.get("/metrics").text)
        eventually(lambda: "event_loop_lag_seconds_bucket" in server.client.get("/metrics").text)
        live = server.client.get("/metrics").text
    finally:
        server.close()
    metrics = Metrics()
    report = Report()
    report.embedding = EmbeddingReport(provider="p", model="m", texts=1)
    report.timings.write = report.timings.cold_start = report.timings.embed = 1.0
    metrics.completed(report, "b", 1.0)
    figures = NexusMetrics(metrics.registry)
    for series in [*vars(metrics).values(), *vars(figures).values()]:
        if labels := getattr(series, "_labelnames", ()):
            series.labels(*("x" for _ in labels))
    rest = metrics.text(Waiting({}, 0.0, 0), streams=0, free={"root": 1}, troubles={}).decode()
    found: dict[str, set[str]] = {}
    for family in [*text_string_to_metric_families(live), *text_string_to_metric_families(rest)]:
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    names = {family.name for family in text_string_to_metric_families(live)}
    assert {family.name for family in text_string_to_metric_families(rest)} <= names
    return found


@pytest.mark.parametrize("expression", [*(rule["expr"] for rule in RULES), *PANELS])
def test_every_expression_parses_and_speaks_of_series_that_are_there(
    expression: str, shown: dict[str, set[str]]
) -> None:
    found = list(selectors(parsed(expression)))
    assert found
    for selector in found:
        if selector.name in RECORDED:
            continue
        assert selector.name in shown, selector.name
        used = {matcher.name for matcher in selector.matchers.matchers} - OF_PROMETHEUS
        assert used <= shown[selector.name], selector.name


@pytest.mark.parametrize("expression", [*(rule["expr"] for rule in RULES), *PANELS])
def test_every_label_that_is_grouped_by_is_there(expression: str, shown: dict[str, set[str]]) -> None:
    known = {label for labels in shown.values() for label in labels} | OF_PROMETHEUS
    for labels in re.findall(r"\bby \(([^)]*)\)", expression):
        assert {label.strip() for label in labels.split(",")} <= known


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: str(rule["alert"]))
def test_every_alert_says_what_it_means_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{rule['alert'].lower()}"
    page = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    headings = {line.strip("# ").strip("`") for line in page.splitlines() if line.startswith("#")}
    assert rule["alert"] in headings


def test_no_two_alerts_have_one_name_and_every_record_is_used() -> None:
    names = [rule["alert"] for rule in ALERTS]
    assert sorted(set(names)) == sorted(names)
    used = {selector.name for rule in ALERTS for selector in selectors(parsed(rule["expr"]))}
    assert used >= RECORDED


def test_every_figure_is_on_the_board_or_in_a_rule(shown: dict[str, set[str]]) -> None:
    used = {
        selector.name for text in [*PANELS, *(rule["expr"] for rule in RULES)] for selector in selectors(parsed(text))
    }
    plain = {re.sub(r"_(bucket|count|sum)$", "", name) for name in used}
    assert sorted({re.sub(r"_(bucket|count|sum)$", "", name) for name in shown} - plain) == []


def test_the_board_can_be_imported() -> None:
    """What Grafana asks of a board in a file: a uid, a schema that it can migrate, panels in its grid, a source that is
    chosen at import."""
    assert (BOARD["uid"], BOARD["schemaVersion"] >= 36) == ("memvid-export", True)
    assert "id" not in BOARD
    variables = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"
    used = {name for text in PANELS for name in re.findall(r"\$(\w+)", text) if not name.startswith("__")}
    assert used <= set(variables)
