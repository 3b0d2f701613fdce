"""What the tables of `labels.py` say, of this call's seeds and of those of an earlier result together."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from contrasts import AP, IOU, Scores, answered, compared, from_plain, joined, means, plain
from label_arms import FEATURE, LABELLED, PRIMARY, head_of, read_tables, seeds_of
from label_protocol import DIGITS, FROZEN, MASKS, MISMATCHED, PERMUTED, PROTOCOL, QUESTIONS, SCRATCH, TUNED, UNPLANNED
from PIL import Image

from dtpipe.distill.downstream.extractors import PATCHES, POSITION, RANDOM_INIT

KINDS = (FROZEN, TUNED, SCRATCH, DIGITS, PERMUTED)
SETTINGS = ("num_images", "num_held_out", "epochs", "steps", "draws", "label_draws", "tuned_draws", "num_teachers")
"""Seeds that differ in one of these are not of one result."""


@dataclass(frozen=True)
class Found:
    """Scores of some seeds."""

    scores: Mapping[str, Scores]
    """By kind of table."""
    interpreters: Mapping[str, Mapping[str, Mapping[str, float]]]
    """By seed and arm: interpreters and their rivals, on pixels of all held-out scenes."""

    def __add__(self, other: Found) -> Found:
        scores = {kind: joined(self.scores[kind], other.scores[kind]) for kind in KINDS}
        return Found(scores, {**self.interpreters, **other.interpreters})


def found_here(args: argparse.Namespace) -> Found:
    """What this call's seeds scored."""
    interpreters = {}
    for seed in seeds_of(args):
        document = json.loads((head_of(args, seed, 0) / "interpreter.json").read_text(encoding="utf-8"))
        interpreters[str(seed)] = {arm: record["others"] for arm, record in document["scores"].items()}
    return Found({kind: read_tables(args, kind) for kind in KINDS}, interpreters)


def found_earlier(document: Mapping[str, Any]) -> Found:
    """What an earlier result has."""
    scores = {kind: from_plain(document["scores"][kind]) for kind in KINDS}
    return Found(scores, document["interpreters"])


def other_settings(args: argparse.Namespace, document: Mapping[str, Any]) -> str | None:
    """Why seeds of this call cannot be added to those of an earlier result; teachers aside."""
    if document["protocol"] != PROTOCOL:
        return "its protocol is another"
    differing = [name for name in SETTINGS if document["settings"][name] != getattr(args, name)]
    return f"its {', '.join(differing)} differ" if differing else None


def results(
    args: argparse.Namespace,
    rates: Mapping[str, Any],
    commands: Iterable[Mapping[str, Any]],
    earlier: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What came out: the contrasts first."""
    found = found_here(args) if earlier is None else found_earlier(earlier) + found_here(args)
    scores = found.scores
    beside = [(num, score) for num in LABELLED for score in (IOU, AP) if (num, score) != (PRIMARY, IOU)]
    scratch = scores[SCRATCH] or scores[TUNED]
    return {
        "protocol": PROTOCOL,
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "seeds": seeds_of(args).stop,
        "rates": rates,
        "contrasts": answered(QUESTIONS, scores, PRIMARY, IOU),
        "beside": [line for num, score in beside for line in answered(QUESTIONS, scores, num, score)],
        "not planned": [line for num in LABELLED for line in answered(UNPLANNED, scores, num, IOU)],
        "feature - scratch at its own rate": [
            {"labelled": num, **compared(scores[TUNED], FEATURE, RANDOM_INIT, num, IOU, scratch)} for num in LABELLED
        ],
        "teachers": [
            {"contrast": f"teacher {idx} - {FEATURE}", **compared(scores[FROZEN], f"teacher {idx}", FEATURE, PRIMARY)}
            for idx in range(1, 1 + args.num_teachers)
        ],
        "controls": controls(scores[FROZEN], scores[PERMUTED], foreground_share(args)),
        "references": {
            **interpreter_means(found),
            "scratch": [line for line in means(scratch) if line["arm"] == RANDOM_INIT],
        },
        "means": {kind: means(scores[kind]) for kind in (FROZEN, TUNED, DIGITS)},
        "scores": {kind: plain(scores[kind]) for kind in KINDS},
        "interpreters": found.interpreters,
        "commands": [*(earlier["commands"] if earlier else ()), *commands],
        "earlier": [*earlier["earlier"], earlier["origin"]] if earlier else [],
    }


def interpreter_means(found: Found) -> dict[str, dict[str, float]]:
    """Of interpreters and their rivals, foreground IoU on pixels and AP; teacher, patches and position stand in the
    frozen tables.
    """
    of_arms: dict[str, list[Mapping[str, float]]] = {}
    for of_seed in found.interpreters.values():
        for arm, values in of_seed.items():
            of_arms.setdefault(arm, []).append(values)
    return {
        arm: {name: statistics.fmean(line[name] for line in lines) for name in lines[0]}
        for arm, lines in of_arms.items()
    }


def controls(scores: Scores, permuted: Scores, share: float) -> dict[str, Any]:
    """Whether the protocol can see. Each says what was found, and whether it holds."""
    gains = {arm: compared(scores, arm, RANDOM_INIT, PRIMARY) for arm in (MASKS, MISMATCHED)}
    beyond = compared(permuted, FEATURE, POSITION, PRIMARY, AP)["mean"]
    values = {
        f"{arm}, {score}": line for arm in (FEATURE, POSITION, PATCHES) for line in means(permuted)
        for score in (line["score"],) if (line["arm"], line["labelled"]) == (arm, PRIMARY)
    }  # fmt: skip
    return {
        MASKS: {"gain": gains[MASKS], "holds": gains[MASKS]["mean"] > 0.2},
        MISMATCHED: {"gain": gains[MISMATCHED], "holds": gains[MISMATCHED]["mean"] <= 0.02},
        "masks of other scenes": {
            "values": {name: line["mean"] for name, line in values.items()},
            "share of the foreground": share,
            "holds": beyond <= 0.02,
        },
    }


def foreground_share(args: argparse.Namespace) -> float:
    """Of the pixels of held-out scenes."""
    masks = sorted((args.work / "held_out" / "semantic").rglob("*.png"))
    return statistics.fmean(float((np.asarray(Image.open(mask)) > 0).mean()) for mask in masks)
