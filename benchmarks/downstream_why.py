"""Which setting of fine-tuning, or of distillation, changes what distillation gains? One change at a time.

    python benchmarks/downstream_why.py --jobs 2                        # goes on where it was stopped
    python benchmarks/downstream_why.py --seeds 2                       # or in several sittings, two seeds
    python benchmarks/downstream_why.py --seeds 3 --add-to FILE         # and three more
    python benchmarks/downstream_why.py --task detect                   # of objects; students in --work serve both
    python benchmarks/downstream_why.py --task detect --first-seed 3    # so that those of seeds 3 to 7 are used

Foreground masks or objects of digit scenes, as the tables `segment` and `detect` of `downstream.py`, but at one rate
for all arms. A seed of masks takes 60 to 95 minutes of a core, with all variants. Everything is a command of dtpipe.
What was decided beforehand is in `protocol`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import downstream
from commands import Command, add_jobs, command_of, run_groups, with_seconds
from common import REPO, RESULTS, publish, published, teacher_digest
from contrasts import holm, p_value
from downstream import STUDIES, TEACHER, UNTRAINED, UPRIGHT

from dtpipe.distill.downstream.extractors import RANDOM_INIT
from dtpipe.distill.downstream.paired import CONFIDENCE, difference_of

BASE, LR = "as published", 0.01
PAIRS = ((TEACHER, RANDOM_INIT), (TEACHER, UNTRAINED))


@dataclass(frozen=True)
class Question:
    """A table of `downstream.py` whose gain is looked into."""

    task: str
    metric: str
    primary: int
    """Labelled scenes that the answer is about."""
    beside: int
    steps: int
    """Of fine-tuning, in the preset."""

    @property
    def labelled(self) -> list[int]:
        """Both numbers of labelled scenes, ascending."""
        return sorted((self.primary, self.beside))


SEGMENT, DETECT = Question("segment", "mIoU", 20, 5, steps=150), Question("detect", "box AP", 20, 80, steps=300)
QUESTIONS = {question.task: question for question in (SEGMENT, DETECT)}


def protocol(question: Question) -> dict[str, str]:
    """What was decided beforehand."""
    return {
        "question": "which single change alters what the distilled student gains on scratch, and on the untrained "
        "teacher's student?",
        "rate": f"{LR:g} for all arms: the best of most arms and numbers of labels in downstream_{question.task}.json",
        "score": f"{question.metric} of 300 held-out scenes; five paired seeds",
        "change": "gain under the variant minus gain as published, paired by seed, with its 95 % interval; p of "
        "Student's t, adjusted by Holm over the file's variants and both gains at "
        f"{question.primary} labels; {question.beside} stand beside it",
        "answer": "changes it: p after Holm is below 0.05; else not seen. Variants of distillation train the distilled "
        "student anew; the others are the base's, so their gain on scratch is against the same scratch",
    }


@dataclass(frozen=True)
class Variant:
    """One change."""

    name: str
    tune: tuple[str, ...] = ()
    """Words of the evaluation."""
    distill: tuple[str, ...] = ()
    """Words of the distillation of the distilled arm."""
    extract: tuple[str, ...] = ()
    """Words of its extraction, where features are others."""
    steps: int = 1
    """Times those of the preset."""

    @property
    def distilled(self) -> bool:
        """Whether the student is another."""
        return bool(self.extract or self.distill)

    @property
    def tuned(self) -> bool:
        """Whether the fine-tuning is another."""
        return bool(self.tune) or self.steps > 1


VARIANTS = (
    Variant(BASE),
    Variant("backbone at a tenth of the rate", ("--backbone-lr", "0.1")),
    Variant("backbone frozen", ("--backbone-lr", "0")),
    Variant("rates fall by 0.75 from layer to layer", ("-s", "eval.tune.layer_decay=0.75")),
    Variant("twice the steps", steps=2),
    Variant("fresh noise and mirrored at random in every step", distill=("--reencode", "1")),
    Variant("a quarter of the epochs", distill=("--epochs", "10", "--warmup-epochs", "1")),
    Variant("timestep 150", extract=("--timesteps", "150")),
    Variant("the finest level alone", distill=("--levels", "l2")),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and score every variant, print and write what came out."""
    args = parse(argv)
    study = STUDIES["digits"]
    root = args.work / study.name
    digests = {study.name: teacher_digest(study.teacher)}
    earlier = earlier_result(args, digests)
    study.prepare(args, root)
    students = [group for seed in args.of_seeds for group in pretraining(args, root, seed)]
    run_groups(students, args.work, args.jobs)
    tables = [table(args, root, variant) for variant in args.chosen if not variant.distilled]
    for evaluation in tables:
        run_groups([[evaluation]] * args.jobs, args.work, args.jobs)  # which share its trainings
    commands = [*(command for group in students for command in group), *tables]
    found = found_here(args, root, earlier)
    content = {"protocol": protocol(args.question), "seeds": len(seeds_in(found)), **results(found, args.question)}
    content["commands"] = [*(earlier["commands"] if earlier else ()), *with_seconds(commands, args.work)]
    content["earlier"] = [*earlier["earlier"], earlier["origin"]] if earlier else []
    publish("downstream_why", content, args.out / args.file, digests)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=[*QUESTIONS], default=SEGMENT.task)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, help="default: 0, or the one after those that are added to")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--num-held-out", type=int, default=300)
    parser.add_argument("--work", type=Path, default=REPO / "runs" / "benchmark-downstream")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    known = ", ".join(f"{idx} {variant.name}" for idx, variant in enumerate(VARIANTS))
    which = range(1, len(VARIANTS))
    parser.add_argument("--variants", type=int, nargs="*", choices=which, default=which, help=f"only these of {known}")
    parser.add_argument("--add-to", type=Path, help="result of earlier seeds; --seeds says how many more")
    add_jobs(parser)
    args = parser.parse_args(argv)
    args.epochs, args.of_seeds = None, new_seeds(args, set())
    args.chosen = [VARIANTS[idx] for idx in (0, *args.variants)]
    args.question = QUESTIONS[args.task]
    args.file = "downstream_why.json" if args.question is SEGMENT else f"downstream_why_{args.task}.json"
    return args


