"""What the pages show is run as it stands there; what they tabulate is compared with the code.

The blocks of a test are written to files of their names in a folder of its own and run in a fresh interpreter, where
warnings are errors.
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path

import httpx
import pytest
from benchmarks import summary
from sqlalchemy.exc import InvalidRequestError

import dbsession
from dbsession import aio, errors
from dbsession.core.backends.mysql import MySQL
from dbsession.core.backends.postgresql import PostgreSQL
from dbsession.core.backends.sqlite import SQLite
from dbsession.core.keys import COMMON_KEYS, KEYS
from dbsession.core.pool.stats import Stats
from dbsession.green.mysql.backend import PyMySQL
from dbsession.watch.check.budget import Workers
from dbsession.watch.check.facts import Facts
from dbsession.watch.check.finding import Finding
from dbsession.watch.check.report import Report
from dbsession.watch.inspection.client import collect
from support import log_lines
from support.gunicorn import Gunicorn
from support.pages import BLOCKS, PAGES, ROOT, rows, table
from support.processes import run_python
from support.uvicorn import Uvicorn

MYSQL = "mysql+pymysql://app:secret@host/shop"

# What every script below begins with: the block's folder as working directory, and a server's call of an application.
START = """
import os, sys
os.chdir(sys.argv[1])
sys.path.insert(0, sys.argv[1])
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

def get(application, path):
    environ, answer = {"SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": ""}, []
    setup_testing_defaults(environ)

    def start_response(status, headers, exc_info=None):
        answer.append(status)
        return answer.append

    body = validator(application)(environ, start_response)
    try:
        text = b"".join(body).decode()
    finally:
        body.close()
    assert answer == ["200 OK"], answer
    return text

def nothing_open(*names):
    return all(dbsession.get_engine(name).pool.checkedout() == 0 for name in names or ["default"])
"""

HAND_WRITTEN_APP = """
from types import SimpleNamespace
from sqlalchemy import text

config = SimpleNamespace(sqldb={"default": "sqlite:///own.db"})

def app(environ, start_response):
    value = get_dbsession().scalar(text("SELECT 41 + 1"))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(value).encode()]
"""

SCOPED_SESSION_APP = """
from sqlalchemy import text

url = "sqlite:///own.db"

def app(environ, start_response):
    session = Session()
    assert session is Session() and session.autoflush
    value = Session.scalar(text("SELECT 41 + 1"))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(value).encode()]
"""

HOLDING = """\
import gevent
from gevent.event import Event
from sqlalchemy import text
import dbsession
options = {"pool_size": 2, "pool_timeout": 0.05}
dbsession.configure({"default": {"url": "sqlite:///own.db", "options": options}})
session, end = dbsession.get_dbsession(), Event()
@dbsession.session_scope("import")
def nightly():
    session.execute(text("INSERT INTO orders VALUES (7, 'secret')"))
    end.wait()
def order():
    call({"REQUEST_METHOD": "GET", "PATH_INFO": "/orders/7", "QUERY_STRING": "secret"}, None)
@dbsession.DBSessionMiddleware
def call(environ, start_response):
    app(environ)
    return []
def app(environ):
    session.execute(text("SELECT * FROM orders WHERE id = :id"), {"id": 7}).all()
    end.wait()
with dbsession.session_scope("tables"):
    session.execute(text("CREATE TABLE orders (id INTEGER, note TEXT)"))
    session.commit()
for held in (nightly, order):
    gevent.spawn(held)
    gevent.sleep(0)
try:
    dbsession.get_engine().connect()
except dbsession.PoolTimeout as timeout:
    error = timeout
end.set()
gevent.wait()
"""

CHECK_ANSWER = """
assert [get(application, "/") for _ in range(3)] == ["42"] * 3
assert engine_of().pool.checkedout() == 0
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with the blocks whose names are file names."""
    for name, text in BLOCKS.items():
        if name.endswith(".py"):
            (tmp_path / name).write_text(text)
    return tmp_path


def run(folder: Path, source: str) -> str:
    return run_python(START + source, folder).stdout


def test_hello_counts_its_visits_then_the_script_and_the_stream_see_them(folder):
    assert len(BLOCKS["hello.py"].splitlines()) <= 20
    run(
        folder,
        """
