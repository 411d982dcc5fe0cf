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

# A floor may import the floors named before it. green and aio share one and never import each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("core",),
    ("green", "aio"),
    ("web",),
    ("watch",),
    ("__init__", "__main__", "flask", "gunicorn_hooks"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FORBIDDEN = {"core": {"gevent", "asyncio"}, "errors": {"gevent", "asyncio"}, "aio": {"gevent"}}
MOST_ENTRIES = 12
MAX_LINES = 300

MODULES = sorted(PACKAGE.rglob("*.py"))
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))


def dotted(path: Path) -> str:
    """`core.pool.holders`; a package's `__init__` is its folder, and the top one's is `__init__`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


NAMES = {dotted(path) for path in MODULES}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, module) of each import in the file, wherever in it: ours without `dbsession.` in front, others'
    by their first name behind a colon."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            first, *rest = name.split(".")
            if first != "dbsession":
                yield node.lineno, f":{first}"
                continue
            while rest and ".".join(rest) not in NAMES:  # a name in a module
                rest.pop()
            yield node.lineno, ".".join(rest) or "__init__"


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_entry_of_the_package_has_a_floor() -> None:
    entries = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert entries == set(FLOOR)
    assert len(entries) <= MOST_ENTRIES


@each_module
def test_module_imports_only_from_the_floors_below(path: Path) -> None:
    own = room(dotted(path))
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {own} imports {module}"
        for line, module in imports(path)
        if not module.startswith(":")
        # `import dbsession` for its path or version: the package itself is there before any of its modules.
        and module != "__init__"
        and room(module) != own
        and FLOOR[room(module)] >= FLOOR[own]
    ]
    assert not wrong, "\n".join(wrong)


@each_module
def test_module_imports_no_library_of_the_other_half(path: Path) -> None:
    own = room(dotted(path))
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {own} imports {module[1:]}"
        for line, module in imports(path)
        if module[1:] in FORBIDDEN.get(own, ()) and module.startswith(":")
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_inside_a_folder_form_no_circle() -> None:
    """Whatever folder two modules share: what is imported late, or for its types only, counts as well."""
    uses = {dotted(path): {module for _, module in imports(path)} & NAMES - {dotted(path)} for path in MODULES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module in done:
            return
        for used in sorted(uses[module]):
            if "." in module and room(used) == room(module):
                visit(used, (*way, module))
        done.add(module)

    for module in sorted(uses):
        visit(module, ())


@each_module
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
        loaded |= {name for name in sys.modules if name.startswith(("dbsession.green", "dbsession.watch"))}
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
