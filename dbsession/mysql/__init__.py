"""What only MySQL and MariaDB need: so far the defaults of their connections."""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine import URL

# PyMySQL waits for ever by default: a silent server would hang every request.
_TIMEOUTS_S = {
    "connect_timeout": 10,
    "read_timeout": 60,  # above innodb_lock_wait_timeout (50), so that a lock wait arrives as error 1205
    "write_timeout": 60,
}


def engine_options(url: URL) -> dict[str, Any]:
    """The arguments of create_engine that a PyMySQL connection gets, below what the URL's query says."""
    if url.get_driver_name() != "pymysql":
        return {}
    defaults = {"charset": "utf8mb4", **_TIMEOUTS_S}
    return {"connect_args": {key: value for key, value in defaults.items() if key not in url.query}}