import dbsession
from hello import application
assert [get(application, "/") for _ in range(3)] == ["1 visits\\n", "2 visits\\n", "3 visits\\n"]
import stream
assert get(stream.application, "/") == "/\\n" * 3
import transfer
assert transfer.visits == 3
assert get(stream.application, "/") == "/home\\n" * 3
import nightly
assert get(application, "/") == "1 visits\\n"
assert nothing_open()
""",
    )


def test_app_that_commits_nothing_stores_nothing(folder):
    (folder / "hello.py").write_text(BLOCKS["hello.py"].replace("session.commit()  #", "pass  #"))
    run(
        folder,
        """
from hello import application
assert [get(application, "/") for _ in range(3)] == ["1 visits\\n"] * 3
""",
    )


@pytest.fixture(params=["sqlite", "mariadb"])
def shop(request, folder, monkeypatch):
    """The first page's application in `folder`, on a database of its own."""
    database = "sqlite:///shop.db" if request.param == "sqlite" else request.getfixturevalue("mariadb_url")
    monkeypatch.setenv("SHOP_URL", database)
    return folder


def test_shop_counts_its_orders_under_gunicorn(shop):
    with Gunicorn("shop:create_app()", config=shop / "gunicorn.conf.py", cwd=shop, ready="/orders") as server:
        answer = httpx.post(f"{server.url}/orders/pen", timeout=60)
        assert answer.status_code == 201 and answer.json() == {"id": 1}
        assert json.loads(server.get("/orders").text) == {"orders": 1}
        assert "Traceback" not in server.logs()


def test_tests_of_the_shop_pass_and_leave_nothing_behind(shop):
    run(
        shop,
        """
import dbsession, pytest
assert pytest.main(["-q", "-p", "no:cacheprovider", "test_shop.py"]) == 0
from shop import session
assert nothing_open() and session.connection().exec_driver_sql("SELECT count(*) FROM orders").scalar() == 0
""",
    )


def test_fresh_file_for_each_test_is_fresh(folder):
    run(folder, "import pytest\nassert pytest.main(['-q', '-p', 'no:cacheprovider', 'test_fresh.py']) == 0\n")


def test_app_context_held_for_a_test_keeps_the_snapshot_it_has_read(shop):
    """As the page says: the test's own session stays in its transaction on MariaDB; a rollback shows what is new."""
    run(
        shop,
        """
from shop import Order, create_app, func, select, session
app = create_app()
counted = lambda: session.scalar(select(func.count()).select_from(Order))
with app.app_context():
    mine = session()
    assert counted() == 0
    assert app.test_client().post("/orders/pen").status_code == 201
    assert session() is mine
    if session.get_bind().dialect.name == "mysql":
        assert counted() == 0
    session.rollback()
    assert counted() == 1
""",
    )


