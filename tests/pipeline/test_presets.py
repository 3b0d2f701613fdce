"""Presets hold the paper's numbers, and each goes through `dtpipe plan` with a tiny teacher of its family."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dtpipe.extract.teachers.base import teacher_kinds
from dtpipe.extract.teachers.stylegan2_network import Layout
from dtpipe.extract.train_config import TrainTeacherConfig
from dtpipe.pipeline.cli import main
from dtpipe.pipeline.resolve import first_line, gather, load_document, preset_names, validate

EXTRACT_TESTS = Path(__file__).resolve().parents[1] / "extract"
PAPER = {"distill.betas": (0.9, 0.95), "distill.weight_decay": 0.05, "distill.lr": 4e-3, "distill.lr_scale": "none"}
ADAMW = {**PAPER, "distill.opt": "adamw", "distill.batch_size": 256}
LAMB = {**PAPER, "distill.opt": "lamb", "distill.batch_size": 2048, "distill.flip": True, "extract.noise.flips": True}
SQUARE = {"extract.transform.px": 256, "extract.transform.resize": "center_crop"}
FLIPS = {"distill.flip": True, "extract.noise.flips": True}
TABLE_17: dict[str, dict[str, Any]] = {
    "imagenet_r50": {**LAMB, **SQUARE, **FLIPS, "distill.student.name": "resnet50"},
    "imagenet_convnext_b": {**LAMB, **SQUARE, **FLIPS, "distill.student.name": "convnext_base"},
    "lsun": {**ADAMW, **SQUARE, **FLIPS, "distill.epochs": 100, "distill.warmup_epochs": 20, "extract.noise.timesteps": (50,)},
    "ffhq": {**ADAMW, **SQUARE, **FLIPS, "distill.epochs": 100, "distill.warmup_epochs": 20, "extract.noise.timesteps": (50,)},
    "bdd100k_adm": {
        **{**ADAMW, **FLIPS, "distill.epochs": 600, "distill.warmup_epochs": 30, "extract.noise.timesteps": (50,)},
        **{"extract.transform.px": (128, 256), "extract.transform.resize": "stretch", "distill.student.name": "resnet50"},
    },
    "bdd100k_stylegan2": {
        **{**ADAMW, "distill.epochs": 600, "distill.warmup_epochs": 30, "extract.transform.px": (512, 1024)},
        **{"extract.images": None, "distill.student.name": "resnet50"},
    },
}
for each in ("imagenet_r50", "imagenet_convnext_b"):
    TABLE_17[each] |= {"distill.epochs": 200, "distill.warmup_epochs": 30, "extract.noise.timesteps": (150,)}
ABLATION: dict[str, Any] = {
    **{**LAMB, **SQUARE, **FLIPS, "distill.epochs": 100, "distill.student.name": "resnet50", "extract.noise.timesteps": (150,)},
    **{"distill.regressor.kind": "fpn_ppm", "distill.loss.mse_weight": 1.0, "distill.loss.at_weight": 10.0},
    "extract.teacher.path": "adm-imagenet",
}
MADE = {"extract.images": None, "extract.num_samples": 1_281_167, "extract.noise.flips": False, "distill.flip": False}
ROWS: dict[str, dict[str, Any]] = {
    "table6_adm": {},
    "table6_stable_diffusion": {"extract.teacher.path": "stable-diffusion-1.4", "extract.transform.px": 512},
    "table6_biggan": {**MADE, "extract.teacher.path": "biggan-deepmind256", "extract.teacher.options": {"class_label": 0}},
    "table6_icgan": {**MADE, "extract.teacher.path": "icgan-imagenet256"},
    **{f"table8_{kind}": {"distill.regressor.kind": kind} for kind in ("fpn", "fpn_attention", "pafpn", "fpn_ppm")},
    "table9_mse": {"distill.loss.at_weight": 0.0},
    "table9_at": {"distill.loss.mse_weight": 0.0},
    "table9_mse_at": {},
    "table10_stochastic": {"extract.teacher.options": {"encoding": "stochastic"}},
    "table10_deterministic": {"extract.teacher.options": {"encoding": "ddim_inversion", "inversion_stride": 10}},
    **{f"table11_t{timestep}": {"extract.noise.timesteps": (timestep,)} for timestep in (50, 150, 250, 350)},
}
TEACHERS = ("adm_teacher", "bdd100k_teacher", "demo_teacher", "small_teacher")  # settings of train-teacher
STACKS = {**{name: [name] for name in TABLE_17}, "ablation": ["ablation"], **{name: ["ablation", name] for name in ROWS}}


def helper(name: str) -> ModuleType:
    """A module beside the tests of extract that makes checkpoints."""
    spec = importlib.util.spec_from_file_location(name, EXTRACT_TESTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Flags that put a tiny teacher in place of each family's, and the image size that it has."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    root = tmp_path_factory.mktemp("tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownBlock2D",) * 6, "up_block_types": ("UpBlock2D",) * 6}
        unet = UNet2DModel(sample_size=64, block_out_channels=(8,) * 6, layers_per_block=1, norm_num_groups=4, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(root / "ddpm")
    helper("sd_pipelines").save_pipeline(root / "sd")
    cases, snapshots = helper("biggan_cases"), helper("stylegan2_snapshots")
    biggan = cases.save(cases.weights("standing"), root, "biggan.pth")
    icgan = cases.save(cases.weights("with_class"), root, "icgan.pth")
    labels = np.array(cases.CLASSES)
    np.save(root / "instances.npy", {"instance_features": cases.features(), "labels": labels, "image_path": ["a/1.JPEG"] * len(labels)})
    layout = Layout(z_dim=6, w_dim=5, num_classes=0, embed_dim=0, mapping_widths=(7, 5), base_px=(4, 4), channels=(4,) * 5)
    (root / "stylegan2.pkl").write_bytes(snapshots.dumps(snapshots.snapshot(snapshots.random_weights(layout), layout)))
    instances = ["-s", f"extract.teacher.options={{instances: {root / 'instances.npy'}}}"]
    return {
        "adm": ["--teacher", str(root / "ddpm"), "--px", "64"],
        "stable_diffusion": ["--teacher", str(root / "sd"), "--px", "64", "-s", "extract.teacher.options.text_embedding=null"],
        "biggan": ["--teacher", str(biggan), "--px", "64", "--num-samples", "4"],
        "icgan": ["--teacher", str(icgan), "--px", "64", "--num-samples", "4", *instances],
        "stylegan2": ["--teacher", str(root / "stylegan2.pkl"), "--px", "64", "--num-samples", "4"],
    }


def family_of(stack: list[str]) -> str:
    """The family of the teacher that presets name; those without a name are of the file's, or of the paper's own."""
    document = gather(stack, {}, {})
    path = document["extract"].get("teacher", {}).get("path")
    published = {each.name: kind.kind for kind in teacher_kinds().values() for each in kind.published}
    return "adm" if path is None and "num_samples" not in document["extract"] else published.get(path or "", "stylegan2")


@pytest.mark.parametrize("name", STACKS)
def test_dtpipe_plan_takes_every_preset(name: str, tiny: Mapping[str, list[str]], image_folder: Path, tmp_path: Path) -> None:
    """All settings resolve and fit each other, on images and with a teacher of another size."""
    family = family_of(STACKS[name])
    images = [] if "--num-samples" in tiny[family] else ["--images", str(image_folder)]
    small = ["--student", "test_convnext", "--batch-size", "4", "-s", "distill.micro_batch=2", "-s", "extract.inline=true"]
    configs = [word for each in STACKS[name] for word in ("-c", each)]
    dtype = ["-s", "extract.teacher.dtype=float32"]  # CPUs are slow at float16
    command = ["plan", *configs, *images, *tiny[family], *small, *dtype, "--out", str(tmp_path / "features"), "--device", "cpu", "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    document = load_document(STACKS[name][0])
    assert plan["distill"]["epochs"] == document["distill"]["epochs"]
    assert plan["extract"]["views"] == (1 if not images else 2)


def value_of(settings: Any, key: str) -> Any:
    for part in key.split(".")[1:]:
        settings = getattr(settings, part)
    return settings


@pytest.mark.parametrize("name", STACKS)
def test_presets_have_the_papers_numbers(name: str) -> None:
    document = gather(STACKS[name], {}, {})
    if "num_samples" not in document["extract"]:
        document["extract"]["images"] = "images"
    document["extract"].setdefault("teacher", {}).setdefault("path", "teacher")
    document["extract"]["out"] = document["distill"]["out"] = "out"
    document["distill"]["datasets"] = ["features"]
    settings = {section: validate(document, section) for section in ("extract", "distill")}
    expected = TABLE_17[name] if name in TABLE_17 else {**ABLATION, **ROWS.get(name, {})}
    assert {key: value_of(settings[key.split(".")[0]], key) for key in expected} == expected
    changed = load_document(name)
    if name in ROWS:  # a row changes its own subject, no more
        assert {f"{section}.{key}" for section, values in changed.items() for key in values} <= {
            *("extract.teacher", "extract.transform", "extract.noise", "extract.num_samples"),
            *("distill.regressor", "distill.loss", "distill.flip"),
        }


@pytest.mark.parametrize("name", TEACHERS)
def test_presets_of_teachers_are_settings_of_train_teacher(name: str) -> None:
    document = gather([name], {}, {"train_teacher.images": "a", "train_teacher.out": "b"})
    assert isinstance(validate(document, "train_teacher"), TrainTeacherConfig)


def test_every_preset_is_checked_and_opens_with_what_it_is_its_command_hardware_and_hours() -> None:
    assert {*STACKS, *TEACHERS, "digits"} == set(preset_names())
    folder = Path(__file__).resolve().parents[2] / "pipeline" / "presets"
    for name in preset_names():
        head = "".join(line for line in (folder / f"{name}.yaml").read_text().splitlines(keepends=True) if line.startswith("#"))
        assert first_line(name).endswith("."), name
        assert f"-c {name}" in head, name
        if name not in ("digits", "demo_teacher"):  # minutes on two CPU cores, as their first line says
            assert "Hardware" in head and ("Hours" in head or "hours" in head), name
