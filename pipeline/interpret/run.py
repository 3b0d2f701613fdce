"""From a feature dataset and labelled images to an interpreter in a folder, scored beside its rivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtpipe.distill.downstream.labelled import LabelledSet, check_several_classes, draw_labelled
from dtpipe.distill.downstream.tuned.tasks.few_labels import cleaned
from dtpipe.distill.engine.device import training_device
from dtpipe.distill.engine.progress import OnTrainProgress
from dtpipe.distill.labels.arms import ArmScore, Predict, interpreter_predict, score_arm
from dtpipe.distill.labels.data import LabelledFeatures
from dtpipe.distill.labels.ensemble import PIXEL_CLASSIFIERS, fit_ensemble
from dtpipe.distill.labels.files import load_interpreter, save_interpreter
from dtpipe.distill.labels.head import features_record
from dtpipe.distill.labels.interpreter import FeatureInterpreter
from dtpipe.distill.labels.linear import LINEAR, fit_linear
from dtpipe.distill.labels.train import interpreter_run, train_interpreter
from dtpipe.extract.sources.layouts.registry import parse_layout
from dtpipe.manifests.canonical import blake3_hex, canonical_json
from dtpipe.manifests.errors import ConfigError, DtpipeError
from dtpipe.manifests.labels import KIND_WORDS, Class, Mask
from dtpipe.manifests.phases import phase
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.records.image_digests import as_digests
from dtpipe.manifests.words import count_of
from dtpipe.pipeline.cli.console import Note
from dtpipe.pipeline.interpret.config import InterpretConfig
from dtpipe.pipeline.interpret.features import BothSides, open_both
from dtpipe.pipeline.interpret.pictures import draw_pictures
from dtpipe.pipeline.rivals.apart import check_apart_by_content
from dtpipe.pipeline.rivals.digests import DigestsOf, DigestStore
from dtpipe.pipeline.sets import open_sets

if TYPE_CHECKING:
    import torch

INTERPRETER_ARM = "interpreter"


@dataclass(frozen=True)
class InterpretResult:
    """What one call did."""

    out: Path
    measure: str
    """What the scores are: mIoU, or accuracy."""
    classes: Sequence[str]
    arms: Sequence[ArmScore]
    """The interpreter first, then its rivals."""
    num_labelled: int
    num_held_out: int
    step: int
    num_steps: int
    resumed_step: int
    pictures: Sequence[Path]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        scores = {arm.name: arm.record() for arm in self.arms}
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("arms", "pictures")}
        return {**own, "out": str(self.out), "scores": scores, "pictures": [str(path) for path in self.pictures]}


@dataclass(frozen=True)
class OpenedLabels:
    """All that an interpreter is trained and scored on."""

    dataset: FeatureDataset
    sides: BothSides
    content: Mapping[str, Any]
    """By digests, for data.json."""


def open_labels(config: InterpretConfig, store: DigestStore, digests_of: DigestsOf, note: Note) -> OpenedLabels:
    """Open features and labelled images, bring the latter to the size of the former, and find what belongs together.

    `digests_of`: of labelled images, so that none is held out too.
    Raises: ConfigError, InputError, TeacherError as the parts do.
    """
    dataset = FeatureDataset.open(config.features)
    train, test = _open_sides(config, dataset, digests_of, note)
    sides = open_both(config, dataset, (train, test), store, note)
    recipe = dataset.plan.model_dump_json(include={"recipe", "listing_blake3"})
    content: dict[str, Any] = {
        "features": blake3_hex(recipe.encode()),
        "labelled": train.content_digest(),
        "num_labelled": len(train),
        "num_live": sides.found.num_missing,
        "flips": sides.train.flips,
    }
    if _cleans(config):
        content["specks"] = "ignored"
    return OpenedLabels(dataset, sides, content)


def _open_sides(
    config: InterpretConfig, dataset: FeatureDataset, digests_of: DigestsOf, note: Note
) -> tuple[LabelledSet, LabelledSet]:
    train, test = open_sets(config, dataset.recipe.transform, note, as_masks=True)
    if train.kind not in (Mask, Class):
        raise ConfigError(
            f"{config.images} has {KIND_WORDS[train.kind]} for labels, and an interpreter learns from masks or "
            "classes; use another layout"
        )
    train, test = check_apart_by_content(train, test, config.test_images is None, digests_of, note)
    train = train.subset(draw_labelled(train, config.labelled, config.seed))
    train = train.changed(cleaned) if _cleans(config) else train
    check_several_classes(train, test)
    return train, test


def _cleans(config: InterpretConfig) -> bool:
    """Whether slips of the pen in masks to learn from are ignored, as those who published them do; not of foreground,
    where they are merged into what is around them."""
    parsed = parse_layout(config.images)
    return parsed is not None and parsed[0].cleans_specks and not config.foreground


def interpret(config: InterpretConfig, note: Note, on_progress: OnTrainProgress | None = None) -> InterpretResult:
    """Train an interpreter, or go on; score it and its rivals on the held-out images; write all into `config.run.out`.

    It is there once it is trained, whatever becomes of its rivals; these may be others when it is called again.
    Raises: as `open_labels` before any step; then as the engine's `run`.
    """
    import torch

    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    device = training_device(config.run.device)
    interpreter_run(config).refuse_other()
    out = Path(config.run.out)
    store = DigestStore(out.parent / "seen", note)
    with phase("opening features and labels"):
        opened = open_labels(config, store, store.of_set, note)
    train, test = opened.sides.train, opened.sides.test
    network, result = train_interpreter(config, train, opened.content, on_progress)
    num_pictures = min(config.run.num_pictures, len(test)) if train.labelled.kind is Mask else 0
    arms, pictures = _kept_scores(network, _record(config, opened, ()), out), _pictures(out)[:num_pictures]
    if arms is None or len(pictures) < num_pictures:
        images = as_digests(store.of_set(train.labelled, "labelled"))
        save_interpreter(network, _record(config, opened, ()), out, images)
        arms = _score(config, network, train, test, device, note)
        pictures = draw_pictures(out, test.labelled, arms)
        save_interpreter(network, _record(config, opened, arms), out, images)
    return InterpretResult(
        out=out,
        measure="accuracy" if train.labelled.kind is Class else "mIoU",
        classes=train.labelled.classes.names,
        arms=arms,
        num_labelled=len(train),
        num_held_out=len(test),
        step=result.step,
        num_steps=result.num_steps,
        resumed_step=result.resumed_step,
        pictures=pictures,
    )


def _kept_scores(network: FeatureInterpreter, record: Mapping[str, Any], out: Path) -> list[ArmScore] | None:
    """What the folder says of this interpreter and these rivals on these images; None where it is of others, or
    nothing.
    """
    try:
        kept = load_interpreter(out)
    except DtpipeError:
        return None
    own = network.state_dict()
    same = all(value.equal(own[name].cpu()) for name, value in kept.network.state_dict().items())
    scores = kept.record.get("scores") or {}
    if not same or not scores or canonical_json({**kept.record, "scores": {}}) != canonical_json(record):
        return None
    return [ArmScore(name, **values) for name, values in scores.items()]


def _pictures(out: Path) -> list[Path]:
    return sorted((out / "pictures").glob("*.png"))


def _score(
    config: InterpretConfig,
    network: FeatureInterpreter,
    train: LabelledFeatures,
    test: LabelledFeatures,
    device: torch.device,
    note: Note,
) -> list[ArmScore]:
    """The interpreter and its rivals, each trained on the same features and labels."""
    of_masks = train.labelled.kind is Mask
    predicts: dict[str, Predict] = {INTERPRETER_ARM: interpreter_predict(network, of_masks)}
    if config.rivals.linear:
        note(f"fitting the {LINEAR}")
        predicts[LINEAR] = fit_linear(config.rivals, train, config.seed, device)
    if config.rivals.pixel_models and of_masks:
        note(f"training {count_of(config.rivals.pixel_models, 'pixel classifier')}")
        predicts[PIXEL_CLASSIFIERS] = fit_ensemble(config.rivals, train, config.seed, device)
    drawn = config.run.num_pictures if of_masks else 0
    return [score_arm(name, predict, test, device, drawn) for name, predict in predicts.items()]


def _record(config: InterpretConfig, opened: OpenedLabels, arms: Sequence[ArmScore]) -> dict[str, Any]:
    """What stands beside the weights of an interpreter."""
    recipe, test = opened.dataset.recipe, opened.sides.test.labelled
    timesteps = dict.fromkeys(view.timestep for view in recipe.views)
    return {
        **features_record(recipe, [level.name for level in opened.sides.train.levels]),
        "timesteps": list(timesteps),
        "together": config.together,
        "data": {**opened.content, "held_out": test.content_digest(), "num_held_out": len(test)},
        "rivals": config.rivals.model_dump(mode="json"),
        "scores": {arm.name: arm.record() for arm in arms},
    }
