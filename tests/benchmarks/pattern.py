"""The pattern that everyone writes by hand, and that dbsession is measured against. Not to be improved: its faults are
part of what it costs.

A process has `urls` set once, where an application would read them from its configuration.
"""

from __future__ import annotations

from greenlet import getcurrent as get_ident
from sqlalchemy import create_engine
from sqlalchemy.orm import scoped_session, sessionmaker

urls = {}
dbsession_cache, dbsession_used = {}, {}


def get_dbsession(name="default"):
    if name not in dbsession_cache:
        engine = create_engine(urls[name], pool_size=20, max_overflow=0, pool_recycle=3600)
        dbsession_cache[name] = scoped_session(sessionmaker(bind=engine, autoflush=False))
    dbsession_used.setdefault(get_ident(), set()).add(name)
    return dbsession_cache[name]


def clear_dbsession():
    for name in dbsession_used.pop(get_ident(), []):
        dbsession_cache[name].remove()
