"""Presets say what is written down of the paper (tables 17 and 6, 8-11), and run with tiny teachers: `dtpipe plan`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from click.testing import CliRunner

from dtpipe.distill.config import DistillConfig
from dtpipe.extract.config import ExtractConfig
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.pipeline.cli.main import main
from dtpipe.pipeline.cli.names import published
from dtpipe.pipeline.cli.settings import gather, load_document, preset_names, validate
from parts.images import write_images
from parts.paper_runs import OTHERS, ROWS, RUNS, configs, header
from parts.paper_tasks import SMALL_TASKS, TASK_ROWS
from parts.tiny_teachers import MAKERS, TinyTeacher

MakeTeacher = Callable[[str], TinyTeacher]


def resolved(name: str) -> tuple[ExtractConfig, DistillConfig]:
    run = RUNS[name]
    source = {"extract.images": "photos"} if run.flips else {"extract.num_samples": 4}
    given = {**source, "extract.run.out": "out", "distill.datasets": ["out"], "distill.run.out": "run"}
    document = gather(configs(name), {}, given | ({} if run.teacher else {"extract.teacher.path": "own"}))
    return validate(document, "extract"), validate(document, "distill")


def test_every_preset_is_in_a_table_of_this_test() -> None:
    assert sorted(preset_names()) == sorted([*RUNS, *TASK_ROWS, *SMALL_TASKS, *OTHERS])


# What they say


@pytest.mark.parametrize("name", RUNS)
def test_extraction_is_the_papers(name: str) -> None:
    run, (extract, _) = RUNS[name], resolved(name)
    px = extract.transform.px
    assert ((px, px) if isinstance(px, int) else px) == run.px
    assert extract.teacher.path == (run.teacher or "own")
    assert extract.noise.flips == run.flips
    assert extract.noise.draws == 1
    assert extract.teacher.dtype == ("float16" if run.family in ("adm", "stable_diffusion") else "float32")
    if run.timestep is not None:
        assert extract.transform.resize == run.resize
        assert extract.noise.timesteps == (run.timestep,)
        assert extract.teacher.options.get("encoding", "stochastic") == run.encoding


@pytest.mark.parametrize("name", RUNS)
def test_distillation_is_the_papers(name: str) -> None:
    run, (_, distill) = RUNS[name], resolved(name)
    assert (distill.student.name, distill.student.pretrained) == (run.student, False)
    assert (distill.opt, distill.peak_lr, distill.betas, distill.weight_decay) == (run.opt, 4e-3, (0.9, 0.95), 0.05)
    assert (distill.batch_size, distill.epochs, distill.warmup_epochs, distill.min_lr) == (
        run.batch,
        run.epochs,
        run.warmup,
        0,
    )
    assert distill.num_warmup_steps(steps_per_epoch=10) == 10 * run.warmup
    assert (distill.regressor.kind, distill.regressor.width, distill.regressor.ppm_scales) == (
        run.regressor,
        256,
        (1, 2, 3, 6),
    )
    assert distill.regressor.norm == "batch"
    assert distill.loss.weights == dict.fromkeys(distill.loss.weights, 0) | {"mse": run.mse, "at": run.at}
    assert (distill.flip, distill.equivariant, distill.clip_grad, distill.ema_decay) == (run.flips, False, None, None)
    assert timm.is_model(distill.student.name)


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.teacher])
def test_teachers_are_published_ones_of_that_size(name: str) -> None:
    [found] = [each for each in published() if each.name == RUNS[name].teacher]
    assert found.px == RUNS[name].px


def test_rows_that_share_features_have_the_settings_of_the_base() -> None:
    base, _ = resolved("ablation")
    shared = {name for name in RUNS if resolved(name)[0] in (base, with_named_encoding(base))}
    text = " ".join(header("ablation"))
    assert shared == {
        "ablation",
        *(name for name in RUNS if name in text),
        *(name for name in ROWS if name[:7] in ("table8_", "table9_")),
    }
    for name in shared & set(ROWS):
        assert "the features of preset ablation, extracted once" in " ".join(header(name))


def with_named_encoding(config: ExtractConfig) -> ExtractConfig:
    """The same content: the default encoding, said."""
    return config.model_copy(
        update={"teacher": config.teacher.model_copy(update={"options": {"encoding": "stochastic"}})}
    )


# That they run


@pytest.fixture(scope="module")
def teacher_of(tmp_path_factory: pytest.TempPathFactory) -> MakeTeacher:
    """Tiny teachers by family, each made once; the one of BDD100K by its own preset."""
    made: dict[str, TinyTeacher] = {}

    def make(family: str) -> TinyTeacher:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = (
                TinyTeacher(trained(folder, "bdd100k_teacher", [32, 64]), (32, 64))
                if family == "ddpm"
                else MAKERS[family](folder)
            )
        return made[family]

    return make


def trained(folder: Path, name: str, px: object) -> Path:
    """The teacher that a preset of `train-teacher` makes of eight images, a few channels wide, in two steps."""
    images = write_images(folder / "images", px=64)
    num_levels = len(load_document(name)["train_teacher"]["channels"])
    small = {
        "px": px,
        "channels": [8] * num_levels,
        "head_channels": 8,
        "norm_groups": 4,
        "batch_size": 2,
        "run": {"steps": 2, "log_every": 1, "num_samples": 1, "sample_steps": 1, "device": "cpu", "threads": 1},
    }
    settings = folder / "small.yaml"
    settings.write_text(yaml.safe_dump({"train_teacher": small}))
    invoke("train-teacher", "-c", name, "-c", settings, "--images", images, "--out", folder / "teacher")
    return folder / "teacher"


def invoke(*words: object) -> dict[str, Any]:
    """A command's answer as JSON."""
    done = CliRunner().invoke(main, [*map(str, words), "--json"])
    assert done.exit_code == 0, done.output
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def arguments(
    name: str, teacher: TinyTeacher, images: Path, folder: Path, dtype: str = "float32", **distill: object
) -> list[object]:
    """A preset for its tiny teacher and four images."""
    settings = teacher.settings(dtype)
    (folder / "small.yaml").write_text(yaml.safe_dump(settings | {"distill": settings["distill"] | distill}))
    source = ["--num-samples", 4] if teacher.synthesizes else ["--images", images, "--limit", 4]
    presets = [word for preset in configs(name) for word in ("-c", preset)]
    return [*presets, "-c", folder / "small.yaml", *source, "--teacher", teacher.path]


