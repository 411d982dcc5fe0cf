"""The order desk: a small Flask application on two databases, written as dbsession is meant to be used.

Sessions are taken where they are needed and never closed here: the wrapper that `init_app` puts round the
application closes them when the response's body has been sent. orders.py holds the tables and the rules.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import answers
import gevent
from flask import Flask, Response, current_app, jsonify, redirect, render_template, request, url_for
from orders import FIELDS, BadInput, Order, check_order, check_text_order, create_tables, databases, now, read_csv
from sqlalchemy import insert, text
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

import dbsession
import dbsession.flask
from dbsession.errors import describe

logger = logging.getLogger("orderdesk")

# Module-level: each use goes to the session of the request that uses it.
orders = dbsession.get_dbsession("default")
audit = dbsession.get_dbsession("audit")


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["DBSESSION_DATABASES"] = databases()
    app.json.sort_keys = False
    dbsession.flask.init_app(app)
    for rule, view, method in (
        ("/", index, "GET"),
        ("/orders", post_order, "POST"),
        ("/orders", list_orders, "GET"),
        ("/orders/import", import_orders, "POST"),
        ("/orders/<order_id>", get_order, "GET"),
        ("/orders.csv", export_orders, "GET"),
        ("/slow", slow, "GET"),
        ("/healthz", healthz, "GET"),
    ):
        app.add_url_rule(rule, view_func=view, methods=[method])
    if os.environ.get("ORDER_DESK_TROUBLE"):  # deploy/demo says so; not for yours
        from trouble import panel

        app.register_blueprint(panel)
    app.register_error_handler(BadInput, lambda error: (error.as_json(), 400))
    app.register_error_handler(SQLAlchemyError, database_failed)
    app.register_error_handler(HTTPException, http_error)

    try:
        create_tables()
        tables_made = True
    except SQLAlchemyError as error:
        # Not fatal: gunicorn shuts down as a whole when a new worker fails to start, and one that replaces another
        # while a database restarts must not do that. The first request tries again.
        logger.warning("The tables could not be checked (%s): the first request tries again.", describe(error))
        tables_made = False

    @app.before_request
    def tables() -> None:
        nonlocal tables_made
        if not tables_made and request.endpoint not in ("healthz", "trouble.live"):
            create_tables()
            tables_made = True

    return app


# -- orders ----------------------------------------------------------------------------------------------------


def post_order() -> Any:
    request.max_content_length = answers.MOST_BODY_BYTES
    if request.mimetype == "application/json":
        order = store(check_order(answers.json_object(whole_body())))
        return jsonify(order.as_json()), 201, {"Location": url_for("get_order", order_id=order.id)}
    if request.mimetype != "application/x-www-form-urlencoded":
        return answers.failure(answers.NEITHER_JSON_NOR_FORM), 415
    whole_body()
    try:
        store(check_text_order(request.form.to_dict()))
    except BadInput as error:
        return page(request.form, error.errors), 400
    return redirect(url_for("index"), 303)


def store(values: dict[str, Any]) -> Order:
    order = Order(**values, created_at=now())
    orders.add(order)
    orders.flush()  # the database gives it its id
    commit_with_entry("order", order.id, f"{order.quantity} x {order.item}")
    return order


def commit_with_entry(action: str, order_id: int | None, detail: str) -> None:
    """Commit what was written to `orders`, with an entry in the other database that says so."""
    audit.add(answers.entry(action, order_id, detail))
    # Both databases have taken their statements before either commits, so nearly all that can fail has failed, and
    # the scope's end rolls both back. Every request takes them in this order, or two could wait for each other.
    audit.flush()
    orders.commit()
    # Two databases have no common transaction. If this second commit fails, the order stands without its entry: an
    # error would only make the client order twice, so the client gets its answer and the log gets the entry. Where
    # no order may ever be without an entry, commit `audit` first: then an entry may be without its order.
    try:
        audit.commit()
    except SQLAlchemyError as error:
        logger.error("The audit entry %r of order %s was not stored: %s", action, order_id, describe(error))


def get_order(order_id: str) -> Any:
    order = orders.get(Order, answers.checked_id(order_id))
    return order.as_json() if order else (answers.failure(f"there is no order {order_id}"), 404)


def list_orders() -> Any:
    return [order.as_json() for order in orders.scalars(answers.listed(request.args))]


def import_orders() -> Any:
    """All or nothing, and no connection is held while the client sends, however long that takes."""
    if request.mimetype != "text/csv":
        return answers.failure(answers.NOT_CSV), 415
    with tempfile.TemporaryFile("w+", encoding="utf-8") as checked_orders:
        for order in read_csv(pieces_of_body()):
            checked_orders.write(json.dumps(list(order.values())) + "\n")
        checked_orders.seek(0)
        rows = (dict(zip(FIELDS, json.loads(line), strict=True)) for line in checked_orders)
        count = 0
        created_at = now()
        while batch := list(islice(rows, answers.BATCH_ROWS)):
            if count:
                time.sleep(0)  # let other requests run: with SQLite nothing else here does
            orders.execute(insert(Order), [row | {"created_at": created_at} for row in batch])
            count += len(batch)
    if count:
        commit_with_entry("import", None, f"{count} orders")
    return {"imported": count}, 201


def export_orders() -> Any:
    """Read out of a server-side cursor while the client reads; the connection goes back at the body's close()."""
    # Run here and not in the generator: a database that is down still becomes a 503, before anything was sent.
    result = orders.execute(answers.EXPORT)

    def body() -> Iterator[str]:
        yield answers.CSV_FIRST_LINE
        for rows in result.partitions():
            yield answers.csv_lines(rows)
            time.sleep(0)  # let other requests run, however fast this client reads

    return Response(body(), mimetype="text/csv", headers=answers.CSV_HEADERS)


