"""Every page: its links lead somewhere, the files it names are there, and each Python block is run by a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from support.pages import BLOCKS, NAMED_BLOCKS, PAGES, ROOT

TESTS = ROOT / "tests"
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """Return what a page's headings are called in a link, by GitHub's rule."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)
    for link in LINK.findall(prose):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent.joinpath(name).resolve() if name else ROOT / page
        assert target.exists() and target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_python_blocks_have_names_of_their_own_and_compile():
    names = [name for name, _ in NAMED_BLOCKS]
    assert len(set(names)) == len(names), "two blocks have one name"
    for page, text in PAGES.items():
        assert text.count("```python\n") == text.count("<!-- test: "), page
    for name, text in BLOCKS.items():
        compile(text, name, "exec")


def test_python_blocks_are_each_run_by_a_test():
    sources = "\n".join(path.read_text() for path in TESTS.rglob("test_*.py") if path != Path(__file__).resolve())
    for name in BLOCKS:
        stem = re.escape(name.removesuffix(".py"))
        assert re.search(rf"""["'\s.]{stem}(\.py)?\b""", sources), f"no test runs the block {name}"


def test_docstrings_can_be_read_alone():
    """An IDE shows the first sentence and nothing else."""
    leans = re.compile(r"(The same|That of|It|Those|After that|As it says|See|From now on|In a \w+ \w+)\b", re.I)
    for path in (ROOT / "dbsession").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                assert not leans.match(ast.get_docstring(node) or ""), f"{path}: {getattr(node, 'name', '')}"


@pytest.mark.parametrize("page", PAGES)
def test_cells_can_be_read_alone(page):
    """Without the row above."""
    leans = re.compile(r"\| (The same|That of|It is|Those|After that|As it says)\b.*", re.I)
    assert not leans.findall(PAGES[page])


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page):
    for name in set(re.findall(r"(?<![\w/.])(?:deploy|tests)/[\w./-]*\w", PAGES[page])):
        here = (ROOT / page).parent
        assert (ROOT / name).exists() or (here / name).exists(), name