@pytest.mark.parametrize("name", RUNS)
def test_every_preset_plans(name: str, teacher_of: MakeTeacher, image_folder: Path, tmp_path: Path) -> None:
    run, teacher = RUNS[name], teacher_of(RUNS[name].family)
    plan = invoke("plan", *arguments(name, teacher, image_folder, tmp_path), "--out", tmp_path / "features")
    extract, distill = plan["extract"], plan["distill"]
    assert (extract["num_samples"], extract["views"]) == (4, 2 if run.flips else 1)
    assert {"image", "l2", "l3"} <= set(extract["levels"])
    assert extract["raw_bytes"] == 4 * sum(extract["levels"].values())
    assert (distill["epochs"], distill["num_steps"], distill["student"]) == (run.epochs, run.epochs, "resnet10t")
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(("name", "levels"), [("table6_biggan", 3), ("table8_pafpn", 4)])
def test_rows_extract_and_distill(
    name: str, levels: int, teacher_of: MakeTeacher, image_folder: Path, tmp_path: Path
) -> None:
    """A plan does not look at flips; training does."""
    short = {"epochs": 1, "warmup_epochs": 0, "batch_size": 2}
    words = arguments(
        name, teacher_of(RUNS[name].family), image_folder, tmp_path, resolved(name)[0].teacher.dtype, **short
    )
    invoke("extract", *words, "--out", tmp_path / "features")
    dataset = FeatureDataset.open(str(tmp_path / "features"))
    assert [view.flip for view in dataset.views] == ([False, True] if RUNS[name].flips else [False])
    run = invoke(
        "distill",
        *words[: words.index("-c", len(configs(name)) * 2) + 2],
        tmp_path / "features",
        "--out",
        tmp_path / "run",
    )
    assert (run["num_steps"], run["num_samples"]) == (2, 4)
    assert len(dataset.levels) == levels


@pytest.mark.parametrize("name", [name for name in OTHERS if name.endswith("_teacher") and name != "bdd100k_teacher"])
def test_teacher_presets_train(name: str, tmp_path: Path) -> None:
    assert (trained(tmp_path, name, 32) / "model_index.json").is_file()


def test_digits_plans_and_a_cpu_times_few_images_at_once(ddpm: Path, image_folder: Path, tmp_path: Path) -> None:
    words = arguments("digits", TinyTeacher(ddpm, 32), image_folder, tmp_path, micro_batch=None)
    plan = invoke("plan", *words, "--out", tmp_path / "features")["distill"]
    assert load_document("digits")["distill"]["batch_size"] == 32
    assert (plan["epochs"], plan["timed_images"]) == (6, 16)
