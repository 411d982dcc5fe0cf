"""Greenlets and threads: the half of the package that runs under gevent, and in plain threads."""
