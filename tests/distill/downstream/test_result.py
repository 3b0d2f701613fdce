"""Means, spreads, tables and the comparison that fills them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from dtpipe.distill.downstream.compare import run_probe
from dtpipe.distill.downstream.extractors import FeatureExtractor, PerSeed, raw_pixels
from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.downstream.result import FIXED, HEAD, ProbeResult, Score, headline_of, headline_rows, mark_best
from dtpipe.manifests.errors import ConfigError
from parts.labelled import with_classes


def score(level: str, seed: int, value: float, selection: float | None, best: bool = False) -> Score:
    return Score("net", level, 5, seed, value, selection, best)


def test_best_level_is_chosen_by_selection_and_ties_go_to_the_later() -> None:
    marked = mark_best([score("l2", 0, 0.9, 0.5), score("l3", 0, 0.1, 0.7), score("all", 0, 0.2, 0.7)])
    assert [one.level for one in marked if one.best] == ["all"]
    assert [one.level for one in mark_best([score("l2", 0, 0.9, None), score("l3", 0, 0.1, None)]) if one.best] == [
        "l3"
    ]


def test_summary_means_and_spreads() -> None:
    scores = (
        *(score("l2", seed, value, 0.5, seed == 2) for seed, value in enumerate((0.2, 0.4, 0.9))),
        *(score("l3", seed, value, 0.6, seed != 2) for seed, value in enumerate((0.3, 0.5, 0.1))),
    )
    result = ProbeResult("probe", "accuracy", 7, scores)
    best = result.best("net", 5)
    assert best.mean == pytest.approx((0.3 + 0.5 + 0.9) / 3)
    assert best.std == pytest.approx(statistics.stdev([0.3, 0.5, 0.9]))
    assert best.levels == {"l3": 2, "l2": 1}
    assert f"{best.mean:.3f} ± {best.std:.3f}" in result.to_table()
    assert "0.500 ± 0.361" in result.to_table(levels=True)  # l2
    with pytest.raises(ConfigError, match="was not scored"):
        result.best("net", 6)


def fixed(arm: str, num: int, values: Sequence[float], level: str = FIXED) -> list[Score]:
    return [Score(arm, level, num, seed, value) for seed, value in enumerate(values)]


def test_the_headline_is_the_fixed_candidate_and_what_folds_chose_stands_below_it() -> None:
    scores = (*fixed("net", 5, [0.5, 0.7]), score("l2", 0, 0.9, 0.5, True), score("l3", 1, 0.8, 0.5, True))
    lines = ProbeResult("readout", "IoU", 7, scores, headline="all levels").to_table().splitlines()
    assert lines[1] == "all levels" and lines[4].split() == ["net", "0.600", "±", "0.141"]
    assert lines[6].startswith("best level") and lines[9].split() == ["net", "0.850", "±", "0.071"]


def test_a_network_with_a_head_stands_in_the_headline_and_chose_nothing() -> None:
    scores = (
        *fixed("net", 5, [0.5]),
        score("l2", 0, 0.9, 0.5, True),
        replace(score(HEAD, 0, 0.4, None, True), extractor="scratch"),
    )
    result = ProbeResult("readout", "IoU", 7, scores)
    assert [(row.extractor, row.mean) for row in headline_rows(result.summaries())] == [("net", 0.5), ("scratch", 0.4)]
    assert "scratch" not in result.to_table().partition("best level")[2]


def test_files_from_before_there_was_a_headline_are_read_by_their_best_level() -> None:
    old = {
        "extractor": "net",
        "level": "best",
        "num_labelled": 5,
        "mean": 0.5,
        "std": None,
        "num_seeds": 1,
        "levels": {},
    }
    assert [row.mean for row in headline_of({"summaries": [old, {**old, "level": "l2", "mean": 0.1}]})] == [0.5]


def test_other_scores_stand_beside_the_headline() -> None:
    scores = (replace(fixed("net", 5, [0.5])[0], others={"foreground AP": 0.75}), *fixed("other", 5, [0.4]))
    table = ProbeResult("readout", "IoU", 7, scores).to_table()
    lines = table.partition("foreground AP, of the same predictions\n")[2].splitlines()
    assert [line.split() for line in lines[2:4]] == [["net", "0.750"], ["other", "-"]]


def test_many_other_scores_stand_in_one_table_at_the_most_labelled_images() -> None:
    names = ("AP50", "AP75", "AR1", "AR10")
    arms = [
        replace(
            fixed(arm, num, [0.5])[0], others={name: num / 100 for name in names if (arm, name) != ("other", "AR1")}
        )
        for num in (5, 20)
        for arm in ("net", "other")
    ]
    lines = ProbeResult("detect", "box AP", 7, tuple(arms)).to_table().splitlines()
    start = lines.index("other scores of the same predictions, 20 labelled") + 1
    rows = [line.split() for line in lines[start : start + 6]]
    assert rows[0] == ["score", "net", "other"]
    assert rows[2:] == [[name, "0.200", "-" if name == "AR1" else "0.200"] for name in names]


def test_differences_and_verdict_go_by_seed_and_into_the_json() -> None:
    scores = (*fixed("scratch", 5, [0.4, 0.5, 0.6]), *fixed("net", 5, [0.5, 0.61, 0.69]), *fixed("third", 5, [0.9]))
    result = ProbeResult("readout", "IoU", 7, scores, subject="net", reference="scratch")
    by_other = {difference.other: difference for difference in result.differences()}
    assert by_other["scratch"].mean == pytest.approx(0.1) and by_other["third"].mean == pytest.approx(-0.3)
    document = json.loads(json.dumps(result.to_json()))
    assert document["verdict"] == result.verdict() and len(document["differences"]) == 2
    assert result.verdict().startswith(
        "net against scratch: better by 0.100 [0.075, 0.125] from 5 labelled images; n = 3"
    )
    assert result.verdict() in result.to_table()
    assert ProbeResult("readout", "IoU", 7, scores).verdict() == ""


def test_merge_refuses_other_tasks() -> None:
    first = ProbeResult("probe", "accuracy", 7, (score("l2", 0, 0.5, None, True),))
    second = ProbeResult("probe", "accuracy", 7, (score("l2", 1, 0.7, None, True),))
    assert ProbeResult.merge([first, second]).best("net", 5).mean == pytest.approx(0.6)
    with pytest.raises(ConfigError, match="differ in num_test: 7 and 8"):
        ProbeResult.merge([first, ProbeResult("probe", "accuracy", 8, ())])


def labelled(num: int, prefix: str) -> LabelledSet:
    rng = np.random.default_rng(num)
    images = rng.integers(0, 256, (num, 8, 8, 3), dtype=np.uint8)
    return with_classes(images, [f"{prefix}{idx}" for idx in range(num)], np.arange(num) % 2)


def test_comparison_scores_every_extractor_size_and_seed_and_is_json() -> None:
    made: list[int] = []

    def make(seed: int) -> FeatureExtractor:
        made.append(seed)
        return FeatureExtractor("scaled", lambda images: {"l2": images.permute(0, 3, 1, 2).float() * (seed + 1)})

    said: list[str] = []
    result = run_probe(
        "knn",
        [PerSeed("per seed", make), raw_pixels()],
        labelled(20, "a"),
        labelled(10, "b"),
        [4, None],
        [0, 1],
        None,
        said.append,
    )
    assert made == [0, 1]
    assert said == ["knn: per seed", "knn: raw pixels"]
    counted = {(s.extractor, s.level, s.num_labelled, s.seed) for s in result.scores}
    assert counted >= {("per seed", "l2", num, seed) for num in (4, 20) for seed in (0, 1)}
    assert {seed for name, _, num, seed in counted if (name, num) == ("raw pixels", 20)} == {0}  # nothing left to draw
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["summaries"][0]["level"] == "fixed"
    table = result.to_table().splitlines()
    assert table[1] == "the last level, up to 20 neighbours: nothing is chosen"
    assert "4 labelled" in table[2] and "20 labelled" in table[2]
    assert [line.split("  ")[0] for line in table[4:6]] == ["per seed", "raw pixels"]
    assert table[7] == "accuracy of the mean class, of the same predictions"
    assert table[13] == "best level and regularisation of each, chosen by folds of the labelled images"


def test_impossible_comparisons_are_refused() -> None:
    train, test = labelled(20, "a"), labelled(10, "b")
    with pytest.raises(ConfigError, match="called 'segment'; choose one of probe, knn, readout"):
        run_probe("segment", [raw_pixels()], train, test, [4], [0])
    with pytest.raises(ConfigError, match="needs masks"):
        run_probe("readout", [raw_pixels()], train, test, [4], [0])
    with pytest.raises(ConfigError, match="different names"):
        run_probe("knn", [raw_pixels(), raw_pixels()], train, test, [4], [0])
    with pytest.raises(ConfigError, match="held out"):
        run_probe("knn", [raw_pixels()], train, train, [4], [0])


def test_a_size_named_twice_is_drawn_once() -> None:
    result = run_probe("knn", [raw_pixels()], labelled(20, "a"), labelled(10, "b"), [20, None], [0])
    levels = [score.level for score in result.scores]
    assert len(levels) == len(set(levels))
    assert torch.is_grad_enabled()