def earlier_result(args: argparse.Namespace, digests: Mapping[str, Any]) -> dict[str, Any] | None:
    """The one that seeds are added to; those of this call come after its own."""
    if args.add_to is None:
        return None
    document = published("downstream_why", args.add_to)
    if [document["protocol"], document["origin"]["teacher_digests"]] != [protocol(args.question), digests]:
        sys.exit(f"{args.add_to} has another protocol or teacher; begin anew")
    known = list(from_plain(document["scores"]))
    if known != [variant.name for variant in args.chosen]:
        sys.exit(f"{args.add_to} has the variants {', '.join(known)}; give the same as --variants")
    args.of_seeds = new_seeds(args, seeds_in(from_plain(document["scores"])))
    return document


def new_seeds(args: argparse.Namespace, known: AbstractSet[int]) -> range:
    """Those of this call, none of which is known."""
    first = max(known, default=-1) + 1 if args.first_seed is None else args.first_seed
    chosen = range(first, first + args.seeds)
    if known & set(chosen):
        sys.exit(f"{args.add_to} has seeds {sorted(known & set(chosen))}; leave out --first-seed")
    return chosen


def seeds_in(found: Mapping[str, Values]) -> set[int]:
    """Of scores."""
    return {seed for values in found.values() for of_seed in values.values() for seed in of_seed}


