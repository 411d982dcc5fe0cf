"""The dashboard and the alerting rules under deploy/ ask for metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from support.processes import run_python

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
RULES = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """{sample name: the names of its labels} of a scrape after one checkout."""
    done = run_python(
        """
        import json, os, sys
        import dbsession
        from sqlalchemy import text
        from dbsession.watch.metrics import MetricsMiddleware
        from prometheus_client.parser import text_string_to_metric_families

        dbsession.configure({"default": f"sqlite:///{sys.argv[1]}/a.db"})
        with dbsession.session_scope():
            dbsession.get_dbsession()().execute(text("SELECT 1"))
        environ = {"PATH_INFO": "/metrics", "REQUEST_METHOD": "GET"}
        body = b"".join(MetricsMiddleware(None)(environ, lambda *_: None)).decode()
        families = text_string_to_metric_families(body)
        print(json.dumps({s.name: [*s.labels, "job", "instance"] for f in families for s in f.samples}))
        """,
        tmp_path_factory.mktemp("scrape"),
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("expression", EXPRESSIONS + [rule["expr"] for rule in RULES])
def test_expression_names_metrics_and_labels_of_a_scrape(samples, expression):
    names = set(re.findall(r"\bdbsession_\w+", expression))
    assert names and names <= set(samples), names - set(samples)
    labels = {label for name in names for label in samples[name]}
    assert set(re.findall(r'(\w+)(?:=~|=|!=)"', expression)) <= labels
    for grouping in re.findall(r"(?:by|on|ignoring|without) \(([\w, ]+)\)", expression):
        assert set(grouping.split(", ")) <= labels
    assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}")


def test_dashboard_and_rules_use_every_metric(samples):
    used = " ".join(EXPRESSIONS)
    for name in samples:
        ours = name.startswith("dbsession_") and not name.endswith(("_created", "_sum", "_count"))
        assert not ours or re.search(rf"\b{name}\b", used), name


def test_dashboard_can_be_imported():
    """Grafana asks for the data source by the variable, and nothing in it is of another Grafana."""
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert VARIABLES["database"]["query"]["query"] == "label_values(dbsession_checkouts_total, database)"
    assert "id" not in DASHBOARD and DASHBOARD["title"] and DASHBOARD["uid"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    places = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & places
        places |= cells
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
    assert {name for text in EXPRESSIONS for name in re.findall(r"\$(\w+)", text)} <= {*VARIABLES, "__rate_interval"}


def test_rules_are_named_in_the_runbook():
    runbook = (DEPLOY / "README.md").read_text()
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert f"| `{rule['alert']}` |" in runbook, rule["alert"]
