"""Up to which error of stored features does a student not notice? Codecs by the score of what is distilled from them.

    python benchmarks/codec_effect.py                    # goes on where it was stopped; 1.2 to 2.5 hours of a core
    python benchmarks/codec_effect.py --seeds 4 --add-to benchmarks/results/codec_effect.json     # four more seeds
    python benchmarks/codec_effect.py --seeds 1 --draws 1 --errors 0.03 --num-images 64 --num-held-out 32 --epochs 1 \
        --batches 1 --work DIR --out DIR                 # a look

Digit scenes of 64 px, the demo's teacher, resnet10t, a frozen read-out of foreground masks. Each codec codes the
features of the same scenes and noise once; in each seed all students begin with the same weights and take the same
batches. Everything but the gradients is a command of dtpipe; all are printed and kept in the JSON. What was decided
beforehand is `PROTOCOL`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from commands import Command, add_jobs, digit_scenes, run_groups, with_seconds
from common import REPO, RESULTS, publish, published, teacher_digest
from contrasts import AP, IOU, compared, from_plain, holm, joined, kept_gain, means, plain, verdict
from gradients import compare_gradients
from label_arms import BATCH, LABELLED, extraction, features_of, frozen, read_tables, run_of, seeds_of, student, table

from dtpipe.distill.downstream.extractors import RANDOM_INIT
from dtpipe.distill.downstream.paired import CONFIDENCE

CAST, INT8, SHUFFLED, OTHER_DRAW = "cast", "int8", "shuffled", "another draw"
ERRORS = (0.01, 0.03, 0.06, 0.10, 0.20)
COARSE = 0.50
PRIMARY = LABELLED[-1]
SHARE = 0.5
TABLES = "frozen"
PROTOCOL = {
    "arms": {
        CAST: "features rounded to float16: what the others are compared with",
        INT8: "a byte for each value",
        "transform E": "the codec transform, fitted to lose the share E of each level's variance",
        OTHER_DRAW: "float16 under another noise seed: how far students of equal worth lie apart",
    },
    "controls": {
        f"transform {COARSE:g}": "must be seen: worse than cast with p below 0.05",
        SHUFFLED: "cast, images with the features of other images: must be seen, too",
        RANDOM_INIT: "no pre-training: worse than cast with p below 0.05, or there is no gain to keep",
    },
    "score": f"held-out foreground IoU of the frozen read-out of all levels from {PRIMARY} labelled scenes, mean over "
    f"draws of labels; IoU from {LABELLED[0]} and AP stand beside it",
    "seed": "varies initial weights, order and labels; scenes and noise are the same",
    "margin": f"{SHARE:g} of what cast gains on {RANDOM_INIT}, in each seed: its own spread counts",
    "answers": "different: p against cast, adjusted by Holm over settings and references, is below 0.05. Equal: two "
    "one-sided tests at 2.5 % say that the difference to cast lies within the margin, on both sides. Else undecided",
    "default": "where all controls are seen: the largest error of transform that is equal, as are all smaller ones",
    "gradients": "of the training loss of equation (3), for the same batches: cosine to that under cast, of all "
    "parameters of the regressor and of the student, at their initial weights and at those that cast trained",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Extract, train and score everything that is missing; print and write what came out."""
    args = parse(argv)
    digests = {"demo": teacher_digest(args.teacher)}
    earlier = earlier_result(args, digests)
    digit_scenes(args.work, args.num_images, args.num_held_out)
    features, seeds = list(extractions(args)), [list(of_seed(args, seed)) for seed in seeds_of(args)]
    run_groups([[command] for command in features], args.work, args.jobs)
    run_groups(seeds, args.work, args.jobs)
    made = with_seconds([*features, *(command for of_one in seeds for command in of_one)], args.work)
    content = results(args, earlier)
    content["commands"] = [*(earlier["commands"] if earlier else ()), *made]
    content["earlier"] = [*earlier.get("earlier", ()), earlier["origin"]] if earlier else []
    publish("codec_effect", content, args.out / "codec_effect.json", digests)
    return 0


def earlier_result(args: argparse.Namespace, digests: Mapping[str, str]) -> dict[str, Any] | None:
    """The one that seeds are added to; `args.first` becomes the next seed after it."""
    if args.add_to is None:
        return None
    document = published("codec_effect", args.add_to)
    theirs = (document["protocol"], document["draws"], document["origin"]["teacher_digests"])
    if theirs != (PROTOCOL, args.draws, digests):
        sys.exit(f"{args.add_to} has another protocol, teacher or number of draws; begin anew")
    if [line["setting"] for line in document["contrasts"]] != settings_of(args):
        sys.exit(f"{args.add_to} is of other --errors; give the same")
    args.first = document["seeds"]
    return document


def primary(args: argparse.Namespace) -> int:
    """Labelled scenes of the headline, as far as there are so many."""
    return PRIMARY if args.num_images >= PRIMARY else LABELLED[0]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=REPO / "pipeline" / "demo" / "teacher")
    parser.add_argument("--errors", type=errors, default=ERRORS, help="of transform, with commas")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=5, help="of labels, in each seed")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--num-held-out", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batches", type=int, default=4, help=f"of {BATCH} images, for the gradients of a seed")
    add_jobs(parser)
    parser.add_argument("--work", type=Path, default=REPO / "runs" / "benchmark-codec-effect")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--add-to", type=Path, help="result of earlier seeds; --seeds says how many more")
    args = parser.parse_args(argv)
    args.first = 0
    return args


def errors(text: str) -> tuple[float, ...]:
    """Shares with commas, the smallest first."""
    return tuple(sorted(float(word) for word in text.split(",")))


