"""Run by .ci/run where only the wheel and what it requires are installed."""

import sys
import tempfile
from pathlib import Path

import dbsession

loaded = {"gevent", "gunicorn", "flask", "prometheus_client"} & {name.partition(".")[0] for name in sys.modules}
assert not loaded, f"import dbsession loads {loaded}"

from sqlalchemy import text  # noqa: E402

from dbsession import aio  # noqa: E402

try:
    aio.configure({"default": "sqlite:///none.db"})
    raise AssertionError("aiosqlite is here: this is to be run without extras")
except aio.ConfigError as error:
    assert "pip install 'gevent-dbsession[aio]'" in str(error), error
assert "gevent" not in sys.modules, "dbsession.aio loads gevent"

with tempfile.TemporaryDirectory() as folder:
    dbsession.configure({"default": f"sqlite:///{Path(folder, 'check.db')}"})
    session = dbsession.get_dbsession()
    with dbsession.session_scope("wheel check"):
        session.execute(text("CREATE TABLE item (name TEXT)"))
        session.execute(text("INSERT INTO item VALUES ('kept')"))
        session.commit()
    with dbsession.session_scope("wheel check"):
        assert session.scalar(text("SELECT name FROM item")) == "kept"
    dbsession.clear_dbsession()
    assert dbsession.get_engine().pool.checkedout() == 0
    dbsession.dispose()
assert dbsession.__version__
