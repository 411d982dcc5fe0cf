"""What the order desk asks its databases and answers its clients, whichever server it runs under: app.py and asgi.py
share it. Nothing here waits, or knows Flask or Starlette."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

from orders import FIELDS, MAX_ID, NUMBERS, TEXTS, BadInput, Entry, Order, check_number, check_text, number
from sqlalchemy import Select, select
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from dbsession.errors import CommitOutcomeUnknown, driver_number

NAMES = ("default", "audit")
MOST_BODY_BYTES = 64 * 1024  # an order needs less than 1; an import may be of any length
PIECE_BYTES = 64 * 1024
BATCH_ROWS = 500
HEALTH_TIMEOUT_S = 2  # of each database that accepts and stays silent; a load balancer wants an answer within 5

# -- what a client sent, or BadInput ---------------------------------------------------------------------------


def checked(field: str, check: Any, *arguments: Any) -> Any:
    try:
        return check(*arguments)
    except ValueError as error:
        raise BadInput({field: str(error)}) from None


def checked_id(order_id: str) -> int:
    found: int = checked("id", check_number, number(order_id), 0, MAX_ID)
    return found


def checked_seconds(query: Mapping[str, str]) -> float:
    try:
        seconds = float(query.get("seconds", "1"))
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= 30:  # NaN is not, either
        raise BadInput({"seconds": "must be a number from 0 to 30"})
    return seconds


def json_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body.decode())
    except (ValueError, RecursionError):
        raise BadInput({"body": "must be valid JSON, in UTF-8"}) from None
    if not isinstance(value, dict):
        raise BadInput({"body": f"must be a JSON object with the fields {', '.join(FIELDS)}"})
    return value


def not_whole() -> BadInput:
    return BadInput({"body": "did not arrive as a whole"})


# -- statements ------------------------------------------------------------------------------------------------

LATEST = select(Order).order_by(Order.id.desc()).limit(20)
LATEST_ID = select(Order.id).order_by(Order.id.desc()).limit(1)

_COLUMNS = (Order.id, Order.customer, Order.item, Order.quantity, Order.price_cents, Order.created_at)
# yield_per: by a server-side cursor, so that no more than a batch is in memory.
EXPORT = select(*_COLUMNS).order_by(Order.id).execution_options(yield_per=BATCH_ROWS)


def listed(query: Mapping[str, str]) -> Select[Any]:
    """The orders that `limit` and `customer` in the URL's query ask for."""
    limit = checked("limit", check_number, number(query.get("limit") or "50"), 1, 1000)
    found = select(Order).order_by(Order.id.desc()).limit(limit)
    if query.get("customer"):
        customer = checked("customer", check_text, query["customer"], TEXTS["customer"])
        found = found.where(Order.customer == customer)
    return found


def entry(action: str, order_id: int | None, detail: str) -> Entry:
    return Entry(action=action, order_id=order_id, detail=detail[:255])


# -- answers ---------------------------------------------------------------------------------------------------

NOT_CSV = f"send text/csv with the header {','.join(FIELDS)}"
NEITHER_JSON_NOR_FORM = "send application/json or application/x-www-form-urlencoded"
CSV_HEADERS = {"Content-Disposition": 'attachment; filename="orders.csv"'}
CSV_FIRST_LINE = ",".join(column.key for column in _COLUMNS) + "\r\n"


def csv_lines(rows: Iterable[Any]) -> str:
    """The rows of EXPORT."""
    part = io.StringIO()
    csv.writer(part).writerows(
        (row_id, plain(customer), plain(item), quantity, price_cents, f"{created_at.isoformat()}Z")
        for row_id, customer, item, quantity, price_cents, created_at in rows
    )
    return part.getvalue()


def plain(value: str) -> str:
    """Text that no spreadsheet takes for a formula: an apostrophe in front is what they all understand as text.
    (GET /orders gives it as it was sent.)"""
    return f"'{value}" if value[0] in "=+-@\t\r" else value


def failure(message: str) -> dict[str, Any]:
    return {"error": {"field": None, "message": message}}


def database_failure(error: SQLAlchemyError) -> tuple[int, str, dict[str, str]]:
    """The status, the message and the headers for a request that `error` has ended."""
    if isinstance(error, IntegrityError):
        return 409, "this conflicts with what is stored", {}
    if isinstance(error, CommitOutcomeUnknown):  # "try again" might order twice
        return 500, "this may have been stored or not: look before you send it again", {}
    # What refuses writes on a standby is an InternalError of PostgreSQL's, and an OperationalError of MySQL's.
    lost = isinstance(error, DBAPIError) and (error.connection_invalidated or driver_number(error) == "25006")
    if lost or isinstance(error, (OperationalError, InterfaceError, PoolTimeout)):
        return 503, "the database is not available, try again", {"Retry-After": "5"}
    return 500, "internal error", {}


def wants_page(accept: str) -> bool:
    """Whether a failure is shown to somebody at a browser, by the request's Accept."""
    return "text/html" in accept


def page_values(
    orders: Iterable[Order], values: Any, errors: Any, nonce: str, failure: str | None = None
) -> dict[str, Any]:
    """Return what templates/orders.html takes. `failure` is the message of a request that the database has ended."""
    return {
        "orders": orders,
        "values": values,
        "errors": errors,
        "failure": failure,
        "texts": TEXTS,
        "numbers": NUMBERS,
        "nonce": nonce,
    }


def page_headers(nonce: str, scripts: bool = False) -> dict[str, str]:
    script = f"script-src 'nonce-{nonce}'; connect-src 'self'; " if scripts else ""
    return {
        "Content-Security-Policy": f"default-src 'none'; {script}style-src 'nonce-{nonce}'; img-src data:; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
