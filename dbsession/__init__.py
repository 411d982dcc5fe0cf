"""A gevent-oriented WSGI database session manager.

    dbsession.configure({"default": "mysql+pymysql://app@db/shop"})
    session = dbsession.get_dbsession("default")          # anywhere, also at module level
    application = dbsession.DBSessionMiddleware(application)

Each greenlet or thread, and in it each unit of work, has its own session; the middleware closes them when the
response's body has been sent. README.md tells the rest.
"""

from dbsession.api import (
    clear_dbsession,
    configure,
    dispose,
    get_dbsession,
    get_engine,
    on_engine_created,
    release_dbsession,
    run_in_transaction,
    session_scope,
    transactional,
)
from dbsession.deadline import DeadlineExceeded, deadline
from dbsession.errors import (
    CommitOutcomeUnknown,
    ConfigError,
    DBSessionError,
    ForeignSession,
    PoolTimeout,
    RollbackRequired,
    ScopeEnded,
    ScopeRequired,
    UnknownDatabase,
    UnsavedWork,
    UsedInHub,
)
from dbsession.manager import SessionManager
from dbsession.watch.inspection import serve_snapshots
from dbsession.watch.snapshot import Snapshot, snapshot
from dbsession.wsgi import DBSessionMiddleware

__version__ = "0.1.0"

__all__ = [
    "CommitOutcomeUnknown",
    "ConfigError",
    "DBSessionError",
    "DBSessionMiddleware",
    "DeadlineExceeded",
    "ForeignSession",
    "PoolTimeout",
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
