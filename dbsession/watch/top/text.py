"""Values from a snapshot as a terminal shows them: as data, which can neither move the cursor nor change a colour."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence


def duration(seconds: float | None) -> str:
    """Write a time with its unit; one in the histograms' first bucket as what is known of it."""
    if seconds is None:
        return "-"
    if seconds <= 0.001:
        return "<1 ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def short_call_site(call_site: str) -> str:
    """`file:line in function` without the file's folders but the last."""
    path, found, rest = call_site.partition(".py:")
    return os.sep.join(path.split(os.sep)[-2:]) + found + rest


def table(rows: Sequence[Sequence[str]], right: str) -> list[str]:
    """Lines with aligned columns, two spaces between them; `right` has a letter for each column, "r" where it is
    aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def key_lines(keys: Iterable[tuple[str, str, str]], width: int) -> str:
    """Write what the keys do, as markup that can be clicked, in as many lines of that width as it takes."""
    lines: list[str] = []
    used = width
    for key, what, action in keys:
        cell = f"[@click=app.{action}][b $footer-key-foreground]{key}[/] {what}[/]"
        needed = len(f"{key} {what}")
        if used + 2 + needed > width:
            lines.append(cell)
            used = needed
        else:
            lines[-1] += f"  {cell}"
            used += 2 + needed
    return "\n".join(lines)
