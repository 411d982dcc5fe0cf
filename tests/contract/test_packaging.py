"""What an index page shows, and the name that everything is installed by."""

from __future__ import annotations

import configparser
import re
from importlib import metadata
from pathlib import Path

import pytest

from dbsession.watch import versions
from support.processes import run_python

ROOT = Path(__file__).resolve().parents[2]
ABOUT = (ROOT / "dbsession" / "ABOUT.md").read_text()
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def test_index_page_has_no_link_and_no_picture() -> None:
    """They would lead nowhere there."""
    assert SETUP["metadata"]["long_description"] == "file: dbsession/ABOUT.md"
    for mark in ("](", "][", "]:", "<img", "<a ", "src=", "href=", "://github"):
        assert mark not in ABOUT, mark


def test_example_of_the_index_page_answers(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)^```$", ABOUT, re.M | re.S)
    (tmp_path / "shop.py").write_text(block)
    run_python(
        """
        import os, sys
        os.chdir(sys.argv[1])
        sys.path.insert(0, sys.argv[1])
        import dbsession, shop

        body = shop.application({"REQUEST_METHOD": "GET"}, lambda status, headers: None)
        assert b"".join(body) == b"42\\n"
        assert dbsession.get_engine().pool.checkedout() == 0
        """,
        tmp_path,
    )


OTHER_PROJECT = re.compile(r"\binstall (-\S+ )*'?\"?dbsession\b")


def test_every_dependency_has_a_lowest_version() -> None:
    """Which `tests/run --lowest` installs: of one without it would take the newest."""
    lists = [SETUP["options"]["install_requires"], *SETUP["options.extras_require"].values()]
    named = [line.strip() for each in lists for line in each.splitlines() if line.strip()]
    assert len(named) > 20
    for requirement in named:
        assert ">=" in requirement or requirement.startswith("gevent-dbsession["), requirement


def test_no_text_installs_the_other_project_called_dbsession() -> None:
    for folder in ("dbsession", "deploy", "tests", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix not in (".png", ".pyc") and path.is_file() and "data" not in path.parts:
                assert not OTHER_PROJECT.search(path.read_text(errors="replace")), path
    assert not OTHER_PROJECT.search((ROOT / "README.md").read_text())
    assert SETUP["metadata"]["name"] == "gevent-dbsession"


def test_version_names_the_other_project_when_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"dbsession": "0.6.7", "gevent": "26.1"}

    def version(name: str) -> str:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(versions.metadata, "version", version)
    ours, libraries, foreign = versions.lines()
    assert ours.startswith("gevent-dbsession ") and libraries.endswith(", gevent 26.1")
    assert "`dbsession` 0.6.7" in foreign
    del found["dbsession"]
    assert versions.lines() == [ours, libraries]
