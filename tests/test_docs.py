"""What the documents say is true: commands parse, links lead somewhere, the README's session and the examples run."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner

from dtpipe.pipeline.cli.main import COMMANDS, main
from dtpipe.pipeline.cli.reference import help_text, reference
from dtpipe.pipeline.cli.settings import SECTIONS, check_key
from parts.documents import PAGES, blocks, commands_in, parse
from parts.images import write_images
from parts.paths import REPO

README = PAGES[0].read_text(encoding="utf-8")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
SMALL = {  # settings that make a command of the README small enough for a test; they change no flag that it shows
    "train-teacher": "train_teacher: {channels: [8, 8, 8, 8, 8, 8], blocks: 1, head_channels: 8, norm_groups: 4,"
    " batch_size: 4, run: {steps: 2, num_samples: 1, sample_steps: 2}}",
    "plan": "extract: {batch_size: 8, run: {inline: true}}",
    "extract": "extract: {batch_size: 8, run: {inline: true}}",
    "distill": "distill: {epochs: 1, batch_size: 8, regressor: {width: 8}}",
    "eval": "eval: {probe: {max_iter: 3, l2_grid: [0.1], folds: 2}}",
    "finetune": "eval: {tune: {steps: 2, epochs: null, lr_grid: []}}",
    "report": "report: {num_images: 1}",
}


def test_the_command_reference_is_fresh() -> None:
    page = (REPO / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == reference(), "run `python -m dtpipe.pipeline.cli.reference docs/cli.md`"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_that_parses(name: str) -> None:
    _, _, after = help_text(name).partition("Example:\n")
    examples = list(commands_in(after.partition("\n\n")[0]))
    assert examples
    for words in examples:
        assert words[0] == name
        parse(words)


def test_every_command_line_in_the_documents_parses() -> None:
    lines = [words for page in PAGES for block in blocks(page.read_text(), "sh") for words in commands_in(block)]
    lines += [words for words, _ in session(README)]
    assert len(lines) >= 35
    for words in lines:
        parse(words)


def test_every_setting_named_in_the_documents_exists() -> None:
    key = re.compile(rf"(?<![\w/.])(?:{'|'.join(SECTIONS)})\.(?!json\b)[a-z_]+[a-z0-9_.]*\b")
    written = [page.read_text() for page in PAGES if page.name != "cli.md"]  # which the commands write themselves
    named = {name for text in written for name in key.findall(text)}
    assert len(named) >= 12
    for name in named - {"distill.loss.huber_weight"}:  # an example of what one may add
        check_key(name, "the documents")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    lost = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert lost == []


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 250


def test_the_hours_of_benchmarks_are_those_of_their_commands() -> None:
    page = (REPO / "benchmarks" / "results" / "README.md").read_text(encoding="utf-8")
    hours = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|$", page, re.MULTILINE))
    for path in (REPO / "benchmarks" / "results").glob("*.json"):
        commands = [line for line in json.loads(path.read_text()).get("commands", ()) if isinstance(line, dict)]
        if commands:
            found = sum(line.get("seconds") or 0 for line in commands) / 3600
            assert float(hours.pop(path.stem)) == pytest.approx(found, abs=0.05), path.name
    assert not hours


MEASURED = [  # the rows of the README's first table of results: file, task, number of labelled images
    *(("probe_flowers", "flowers_classes", count) for count in (50, 250, 3251)),
    *(("probe_digits", "digits_foreground", count) for count in (5, 20, 80, 3000)),
]


def test_the_readmes_results_are_those_of_the_benchmarks() -> None:
    table = README.partition("| task, labelled images |")[2].splitlines()[2 : 2 + len(MEASURED)]
    for row, (file, task, count) in zip(table, MEASURED, strict=True):
        document = json.loads((REPO / "benchmarks" / "results" / f"{file}.json").read_text())
        scores = [score for score in document["results"][task]["scores"] if score["best"]]
        shown = [cell.strip(" *") for cell in row.split("|")[2:-1]]
        for cell, extractor in zip(shown, ("distilled", "random initialisation", "teacher", "supervised"), strict=True):
            values = [s["value"] for s in scores if (s["extractor"], s["num_labelled"]) == (extractor, count)]
            assert len(values) == 3
            assert cell == f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}", (row, extractor)


QUANTILE = 2.7764
"""Of Student's t at 97.5 %, with five seeds."""


