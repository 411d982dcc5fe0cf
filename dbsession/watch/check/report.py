"""The check: everything that can be known of the databases before requests come."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy.engine import Engine

from dbsession.errors import DBSessionError, describe, masked, plain, raised_at
from dbsession.green import api, hub
from dbsession.watch.check import budget, findings, probe
from dbsession.watch.check.budget import Workers
from dbsession.watch.check.facts import Facts
from dbsession.watch.check.finding import Finding, worst

logger = logging.getLogger("dbsession.watch.check")


@dataclass(frozen=True)
class Report:
    """What was found. Frozen, and holds no connection.

    Attributes:
        workers: what the budget was reckoned for.
        facts: of each database whose configuration can be used.
        findings: in the order of the databases; the environment and the budget last.
    """

    workers: Workers
    facts: tuple[Facts, ...]
    findings: tuple[Finding, ...]

    @property
    def status(self) -> str:
        """`error`, `warning` or `ok`."""
        return worst(self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; README.md lists the keys."""
        return {
            "status": self.status,
            "workers": self.workers.workers,
            "requests_at_once": self.workers.at_once,
            "databases": {each.name: asdict(each) for each in self.facts},
            "findings": [asdict(finding) for finding in self.findings],
        }


def examine(names: Iterable[str], engine_of: Callable[[str], Engine], workers: Workers) -> Report:
    """Look at the named databases, all at once. Takes probe.BOUND_S at most; switches greenlets.

    Args:
        names: of the databases.
        engine_of: gives the engine of a name, or raises what becomes a finding.
        workers: who will use them.
    """
    found: list[Finding] = []
    engines: dict[str, Engine] = {}
    for name in names:
        shown = (masked(str(name)),)  # what is no name of a database may be its URL
        try:
            engines[name] = engine_of(name)
        except DBSessionError as error:
            found.append(Finding("error", "configuration", shown, str(error)))
        except Exception as error:  # of a callable that is asked for it; its text may hold anything, a password too
            what = f"asking for its configuration failed with {describe(error)} at {raised_at(error)}"
            found.append(Finding("error", "configuration", shown, what, "Correct the function that is asked."))
    seen = tuple(probe.gather_all(engines))
    for each in seen:
        found.extend(findings.of(each))
    found.extend(findings.of_environment())
    found.extend(budget.of(workers, seen))
    return Report(workers, seen, tuple(found))


def in_worker(cfg: Any) -> None:
    """Look at the databases of this worker's application, and log what is wrong; returns at once.

    Args:
        cfg: gunicorn's configuration.
    """
    workers = Workers.of_gunicorn(cfg)
    # A hub that does not run for as long as the process (that of a sync worker, say) would never come to it.
    (hub.run_aside if hub.lasts() else hub.run_in_thread)(lambda: _log(workers))


def _log(workers: Workers) -> None:
    try:
        names = api.manager.known()
        report = examine(names, api.get_engine, workers)
    except Exception as error:  # a worker never fails for having been looked at
        logger.warning("dbsession check could not be made: %s.", describe(error))
        return
    for finding in report.findings:
        if finding.level in ("warning", "error"):
            # In one line, whatever a server or a configuration wrote into it.
            text = plain(" ".join(f"{finding.found}. {finding.change}".split()))
            level = logging.ERROR if finding.level == "error" else logging.WARNING
            logger.log(level, "dbsession check: %s: %s", ", ".join(finding.databases) or finding.check, text)
    if names and report.status == "ok":
        logger.info("dbsession check: nothing is wrong with %s.", ", ".join(names))
