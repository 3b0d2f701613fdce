"""Smaller studies by the protocol of `labels.py`: arms of a seed, their frozen read-outs, and differences of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from commands import Command, run_groups, with_seconds
from common import publish, teacher_digest
from contrasts import AP, IOU, Question, answered, equivalence, from_plain, joined, means, plain
from label_arms import LABELLED, PRIMARY, read_tables, seeds_of

MARGIN = 0.02
SCORES = {
    "score": f"held-out foreground IoU of the frozen read-out from {PRIMARY} labelled scenes; {LABELLED[-1]} beside",
    "answers": f"different: p of Holm over all contrasts is below 0.05; equal: the 95 % interval is within {MARGIN:g}; "
    "both: a difference smaller than that; else undecided",
}


@dataclass(frozen=True)
class Study:
    """One of them."""

    name: str
    """Of its part, and of its result: `labels_NAME.json`."""
    questions: tuple[Question, ...]
    protocol: Mapping[str, str]
    """What was decided beforehand."""
    settings: tuple[str, ...]
    """Arguments that make seeds another study's."""
    of_seed: Callable[[argparse.Namespace, int], Iterator[Command]]
    """Everything that a seed takes; its tables are of the kind `name`."""

    def report(self, args: argparse.Namespace) -> int:
        """Train and score every arm, and say what differs."""
        earlier = self.earlier_result(args)
        seeds = [list(self.of_seed(args, seed)) for seed in seeds_of(args)]
        run_groups(seeds, args.work, args.jobs)
        made = [command for of_one in seeds for command in of_one]
        scores = joined(from_plain(earlier["scores"]), read_tables(args, self.name))
        beside = [(num, score) for num in LABELLED for score in (IOU, AP) if (num, score) != (PRIMARY, IOU)]
        kinds = {self.name: scores}
        content: dict[str, Any] = {
            "protocol": self.protocol,
            "settings": {name: getattr(args, name) for name in self.settings},
            "seeds": seeds_of(args).stop,
            "contrasts": [
                {"answer": equivalence(line, line["p_holm"], MARGIN), **line}
                for line in answered(self.questions, kinds, PRIMARY, IOU)
            ],
            "beside": [line for num, score in beside for line in answered(self.questions, kinds, num, score)],
            "means": means(scores),
            "scores": plain(scores),
            "commands": [*earlier["commands"], *with_seconds(made, args.work)],
            "earlier": [*earlier["earlier"], *([earlier["origin"]] if "origin" in earlier else [])],
        }
        publish("labels", content, args.out / f"labels_{self.name}.json", {"demo": teacher_digest(args.teacher)})
        return 0

    def earlier_result(self, args: argparse.Namespace) -> dict[str, Any]:
        """The one that seeds are added to, or an empty one; `args.first` becomes the next seed after it."""
        if args.add_to is None:
            return {"scores": [], "commands": [], "earlier": []}
        document: dict[str, Any] = json.loads(args.add_to.read_text(encoding="utf-8"))
        settings = {name: getattr(args, name) for name in self.settings}
        same = document["protocol"] == self.protocol and document["settings"] == settings
        if not same or document["origin"]["teacher_digests"] != {"demo": teacher_digest(args.teacher)}:
            sys.exit(f"{args.add_to} cannot be added to: its protocol, teacher, or {', '.join(self.settings)} differ")
        args.first = document["seeds"]
        return document