@pytest.mark.parametrize(
    ("file", "first", "counts"),
    [
        ("downstream_segment", 0, (5, 20, 80)),
        ("downstream_detect", 3, (5, 20, 80)),
        ("downstream_finetune", 6, (25, 50)),
        ("downstream_finetune_250", 8, (250,)),
    ],
)
def test_the_readmes_table_of_fine_tuning_is_that_of_the_benchmark(
    file: str, first: int, counts: tuple[int, ...]
) -> None:
    document = json.loads((REPO / "benchmarks" / "results" / f"{file}.json").read_text())
    found, arms = document["results"], ("distilled", "untrained", "random initialisation")
    rows = README.partition("| fine-tuned, labelled images |")[2].splitlines()[2 + first : 2 + first + len(counts)]
    for row, count in zip(rows, counts, strict=True):
        of_arm = {
            arm: [s["value"] for s in found["scores"] if (s["extractor"], s["num_labelled"]) == (arm, count)]
            for arm in arms
        }
        expected = [f"{statistics.mean(of_arm[arm]):.3f} ± {statistics.stdev(of_arm[arm]):.3f}" for arm in arms]
        for other in ("random initialisation", "untrained"):
            gains = [ours - theirs for ours, theirs in zip(of_arm["distilled"], of_arm[other], strict=True)]
            mean, half = statistics.mean(gains), QUANTILE * statistics.stdev(gains) / 5**0.5
            expected.append(f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]")
        assert [cell.strip() for cell in row.split("|")[2:-1]] == expected


def test_the_readmes_table_of_labels_is_that_of_the_benchmark() -> None:
    document = json.loads((REPO / "benchmarks" / "results" / "labels_digits.json").read_text())
    arms = ("random initialisation", "untrained teacher", "feature", "mix", "label")
    rows = README.partition("| pre-trained with |")[2].splitlines()[2 : 2 + len(arms)]
    for row, arm in zip(rows, arms, strict=True):
        expected = []
        for kind, count in (("frozen", 20), ("frozen", 80), ("tuned", 20), ("tuned", 80)):
            lines = [line for line in document["scores"][kind] if (line["arm"], line["labelled"]) == (arm, count)]
            values = [statistics.mean(line["draws"]) for line in lines if line["score"] == "iou"]
            assert len(values) == document["seeds"] == 8
            expected.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
        assert [cell.strip(" *") for cell in row.split("|")[2:-1]] == expected, arm