# -- other pages -----------------------------------------------------------------------------------------------


def slow() -> Any:
    seconds = answers.checked_seconds(request.args)
    latest = orders.scalar(answers.LATEST_ID)
    # What is slow below needs no database: give the connection back, or 20 such requests stop everybody else.
    dbsession.release_dbsession()
    time.sleep(seconds)
    return {"slept": seconds, "latest_order": latest}


def healthz() -> Any:
    found = {}
    for name in answers.NAMES:
        pool = dbsession.get_engine(name).pool
        in_use = pool.checkedout()
        # All connections in use is busy and not down: then it waits its turn, as the requests do.
        limit_s = answers.HEALTH_TIMEOUT_S if in_use < pool.size() else None
        started = time.monotonic()
        ok = False
        with suppress(SQLAlchemyError), gevent.Timeout(limit_s, False):
            dbsession.get_dbsession(name).execute(text("SELECT 1"))
            ok = True
        dbsession.clear_dbsession()
        latency_ms = round((time.monotonic() - started) * 1000, 2)
        found[name] = {"ok": ok, "latency_ms": latency_ms, "in_use": in_use}
    ok = all(database["ok"] for database in found.values())
    return {"ok": ok, "worker": os.getpid(), "databases": found}, 200 if ok else 503


def index() -> Any:
    return page({}, {})


def page(values: Any, errors: Any, failure: str | None = None) -> Response:
    latest = orders.scalars(answers.LATEST).all() if failure is None else []
    nonce = secrets.token_urlsafe(16)
    html = render_template("orders.html", **answers.page_values(latest, values, errors, nonce, failure))
    return Response(html, headers=answers.page_headers(nonce, scripts="trouble" in current_app.blueprints))


# -- bodies and errors -----------------------------------------------------------------------------------------


def pieces_of_body() -> Iterator[bytes]:
    """The body, piece by piece, of any length; BadInput if it does not arrive as a whole."""
    received = 0
    while True:
        try:
            piece = request.stream.read(answers.PIECE_BYTES)
        except Exception as error:  # each server's own: the connection was lost, a chunk has no valid end ...
            raise answers.not_whole() from error
        if not piece:
            break
        received += len(piece)
        yield piece
        time.sleep(0)  # let other requests run, however fast this client sends
    check_length(received)


def whole_body() -> bytes:
    """The body, of limited length; BadInput if it does not arrive as a whole."""
    try:
        body = request.get_data()
        request.stream.read(1)  # Werkzeug stops at its limit in silence; this raises, if no length was announced
    except RequestEntityTooLarge:
        raise
    except Exception as error:
        raise answers.not_whole() from error
    check_length(len(body))
    return body


def check_length(received: int) -> None:
    # A client that goes away ends the body early, and gunicorn does not tell that from its end.
    if received < (request.content_length or 0):
        raise answers.not_whole()


def http_error(error: HTTPException) -> Any:
    """404, 405, 413, 500 ... as JSON."""
    response = error.get_response()
    if error.code and error.code >= 400:
        response.data = json.dumps(answers.failure(error.description or error.name)) + "\n"
        response.content_type = "application/json"
    return response


def database_failed(error: SQLAlchemyError) -> Any:
    # By type and number: the text has the values in it, and a customer's name does not belong in a log.
    logger.error("%s %s failed: %s", request.method, request.path, describe(error))
    status, message, headers = answers.database_failure(error)
    if answers.wants_page(request.headers.get("Accept", "")):
        return page(request.form, {}, message), status, headers  # with what was typed in
    return answers.failure(message), status, headers


app = create_app()
