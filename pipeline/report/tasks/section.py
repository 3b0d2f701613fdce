"""The part of the page about downstream tasks: verdict, table, scores over numbers of labels, classes, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from dtpipe.distill.downstream.paired import interval
from dtpipe.manifests.words import count_of
from dtpipe.pipeline.config import ReportConfig
from dtpipe.pipeline.report import figures
from dtpipe.pipeline.report.section import Notes, Section, render
from dtpipe.pipeline.report.tasks.gallery import prediction_pictures
from dtpipe.pipeline.report.tasks.results import Arms, ByClass, Cell, TaskResult, task_results

_MOST_CLASSES, _MOST_ARMS = 24, 5
_FEW_SCORES = 3  # other scores with a table of their own
_FROZEN = "Features are frozen, under a classifier that learns from few labels"
_CHOSEN = "best level and regularisation of each arm, chosen on its labelled images only"


def task_sections(run: Path, config: ReportConfig, notes: Notes) -> Iterator[Section]:
    """One section per result of the run."""
    for result in task_results(run, notes.leave_out):
        yield task_section(result, prediction_pictures(result, config, notes))


def task_section(result: TaskResult, pictures: Markup) -> Section:
    """Verdict on top, then the table beside its figure, classes, and the pictures that are given."""
    numbers = result.numbers
    html = render(
        "task.html",
        verdicts=result.verdicts,
        numbers=[f"{num} labelled" for num in numbers],
        table=_grid(result, result.arms),
        differences=_difference_rows(result),
        paired="paired by seed, with 95% intervals" if result.num_seeds > 1 else "one seed, no interval",
        more=dict(_more_tables(result)),
        ours=result.subjects,
        how=_how(result),
        caption=_caption(result),
        figure=score_figure(result),
        classes=list(_class_figures(result)),
        pictures=pictures,
    )
    return Section(f"{result.task}: {result.metric}", html)


def _grid(result: TaskResult, arms: Arms) -> dict[str, list[str]]:
    """Arm to its cells, one per number of labelled images."""
    return {arm: [cell_text(cells.get(num)) for num in result.numbers] for arm, cells in arms.items()}


def _difference_rows(result: TaskResult) -> dict[str, list[str]]:
    """Other arm to the subject's difference from it, one per number of labelled images."""
    known = {(one.other, one.num_labelled): interval(one) for one in result.differences}
    others = dict.fromkeys(one.other for one in result.differences)
    return {other: [known.get((other, num), "-") for num in result.numbers] for other in others}


def _more_tables(result: TaskResult) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Tables below the headline's, by their titles."""
    if len(result.others) <= _FEW_SCORES:
        for name, arms in result.others.items():
            yield f"{name}, of the same predictions", _grid(result, arms)
    else:
        named = {
            f"{name}, {arm}": row for name, arms in result.others.items() for arm, row in _grid(result, arms).items()
        }
        yield "other scores of the same predictions", named
    if result.chosen:
        yield _CHOSEN, _grid(result, result.chosen)


def _how(result: TaskResult) -> str:
    """What was scored, and how."""
    clauses = [_FROZEN] if result.frozen else []
    clauses += [result.headline] if result.headline else [_CHOSEN] if result.frozen else []
    return _sentences([": ".join(clauses), "Numbers of labelled images count all classes together"])


def cell_text(cell: Cell | None) -> str:
    """Mean and spread of a cell of the table."""
    if cell is None:
        return "-"
    return f"{cell.mean:.3f} ± {cell.std:.3f}" if cell.std is not None else f"{cell.mean:.3f}"


def score_figure(result: TaskResult) -> Markup:
    """Score over number of labelled images, a line per arm, with intervals."""
    rows = {arm: [_point(cells.get(num)) for num in result.numbers] for arm, cells in result.arms.items()}
    return figures.scores(result.path.stem, result.numbers, rows, result.metric)


def _point(cell: Cell | None) -> figures.Point | None:
    if cell is None:
        return None
    return cell.mean, *(cell.interval() or (cell.mean, cell.mean))


def _caption(result: TaskResult) -> str:
    seeds = result.num_seeds
    spread = (
        f"mean ± standard deviation of {seeds} seeds; bars are 95% intervals of the mean (Student's t)"
        if seeds > 1
        else "one seed"
    )
    return _sentences([f"{count_of(result.num_test, 'held-out image')}; {spread}", *result.notes])


def _sentences(sentences: Sequence[str]) -> str:
    """Clauses and sentences as one text."""
    whole = [f"{one[0].upper()}{one[1:]}" for one in sentences if one]
    return " ".join(one if one.endswith((".", "!", "?")) else f"{one}." for one in whole)


def _class_figures(result: TaskResult) -> Iterator[tuple[str, Markup]]:
    """A caption and bars for each score that is known by class, from the largest number of labelled images."""
    for name, arms in result.by_class.items():
        num = max(num for tables in arms.values() for num in tables)
        tables = {arm: by_num[num] for arm, by_num in arms.items() if num in by_num}
        tables = {arm: tables[arm] for arm in _few_arms(result, tables, num)}
        classes, said = _few_classes(tables)
        rows = {arm: [table.get(name) for name in classes] for arm, table in tables.items()}
        caption = f"{name} by class, from {count_of(num, 'labelled image')}{said}."
        yield caption, figures.bars(f"{result.path.stem} {name}", classes, rows, name)


def _few_arms(result: TaskResult, tables: Mapping[str, ByClass], num: int) -> list[str]:
    """At most `_MOST_ARMS`: those asked about, and the best of the others; in the order of the table."""
    others = sorted((arm for arm in tables if arm not in result.subjects), key=lambda arm: -result.arms[arm][num].mean)
    kept = {*result.subjects, *others[: max(0, _MOST_ARMS - len(result.subjects))]}
    return [arm for arm in tables if arm in kept]


def _few_classes(tables: Mapping[str, ByClass]) -> tuple[Sequence[str], str]:
    """At most `_MOST_CLASSES`: those whose values differ most between the arms; and a clause that says so."""
    classes = list(dict.fromkeys(name for table in tables.values() for name in table))
    if len(classes) <= _MOST_CLASSES:
        return classes, ""

    def spread(name: str) -> float:
        known = [value for table in tables.values() if (value := table.get(name)) is not None]
        return max(known) - min(known) if known else -1.0

    widest = set(sorted(classes, key=spread, reverse=True)[:_MOST_CLASSES])
    said = f": {_MOST_CLASSES} of {len(classes)} classes, those in which the arms differ most"
    return [name for name in classes if name in widest], said