@pytest.mark.parametrize("preload", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_hello_runs_under_gunicorn_with_the_configuration_shown(folder, preload):
    config = folder / "gunicorn.conf.py"
    config.write_text(BLOCKS["gunicorn.conf.py"])
    arguments = ["--preload"] if preload else []
    with Gunicorn("hello:application", *arguments, config=config, cwd=folder, workers=2) as server:
        answers = [server.get("/").text for _ in range(3)]
    assert answers == ["1 visits\n", "2 visits\n", "3 visits\n"]


def test_monitored_hello_shows_its_metrics(folder):
    run(
        folder,
        """
from monitored import application
assert get(application, "/") == "1 visits\\n"
assert 'dbsession_connects_total{database="default"} 1.0' in get(application, "/metrics")
""",
    )


def test_traced_engines_make_spans_and_report_their_pools(folder):
    run(
        folder,
        """
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

exporter, reader, provider = InMemorySpanExporter(), InMemoryMetricReader(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
metrics.set_meter_provider(MeterProvider([reader]))
import dbsession, traced
from sqlalchemy import text
dbsession.configure({"default": "sqlite:///a.db", "audit": "sqlite:///b.db"})
for name in "default", "audit":
    with dbsession.session_scope():
        dbsession.get_dbsession(name).execute(text("SELECT 1"))
assert [span.name for span in exporter.get_finished_spans()] == ["SELECT a.db", "SELECT b.db"]
(resource,) = reader.get_metrics_data().resource_metrics
told = {metric.name for scope in resource.scope_metrics for metric in scope.metrics}
assert {"db.client.connection.count", "db.client.connection.use_time", "db.client.connections.usage"} <= told
""",
    )


def test_metrics_table_has_every_metric():
    metrics = table("dbsession/watch/README.md", "metric")
    source = (ROOT / "dbsession" / "watch" / "metrics.py").read_text()
    for kind, name in re.findall(r'(_gauge|_counter|_histogram)\(\s*"(dbsession_\w+)"', source):
        assert f"`{name}{'_total' if kind == '_counter' else ''}`" in metrics, name


def test_check_page_lists_the_keys_of_its_json():
    said = (
        PAGES["dbsession/watch/README.md"].partition("- **`--json`** has the keys")[2].partition("These keys stay")[0]
    )
    keys = [*Report(Workers(), (), ()).as_json(), *(f.name for each in (Facts, Finding) for f in fields(each))]
    assert set(re.findall(r"`(\w+)`", said)) == {*keys, "ok", "info", "warning"}


def test_flask_export_streams_inside_its_session(shop):
    run(
        shop,
        """
import dbsession
from export import app
client = app.test_client()
assert [client.post(f"/orders/{item}").json["id"] for item in ("pen", "ink")] == [1, 2]
answer = client.get("/orders.csv")
assert answer.is_streamed
assert answer.text == "1,pen\\n2,ink\\n"
answer.close()
assert nothing_open()
""",
    )


def test_pool_timeout_shown_is_what_two_holders_give(folder):
    """But for its times, and for where the file is."""
    (folder / "jobs.py").write_text(HOLDING)
    said = run(folder, "import jobs\nprint(jobs.error)").replace(str(folder), "/srv/shop")
    shown = PAGES["dbsession/watch/README.md"].split("<!-- text: pool-timeout -->\n```\n")[1].split("```")[0]
    times = re.compile(r"\d+\.\d+ s")
    assert times.sub("s", said) == times.sub("s", shown)


def test_snapshot_shown_is_printed(folder):
    said = run(
        folder,
        "from hello import application\nimport dbsession\nget(application, '/')\n"
        "held = dbsession.get_engine().connect()\n" + BLOCKS["snapshot"],
    )
    first, second, holder, *_, whole = said.splitlines()
    assert first == "default: 1 of 20 in use, 0 waiting"
    assert re.fullmatch(r"\d checkouts, 0 in vain, 99 % within 0\.\d+ s", second)
    assert " idle " in holder and json.loads(whole)["holders"]


def test_release_gives_the_connection_back_before_the_slow_call(folder):
    run(
        folder,
        """
import dbsession, hello
from hello import session, text
get(hello.application, "/")

def call_slow_service(paths):
    assert paths == ["/"] and nothing_open()

"""
        + BLOCKS["release"]
        + """
assert session.scalar(text("SELECT count(*) FROM visit")) == 0
""",
    )


def test_asyncio_page_names_the_keys_that_do_not_hold():
    """`guard` is read by the gevent half alone, and so is `write_timeout_s`, but for psycopg."""
    rows = re.findall(r"^\| (`.*) \| .* \|$", table("dbsession/aio/README.md", "key"), re.M)
    told = set(re.findall(r"`(?:options: )?(\w+)`", " ".join(rows)))
    assert told == {"write_timeout_s", "guard", "reset", "creator", "read_timeout_s"}
    sources = {path: path.read_text() for path in (ROOT / "dbsession" / "aio").rglob("*.py")}
    assert not any("guard" in text for text in sources.values())
    assert {path.parent.name for path, text in sources.items() if "write_timeout_s" in text} == {"postgresql"}
    aio.SessionManager({"default": {"url": MYSQL, "write_timeout_s": 3, "guard": "raise"}})
    for entry in ({"url": MYSQL, "reset": "connection"}, {"url": MYSQL, "options": {"creator": print}}):
        with pytest.raises(aio.ConfigError):
            aio.SessionManager({"default": entry})


def test_asyncio_application_shown_is_seen_from_outside(folder):
    example = folder / "seen.py"
    text = example.read_text().replace("/run/shop", f"{folder}/inspect")
    query = "@app.get('/one')\nasync def one():\n    return await session.scalar(text('SELECT 1'))\n"
    example.write_text(
        f"from sqlalchemy import text\n{text}\naio.configure({{'default': 'sqlite:///{folder}/own.db'}})\n"
        f"session = aio.get_dbsession()\n{query}"
    )
    with Uvicorn("seen:app", f"--app-dir={folder}") as server:
        assert server.get("/one").text == "1"
        assert 'dbsession_checkouts_total{database="default"} 1.0' in httpx.get(f"{server.url}/metrics/").text
        (worker,) = collect(folder / "inspect").workers
        assert [database["checkouts"] for database in worker["databases"]] == [1]
        assert "Traceback" not in server.logs()


def test_asyncio_pages_name_every_function():
    for module, page in ((aio, "dbsession/aio/README.md"), (aio.loop_local, "dbsession/aio/loop_local/README.md")):
        for name, value in vars(module).items():
            if inspect.isfunction(value) and not name.startswith("_") and value.__module__ == module.__name__:
                assert re.search(rf"`[^`\n]*\b{name}\b", PAGES[page]), name


@pytest.mark.parametrize("kind", ["uvicorn", "gunicorn"])
def test_fastapi_example_counts_its_visits_and_loads_no_gevent(folder, kind):
    """In about twenty lines."""
    example = folder / "fastapi_app.py"
    assert len([line for line in BLOCKS["fastapi_app.py"].splitlines() if line]) <= 20
    with example.open("a") as file:
        file.write(
            "\n\n@app.post('/gevent')\nasync def gevent():\n    import sys\n    return 'gevent' in sys.modules\n"
        )
    if kind == "uvicorn":
        server: Gunicorn = Uvicorn("fastapi_app:app", f"--app-dir={folder}")
    else:
        (folder / "gunicorn.conf.py").unlink()  # the one shown for gevent, which gunicorn would take
        server = Gunicorn("fastapi_app:app", "-k", "asgi", cwd=folder, ready="/")
    with server, httpx.Client(base_url=server.url, timeout=60) as client:
        first = client.get("/").json()
        assert [client.get(path).json() for path in ("/a", "/b")] == [first + 1, first + 2]
        assert client.post("/gevent").json() is False
        assert "Traceback" not in server.logs()


def test_loop_local_example_makes_one_client_for_each_loop(folder):
    run(
        folder,
        """
import asyncio, functools, http.server, pathlib, threading

class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.path.encode())

    def log_message(self, *_):
        pass

server = http.server.HTTPServer(("127.0.0.1", 0), Hello)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}"
shown = pathlib.Path("http_client.py")
shown.write_text(shown.read_text().replace("http://127.0.0.1:8000", url))
from http_client import client, fetch

async def main():
    assert await asyncio.gather(*map(fetch, ("/a", "/b", "/a"))) == ["/a", "/b", "/a"]
    async with client(url) as http:
        assert http is await client(base_url=url)
    assert not http.is_closed
    return http

clients = [asyncio.run(main()) for _ in range(2)]
assert clients[0] is not clients[1] and all(http.is_closed for http in clients)
server.shutdown()
server.server_close()
""",
    )


@pytest.mark.parametrize("pool_size", [1, 2])
def test_nested_scopes_need_two_connections(folder, pool_size):
    body = "".join(f"    {line}\n" for line in BLOCKS["nested"].splitlines())
    run(
        folder,
        f"""
import dbsession
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError as PoolTimeout
options = {{"pool_size": {pool_size}, "pool_timeout": 0.1}}
dbsession.configure({{"default": {{"url": "sqlite:///own.db", "options": options}}}})
session = dbsession.get_dbsession()
waited = False
try:
{body}
except PoolTimeout as error:
    assert "QueuePool limit of size" in str(error) and "reached, connection timed out" in str(error)
    waited = True
assert waited is ({pool_size} == 1)
assert nothing_open()
""",
    )


def test_configuration_shown_is_taken(folder):
    run(
        folder,
        "import dbsession\n"
        + BLOCKS["configure"]
        + """
assert dbsession.get_engine("default").pool.size() == 20
assert dbsession.get_engine("reports").pool.size() == 5
assert dbsession.get_dbsession("reports")().expire_on_commit is False
""",
    )


def test_key_tables_tell_whose_key_it_is_and_its_default(monkeypatch):
    """A table of keys for each kind of database, with the drivers that take a key; two for what goes to SQLAlchemy."""
    monkeypatch.delenv("DBSESSION_GUARD", raising=False)
    common = {row[0]: row[-1] for row in rows("dbsession/README.md", "key of any database")}
    sqlite = {row[0]: (row[1], row[-1]) for row in rows("dbsession/README.md", "key for SQLite")}
    mysql = {row[0]: (row[1], row[-1]) for row in rows("dbsession/README.md", "key for MySQL and MariaDB")}
    postgresql = {row[0]: (row[1], row[-1]) for row in rows("dbsession/README.md", "key for PostgreSQL")}
    pool = {row[0]: row[-1] for row in rows("dbsession/README.md", "key in `options`: the pool")}
    session = {row[0]: row[-1] for row in rows("dbsession/README.md", "key in `session`")}
    manager = dbsession.SessionManager({"default": MYSQL})
    engine, made = manager.engine(), manager.get()()
    manager.clear()
    config = manager.database("default").config
    default = {key: getattr(config, key) for key in KEYS if key not in ("url", "options", "session")}
    default = {key: value if isinstance(value, (bool, str)) else f"{value:g}" for key, value in default.items()}
    assert common == {"`url`": "required", "`options`": "`{}`", "`session`": "`{}`"} | {
        f"`{key}`": default[key] for key in COMMON_KEYS if key in default
    }
    for kind, told in ((SQLite, sqlite), (MySQL, mysql), (PostgreSQL, postgresql)):
        takers = {key: [name for name, keys in kind.DRIVER_KEYS.items() if key in keys] for key in KEYS}
        assert told == {
            f"`{key}`": (", ".join(takers[key]) or "any", str(default[key]))
            for key in {*kind.KEYS, *(key for key in KEYS if takers[key])}
        }
    assert pool == {
        "`pool_size`": str(engine.pool.size()),
        "`max_overflow`": str(engine.pool._max_overflow),
        "`pool_timeout`": f"{engine.pool.timeout():g}",
        "`pool_recycle`": str(engine.pool._recycle),
        "`pool_pre_ping`": str(engine.pool._pre_ping),
    }
    assert session == {
        "`autoflush`": str(made.autoflush),
        "`close_resets_only`": "False",
        "`class_`": "`Session`",
        "`expire_on_commit`": str(made.expire_on_commit),
    }
    with pytest.raises(InvalidRequestError, match="permanently closed"):  # as close_resets_only says
        made.connection()
    charset = PyMySQL(config, Stats()).engine_options()["connect_args"]["charset"]
    assert f"The character set is {charset} unless" in PAGES["dbsession/README.md"]


def test_error_table_has_every_code_and_no_other():
    known: dict[str, type] = {"DBS-DEADLINE": dbsession.DeadlineExceeded}
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.DBSessionError):
            known[error.code] = error
    sources = "".join(module.read_text() for module in (ROOT / "dbsession").rglob("*.py"))
    assert set(known) == set(re.findall(r'^    code = "([A-Z-]+)"$', sources, re.M))
    found = {row[0]: row[1] for row in rows("dbsession/README.md", "code")}
    assert list(found) == sorted(f"`[{code}]`" for code in known)
    for code, error in known.items():
        name, _, base = found[f"`[{code}]`"].partition(", a")
        assert name == f"`{error.__name__}`"
        assert not base or base.strip("n `").rpartition(".")[2] in {each.__name__ for each in error.__mro__}, base


