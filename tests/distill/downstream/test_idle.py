"""Tasks say truly what they read: their code is watched while it trains and predicts; other settings are refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch

from dtpipe.distill.downstream.config import ProbeConfig
from dtpipe.distill.downstream.extractors import random_student
from dtpipe.distill.downstream.idle import changed_settings, refuse_idle_settings
from dtpipe.distill.downstream.registry import FROZEN_TASKS, TUNED_TASKS
from dtpipe.distill.downstream.tuned.batches import BatchOrder
from dtpipe.distill.downstream.tuned.config import AugmentConfig, HeadConfig, InferenceConfig, TuneConfig
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import Class, ClassTable, Mask, Panoptic
from dtpipe.pipeline.cli.settings import load_document, preset_names
from parts.objects import rectangles
from parts.tuning import STUDENT

READ_BY_OTHERS = {"augment.repeats"}  # by the order of batches, of every task
FOR_A_SENTENCE = {"inference.flips", "inference.scales", "inference.window_px"}  # detection has one of its own
CONFIGS = (
    {"augment": {"crop_px": [32, 32]}},
    {"augment": {"crop_px": [32, 32], "mixup": 0.5, "scale": [0.5, 1.0], "short_px": [32, 40], "policy": "trivial"}},
    {"head": {"convs": 1}, "augment": {"crop_px": [32, 32], "max_class_share": 0.75}},
    {
        "augment": {"crop_px": [32, 32]},
        "head": {"stride": 8},
        "inference": {"window_px": [32, 32], "stride_px": [16, 16]},
    },
)


def watched(model: Any, section: str, read: set[str]) -> Any:
    """The settings, noting what is read of them."""

    class Watched(type(model)):
        def __getattribute__(self, name: str) -> Any:
            if name in type(model).model_fields:
                read.add(f"{section}.{name}")
            return super().__getattribute__(name)

    return Watched.model_construct(**dict(model))


def pictures(kind: type) -> Iterator[tuple[np.ndarray, Any]]:
    rng = np.random.default_rng(0)
    for _ in range(2):
        image = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
        segments = np.repeat([[1], [2]], 24, axis=0).repeat(48, axis=1).astype(np.int32)
        objects = rectangles((48, 48), [(2, 2, 40, 40)], [1])
        others = {
            Class: Class(1),
            Mask: Mask((segments - 1).astype(np.uint8), 255),
            Panoptic: Panoptic(segments, {1: 0, 2: 1}),
        }
        yield image, others.get(kind, objects)


def reads_of(name: str) -> set[str]:
    """What building, augmenting, mixing, a loss and a prediction read."""
    task, read = TUNED_TASKS[name], set()
    table = ClassTable(("a", "b"), frozenset({0}) if task.kind is Panoptic else frozenset())
    for changes in CONFIGS:
        plain = TuneConfig.model_validate(
            {"steps": 1, **changes, "head": {"width": 8, "samples": 8, **changes.get("head", {})}}
        )
        parts = {part: watched(getattr(plain, part), part, read) for part in ("augment", "head", "inference")}
        config = plain.model_copy(update=parts)
        with suppress(ConfigError):  # detection has no windows
            network = task.build(random_student(STUDENT, 0), table, config).train()
            view, mix = task.augment(table, config), task.mix(table, config)
            examples = [view(*picture) for picture in pictures(task.kind)]
            images, targets = [example.image for example in examples], [example.target for example in examples]
            if mix is not None:
                mixed, targets = mix(torch.stack(images), targets)
                images = list(mixed)
            network(images, targets)
            network.eval().predict([torch.rand(3, 48, 48) * 2 - 1])
        BatchOrder.of(config, 4, 0)
    return read


@pytest.mark.parametrize("name", TUNED_TASKS)
def test_a_task_reads_what_it_says_and_nothing_else(name: str) -> None:
    declared = {key for key in TUNED_TASKS[name].reads if "." in key}
    read = reads_of(name)
    extra = FOR_A_SENTENCE if name in ("detect", "panoptic") else set()
    assert read - extra == declared, (read - declared, declared - read)


def test_every_setting_is_read_by_a_task() -> None:
    models = {"augment": AugmentConfig, "head": HeadConfig, "inference": InferenceConfig}
    every = {f"{section}.{name}" for section, model in models.items() for name in model.model_fields}
    assert {key for task in TUNED_TASKS.values() for key in task.reads if "." in key} == every
    assert {key for task in FROZEN_TASKS.values() for key in task.reads} == set(ProbeConfig.model_fields)


@pytest.mark.parametrize(
    ("task", "settings", "said"),
    [
        ("segment", {"augment": {"mixup": 0.2}}, r"eval\.tune\.augment\.mixup is for finetune and linear, and segment"),
        ("segment", {"head": {"anchor_scale": 4}}, r"head\.anchor_scale is for detect and panoptic, and segment does"),
        ("detect", {"inference": {"stride_px": [8, 8]}}, r"inference\.stride_px is for .*segment.*, and detect"),
        (
            "fcn",
            {"head": {"aux_weight": 0.1}},
            r"head\.aux_weight is for .*few-labels",
        ),
        ("linear", {"layer_decay": 0.7}, r"eval\.tune\.layer_decay is for .*finetune.*, and linear does not read it"),
    ],
)
def test_a_setting_of_other_tasks_is_refused_with_their_names(task, settings, said) -> None:
    with pytest.raises(ConfigError, match=said):
        refuse_idle_settings(task, TuneConfig.model_validate({"steps": 1, **settings}))


def test_settings_of_frozen_tasks_too() -> None:
    with pytest.raises(ConfigError, match=r"eval\.probe\.k is for knn, and probe does not read it; leave it out"):
        refuse_idle_settings("probe", ProbeConfig(k=3))
    refuse_idle_settings("knn", ProbeConfig(k=3))
    assert list(changed_settings(ProbeConfig(k=3))) == ["k"]


@pytest.mark.parametrize("name", [name for name in preset_names() if "tune" in load_document(name).get("eval", {})])
def test_presets_hold_no_setting_that_their_task_does_not_read(name: str) -> None:
    settings = load_document(name)["eval"]
    refuse_idle_settings(settings["task"], TuneConfig.model_validate(settings["tune"]))
