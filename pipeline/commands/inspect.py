"""`dtpipe inspect`: what a feature dataset holds, and one sample as a picture."""

from __future__ import annotations

from typing import Any

import click

from dtpipe.extract.sources.names import ignored_text
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.words import teacher_in_words
from dtpipe.pipeline.cli.console import Console, format_bytes, format_error

HELP = """Show what a feature dataset holds.

With --sample, draw one sample: its image and each level, the first three principal components as colours.

\b
Example:
  dtpipe inspect features/
  dtpipe inspect features/ --sample cat/001.png --png cat.png
"""
_SHOWN_BAD, SHOWN_LABELS = 20, 12


@click.command("inspect", help=HELP)
@click.argument("url")
@click.option("--sample", metavar="KEY", help="Draw the sample of this key; goes with --png.")
@click.option("--png", metavar="FILE", help="Where to write the picture.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(url: str, sample: str | None, png: str | None, as_json: bool) -> None:
    """Print the dataset's description, or draw one sample."""
    from dtpipe.pipeline.report.inspect import describe_dataset, render_sample

    console = Console(as_json)
    if (sample is None) != (png is None):
        raise ConfigError("--sample and --png go together: the key of a sample, and the file to draw it into")
    if sample is not None and png is not None:
        path = render_sample(url, sample, png)
        console.result(f"wrote {path}")
        console.document({"path": str(path)})
        return
    description = describe_dataset(url)
    _print(console, description)
    console.document(description)


def _print(console: Console, facts: dict[str, Any]) -> None:
    totals, recipe = facts["totals"], facts["recipe"]
    state = "complete" if facts["complete"] else "unfinished: run the same extract again"
    console.pairs(
        {
            "dataset": facts["url"],
            "state": f"{state}; {totals['num_shards_committed']} of {totals['num_shards']} shards",
            "digest": facts["digest"] or "-",
            "samples": f"{totals['num_ok']} ok, {totals['num_bad']} bad, of {totals['num_rows']}",
            "size": format_bytes(totals["size_bytes"]),
            "teacher": teacher_in_words(recipe["teacher"]),
            **_batches(facts),
            "views": "; ".join(_view(view) for view in facts["views"]),
            "source": f"{recipe['source']['kind']}, {recipe['source']['order']} order",
            "format": f"{recipe['shard']['format']}, {recipe['shard']['samples']} samples per shard",
        }
    )
    console.result()
    rows = (
        [("image", "", _shape(facts["images"]["shape"]), "uint8", *_sizes(facts["images"]), "")]
        if facts["images"]
        else []
    )
    rows += [
        (level["name"], str(level["stride"]), _shape(level["shape"]), level["dtype"], *_sizes(level), level["tap"])
        for level in facts["levels"]
    ]
    console.table(("array", "stride", "per sample", "dtype", "stored", "ratio", "tap"), rows)
    if facts["fitted_bytes"]:
        console.result(f"codecs were fitted before: {format_bytes(facts['fitted_bytes'])} in codecs/")
    _print_errors(console, facts["levels"])
    _print_labels(console, facts["labels"])
    if facts["ignored"]:
        console.result(f"ignored: {ignored_text(facts['ignored'])}")
    for bad in facts["bad"][:_SHOWN_BAD]:
        console.result(f"bad: {bad['key']}: {bad['reason']}")
    if len(facts["bad"]) > _SHOWN_BAD:
        console.result(f"and {len(facts['bad']) - _SHOWN_BAD} more bad samples; --json lists them all")


def _print_errors(console: Console, levels: list[dict[str, Any]]) -> None:
    """What codecs lost, beside what a fit expected that they would, and the bytes that it expected."""
    lossy = [level for level in levels if level["codec_error"] or level["expected"]]
    if not lossy:
        return
    console.result()
    rows = []
    for level in lossy:
        expected, measured = level["expected"] or {}, level["codec_error"] or {}
        errors = [expected.get("relative_mse"), *map(measured.get, ("relative_mse", "worst"))]
        shown = ["-" if error is None else format_error(error) for error in errors]
        apart = [f"{measured[name]:.4f}" if measured else "-" for name in ("cosine", "attention")]
        codec = level["codec"] if level["coder"] == "zstd" else f"{level['codec']}, {level['coder']}"
        size = "-" if level["expected_bytes"] is None else format_bytes(level["expected_bytes"])
        rows.append((level["name"], codec, size, *shown, *apart, str(measured.get("num", "-"))))
    columns = ("level", "codec", "bytes expected", "error expected", "measured", "worst", "cosine", "attention", "of")
    console.table(columns, rows)


def _batches(facts: dict[str, Any]) -> dict[str, str]:
    """Batch sizes, where not all shards have the recipe's."""
    if not facts["batch_sizes"]:
        return {}
    lower = ", ".join(
        f"{same['batch_size']} in shards {same['first']} to {same['last']}" for same in facts["batch_sizes"]
    )
    return {"batches": f"{facts['recipe']['compute']['batch_size']} images, but {lower}"}


def _print_labels(console: Console, labels: dict[str, int]) -> None:
    if labels:
        named = ", ".join(f"{name} ({count})" for name, count in list(labels.items())[:SHOWN_LABELS])
        more = f" and {len(labels) - SHOWN_LABELS} more" if len(labels) > SHOWN_LABELS else ""
        console.result(f"labels: {named}{more}")


def _view(view: dict[str, Any]) -> str:
    timestep = "" if view["timestep"] is None else f"timestep {view['timestep']}, "
    return f"{timestep}draw {view['draw']}{', flipped' if view['flip'] else ''}"


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def _sizes(array: dict[str, Any]) -> tuple[str, str]:
    ratio = array["ratio"]
    return format_bytes(array["size_bytes"]), "-" if ratio is None else f"{ratio:.2f}"
