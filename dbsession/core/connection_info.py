"""The keys of what we note of a pooled connection: in its `info`, which goes with the connection, or in its pool
record's `record_info`, which stays."""

from __future__ import annotations

COMMITTING = "dbsession.committing"
"""In `info`: a commit was begun that has not succeeded."""

DOOMED = "dbsession.doomed"
"""In `info`: the error that has undone a part of the transaction under way."""

SCOPE = "dbsession.scope"
"""In `info`: a weak reference to the scope of the session that uses it."""

READ_TIMEOUT = "dbsession.read_timeout"
"""In `info`: the read timeout that it had before its scope set another."""

WIRE = "dbsession.wire"
"""In `info`: what knows whether the connection is `pinging` or has something `unread`, where its DBAPI object does
not."""

CHECKOUT = "dbsession.checkout"
"""In `record_info`: the `holders.Checkout` of whoever uses it."""