def test_log_table_has_every_line_with_its_logger_and_level_and_no_other():
    told = set()
    for loggers, line, means, do in rows("dbsession/README.md", "logger"):
        level, quoted = re.fullmatch(r"((?:[A-Z]+ (?:or )?)*)(`.*`)", line).groups()
        for name in loggers.split(", "):
            told.add((name.strip("`"), level.strip() or "WARNING", quoted.strip("`").strip()))
        assert means and do
    assert told == set(log_lines.of_package())


def test_runbook_says_what_to_do_about_every_logger_and_every_line_of_the_order_desk():
    page = "deploy/README.md"
    named = [name.strip("`") for row in rows(page, "logger") for name in row[0].split(", ")]
    assert sorted(named) == sorted({name for name, _, _ in log_lines.of_package()})
    lines = log_lines.of_files(ROOT / "deploy" / "app.py", ROOT / "deploy" / "asgi.py")
    found = [row[0] for row in rows(page, "line of `orderdesk`")]
    assert sorted(found) == sorted(f"{level} `{line}`" for name, level, line in lines if name == "orderdesk")
    assert {name for name, _, _ in lines} == {"orderdesk"}


def test_runbook_tells_the_variables_and_their_defaults():
    told = {row[0].strip("`"): re.match(r"`?([^`:, ]*)", row[1])[1] for row in rows("deploy/README.md", "variable")}
    config = (ROOT / "deploy" / "gunicorn.conf.py").read_text()
    numbers = dict(re.findall(r'number\("(\w+)", (\d+),', config))
    assert numbers.items() <= told.items()
    read = set(re.findall(r'(?:environ\.get\(|number\(|switch\(|check_url\()"(\w+)"', config))
    assert read <= set(told) and {"DBSESSION_INSPECT", "DBSESSION_METRICS", "ORDER_DESK_TROUBLE"} <= set(told)


