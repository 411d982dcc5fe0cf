"""The plots: SVG, the same bytes for the same figures, so that a new run shows in a diff only where it differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

matplotlib.rcParams.update(
    {"svg.hashsalt": "dbsession", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
    | {"axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True, "grid.alpha": 0.3}
)

OURS, THEIRS = "#1b6ca8", "#b8b8b8"
OTHERS = ["#d1495b", "#8a6d1f", "#4f8a63", "#777777"]


def bars(path: Path, title: str, values: Mapping[str, float], unit: str, log: bool = False) -> None:
    """One horizontal bar for each case; those of dbsession stand out."""
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.3 * len(values)), layout="constrained")
    names = list(values)[::-1]
    colours = [OURS if "dbsession" in name else THEIRS for name in names]
    drawn = axes.barh(names, [values[name] for name in names], color=colours)
    axes.bar_label(drawn, fmt="{:.4g}", padding=3)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    if log:
        axes.set_xscale("log")
    axes.set_xlabel(unit)
    _save(figure, axes, path, title)


def lines(
    path: Path, title: str, series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, log_y: bool = False
) -> None:
    """One line for each case, over a logarithmic x."""
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.set_prop_cycle(color=OTHERS)
    for name, points in series.items():
        style = {"color": OURS, "linewidth": 2.2} if name.startswith("dbsession") else {"linestyle": "--"}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
    axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False)
    _save(figure, axes, path, title)


def _save(figure: plt.Figure, axes: plt.Axes, path: Path, title: str) -> None:
    axes.set_title(title, loc="left")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
