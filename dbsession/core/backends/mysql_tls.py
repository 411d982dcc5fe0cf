"""TLS contexts of MySQL's drivers: one for each set of arguments, however many connections use it.

A context takes 20 ms of CPU in C and nearly a megabyte, as it reads all the certificates that the machine trusts, and
stock drivers make one for each connection. What is negotiated belongs to the connection, so one context serves all.
"""

from __future__ import annotations

import configparser
import os
import ssl
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any

import pymysql.connections
from pymysql.optionfile import Parser

SSL_CONNECTION_ERROR = 2026
"""The client's number, CR_SSL_CONNECTION_ERROR."""

_FILES = ("ca", "capath", "cert", "key")
_LONGEST_SHOWN = 300  # characters; a key without its line ends has more
_AT_MOST = 8  # a listener that names other files at each connect must not fill the memory

# Reads the certificates, as PyMySQL understands `ssl`; its `self` is not used.
_create: Any = pymysql.connections.Connection._create_ssl_ctx  # type: ignore[attr-defined]  # not in the stubs

TRUSTED_BY_THE_MACHINE: Mapping[str, Any] = MappingProxyType({"check_hostname": True, "verify_mode": "machine"})

# Size and times of a file, and which one it is: a link may lead to another one by now.
_Stamp = tuple[int, int, int, int] | None


class TLSContexts:
    """The TLS contexts of one engine. Lives as long as the engine, through forks: a child may use what its parent has
    made, since nothing of any connection is in there, and OpenSSL sees to its random numbers itself.

    `_made` is written by whoever has made a context, in one step; nothing switches greenlets while one is made. Two
    threads that make one at once use one each, and the later one stays.
    """

    def __init__(self) -> None:
        self._made: dict[Any, tuple[tuple[_Stamp, ...], ssl.SSLContext]] = {}

    def of(self, options: Mapping[str, Any], error: type[Exception]) -> ssl.SSLContext:
        """Return the context for `options`, those of PyMySQL's argument `ssl`. It is made again when a file that they
        name has changed; files that cannot be used raise `error`, and what was made before is not used either.

        Args:
            options: `{}` asks no certificate who the server is; TRUSTED_BY_THE_MACHINE asks one of those that the
                machine trusts, for the server's name.
        """
        # The class, since gevent's has another way to wait: what was made before a patch is of no use after it.
        key = ssl.SSLContext, *sorted((name, _hashable(value)) for name, value in options.items())
        stamps = tuple(_stamp(options[name]) for name in _FILES if options.get(name))  # before they are read
        made = self._made.get(key)
        if made is not None and made[0] == stamps:
            return made[1]
        try:
            context = self._make(options)
        except OSError as reason:  # a certificate's faults are OSErrors, too
            self._made.pop(key, None)
            named = ", ".join(f"{name}={_shown(options[name])}" for name in _FILES if options.get(name))
            raise error(
                SSL_CONNECTION_ERROR,
                f"TLS cannot be set up with {named or 'these arguments'} ({type(reason).__name__}: {reason}): see "
                "that the files are there, readable and belong together",
            ) from reason
        while len(self._made) >= _AT_MOST:
            self._made.pop(next(iter(self._made)), None)
        self._made[key] = stamps, context
        return context

    @staticmethod
    def _make(options: Mapping[str, Any]) -> ssl.SSLContext:
        if options is TRUSTED_BY_THE_MACHINE:
            return ssl.create_default_context()
        context: ssl.SSLContext
        if options:
            context = _create(None, options)
        else:  # as PyMySQL's, which reads the certificates that the machine trusts all the same
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def with_option_file(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the TLS options in a driver's `arguments`, which stand above those of the option file that they name."""
    options = dict(arguments.get("ssl") or {})
    group = arguments.get("read_default_group")
    file = arguments.get("read_default_file") or ("/etc/my.cnf" if group else None)
    if file:
        parser: Any = Parser()
        parser.read(os.path.expanduser(file))
        for name in ("ca", "capath", "cert", "key", "cipher"):
            with suppress(configparser.Error):
                options[name] = options.get(name) or parser.get(group or "client", f"ssl-{name}")
    return options


def _hashable(value: Any) -> Any:
    """Return what stands for an option's value in a key. The drivers ignore options that they do not know, whatever
    these are."""
    if isinstance(value, bytearray):
        return bytes(value)  # a key's password
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


def _shown(path: Any) -> str:
    """A file's path as an error shows it; not what was given in its place, which may be the key itself."""
    text = os.fsdecode(path)
    if "\n" in text or "-----" in text or len(text) > _LONGEST_SHOWN:
        return f"(a text of {len(text)} characters that is no path: write it to a file, and name that)"
    return repr(text)


def _stamp(path: Any) -> _Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