def transform(error: float) -> str:
    """The name of the arm whose features lost a share of their variance."""
    return f"transform {error:g}"


def codings(args: argparse.Namespace) -> dict[str, list[object]]:
    """Settings by what they are called, with the words of `dtpipe extract`."""
    words: dict[str, list[object]] = {CAST: [], INT8: ["-s", f"extract.codec.name={INT8}"]}
    return words | {transform(error): ["--max-error", error] for error in (*args.errors, COARSE)}


def arms(args: argparse.Namespace) -> dict[str, Path]:
    """Every arm that is trained, with its features."""
    named = {name: features_of(args, name, 0) for name in codings(args)}
    return {**named, SHUFFLED: named[CAST], OTHER_DRAW: features_of(args, CAST, 1)}


def settings_of(args: argparse.Namespace) -> list[str]:
    """The arms that are compared with cast, controls aside."""
    return [name for name in arms(args) if name not in (CAST, transform(COARSE), SHUFFLED)]


def extractions(args: argparse.Namespace) -> Iterator[Command]:
    """Features of one noise seed under each codec, and of another under cast."""
    for name, words in codings(args).items():
        yield extraction(args, name, 0, *words)
    yield extraction(args, CAST, 1)


def of_seed(args: argparse.Namespace, seed: int) -> Iterator[Command]:
    """All students of a seed, and the table of their scores."""
    for arm, features in arms(args).items():
        yield student(args, arm, seed, features, *(["--mismatch", seed] if arm == SHUFFLED else []))
    runs = {arm: [run_of(args, arm, seed)] for arm in arms(args)}
    yield frozen(args, seed, runs, table(args, TABLES, seed), args.draws)


def of_gradients(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Gradients of a seed's first batches under every arm's features against cast's; kept once measured."""
    kept = args.work / "gradients" / f"{seed}-{args.batches}.json"
    if not kept.is_file():
        runs = {arm: run_of(args, arm, seed) for arm in arms(args)}
        measured = compare_gradients(CAST, runs, args.batches)
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(measured), encoding="utf-8")
    values: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return values


# --- what came out ---------------------------------------------------------------------------------------------------


def results(args: argparse.Namespace, earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """Answers first, of an earlier result's seeds and of this call's."""
    scores, num = joined(from_plain(earlier["scores"] if earlier else []), read_tables(args, TABLES)), primary(args)
    gradients = [*gradients_before(earlier), *(of_gradients(args, seed) for seed in seeds_of(args))]
    settings = settings_of(args)
    contrasts = judged([kept_gain(scores, name, CAST, RANDOM_INIT, num, SHARE) for name in settings])
    seen = {name: seen_control(compared(scores, name, CAST, num)) for name in PROTOCOL["controls"]}
    beside = [(few, score) for few in LABELLED for score in (IOU, AP) if (few, score) != (num, IOU)]
    return {
        "protocol": PROTOCOL,
        "seeds": seeds_of(args).stop,
        "draws": args.draws,
        "default": default_error(args.errors, contrasts, seen),
        "contrasts": contrasts,
        "controls": seen,
        "gradients": [averaged(name, gradients) for name in arms(args) if name != CAST],
        "bytes": {name: feature_bytes(features_of(args, name, 0)) for name in codings(args)},
        "beside": [
            {"setting": name, "labelled": few, "score": score, **compared(scores, name, CAST, few, score)}
            for few, score in beside
            for name in settings
        ],
        "means": means(scores),
        "scores": plain(scores),
    }


def judged(contrasts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """With p adjusted over all of them, and what they say."""
    adjusted = holm([line["p"] for line in contrasts])
    return [
        {"answer": verdict(p, line["within"], f"{SHARE:g} of the gain"), **line, "p_holm": p}
        for line, p in zip(contrasts, adjusted, strict=True)
    ]


def seen_control(difference: Mapping[str, Any]) -> dict[str, Any]:
    """Whether something is worse than cast beyond chance."""
    mean, p = difference["mean"], difference["p"]
    return {**difference, "holds": p is not None and p < 1 - CONFIDENCE and mean < 0}


def default_error(
    tried: Sequence[float], contrasts: Sequence[Mapping[str, Any]], controls: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The largest error up to which every one is equal to cast; None where none is, or a control was not seen.

    Errors are tested from the smallest on and the first failure ends it, so that each is tested at the full level.
    """
    unseen = [name for name, control in controls.items() if not control["holds"]]
    if unseen:
        return {"max_error": None, "why": f"not seen, though it must be: {', '.join(unseen)}"}
    answers, chosen = {line["setting"]: line["answer"] for line in contrasts}, None
    for error in sorted(tried):
        answer = answers[transform(error)]
        if not answer.startswith("equal"):
            return {"max_error": chosen, "why": f"{transform(error)} is {answer}"}
        chosen = error
    return {"max_error": chosen, "why": "the largest that was tried"}


def gradients_before(earlier: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Of each earlier seed the mean over those seeds, which is what was kept."""
    if earlier is None:
        return []
    kept = {line["arm"]: {key: line[key] for key in line if key != "arm"} for line in earlier["gradients"]}
    return [kept] * int(earlier["seeds"])


def averaged(name: str, gradients: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One arm's cosines and errors, means over seeds."""
    own = [measured[name] for measured in gradients]
    return {
        "arm": name,
        **{key: {part: round(sum(one[key][part] for one in own) / len(own), 5) for part in own[0][key]}
           for key in own[0]},
    }  # fmt: skip


def feature_bytes(dataset: Path) -> int:
    """Stored bytes of a zarr dataset's levels, with what their codecs need."""
    places = (*dataset.glob("data.zarr/l*"), dataset / "codecs")
    return sum(path.stat().st_size for place in places for path in place.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(main())
