"""What the benchmark of changes to fine-tuning concludes, from scores by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "benchmarks"))

from downstream import TEACHER, UNTRAINED  # noqa: E402
from downstream_why import BASE, LABELLED, VARIANTS, found_here, parse, result_file, results, table  # noqa: E402

from dtpipe.distill.downstream.extractors import RANDOM_INIT  # noqa: E402

GAINS = [0.02, 0.03, 0.025, 0.01, 0.015]
"""On scratch, by seed, in the base."""


def write(path: Path, arms: dict[str, list[float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = [
        {"extractor": arm, "num_labelled": num, "seed": seed, "value": value}
        for arm, values in arms.items()
        for num in LABELLED
        for seed, value in enumerate(values)
    ]
    path.write_text(json.dumps({"scores": scores}))


def test_a_variant_changes_a_gain_where_the_paired_difference_is_clear(tmp_path: Path) -> None:
    scratch = [0.7, 0.72, 0.69, 0.71, 0.7]
    base = {TEACHER: [one + gain for one, gain in zip(scratch, GAINS, strict=True)]}
    base |= {RANDOM_INIT: scratch, UNTRAINED: [value + 0.01 for value in scratch]}
    own = {variant.name: list(base[TEACHER]) for variant in VARIANTS if variant.distilled}
    own["T = 150"] = [value - 0.05 + 0.001 * seed for seed, value in enumerate(base[TEACHER])]
    for variant in VARIANTS:
        if variant.tune or variant.name == BASE:
            raised = [value + 0.004 * (seed % 2) for seed, value in enumerate(base[TEACHER])]
            write(
                result_file(tmp_path, variant), {**base, **own} if variant.name == BASE else {**base, TEACHER: raised}
            )
    found = results(found_here(parse([]), tmp_path, None))
    tuned = results(found_here(parse(["--variants", "0", "1", "2", "3", "4"]), tmp_path, None))
    assert len(tuned["changes"]) == 2 * 2 * 4
    added = parse(["--variants", "5", "6", "7", "8", "--add-to", "x"])
    assert results(found_here(added, tmp_path, json.loads(json.dumps(tuned)))) == found
    (lost,) = [
        line
        for line in found["changes"]
        if (line["variant"], line["gain"], line["labelled"]) == ("T = 150", f"{TEACHER} - {RANDOM_INIT}", 20)
    ]
    assert lost["answer"] == "changes it" and lost["mean"] == pytest.approx(-0.048)
    assert {line["answer"] for line in found["changes"] if line["variant"] != "T = 150"} == {"not seen"}
    assert len(found["changes"]) == 2 * 2 * (len(VARIANTS) - 1)
    (gain,) = [
        line
        for line in found["gains"]
        if (line["variant"], line["gain"], line["labelled"]) == (BASE, f"{TEACHER} - {RANDOM_INIT}", 5)
    ]
    assert gain["mean"] == pytest.approx(0.02) and gain["high"] == pytest.approx(0.02 + 0.00982, abs=1e-5)


def test_students_of_other_distillations_are_arms_of_the_bases_table(tmp_path: Path) -> None:
    words = table(parse(["--seeds", "2"]), tmp_path, VARIANTS[0])
    compared = [words[place + 1] for place, word in enumerate(words) if word == "--compare"]
    assert [arm.partition("=")[0] for arm in compared[:2]] == [UNTRAINED, "fresh noise in every step"]
    assert compared[1].endswith("fresh-noise-in-every-step-0," + str(tmp_path / "fresh-noise-in-every-step-1"))
    added = table(parse(["--variants", "7", "8", "--add-to", "x"]), tmp_path, VARIANTS[0])
    assert added[1].startswith("T = 150=") and added.count("--compare") == 1  # the base's scores are there already
    assert table(parse([]), tmp_path, VARIANTS[1]).count("--compare") == 1
