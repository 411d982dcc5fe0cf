"""PyMySQL under gevent: the bytes of a connection, its state at the server, and KILL."""
