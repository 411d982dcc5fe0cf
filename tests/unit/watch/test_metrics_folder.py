"""The folder that workers share, as far as it needs no gunicorn."""

from __future__ import annotations

from types import SimpleNamespace

from dbsession.watch import metrics_folder


def test_begin_says_what_it_could_not_remove_and_lets_the_server_start(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("DBSESSION_METRICS", "/metrics")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "gone"))
    metrics_folder.begin(SimpleNamespace(master_pid=0))
    assert caplog.messages == ["The metrics of an earlier run could not be removed: FileNotFoundError (2)."]