def test_the_readmes_costs_are_those_of_the_benchmarks() -> None:
    found = {
        name: json.loads((REPO / "benchmarks" / "results" / f"{name}.json").read_text())
        for name in ("extract", "extract_flowers", "extract_memory", "codec", "read", "distill_step")
    }
    memory = found["extract_memory"]["memory"]
    extract, sizes = found["extract"], list(found["read"]["sizes"].values())
    tight = [
        found["codec"]["teachers"][name]["codecs"]["transform 0.03"]["total_ratio"] for name in ("demo", "flowers64")
    ]
    bare = [found[name]["ratio"]["ratio"] for name in ("extract", "extract_flowers")]
    cores = [extract["cores"]["codecs"][codec]["cores_for_gpu_img_s"]["400"] for codec in ("cast", "int8")]
    steps = list(found["distill_step"]["teachers"].values())
    streams = [size["ratios"]["dtpipe zarr"]["stream over best shuffled"] for size in sizes]
    one = [f"{size['dtpipe zarr']['random']['ms']:.2g}" for size in sizes]
    expected = [
        f"{', '.join(f'{ratio:.2f}' for ratio in bare)}; {extract['workers']['two_over_one']:.2f}",
        f"{memory['resident_mb_by_fifth'][-1] - memory['resident_mb_before']:.0f}; {memory['last_over_second']:.3f}",
        f"{extract['written']['amplification']:.2f}",
        "; ".join(f"{number:.1f}" for number in cores),
        "; ".join(", ".join(f"{ratios[stage]:.1f}" for ratios in tight) for stage in ("rans", "zstd_3")),
        ", ".join(f"{ratio:.1f}" for ratio in streams),
        f"{', '.join(one)} ms",
        ", ".join(f"{step['cached_over_memory']:.2f}" for step in steps),
        ", ".join(f"{step['live_over_cached']:.2f}" for step in steps),
    ]
    rows = README.partition("| cost, on two CPU cores |")[2].splitlines()[2 : 2 + len(expected)]
    assert [row.split("|")[2].strip() for row in rows] == expected


def session(text: str) -> list[tuple[list[str], list[str]]]:
    """Commands of the README's `console` blocks, each with the lines of its answer."""
    steps: list[tuple[list[str], list[str]]] = []
    for line in "".join(blocks(text, "console")).replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            (words,) = commands_in(line)
            steps.append((words, []))
        elif line and line != "...":
            steps[-1][1].append(line)
    return steps


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the README's session was run on a few images; each line of an answer begins as it is shown."""
    root = tmp_path_factory.mktemp("readme")
    write_images(root / "photos", 60)
    write_images(root / "held-out", 60, start=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for words, answer in session(README):
            follow(root, words, answer)
        yield root


def follow(root: Path, words: list[str], answer: list[str]) -> None:
    """Run a command as a page has it, but small; each line of its answer begins as one that is shown."""
    kind = words[2] if words[2:3] == ["finetune"] else words[0]
    small = root / f"{kind}.yaml"
    small.write_text(SMALL.get(kind, ""))
    done = CliRunner().invoke(main, [*words, *(["-c", str(small)] if kind in SMALL else [])])
    assert done.exit_code == 0, f"dtpipe {shlex.join(words)}\n{done.output}"
    starts = {line.split("  ")[0] for line in done.output.splitlines()}
    assert {line.split("  ")[0] for line in answer} <= starts, f"dtpipe {shlex.join(words)}\n{done.output}"


@pytest.mark.slow
def test_the_readmes_session_runs_and_answers_as_shown(used: Path) -> None:
    names = "train-teacher plan extract verify distill eval export report"
    assert [words[0] for words, _ in session(README)] == names.split()
    assert (used / "runs" / "r10" / "report.html").is_file()
    assert (used / "r10" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_readmes_python_runs_and_prints_what_it_says(used: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(used)
    for code in blocks(README, "python"):
        with redirect_stdout(StringIO()) as shown:
            exec(compile(code, "README.md", "exec"), {})
        assert shown.getvalue()


@pytest.mark.slow
def test_the_tutorial_is_followed_to_the_letter(used: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that are the README's too have been run with these flags, in this folder."""
    monkeypatch.chdir(used)
    text = (REPO / "docs" / "tutorial.md").read_text(encoding="utf-8")
    before = [words for words, _ in session(README)]
    own = [(words, answer) for words, answer in session(text) if words not in before]
    assert [words[0] for words, _ in own] == ["report", "eval", "export", "predict"]
    for words, answer in own:
        follow(used, words, answer)
    assert (used / "predicted" / "classes.csv").read_text().count("\n") == 61
    (code,) = blocks(text, "python")
    with redirect_stdout(StringIO()) as shown:
        exec(compile(code, "tutorial.md", "exec"), {})
    assert shown.getvalue().startswith("loss ")