def test_hand_written_pattern_moves_over(folder):
    engine_of = "engine_of = lambda: {}\n"
    run(
        folder,
        HAND_WRITTEN_APP
        + BLOCKS["before-hand-written"]
        + engine_of.format("dbsession_cache['default'].get_bind()")
        + CHECK_ANSWER,
    )
    run(
        folder,
        HAND_WRITTEN_APP + BLOCKS["after-hand-written"] + engine_of.format("dbsession.get_engine()") + CHECK_ANSWER,
    )


@pytest.mark.parametrize("name", ["before-scoped-session", "after-scoped-session"])
def test_raw_scoped_session_moves_over(folder, name):
    run(folder, SCOPED_SESSION_APP + BLOCKS[name] + "engine_of = lambda: engine\n" + CHECK_ANSWER)


FLASK_SQLALCHEMY_APP = """
url, audit_url = f"sqlite:///{os.getcwd()}/own.db", f"sqlite:///{os.getcwd()}/audit.db"
"""

CHECK_USERS = """
client = app.test_client()
assert [client.post("/users/ada").text for _ in range(3)] == ["1", "2", "3"]
"""


def test_flask_sqlalchemy_moves_over(folder):
    check = """
with app.app_context():
    assert Visit.query.count() == 3
    for engine in db.engines.values():
        engine.dispose()
"""
    run(folder, FLASK_SQLALCHEMY_APP + BLOCKS["before-flask-sqlalchemy"] + CHECK_USERS + check)
    check = """
assert nothing_open("default", "audit")
assert audit.scalar(select(func.count()).select_from(Visit)) == 6
"""
    run(
        folder,
        FLASK_SQLALCHEMY_APP
        + BLOCKS["after-flask-sqlalchemy"]
        + CHECK_USERS.replace('"1", "2", "3"', '"4", "5", "6"')
        + check,
    )


