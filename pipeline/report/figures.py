"""Figures of the report: inline SVG whose text and axes follow the page's colour, so that dark mode works."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # replaced by currentColor; no other element has it
COLOURS = ("#3b82c4", "#d9822b", "#4d9e5a", "#b5485d", "#8b6cc1", "#8a7d5c", "#c76fa8", "#5fa8a8")
GREY = "#8a8f98"
WIDTH_IN, HEIGHT_IN = 4.6, 2.9

Series = tuple[Sequence[float], Sequence[float]]


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: Any = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK
    )
    with rc_context({**settings, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(WIDTH_IN * columns, HEIGHT_IN), layout="constrained")
        panels = figure.subplots(1, columns, squeeze=False)
    axes: list[Axes] = list(panels[0])
    for axis in axes:
        axis.set_facecolor("none")
        axis.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, name: str) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "text.color": INK}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'(<svg[^>]*?) width="[^"]*pt" height="[^"]*pt"|(<svg[^>]*?) height="[^"]*pt"', r"\1\2", svg, count=1)


def _legend(axis: Axes, **place: Any) -> None:
    legend = axis.legend(frameon=False, fontsize=8, **place)
    for text in legend.get_texts():
        text.set_color(INK)


def curves(panels: Mapping[str, Mapping[str, Series]], log: Sequence[str] = ()) -> str:
    """Panels side by side, each with lines by name over steps; panels named in `log` get a logarithmic y axis."""
    figure, axes = _figure(len(panels))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for idx, (name, (steps, values)) in enumerate(lines.items()):
            style: dict[str, Any] = {"marker": "o", "markersize": 3} if len(steps) < 12 else {}
            axis.plot(steps, values, color=COLOURS[idx % len(COLOURS)], linewidth=1.6, label=name, **style)
        if title in log and all(value > 0 for _, values in lines.values() for value in values):
            axis.set_yscale("log")
        axis.set_title(title, color=INK, fontsize=10, loc="left")
        axis.set_xlabel("step", color=INK)
        axis.set_xlim(0, 1.03 * max(steps[-1] for steps, _ in lines.values()))
        axis.locator_params(axis="x", integer=True)
        if len(lines) > 1:
            _legend(axis)
    return _svg(figure, "curves")


def scores(
    title: str, numbers: Sequence[int], rows: Mapping[str, Sequence[tuple[float, float] | None]], metric: str
) -> str:
    """Mean and spread of each extractor over the number of labelled images, which are evenly spaced."""
    figure, (axis,) = _figure(1)
    places = range(len(numbers))
    for idx, (name, cells) in enumerate(rows.items()):
        known = [(place, cell) for place, cell in zip(places, cells, strict=True) if cell is not None]
        colour = COLOURS[idx % len(COLOURS)]
        xs, means, spreads = [x for x, _ in known], [cell[0] for _, cell in known], [cell[1] for _, cell in known]
        axis.errorbar(
            xs, means, yerr=spreads, color=colour, linewidth=1.6, marker="o", markersize=4, capsize=2, label=name
        )
    axis.set_xticks(list(places), [str(num) for num in numbers])
    axis.set_xlabel("labelled images", color=INK)
    axis.set_ylabel(metric, color=INK)
    axis.set_ylim(bottom=0)
    _legend(axis, loc="lower left", bbox_to_anchor=(-0.05, 1.0), ncols=2)
    return _svg(figure, title)