def pretraining(args: argparse.Namespace, root: Path, seed: int) -> list[list[Command]]:
    """What trains the base's students of a seed, then that of each variant of distillation."""
    base = downstream.pretraining(STUDIES["digits"], root, args, seed)
    extract, distill = base[:2]
    groups = [base[:2], base[2:]]
    for variant in args.chosen:
        features = features_of(root, variant, seed)
        made = [[*_with(extract, "--out", features), *variant.extract]] if variant.extract else []
        if variant.distilled:
            words = [distill[0], str(features), *distill[2:], *variant.distill]
            groups.append([*made, _with(words, "--out", run_of(root, variant, seed))])
    return groups


def _with(command: Command, flag: str, value: object) -> Command:
    place = command.index(flag) + 1
    return [*command[:place], str(value), *command[place + 1 :]]


def features_of(root: Path, variant: Variant, seed: int) -> Path:
    """What its student learned from."""
    return root / "features" / (f"{_word(variant)}-{seed}" if variant.extract else f"{TEACHER}{seed}")


def run_of(root: Path, variant: Variant, seed: int) -> Path:
    """Its student of the trained teacher."""
    return root / (f"{_word(variant)}-{seed}" if variant.distilled else f"{TEACHER}{seed}")


def _word(variant: Variant) -> str:
    return variant.name.replace(" ", "-")


def table(args: argparse.Namespace, root: Path, variant: Variant) -> Command:
    """All arms and seeds of a variant; in the base's, the students of variants of distillation are arms too."""
    others = [other for other in args.chosen if other.distilled and variant.name == BASE]
    runs = {arm: [root / f"{arm}{seed}" for seed in args.of_seeds] for arm in (TEACHER, UNTRAINED)}
    runs |= {other.name: [run_of(root, other, seed) for seed in args.of_seeds] for other in others}
    first, *compared = (f"{name}=" + ",".join(map(str, of_arm)) for name, of_arm in runs.items())
    compare = [word for arm in compared for word in ("--compare", arm)]
    labels = ["--labelled", ",".join(map(str, args.question.labelled)), "--seeds", len(args.of_seeds)]
    settings = ["-c", f"{args.task}_small", *UPRIGHT, "-s", f"eval.tune.lr={LR:g}", "-s", "eval.tune.lr_grid=[]"]
    where = [*downstream.images_of(args.task, root), "-s", f"eval.seed={args.of_seeds.start}"]
    steps = ["--steps", variant.steps * args.question.steps] if variant.steps > 1 else []
    out = ["--out", result_file(root, args.task, variant)]
    return command_of("eval", first, args.task, *compare, *where, *labels, *settings, *variant.tune, *steps, *out)


def result_file(root: Path, task: str, variant: Variant) -> Path:
    """Where a table is written as JSON."""
    return root / "tables" / ("why" if task == SEGMENT.task else f"why-{task}") / f"{_word(variant)}.json"


# --- what came out ---------------------------------------------------------------------------------------------------

Values = Mapping[tuple[str, int], Mapping[int, float]]
"""(arm, number of labelled images) to the score of each seed."""


def found_here(args: argparse.Namespace, root: Path, earlier: Mapping[str, Any] | None) -> dict[str, Values]:
    """Scores of each variant, of an earlier result's seeds and of this call's."""
    found: dict[str, Values] = from_plain(earlier["scores"]) if earlier else {}
    base = read(result_file(root, args.task, VARIANTS[0]))
    for variant in args.chosen:
        own = read(result_file(root, args.task, variant)) if variant.tuned else of_variant(base, variant)
        before = found.get(variant.name, {})
        found[variant.name] = {place: {**before.get(place, {}), **of_seed} for place, of_seed in own.items()}
    return found


def results(found: Mapping[str, Values], question: Question) -> dict[str, Any]:
    """Answers first."""
    lines = {"changes": changes(found, question), "gains": gains(found, question), "own": own(found, question)}
    return {**lines, "scores": plain(found)}


def read(path: Path) -> Values:
    """Scores of a table."""
    values: dict[tuple[str, int], dict[int, float]] = {}
    for score in json.loads(path.read_text(encoding="utf-8"))["scores"]:
        values.setdefault((score["extractor"], score["num_labelled"]), {})[score["seed"]] = score["value"]
    return values


