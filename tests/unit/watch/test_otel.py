"""OpenTelemetry: the pools by its semantic conventions, read by its real SDK, and its SQLAlchemy instrumentation on
every named engine."""

from __future__ import annotations

from opentelemetry.semconv._incubating.metrics import db_metrics

from support.processes import run_python, run_script

START = """
import os, sys
os.chdir(sys.argv[1])
import dbsession
from sqlalchemy import text
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from dbsession.watch import otel

reader = InMemoryMetricReader()

def points():
    \"\"\"{(short name, attribute values): data point}\"\"\"
    return {
        (metric.name.removeprefix("db.client.connection."), *point.attributes.values()): point
        for resource in reader.get_metrics_data().resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
    }

def use(session, times):
    for _ in range(times):
        with dbsession.session_scope():
            session.execute(text("SELECT 1"))
"""


def test_pools_are_reported_of_engines_built_before_and_after(tmp_path):
    run_python(
        START
        + """
dbsession.configure({"before": "sqlite:///a.db"})
use(dbsession.get_dbsession("before"), 2)  # not counted
otel.instrument(MeterProvider([reader]))
dbsession.configure({"before": "sqlite:///a.db", "after": {"url": "sqlite:///b.db", "options": {"pool_size": 3}}})
use(dbsession.get_dbsession("before"), 4)
with dbsession.session_scope():
    dbsession.get_dbsession("after")().execute(text("SELECT 1"))
    found = points()
    assert found["count", "after", "used"].value == 1 and found["count", "after", "idle"].value == 0
    assert found["count", "before", "used"].value == 0 and found["count", "before", "idle"].value == 1
    assert found["max", "after"].value == found["idle.max", "after"].value == 3
    assert found["pending_requests", "after"].value == found["timeouts", "after"].value == 0
    assert found["wait_time", "after"].count == 1 and ("use_time", "after") not in found
    assert found["use_time", "before"].count == found["wait_time", "before"].count == 4
    (holds,) = [each.holds for each in dbsession.snapshot().databases if each.name == "before"]
    assert found["use_time", "before"].bucket_counts == holds.counts
    assert found["use_time", "before"].explicit_bounds == holds.bounds_s
    assert abs(found["use_time", "before"].sum - holds.sum_s) < 1e-9
assert points()["use_time", "after"].count == 1
try:
    otel.instrument()
except dbsession.ConfigError as error:
    assert "called twice" in str(error)
else:
    raise AssertionError
""",
        tmp_path,
    )


def test_who_waits_and_waits_in_vain_is_reported(tmp_path):
    run_python(
        START
        + """
import threading
from support.waiting import wait_until
otel.instrument(MeterProvider([reader]))
options = {"pool_size": 1, "pool_timeout": 0.2}
dbsession.configure({"default": {"url": "sqlite:///a.db", "options": options}})
session, failed = dbsession.get_dbsession(), []

def wait():
    try:
        use(session, 1)
    except dbsession.PoolTimeout:
        failed.append(1)

with dbsession.session_scope():
    session.execute(text("SELECT 1"))
    waiter = threading.Thread(target=wait)
    waiter.start()
    wait_until(lambda: points()["pending_requests", "default"].value == 1 or failed)
    waiter.join()
found = points()
assert failed and found["timeouts", "default"].value == 1
assert found["wait_time", "default"].count == 2 and found["wait_time", "default"].max >= 0.2
assert found["use_time", "default"].count == 1
""",
        tmp_path,
    )


def test_values_are_recorded_by_themselves_and_a_forked_child_reports_its_own(tmp_path, mode):
    source = START.replace("import dbsession\n", "")
    run_script(
        mode,
        source
        + """
dbsession.configure({"default": "sqlite:///a.db"})
otel.instrument(MeterProvider([reader]))
session = dbsession.get_dbsession()
use(session, 3)
pending = lambda: sum(len(values) for _, _, values in otel._pools._values.values())
wait_until(lambda: not pending())
assert points()["use_time", "default"].count == 3
use(session, 2)
if os.fork() == 0:
    try:
        assert pending() == 0  # the parent's
        use(session, 4)
        assert points()["use_time", "default"].count == 3 + 4  # what the SDK had got before the fork, it keeps
        use(session, 1)
        wait_until(lambda: not pending())
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(1)
assert os.waitpid(-1, 0)[1] == 0
assert points()["use_time", "default"].count == 5
""",
        tmp_path,
    )


