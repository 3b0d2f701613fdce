"""Presets of segmentation build the networks of their rows, rates fall as in their sources, and all plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.groups import parameter_groups
from dtpipe.distill.downstream.tuned.network import resolve
from dtpipe.distill.downstream.tuned.registry import find_tuned
from dtpipe.distill.downstream.tuned.schedule import rate_share
from dtpipe.distill.student.student import StudentSpec, build_student
from dtpipe.manifests.labels import ClassTable
from dtpipe.pipeline.cli.main import main
from dtpipe.pipeline.cli.settings import gather, validate
from dtpipe.pipeline.demo.scenes import write_scenes
from parts.paper_segmentation import SEGMENTATION_ROWS, SEGMENTATION_STUDENTS
from parts.tuning import write_run

TINY = {
    **{"eval.tune.head.width": "16", "eval.tune.batch_size": "2", "eval.tune.augment.crop_px": "[64,64]"},
    **{"eval.tune.augment.short_px": "[64]", "eval.tune.augment.long_px": "64"},
    **{"eval.tune.inference.short_px": "64", "eval.tune.inference.long_px": "64"},
}
WINDOWS = {"eval.tune.inference.window_px": "[64,64]", "eval.tune.inference.stride_px": "[43,43]"}
PLANS: dict[str, dict[str, str]] = {
    "ade20k_upernet_r50": {},
    "ade20k_upernet_convnext_b": WINDOWS,
    "bdd_semantic_upernet_r50": {},
    "cityscapes_upernet_r50": {"eval.labelled": "[2,all]"},
    "imagenet_foreground_fcn": {"eval.foreground": "true"},
}
"""Presets, with what they need of a few scenes of 64 px."""


def tune_of(name: str) -> TuneConfig:
    tune = validate(gather([name], {}, {"eval.checkpoint": "run", "eval.images": "images"}), "eval").tune
    assert tune is not None
    return tune


@pytest.mark.parametrize("name", SEGMENTATION_ROWS)
def test_networks_are_built_and_give_a_class_for_each_cell(name: str) -> None:
    """On a device without memory."""
    tune, task = tune_of(name), find_tuned(SEGMENTATION_ROWS[name]["task"])
    assert tune.augment.crop_px is not None
    height, width = tune.augment.crop_px
    with torch.device("meta"):
        student = build_student(StudentSpec(SEGMENTATION_STUDENTS[name], 4, (256, 256)), drop_path=tune.drop_path)
        network = task.build(student, ClassTable.numbered(19), resolve(task, student, tune)).eval()
        logits = network.logits(torch.zeros(1, 3, height, width))
    assert logits.shape == (1, 19, height // 4, width // 4)


def test_rates_of_a_convnext_fall_by_stage_as_in_its_own_repository() -> None:
    """num_layers 12 gives ids 0 (stem), 1 to 4 (stages) and 13 (head), and the rate 0.9^(13 - id)."""
    tune = tune_of("ade20k_upernet_convnext_b")
    with torch.device("meta"):
        student = build_student(StudentSpec("convnext_base", 4, (512, 512)))
        network = find_tuned("segment").build(student, ClassTable.numbered(150), tune)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in parameter_groups(network, tune) for p in group["params"]}
    assert scales["student.net.stem_0.weight"] == pytest.approx(0.9**13)
    for stage in range(4):
        assert scales[f"student.net.stages_{stage}.blocks.2.mlp.fc1.weight"] == pytest.approx(0.9 ** (12 - stage))
    assert {scales["levels.norms.0.weight"], scales["head.classifier.weight"], scales["aux.classifier.weight"]} == {1}


@pytest.mark.parametrize("name", ["ade20k_upernet_r50", "ade20k_upernet_convnext_b"])
def test_rates_over_time_are_the_published_schedules(name: str) -> None:
    """mmcv's poly: (lr - min) * (1 - step/steps)^power + min, after a linear warm-up where there is one."""
    tune = tune_of(name)
    for step in (20_000, 80_000, 159_000):
        power, least = (0.9, 1e-4) if name.endswith("r50") else (1.0, 0.0)
        rate = (tune.lr - least) * (1 - step / 160_000) ** power + least
        assert tune.lr * rate_share(step, 160_000, tune) == pytest.approx(
            rate, rel=0.01
        )  # where the poly begins differs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), spec=StudentSpec("test_resnet", 4, (64, 64)))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), 8, 0)


@pytest.mark.parametrize("name", PLANS)
def test_every_preset_plans(name: str, run: Path, images: Path) -> None:
    task = SEGMENTATION_ROWS[name]["task"]
    changed = [word for key, value in (TINY | PLANS[name]).items() for word in ("-s", f"{key}={value}")]
    words = ["eval", run, task, "-c", name, "--images", images, "--masks", images.parent / "semantic", *changed]
    done = CliRunner().invoke(main, [*map(str, words), "--device", "cpu", "-n", "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert (plan["task"], plan["arms"]) == (task, ["distilled", "random initialisation"])
    assert plan["num_trainings"] == 2 * len(plan["num_labelled"]) and plan["seconds"] > 0


def test_the_small_preset_plans(run: Path, images: Path) -> None:
    words = ["eval", run, "segment", "-c", "segment_small", "--images", images, "--masks", images.parent / "semantic"]
    done = CliRunner().invoke(main, [*map(str, words), "--labelled", "4", "--device", "cpu", "-n", "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert (plan["task"], plan["num_labelled"], plan["student"]) == ("segment", [4], "test_resnet")
    assert plan["num_trainings"] == 2 * (3 + 3 * 3)  # arms; seeds, and three rates on three folds for the first
    assert plan["head_parameters"] > 100_000 and plan["seconds"] > 0