def test_tables_are_created_each_in_its_own_database(folder):
    run(
        folder,
        """
import dbsession, models
from sqlalchemy import inspect
dbsession.configure({"default": "sqlite:///own.db", "audit": "sqlite:///audit.db"})
models.create_tables()
assert inspect(dbsession.get_engine()).get_table_names() == ["orders"]
assert inspect(dbsession.get_engine("audit")).get_table_names() == ["event"]
""",
    )


def test_alembic_migrates_each_database_with_its_own_tables(folder):
    run(
        folder,
        """
import re
from pathlib import Path
import dbsession
from alembic import command
from alembic.config import Config

os.environ |= {"DBSESSION_URL": "sqlite:///own.db", "DBSESSION_AUDIT_URL": "sqlite:///audit.db"}
config = Config("alembic.ini", stdout=open(os.devnull, "w"))
command.init(config, "migrations", template="multidb")
ini = Path("alembic.ini")
ini.write_text(re.sub("(?m)^databases = .*", "databases = default, audit", ini.read_text()))
Path("migrations", "env.py").write_text(Path("env.py").read_text())
config = Config("alembic.ini", stdout=open(os.devnull, "w"))
command.revision(config, "first", autogenerate=True)
command.upgrade(config, "head")
from sqlalchemy import inspect
tables = lambda name: sorted(inspect(dbsession.get_engine(name)).get_table_names())
assert tables("default") == ["alembic_version", "orders"], tables("default")
assert tables("audit") == ["alembic_version", "event"], tables("audit")
command.check(config)
command.downgrade(config, "base")
assert tables("audit") == ["alembic_version"]
""",
    )


def test_what_it_costs_is_what_the_benchmarks_wrote():
    shown = rows("README.md", "measured")
    found = {goal["text"]: goal for report in summary.found() for goal in report["goals"]}
    assert len(shown) > 4
    for text, result, limit, met in shown:
        goal = found[text]
        assert (result.split()[0], limit) == (goal["shown"].split()[0], goal["limit"]), text
        assert met == ("yes" if goal["met"] else "**no**"), text


def test_measured_figures_are_those_that_the_benchmarks_wrote():
    reports = summary.found()
    assert [report["benchmark"] for report in reports] == list(summary.NAMES)
    assert not any(report["quick"] for report in reports)
    assert (summary.RESULTS / "README.md").read_text() == summary.all_goals()
