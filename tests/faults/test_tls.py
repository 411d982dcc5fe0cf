"""TLS: one context for all of an engine's connections, really negotiated, and refused where it should be."""

from __future__ import annotations

import gc
import os
import shutil
import ssl
import warnings
from contextlib import AsyncExitStack

import pymysql
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import OperationalError

from dbsession.core.backends import mysql_tls
from dbsession.green.mysql.connection import Connection
from support.certificates import make_authority, make_certificate
from support.halves import done, entered, on_both_halves
from support.mariadb import MariaDBServer

CIPHER = text("SHOW STATUS LIKE 'Ssl_cipher'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    authority = make_authority(folder)
    make_authority(folder, "stranger")
    make_certificate(authority, "server", "IP:127.0.0.1")
    make_certificate(authority, "client")
    make_certificate(folder / "stranger.pem", "strangers_client")
    return folder


@pytest.fixture(scope="module")
def tls_server(folder):
    files = {"ca": "ca.pem", "cert": "server.pem", "key": "server.key"}
    server = MariaDBServer(*(f"--ssl-{key}={folder / file}" for key, file in files.items()))
    try:
        server.create_database("test")
        with server.root() as cursor:
            for user, needs in (("known", "X509"), ("hidden", "SSL")):
                cursor.execute(f"CREATE USER {user}@'127.0.0.1' IDENTIFIED BY %s REQUIRE {needs}", (server.password,))
                cursor.execute(f"GRANT ALL ON test.* TO {user}@'127.0.0.1'")
        yield server
    finally:
        server.close()


@pytest.fixture
def managed(driver, half):
    managers = []

    def make(url, user="app", query="", **entry):
        url = url.replace("pymysql", driver).replace("app:", f"{user}:") + query
        managers.append(half.verbs.SessionManager({"default": {"url": url, **entry}}))
        return managers[-1]

    yield make

    async def dispose():
        for manager in managers:
            await done(manager.dispose())

    half.run(dispose)
    with warnings.catch_warnings():  # aiomysql leaves a socket behind when TLS is refused
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def verified(folder, ca="ca.pem", **more):
    """What `ssl` is for each driver: its own name for it is the same."""
    return {"options": {"connect_args": {"ssl": {"ca": str(folder / ca), **more}}}}


async def cipher(manager):
    async with entered(manager.scope()):
        return (await done(manager.get().execute(CIPHER))).one()[1]


async def refused(manager):
    with pytest.raises(OperationalError) as caught:
        await cipher(manager)
    return why(caught.value)


def why(error):
    """The texts of an error and of its causes: aiomysql's own text keeps them back."""
    return "" if error is None else f"{error} {why(error.__cause__)}"


@pytest.fixture
def made(monkeypatch):
    """Every context that reads certificates, which is what takes the time."""
    made = []
    create = ssl.create_default_context

    def counted(*arguments, **more):
        made.append(arguments or more)
        return create(*arguments, **more)

    monkeypatch.setattr(ssl, "create_default_context", counted)
    return made


@on_both_halves
async def test_f32_connections_and_kills_share_one_tls_context(half, managed, tls_server, folder, made):
    manager = managed(tls_server.url("test"), user="hidden", read_timeout_s=0.5, **verified(folder))
    async with AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(entered(manager.scope()))
            assert (await done(manager.get().execute(CIPHER))).one()[1]
        with pytest.raises(OperationalError, match="2013"):
            await done(manager.get().execute(text("SELECT SLEEP(60)")))
        await half.until(lambda: manager.database("default").stats.kills == 1)
    assert manager.database("default").stats.connects == 3
    assert len(made) == 1


@on_both_halves
async def test_f32_no_certificates_are_read_when_nothing_is_said(half, managed, mariadb_url, tls_server, made):
    plain, offered = managed(mariadb_url), managed(tls_server.url("test"))
    assert await cipher(plain) == ""
    assert bool(await cipher(offered)) is (half.name == "gevent")  # PyMySQL takes it where it is offered
    assert not made


@on_both_halves
async def test_f32_wrong_server_is_refused(half, managed, mariadb_url, tls_server, folder):
    stranger = managed(tls_server.url("test"), **verified(folder, "stranger.pem"))
    assert "certificate verify failed" in await refused(stranger)
    by_name = tls_server.url("test").replace("127.0.0.1", "localhost")
    assert "localhost" in await refused(managed(by_name, **verified(folder)))
    assert await cipher(managed(by_name, **verified(folder, check_hostname=False)))
    without = await refused(managed(mariadb_url, **verified(folder)))
    assert "support" in without or "WRONG_VERSION_NUMBER" in without  # asyncmy begins TLS without asking


@on_both_halves
async def test_f32_client_certificates_and_ready_contexts_are_used(half, managed, tls_server, folder):
    own = {"cert": str(folder / "client.pem"), "key": str(folder / "client.key")}
    assert await cipher(managed(tls_server.url("test"), user="known", **verified(folder, **own)))
    assert "1045" in await refused(managed(tls_server.url("test"), user="known", **verified(folder)))
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    ready = {"options": {"connect_args": {"ssl": context}}}
    assert await cipher(managed(tls_server.url("test"), user="hidden", **ready))
    query = f"?ssl_ca={folder / 'ca.pem'}&ssl_cert={own['cert']}&ssl_key={own['key']}"
    assert await cipher(managed(tls_server.url("test"), user="known", query=query))


@on_both_halves
async def test_f32_options_that_the_driver_ignores_are_ignored(half, managed, tls_server, folder):
    assert await cipher(managed(tls_server.url("test"), user="hidden", **verified(folder, ciphers=["a"], more={1: 2})))


@on_both_halves
async def test_f32_a_key_given_in_place_of_its_path_is_in_no_error(half, managed, tls_server, folder):
    key = (folder / "client.key").read_text()
    for given in (key, "".join(key.splitlines()[1:-1]) * 3):
        message = await refused(managed(tls_server.url("test"), **verified(folder, cert=given, key=given)))
        assert "is no path" in message and given[30:60] not in message


@on_both_halves
async def test_f32_changed_files_are_read_again(half, driver, managed, tls_server, folder, tmp_path, made):
    """Rotated, broken, gone, and back: whoever connects uses what is there now, or is told."""
    ca = tmp_path / "ca.pem"
    if driver == "asyncmy":  # one that the option file names
        (tmp_path / "my.cnf").write_text(f"[client]\nssl-ca={ca}\n")
        entry = {"options": {"connect_args": {"read_default_file": str(tmp_path / "my.cnf")}}}
    else:
        entry = {"options": {"connect_args": {"ssl": {"ca": str(ca)}}}}
    manager = managed(tls_server.url("test"), user="hidden", **entry)

    async def next_connection():
        await done(manager.dispose())
        return await cipher(manager)

    shutil.copy(folder / "ca.pem", ca)
    assert await next_connection() and await next_connection()
    assert len(made) == 1
    (tmp_path / "new").write_bytes((folder / "stranger.pem").read_bytes())
    os.replace(tmp_path / "new", ca)
    with pytest.raises(OperationalError) as caught:
        await next_connection()
    assert "certificate verify failed" in why(caught.value)
    ca.write_text("half a certif")
    for _ in range(2):  # the one from before is not used in its place
        with pytest.raises(OperationalError, match=r"2026.*ca\.pem"):
            await next_connection()
    ca.unlink()
    with pytest.raises(OperationalError, match=r"2026.*ca\.pem.*No such file"):
        await next_connection()
    shutil.copy(folder / "ca.pem", ca)
    assert await next_connection()


def test_f32_contexts_do_not_pile_up_when_each_connect_names_other_files(folder, tmp_path):
    contexts = mysql_tls.TLSContexts()
    for number in range(20):
        shutil.copy(folder / "ca.pem", tmp_path / f"{number}.pem")
        contexts.of({"ca": str(tmp_path / f"{number}.pem")}, OperationalError)
    assert len(contexts._made) <= 8


@pytest.mark.parametrize("cursorclass", [pymysql.cursors.Cursor, pymysql.cursors.SSCursor])
def test_rows_come_whole_through_tls(tls_server, folder, parser, cursorclass):
    url = make_url(tls_server.url("test"))
    login = {"host": url.host, "port": url.port, "user": "hidden", "password": url.password}
    connection = Connection(**login, database="test", ssl={"ca": str(folder / "ca.pem")})
    try:
        for _ in range(2):
            with connection.cursor(cursorclass) as cursor:
                cursor.execute("SELECT seq, REPEAT('x', seq MOD 300) FROM seq_1_to_9000")
                assert list(cursor.fetchall()) == [(n, "x" * (n % 300)) for n in range(1, 9001)]
    finally:
        connection.close()