def test_names_are_those_of_the_semantic_conventions(tmp_path):
    """The conventions are still being worked on, so their package is only in the tests."""
    done = run_python(
        START
        + """
otel.instrument(MeterProvider([reader]))
dbsession.configure({"default": "sqlite:///a.db"})
use(dbsession.get_dbsession(), 1)
for resource in reader.get_metrics_data().resource_metrics:
    for scope in resource.scope_metrics:
        for metric in scope.metrics:
            print(metric.name, metric.unit)
""",
        tmp_path,
    )
    told = dict(line.split() for line in done.stdout.splitlines())
    short = ("COUNT", "MAX", "IDLE_MAX", "PENDING_REQUESTS", "TIMEOUTS", "WAIT_TIME", "USE_TIME")
    assert set(told) == {getattr(db_metrics, f"DB_CLIENT_CONNECTION_{name}") for name in short}
    units = dict.fromkeys(told, "{connection}") | {
        "db.client.connection.pending_requests": "{request}",
        "db.client.connection.timeouts": "{timeout}",
        "db.client.connection.wait_time": "s",
        "db.client.connection.use_time": "s",
    }
    assert told == units


def test_destructor_that_gives_a_connection_back_while_the_sdk_holds_its_lock_is_no_deadlock(tmp_path):
    """The SDK's locks are not reentrant, and a collection may come at any line."""
    run_python(
        START
        + """
import gc
otel.instrument(MeterProvider([reader]))
dbsession.configure({"default": "sqlite:///a.db"})
engine, collected = dbsession.get_engine(), []
use(dbsession.get_dbsession(), 1)

class Cycle:
    pass

class Collecting(float):
    def __radd__(self, sum):  # the SDK adds it up, under its lock
        dropped = Cycle()
        dropped.self, dropped.connection = dropped, engine.connect()
        del dropped
        collected.append(gc.collect())
        return float(self) + sum

(database,) = dbsession.core.engine.all_databases()
gc.disable()
database.stats.holds.add(Collecting(0.1))
assert points()["use_time", "default"].count >= 2 and collected
assert engine.pool.checkedout() == 0
""",
        tmp_path,
    )


def test_its_instrumentation_traces_every_named_engine(tmp_path):
    run_python(
        START
        + """
from opentelemetry import metrics, trace
from opentelemetry.instrumentation.sqlalchemy.engine import EngineTracer
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)

usage = metrics.get_meter("shop").create_up_down_counter("db.client.connections.usage")

@dbsession.on_engine_created
def trace_engine(name, engine):
    EngineTracer(trace.get_tracer("shop"), engine, usage)

dbsession.configure({"default": "sqlite:///a.db", "audit": "sqlite:///b.db"})
for name in "default", "audit":
    with dbsession.session_scope():
        dbsession.get_dbsession(name)().execute(text("SELECT :secret"), {"secret": "s3cret"})
spans = [(span.name, span.attributes["db.statement"]) for span in exporter.get_finished_spans()]
assert spans == [("SELECT a.db", "SELECT ?"), ("SELECT b.db", "SELECT ?")], spans
""",
        tmp_path,
    )


def test_its_instrumentor_still_refuses_this_sqlalchemy_and_a_second_engine(tmp_path):
    """Why README shows `EngineTracer` and not `SQLAlchemyInstrumentor().instrument(engine=engine)`. When this fails,
    it has become better: change README."""
    run_python(
        START
        + """
import logging
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
said, results = [], []
logging.getLogger("opentelemetry").addFilter(lambda record: False)
logging.getLogger("opentelemetry.instrumentation.instrumentor").addFilter(lambda record: said.append(record.msg))

@dbsession.on_engine_created
def trace_engine(name, engine):
    results.append(SQLAlchemyInstrumentor().instrument(engine=engine))
    results.append(SQLAlchemyInstrumentor().instrument(engine=engine, skip_dep_check=True))

dbsession.configure({"default": "sqlite:///a.db", "audit": "sqlite:///b.db"})
assert [each is None for each in results] == [True, False, True, True], results
refusals = "nothing can be instrumented", "falls outside", "DependencyConflict"
assert any(each in str(said[0]) for each in refusals), said
assert "already instrumented" in said[1], said
""",
        tmp_path,
    )


def test_otel_without_its_api_says_what_to_install():
    run_python(
        """
        import sys
        import dbsession
        sys.modules["opentelemetry.metrics"] = None
        try:
            from dbsession.watch import otel
        except dbsession.ConfigError as error:
            assert "pip install 'gevent-dbsession[otel]'" in str(error)
        else:
            raise AssertionError
        """
    )


def test_pools_of_tasks_are_reported(tmp_path):
    run_python(
        START
        + """
import asyncio
from dbsession import aio
otel.instrument(MeterProvider([reader]))
aio.configure({"default": {"url": "sqlite:///a.db", "options": {"pool_size": 3}}})

async def main():
    for _ in range(4):
        async with aio.session_scope():
            await aio.get_dbsession().execute(text("SELECT 1"))
    async with aio.session_scope():
        await aio.get_dbsession().execute(text("SELECT 1"))
        found = points()
        assert found["count", "default", "used"].value == 1 and found["count", "default", "idle"].value == 0
        assert found["max", "default"].value == 3 and found["timeouts", "default"].value == 0
        assert found["wait_time", "default"].count == 5 and found["use_time", "default"].count == 4

asyncio.run(main())
assert points()["use_time", "default"].count == 5
""",
        tmp_path,
    )
