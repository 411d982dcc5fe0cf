"""The package's shape: each module imports only what stands above it, and fits on a few pages."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import dbsession
from support.processes import run_python

PACKAGE = Path(__file__).resolve().parents[2] / "dbsession"

# Import order = call order: a module imports only from those before it. A folder is one entry, and inside it
# everything may import everything. `__init__` is the package itself: what may say `import dbsession`.
ORDER = (
    "errors",
    "keys",
    "config",
    "source",
    "stats",
    "discarding",
    "driver",
    "statements",
    "masking",
    "places",
    "holders",
    "unit",
    "sqlite_files",
    "hub",
    "ident",
    "teardown",
    "scope",
    "block",
    "fork",
    "turns",
    "ticker",
    "greenlet_holders",
    "leaks",
    "leak_ticker",
    "guard",
    "homes",
    "pool",
    "sqlite",
    "mysql",
    "outcome",
    "sessions",
    "attempts",
    "created",
    "connections",
    "factory",
    "registry",
    "engines",
    "transaction",
    "manager",
    "deadlines",
    "api",
    "reply",
    "wsgi",
    "watch",
    "aio",
    "__init__",
    "flask",
    "gunicorn_hooks",
    "cli",
    "__main__",
)
MAX_LINES = 300

MODULES = sorted(PACKAGE.rglob("*.py"))


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, layer) of every import of ours in the file, wherever in it; late ones count as well."""
    package = ["dbsession", *path.relative_to(PACKAGE).parts[:-1]]

    def of(dotted: list[str]) -> str:
        # A name that is no module of ours, as in `from dbsession import configure`, comes from the package.
        known = len(dotted) > 1 and dotted[1] in ORDER
        return dotted[1] if known else "__init__"

    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "dbsession":
                    yield node.lineno, of(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            if base[:1] == ["dbsession"]:
                for alias in node.names:
                    yield node.lineno, of([*base, alias.name])


def test_order_lists_every_module() -> None:
    assert {layer(path) for path in MODULES} == set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_from_above(path: Path) -> None:
    own = layer(path)
    above = ORDER[: ORDER.index(own)]
    inside = (own,) if path.parent != PACKAGE else ()
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {own} imports {name}"
        for line, name in imported_layers(path)
        if name not in above + inside
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_import_brings_in_no_extra() -> None:
    """`import dbsession` loads only what its own requirements installed."""
    run_python(
        """
        import sys
        import dbsession

        extras = {"gunicorn", "flask", "werkzeug", "prometheus_client", "opentelemetry", "textual", "rich"}
        drivers = {"aiomysql", "asyncmy", "aiosqlite", "asyncpg"}
        loaded = {name.partition(".")[0] for name in sys.modules} & (extras | drivers | {"gevent", "asyncio"})
        assert not loaded, loaded
        for name in dbsession.__all__:  # each loads its module, the gevent half
            getattr(dbsession, name)
        loaded = {name.partition(".")[0] for name in sys.modules} & (extras | drivers)
        assert not loaded, loaded
        """
    )


def test_aio_brings_in_no_gevent_and_no_driver() -> None:
    """Not even an engine does, until its driver is needed; and none of our modules that aio loads imports gevent."""
    run_python(
        """
        import sys
        import dbsession.aio

        for name in dbsession.aio.__all__:
            getattr(dbsession.aio, name)
        drivers = {"aiomysql", "asyncmy", "aiosqlite", "asyncpg"}
        loaded = {name.partition(".")[0] for name in sys.modules} & (drivers | {"gevent"})
        assert not loaded, loaded
        """
    )


def test_public_names_are_found_listed_and_typed() -> None:
    """Those of `dbsession.__all__`: imported at their first use (PEP 562), and under TYPE_CHECKING for type checkers,
    from the same modules."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == dbsession._MODULES
    assert sorted(typed) == sorted(dbsession.__all__)
    assert set(dbsession.__all__) <= set(dir(dbsession))
    for name, module in typed.items():
        assert getattr(dbsession, name) is getattr(import_module(str(module)), name)
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        dbsession.nothing_of_ours  # noqa: B018
