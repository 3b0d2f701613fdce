"""After distillation of soft labels a task takes backbone and decoder (appendix G.4), and both are exported together.

Masks have UPerNet's decoder, classes of whole images a linear layer.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dtpipe.distill.downstream.tuned.heads.distilled import decoder_of
from dtpipe.distill.downstream.tuned.run import TuneResult
from dtpipe.distill.downstream.tuned.trainer import TuneJob, Tuning
from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.export.predictor import export_predictor
from dtpipe.distill.stream.data import OpenedData
from dtpipe.distill.student.distiller import build_distiller
from dtpipe.distill.student.load import load_student
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import ClassTable
from dtpipe.pipeline.arms import Arm, random_arm
from dtpipe.pipeline.tune.cells import TunedTable, run_cells
from parts.memory import PX, MemorySource, level_spec, tiny_config
from parts.runs import train_on
from parts.soft_labels import CLASSES, LABELS, POOLED, with_labels
from parts.tuning import STUDENT, bright_halves, tune_config, tune_job

SOURCE = MemorySource(levels=(level_spec("l3", 8, 6),))
SMALL = {"head": {"width": 8}}


def distilled(folder: Path, level: Any = LABELS, **changes: Any) -> Path:
    config = tiny_config(folder, **{"epochs": 1, "ema_decay": 0.5, **changes})
    train_on(OpenedData(with_labels(SOURCE, level), (PX, PX), "0" * 64, classes={level.name: CLASSES}), config)
    return folder


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distilled(tmp_path_factory.mktemp("runs") / "mix")


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a ConvNeXt, whose classifier in timm has a norm that a distilled one has not."""
    folder = tmp_path_factory.mktemp("runs") / "pooled"
    return distilled(folder, POOLED, student={"name": "test_convnext"})


def job_of(
    run: Path, classes: tuple[str, ...] = CLASSES, task: str = "segment", **settings: Any
) -> tuple[TuneJob, Any]:
    labelled = bright_halves(6, 0, masked=task not in ("finetune", "linear"))
    object.__setattr__(labelled, "classes", ClassTable(classes))
    job = tune_job(tune_config(**{**SMALL, **settings}), labelled, task, load_student(run))
    return job.started_from(lambda: decoder_of(run))


def head_of(job: TuneJob) -> dict[str, Tensor]:
    state = Tuning(job, torch.device("cpu")).model.state_dict()
    return {name.removeprefix("head."): value for name, value in state.items() if name.startswith("head.")}


@pytest.mark.parametrize("task", ["segment", "few-labels"])
@pytest.mark.parametrize("classes", [CLASSES, ("lamp", "window")])
def test_a_task_starts_from_the_average_of_the_decoder_and_a_classifier_of_its_own_for_other_classes(
    mix, task, classes
):
    saved = load_checkpoint(mix / "last.pt", "distill")["decoder_ema"]
    job, clause = job_of(mix, classes, task)
    head = head_of(job)
    same = {name for name, value in head.items() if torch.equal(value, saved.get(f"head.{name}", torch.zeros(0)))}
    anew = {name for name in head if name.startswith("classifier")}
    assert same == (head.keys() if classes == CLASSES else head.keys() - anew)
    assert {"laterals.0.0.weight", "laterals.3.join.0.weight", "outputs.0.0.weight", "fuse.0.weight"} <= same
    assert ("all but the classifier" in clause) == (classes != CLASSES)


@pytest.mark.parametrize(
    ("settings", "clause"),
    [
        ({"from_decoder": False}, None),
        ({"head": {"width": 16}}, "starts from the backbone alone: .* width 8 and norm batch; .*head.width=8"),
        ({"head": {"width": 8, "norm": "group"}}, "head.norm=batch"),
        ({"head": {"width": 8, "ppm_scales": [1, 2]}}, r"ppm_scales=\[1, 2, 3, 6\]"),
    ],
)
def test_what_the_settings_say_against_it_is_heeded(mix, settings, clause):
    job, said = job_of(mix, **settings)
    assert job.decoder is None and "start_decoder" not in job.record()
    assert said is None if clause is None else re.search(clause, said)


@pytest.mark.parametrize("norm", ["auto", "none"])
def test_classes_start_from_the_average_of_the_linear_layer(pooled, norm):
    saved = load_checkpoint(pooled / "last.pt", "distill")["decoder_ema"]
    job, clause = job_of(pooled, task="finetune", head={"pooled_norm": norm})
    model = Tuning(job, torch.device("cpu")).model
    assert isinstance(model.norm, torch.nn.Identity) and clause == "starts from the backbone and the decoder of its run"
    assert torch.equal(model.linear.weight, saved["head.classifier.weight"][:, :, 0, 0])
    assert torch.equal(model.linear.bias, saved["head.classifier.bias"])


