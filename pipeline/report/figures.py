"""Figures of the report: inline SVG whose text and axes follow the page's colour, so that dark mode works."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # replaced by currentColor; no other element has it
COLOURS = ("#3b82c4", "#d9822b", "#4d9e5a", "#b5485d", "#8b6cc1", "#8a7d5c", "#c76fa8", "#5fa8a8")
GREY = "#8a8f98"
WIDTH_IN, HEIGHT_IN = 4.6, 2.9
_BARS_WIDTH_IN, _BAR_IN = 7.0, 0.1
_LEAST_R2 = -0.5
_LEAST_TOP = 0.02  # of scores that are all next to nothing
_LARGEST_SCALE = 1.6  # pixels of a point: letters of 9 points
_ASIDE = 0.035  # of the distance of two numbers of labels

Series = tuple[Sequence[float], Sequence[float]]
Point = tuple[float, float, float]
"""Mean, and the ends of its interval."""


def _figure(columns: int, size_in: tuple[float, float] = (WIDTH_IN, HEIGHT_IN)) -> tuple[Figure, list[Axes]]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: Any = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK
    )
    with rc_context({**settings, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(size_in[0] * columns, size_in[1]), layout="constrained")
        panels = figure.subplots(1, columns, squeeze=False)
    axes: list[Axes] = list(panels[0])
    for axis in axes:
        axis.set_facecolor("none")
        axis.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, name: str) -> Markup:
    """As wide as there is room, until its letters are larger than the page's."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "text.color": INK}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    most_px = round(_LARGEST_SCALE * 72 * figure.get_figwidth())
    return Markup(re.sub(r' width="[^"]*pt" height="[^"]*pt"', f' style="max-width: {most_px}px"', svg, count=1))


def _legend(axis: Axes, **place: Any) -> None:
    legend = axis.legend(frameon=False, fontsize=8, **place)
    for text in legend.get_texts():
        text.set_color(INK)


def curves(
    panels: Mapping[str, Mapping[str, Series]],
    log: Sequence[str] = (),
    num_columns: int | None = None,
    against: Sequence[str] = (),
    x_label: str = "step",
) -> Markup:
    """Panels side by side, each with lines by name over steps, or over what `x_label` says; panels named in `log` get a
    logarithmic y axis.

    Panels named in `against` show 0 as what a constant has, and not what lies below `_LEAST_R2`. `num_columns` leaves
    room for more panels than there are.
    """
    figure, axes = _figure(num_columns or len(panels))
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for idx, (name, (steps, values)) in enumerate(lines.items()):
            style: dict[str, Any] = {"marker": "o", "markersize": 3} if len(steps) < 12 else {}
            axis.plot(steps, values, color=COLOURS[idx % len(COLOURS)], linewidth=1.6, label=name, **style)
        if title in log and all(value > 0 for _, values in lines.values() for value in values):
            axis.set_yscale("log")
        if title in against:
            axis.axhline(0.0, color=GREY, linewidth=1.2, linestyle="--", label="constant")
            axis.set_ylim(bottom=max(axis.get_ylim()[0], _LEAST_R2))
        axis.set_title(title, color=INK, fontsize=10, loc="left")
        axis.set_xlabel(x_label, color=INK)
        axis.set_xlim(0, 1.03 * max(steps[-1] for steps, _ in lines.values()))
        axis.locator_params(axis="x", integer=True)
        if len(lines) > 1:
            _legend(axis)
    return _svg(figure, "curves")


def scores(title: str, numbers: Sequence[int], rows: Mapping[str, Sequence[Point | None]], metric: str) -> Markup:
    """Mean and interval of each arm over the number of labelled images, which are evenly spaced."""
    figure, (axis,) = _figure(1)
    for idx, (name, cells) in enumerate(rows.items()):
        aside = _ASIDE * (idx - (len(rows) - 1) / 2)  # so that intervals do not hide each other
        known = [(place + aside, cell) for place, cell in enumerate(cells) if cell is not None]
        xs, means = [x for x, _ in known], [mean for _, (mean, _, _) in known]
        ends = [[mean - low for _, (mean, low, _) in known], [high - mean for _, (mean, _, high) in known]]
        colour = COLOURS[idx % len(COLOURS)]
        axis.errorbar(
            xs, means, yerr=ends, color=colour, linewidth=1.6, marker="o", markersize=4, capsize=2, label=name
        )
    axis.set_xticks(range(len(numbers)), [str(num) for num in numbers])
    axis.set_xlabel("labelled images", color=INK)
    axis.set_ylabel(metric, color=INK)
    axis.set_xlim(-0.5, len(numbers) - 0.5)
    bottom, top = axis.get_ylim()
    axis.set_ylim(max(0.0, bottom), max(top, _LEAST_TOP))
    _legend(axis, loc="lower left", bbox_to_anchor=(-0.05, 1.0), ncols=2)
    return _svg(figure, title)


def bars(title: str, groups: Sequence[str], rows: Mapping[str, Sequence[float | None]], metric: str) -> Markup:
    """Values by group, a bar per arm in each; groups go down."""
    height = 0.7 + len(groups) * (_BAR_IN * len(rows) + 0.1)
    figure, (axis,) = _figure(1, (_BARS_WIDTH_IN, height))
    share = 0.8 / len(rows)
    for idx, (name, values) in enumerate(rows.items()):
        places = [place + share * (idx - (len(rows) - 1) / 2) for place in range(len(groups))]
        widths = [0.0 if value is None else value for value in values]
        axis.barh(places, widths, height=share, color=COLOURS[idx % len(COLOURS)], label=name)
    axis.set_yticks(range(len(groups)), list(groups))
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.set_xlabel(metric, color=INK)
    axis.grid(False, axis="y")
    _legend(axis, loc="lower left", bbox_to_anchor=(-0.05, 1.0), ncols=min(3, len(rows)))
    return _svg(figure, title)
