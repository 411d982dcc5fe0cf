"""The log lines that the package can write, read from its source: what a page tabulates is compared with them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from support.pages import ROOT

LEVELS = ("debug", "info", "warning", "error", "critical", "exception", "log")

Line = tuple[str, str, str]
"""A logger's name, a level, and a text with "..." for what changes."""


def of_package() -> list[Line]:
    """Return the lines of every logger of the package that has a name of ours. SQLAlchemy names the pools' own."""
    return sorted(set(_of(ROOT / "dbsession")))


def of_files(*paths: Path) -> list[Line]:
    """Return the lines that these files write by their own loggers."""
    return sorted({line for path in paths for line in _of(path)})


def _of(where: Path) -> Iterator[Line]:
    files = sorted(where.rglob("*.py")) if where.is_dir() else [where]
    trees = [ast.parse(path.read_text()) for path in files]
    for tree in trees:
        parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or node.attr not in LEVELS:
                continue
            if ast.unparse(node.value) not in ("logger", "self._logger", _OF_CLASS):
                continue
            call = parents[node]
            assert isinstance(call, ast.Call), ast.unparse(call)
            handed_on = node in call.args  # partial(logger.info, ...)
            texts = call.args[call.args.index(node) + 1 :] if handed_on else call.args
            level = "WARNING or ERROR" if node.attr == "log" else node.attr.upper()
            text = texts[1 if node.attr == "log" else 0]
            assert isinstance(text, ast.Constant), ast.unparse(call)
            shown = re.sub(r"%(\.\d)?[rsdfg]", "...", str(text.value)).replace("\n", "")
            of_class = ast.unparse(node.value) == _OF_CLASS
            names = _of_classes(trees) if of_class else _names(node, tree, trees, parents)
            assert names, ast.unparse(call)
            for name in names:
                yield name, level, shown


_OF_CLASS = "logging.getLogger(self.LOGGER)"


def _of_classes(trees: list[ast.Module]) -> set[str]:
    """Return what classes have as their LOGGER, a literal."""
    return {
        str(node.value.value)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LOGGER"
        if isinstance(node.value, ast.Constant)
    }


def _names(node: ast.AST, tree: ast.Module, trees: list[ast.Module], parents: dict[ast.AST, ast.AST]) -> set[str]:
    """Return the name of the module's own logger, or of the one that it imports; where one is handed to a function or
    a class, those of the modules that hand it in."""
    handed = node
    while not isinstance(handed, ast.Module):
        handed = parents[handed]
        takers = handed.body if isinstance(handed, ast.ClassDef) else [handed]
        if any(isinstance(each, _FUNCTION) and any(arg.arg == "logger" for arg in each.args.args) for each in takers):
            name = str(getattr(handed, "name", ""))
            return {
                _own(other)
                for other in trees
                for call in ast.walk(other)
                if isinstance(call, ast.Call)
                and ast.unparse(call.func).rpartition(".")[2] == name
                and any(isinstance(each, ast.Name) and each.id == "logger" for each in call.args)
            }
    return {_own(tree)}


_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def _own(tree: ast.Module) -> str:
    """Return the name that a module gives its logger, or gets with one that it imports."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "logger":
            assert isinstance(node.value, ast.Call) and isinstance(node.value.args[0], ast.Constant)
            return str(node.value.args[0].value)
    (source,) = (
        node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and any(each.name == "logger" for each in node.names)
    )
    return _own(ast.parse((ROOT / f"{str(source).replace('.', '/')}.py").read_text()))