def of_variant(base: Values, variant: Variant) -> Values:
    """The base's arms, its distilled student the variant's."""
    arms = {TEACHER: variant.name if variant.distilled else TEACHER, UNTRAINED: UNTRAINED, RANDOM_INIT: RANDOM_INIT}
    return {
        (arm, num): values for arm, shown in arms.items() for (of_arm, num), values in base.items() if of_arm == shown
    }


def gains(found: Mapping[str, Values], question: Question) -> list[dict[str, Any]]:
    """The distilled student minus each other arm, of every variant."""
    lines = []
    for name, values in found.items():
        for num in question.labelled:
            for first, second in PAIRS:
                difference = difference_of(first, second, num, values[first, num], values[second, num])
                assert difference is not None, "all arms have all seeds"
                own = {key: getattr(difference, key) for key in ("mean", "low", "high", "n")}
                lines.append({"variant": name, "gain": f"{first} - {second}", "labelled": num, **own})
    return lines


def changes(found: Mapping[str, Values], question: Question) -> list[dict[str, Any]]:
    """Each variant's gains minus the base's, the primary number of labels first."""
    lines = []
    for num in (question.primary, question.beside):
        of_num = [
            {"variant": name, "gain": f"{first} - {second}", "labelled": num, **change(found, name, first, second, num)}
            for name in found
            if name != BASE
            for first, second in PAIRS
        ]
        adjusted = holm([line["p"] for line in of_num])
        for line, p in zip(of_num, adjusted, strict=True):
            answer = "one seed, no answer" if p is None else "changes it" if p < 1 - CONFIDENCE else "not seen"
            lines.append({"answer": answer, **line, "p_holm": p})
    return lines


def change(found: Mapping[str, Values], name: str, first: str, second: str, num: int) -> dict[str, Any]:
    """What a variant adds to a gain, paired by seed."""
    of_variant, of_base = (_gain(found[which], first, second, num) for which in (name, BASE))
    difference = difference_of(name, BASE, num, of_variant, of_base)
    assert difference is not None, "all variants have all seeds"
    values = [of_variant[seed] - of_base[seed] for seed in sorted(of_variant)]
    return {key: getattr(difference, key) for key in ("mean", "low", "high", "n")} | {"p": p_value(values)}


def own(found: Mapping[str, Values], question: Question) -> list[dict[str, Any]]:
    """The distilled student's own score under each variant minus its score in the base: not in the plan, and looked at
    because a gain may grow where scratch gets worse.
    """
    lines = []
    for name in found:
        for num in question.labelled:
            ours, before = (found[which][TEACHER, num] for which in (name, BASE))
            difference = difference_of(name, BASE, num, ours, before)
            if name != BASE and difference is not None:
                values = {key: getattr(difference, key) for key in ("mean", "low", "high", "n")}
                lines.append({"variant": name, "labelled": num, **values})
    return lines


def _gain(values: Values, first: str, second: str, num: int) -> dict[int, float]:
    return {seed: value - values[second, num][seed] for seed, value in values[first, num].items()}


def from_plain(lines: Sequence[Mapping[str, Any]]) -> dict[str, Values]:
    """Inverse of `plain`."""
    found: dict[str, dict[tuple[str, int], dict[int, float]]] = {}
    for line in lines:
        of_seed = {int(seed): value for seed, value in line["seeds"].items()}
        found.setdefault(line["variant"], {})[line["arm"], line["labelled"]] = of_seed
    return dict(found)


def plain(found: Mapping[str, Values]) -> list[dict[str, Any]]:
    """All scores, a line for each variant, arm and number of labels, by seed."""
    return [
        {"variant": name, "arm": arm, "labelled": num, "mean": statistics.fmean(of_seed.values()), "seeds": of_seed}
        for name, values in found.items()
        for (arm, num), of_seed in values.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
