"""What the benchmark of changes to fine-tuning concludes, from scores by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "benchmarks"))

from downstream import TEACHER, UNTRAINED  # noqa: E402
from downstream_why import (  # noqa: E402
    BASE,
    DETECT,
    SEGMENT,
    VARIANTS,
    earlier_result,
    found_here,
    parse,
    pretraining,
    protocol,
    result_file,
    results,
    table,
)

from dtpipe.distill.downstream.extractors import RANDOM_INIT  # noqa: E402
from dtpipe.pipeline.cli.settings import load_document  # noqa: E402

GAINS = [0.02, 0.03, 0.025, 0.01, 0.015]
"""On scratch, by seed, in the base."""


def write(path: Path, arms: dict[str, list[float]], seeds: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = [
        {"extractor": arm, "num_labelled": num, "seed": seed, "value": values[seed]}
        for arm, values in arms.items()
        for num in SEGMENT.labelled
        for seed in seeds
    ]
    path.write_text(json.dumps({"scores": scores}))


def test_a_variant_changes_a_gain_where_the_paired_difference_is_clear(tmp_path: Path) -> None:
    scratch = [0.7, 0.72, 0.69, 0.71, 0.7]
    base = {TEACHER: [one + gain for one, gain in zip(scratch, GAINS, strict=True)]}
    base |= {RANDOM_INIT: scratch, UNTRAINED: [value + 0.01 for value in scratch]}
    own = {variant.name: list(base[TEACHER]) for variant in VARIANTS if variant.distilled}
    own["timestep 150"] = [value - 0.05 + 0.001 * seed for seed, value in enumerate(base[TEACHER])]
    raised = {**base, TEACHER: [value + 0.004 * (seed % 2) for seed, value in enumerate(base[TEACHER])]}

    def made_of(root: Path, seeds: range, earlier: dict[str, Any] | None = None) -> dict[str, Any]:
        args = parse([])
        args.of_seeds = seeds
        for variant in VARIANTS:
            if not variant.distilled:
                write(result_file(root, "segment", variant), {**base, **own} if variant.name == BASE else raised, seeds)
        return json.loads(json.dumps(results(found_here(args, root, earlier), SEGMENT)))  # type: ignore[no-any-return]

    found = made_of(tmp_path / "at once", range(5))
    two = made_of(tmp_path / "two", range(2))
    assert {line["n"] for line in two["gains"]} == {2}
    one = made_of(tmp_path / "one", range(1))
    assert {line["answer"] for line in one["changes"]} == {"one seed, no answer"}
    assert made_of(tmp_path / "three more", range(2, 5), two) == found
    (lost,) = [
        line
        for line in found["changes"]
        if (line["variant"], line["gain"], line["labelled"]) == ("timestep 150", f"{TEACHER} - {RANDOM_INIT}", 20)
    ]
    assert lost["answer"] == "changes it" and lost["mean"] == pytest.approx(-0.048)
    assert {line["answer"] for line in found["changes"] if line["variant"] != "timestep 150"} == {"not seen"}
    assert len(found["changes"]) == 2 * 2 * (len(VARIANTS) - 1)
    assert len(found["own"]) == 2 * (len(VARIANTS) - 1)
    own = {(line["variant"], line["labelled"]): line["mean"] for line in found["own"]}
    assert own["timestep 150", 5] == pytest.approx(-0.048) and own["backbone frozen", 20] == pytest.approx(0.0016)
    (gain,) = [
        line
        for line in found["gains"]
        if (line["variant"], line["gain"], line["labelled"]) == (BASE, f"{TEACHER} - {RANDOM_INIT}", 5)
    ]
    assert gain["mean"] == pytest.approx(0.02) and gain["high"] == pytest.approx(0.02 + 0.00982, abs=1e-5)


def test_students_of_other_distillations_are_arms_of_the_bases_table(tmp_path: Path) -> None:
    args = parse(["--seeds", "2"])
    words = table(args, tmp_path, VARIANTS[0])
    compared = [words[place + 1] for place, word in enumerate(words) if word == "--compare"]
    assert not any(set("=,") & set(variant.name) for variant in VARIANTS)  # which end an arm's name on the command line
    assert [arm.partition("=")[0] for arm in compared[:2]] == [
        UNTRAINED,
        "fresh noise and mirrored at random in every step",
    ]
    assert compared[1].endswith(
        "fresh-noise-and-mirrored-at-random-in-every-step-0,"
        + str(tmp_path / "fresh-noise-and-mirrored-at-random-in-every-step-1")
    )
    assert table(args, tmp_path, VARIANTS[1]).count("--compare") == 1
    objects = table(parse(["--task", "detect"]), tmp_path, VARIANTS[1])
    assert objects[2] == "detect" and objects[objects.index("--labelled") + 1] == "20,80"
    assert objects[objects.index("--out") + 1] != words[words.index("--out") + 1]


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_twice_the_steps_are_twice_those_of_the_preset(task: str, tmp_path: Path) -> None:
    (variant,) = [variant for variant in VARIANTS if variant.name == "twice the steps"]
    words = table(parse(["--task", task]), tmp_path, variant)
    preset = load_document(f"{task}_small")["eval"]["tune"]
    assert int(words[words.index("--steps") + 1]) == 2 * preset["steps"]


def test_seeds_are_added_to_a_result_of_the_same_variants_and_teacher(tmp_path: Path) -> None:
    earlier, digests = tmp_path / "earlier.json", {"digits": "00"}
    scores = [
        {"variant": name, "arm": TEACHER, "labelled": 20, "seeds": {"0": 0.5, "1": 0.6}}
        for name in (BASE, "timestep 150")
    ]
    document = {
        "benchmark": "downstream_why",
        "protocol": protocol(SEGMENT),
        "origin": {"teacher_digests": digests},
        "seeds": 2,
        "scores": scores,
    }
    earlier.write_text(json.dumps(document))
    for other in ("read.json", "README.md", "nowhere.json"):
        with pytest.raises(SystemExit, match=rf"{other} .*result of benchmarks/downstream_why.py"):
            earlier_result(parse(["--add-to", str(REPO / "benchmarks" / "results" / other)]), digests)
    given = ["--seeds", "3", "--add-to", str(earlier), "--variants", "7"]
    args = parse(given)
    assert earlier_result(args, digests) == document and args.of_seeds == range(2, 5)
    later = parse([*given, "--first-seed", "5"])
    assert earlier_result(later, digests) == document and later.of_seeds == range(5, 8)
    with pytest.raises(SystemExit, match=r"has seeds \[1\]; leave out --first-seed"):
        earlier_result(parse([*given, "--first-seed", "1"]), digests)
    words = table(args, tmp_path, VARIANTS[0])
    assert words[1] == f"{TEACHER}=" + ",".join(str(tmp_path / f"{TEACHER}{seed}") for seed in (2, 3, 4))
    assert "eval.seed=2" in words and words[words.index("--seeds") + 1] == "3"
    made = [command[command.index("--out") + 1] for group in pretraining(args, tmp_path, 4) for command in group]
    named = ["features/distilled4", "distilled4", "features/untrained4", "untrained4"]
    named += ["features/timestep-150-4", "timestep-150-4"]
    assert made == [str(tmp_path / name) for name in named]
    with pytest.raises(SystemExit, match="another protocol or teacher"):
        earlier_result(parse(given), {"digits": "11"})
    with pytest.raises(SystemExit, match="another protocol or teacher"):
        earlier_result(parse([*given, "--task", DETECT.task]), digests)
    with pytest.raises(SystemExit, match="has the variants as published, timestep 150; give the same"):
        earlier_result(parse([*given, "8"]), digests)