@pytest.mark.parametrize(
    ("task", "classes", "settings", "clause"),
    [
        ("finetune", CLASSES, {"from_decoder": False}, None),
        ("finetune", ("lamp", "sun"), {}, "backbone alone: the run's classes are background, bright, dark$"),
        ("finetune", CLASSES[::-1], {}, "backbone alone: the run has these classes in another order"),
        ("finetune", CLASSES, {"head": {"pooled_norm": "layer"}}, "has no norm; a head as .*pooled_norm=none would do"),
        ("linear", CLASSES, {}, None),
        ("segment", CLASSES, {}, "the decoder of its run is of whole images' classes"),
    ],
)
def test_a_classifier_that_is_not_as_distilled_starts_anew(pooled, task, classes, settings, clause):
    job, said = job_of(pooled, classes, task, **settings)
    assert job.decoder is None and (said is None if clause is None else re.search(clause, said))


@pytest.mark.parametrize(
    ("task", "clause"),
    [("fcn", None), ("finetune", "starts from the backbone alone: the decoder of its run is of masks")],
)
def test_heads_that_are_no_upernet_start_anew(mix, task, clause):
    job, said = job_of(mix, task=task)
    assert job.decoder is None and said == clause


def test_the_start_is_part_of_what_a_training_is_of(mix):
    started, plain = job_of(mix)[0], job_of(mix, from_decoder=False)[0]
    assert started.record() == {**plain.record(), "start_decoder": decoder_of(mix).digest}


def test_arms_with_a_decoder_start_from_it_and_the_rivals_do_not(mix, tmp_path):
    images = bright_halves(8, 0, masked=True)
    arms = [Arm("mix", lambda _: load_student(mix), 1, (), lambda _: decoder_of(mix)), random_arm(STUDENT)]
    jobs: list[TuneJob] = []

    def train(job: TuneJob, *_others: Any) -> TuneResult:
        jobs.append(job)
        return TuneResult(tmp_path, tmp_path, 1, 1, 1, 1.0, 1.0, {}, {}, 0, 1, value=0.5)

    task = job_of(mix)[0].task
    table = TunedTable(task, arms, images, bright_halves(2, 1, masked=True), [4], range(1), tune_config(**SMALL))
    said: list[str] = []
    result = run_cells(table, tmp_path, train, said.append)
    assert [job.decoder is not None for job in jobs] == [True, False]
    assert (
        [note for note in result.notes if "decoder" in note]
        == said[:1]
        == [
            "mix starts from the backbone and the decoder of its run, all but the classifier: the run's classes are "
            "background, bright, dark"
        ]
    )


def test_of_a_thousand_classes_a_few_are_named(mix):
    many = replace(decoder_of(mix), classes=tuple(f"n{idx}" for idx in range(1000)))
    assert many.other_classes(ClassTable(CLASSES)) == "the run's classes are n0, n1, n2, n3, n4 and 995 more"


@pytest.mark.parametrize("student", ["test_resnet", "test_convnext", "test_vit"])
def test_backbone_and_decoder_are_exported_together_and_see_what_they_saw_in_training(tmp_path, student):
    """The predictor's logits are those of the distilled student, also without norms of a ConvNeXt's levels."""
    config = {"student": {"name": student}, "regressor": {"width": 8, "norm": "group", "ppm_scales": (1, 2)}}
    run = distilled(tmp_path / "run", **config)
    predictor = export_predictor(run, tmp_path / "predictor")
    assert predictor.classes.names == CLASSES
    images = torch.rand(2, 3, 32, 32)
    model = build_distiller(tiny_config(run, **config), SOURCE.levels, (PX, PX), labels=LABELS).eval()
    state = load_checkpoint(run / "last.pt", "distill")
    model.regressor.load_state_dict(state["regressor"])  # of which the decoder shares what the average replaces
    model.decoder.load_state_dict(state["decoder_ema"])
    model.student.load_state_dict(state["ema"])
    logits = predictor.network.logits(images)
    seen = torch.nn.functional.interpolate(logits, (LABELS.height, LABELS.width), mode="bilinear")
    torch.testing.assert_close(seen, model(images)[LABELS.name])
    (prediction,) = predictor.predict([np.zeros((40, 56, 3), np.uint8)]) if student == "test_resnet" else (None,)
    assert prediction is None or prediction.numbers.shape == (40, 56)


@pytest.mark.parametrize("student", ["test_resnet", "test_convnext", "test_vit"])
def test_a_linear_layer_is_exported_with_its_backbone(tmp_path, student):
    config = {"student": {"name": student}}
    run = distilled(tmp_path / "run", POOLED, **config)
    predictor = export_predictor(run, tmp_path / "predictor")
    images = torch.rand(2, 3, 32, 32)
    model = build_distiller(tiny_config(run, **config), SOURCE.levels, (PX, PX), labels=POOLED).eval()
    state = load_checkpoint(run / "last.pt", "distill")
    model.decoder.load_state_dict(state["decoder_ema"])
    model.student.load_state_dict(state["ema"])
    torch.testing.assert_close(predictor.network.logits(images), model(images)[POOLED.name].flatten(1))
    (seen,) = predictor.predict([np.zeros((40, 56, 3), np.uint8)])
    assert predictor.classes.names == CLASSES and seen.probabilities.shape == (3,)


def test_a_run_without_soft_labels_has_no_head_to_export(tmp_path):
    run = distilled(tmp_path / "run", labels={"weight": 0.0})
    with pytest.raises(InputError, match="the run has no decoder of soft labels, so no head"):
        export_predictor(run, tmp_path / "predictor")
    assert not (tmp_path / "predictor").exists()
