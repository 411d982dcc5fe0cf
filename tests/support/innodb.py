"""What InnoDB says of itself."""

from __future__ import annotations

# Not information_schema.innodb_trx: who reads that again within 100 ms sees what it was before.
INNODB_STATUS = "SHOW ENGINE INNODB STATUS"


def open_transactions(status: object) -> int:
    """How many there are, in the text that INNODB_STATUS gives."""
    # Before that there are those of the latest deadlock, however old.
    return str(status).partition("LIST OF TRANSACTIONS FOR EACH SESSION")[2].count(", ACTIVE ")
