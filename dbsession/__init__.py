"""A gevent-oriented WSGI database session manager.

    dbsession.configure({"default": "mysql+pymysql://app@db/shop"})
    session = dbsession.get_dbsession("default")          # anywhere, also at module level
    application = dbsession.DBSessionMiddleware(application)

Each greenlet or thread, and in it each unit of work, has its own session; the middleware closes them when the
response's body has been sent. README.md tells the rest.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbsession.core.snapshot import Snapshot, snapshot
    from dbsession.errors import (
        CommitOutcomeUnknown,
        ConfigError,
        DBSessionError,
        ForeignSession,
        PoolTimeout,
        ResultCut,
        RollbackRequired,
        ScopeEnded,
        ScopeRequired,
        UnknownDatabase,
        UnsavedWork,
        UsedInHub,
    )
    from dbsession.green.api import (
        clear_dbsession,
        configure,
        dispose,
        get_dbsession,
        get_engine,
        on_engine_created,
        release_dbsession,
        run_in_transaction,
        transactional,
    )
    from dbsession.green.block import session_scope
    from dbsession.green.deadline import DeadlineExceeded, deadline
    from dbsession.green.manager import SessionManager
    from dbsession.watch.inspection.server import serve_snapshots
    from dbsession.web.wsgi import DBSessionMiddleware

__version__ = "0.1.0"

__all__ = [
    "CommitOutcomeUnknown",
    "ConfigError",
    "DBSessionError",
    "DBSessionMiddleware",
    "DeadlineExceeded",
    "ForeignSession",
    "PoolTimeout",
    "ResultCut",
    "RollbackRequired",
    "ScopeEnded",
    "ScopeRequired",
    "SessionManager",
    "Snapshot",
    "UnknownDatabase",
    "UnsavedWork",
    "UsedInHub",
    "clear_dbsession",
    "configure",
    "deadline",
    "dispose",
    "get_dbsession",
    "get_engine",
    "on_engine_created",
    "release_dbsession",
    "run_in_transaction",
    "serve_snapshots",
    "session_scope",
    "snapshot",
    "transactional",
]

# Imported at their first use (PEP 562): `import dbsession.aio` would load gevent otherwise, which no asyncio program
# wants. A module may not be called what one of these names is called: importing it would put it in the name's place.
_NAMES = {
    "green.api": (
        "clear_dbsession",
        "configure",
        "dispose",
        "get_dbsession",
        "get_engine",
        "on_engine_created",
        "release_dbsession",
        "run_in_transaction",
        "transactional",
    ),
    "green.deadline": ("DeadlineExceeded", "deadline"),
    "errors": (
        "CommitOutcomeUnknown",
        "ConfigError",
        "DBSessionError",
        "ForeignSession",
        "PoolTimeout",
        "ResultCut",
        "RollbackRequired",
        "ScopeEnded",
        "ScopeRequired",
        "UnknownDatabase",
        "UnsavedWork",
        "UsedInHub",
    ),
    "green.manager": ("SessionManager",),
    "watch.inspection.server": ("serve_snapshots",),
    "core.snapshot": ("Snapshot", "snapshot"),
    "green.block": ("session_scope",),
    "web.wsgi": ("DBSessionMiddleware",),
}
_MODULES = {name: f"dbsession.{module}" for module, names in _NAMES.items() for name in names}


if not TYPE_CHECKING:  # or a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
