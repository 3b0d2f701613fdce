"""Presets say what is written down of the paper (tables 17 and 6, 8-11), and run with tiny teachers: `dtpipe plan`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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
from parts.paper_runs import ABLATIONS, CACHED, COLUMNS, LIVE, OTHERS, OVERLAYS, ROWS, RUNS
from parts.paper_tasks import SMALL_TASKS, TASK_ROWS
from parts.tiny_teachers import MAKERS, TinyTeacher

MakeTeacher = Callable[[str], TinyTeacher]


def configs(name: str, form: str = LIVE) -> list[str]:
    """The presets of a run, one laid over the other."""
    return [*RUNS[name].presets, *(["cached"] if form == CACHED else [])]


def resolved(name: str, form: str = LIVE) -> tuple[ExtractConfig, DistillConfig]:
    row = RUNS[name]
    source = {"extract.images": "photos"} if row.run.flips else {"extract.num_samples": 4}
    given = {**source, "extract.run.out": "out", "distill.datasets": ["out"], "distill.run.out": "run"}
    own = {} if row.run.teacher else {"extract.teacher.path": "own"}
    document = gather(configs(name, form), dict(row.switch), given | own)
    return validate(document, "extract"), validate(document, "distill")


def test_every_preset_is_in_a_table_of_this_test() -> None:
    assert sorted(preset_names()) == sorted([*COLUMNS, *OVERLAYS, *TASK_ROWS, *SMALL_TASKS, *OTHERS])


# What they say


@pytest.mark.parametrize("name", RUNS)
def test_extraction_is_the_papers(name: str) -> None:
    run, (extract, _) = RUNS[name].run, resolved(name)
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
    run, (_, distill) = RUNS[name].run, resolved(name)
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


@pytest.mark.parametrize("name", RUNS)
def test_noise_is_renewed_in_every_step_and_in_the_cached_form_never(name: str) -> None:
    live, cached = resolved(name), resolved(name, CACHED)
    assert live[0] == cached[0]  # what would be stored is what is encoded
    assert (live[1].reencode, cached[1].reencode) == (1, 0)
    assert live[1].model_copy(update={"reencode": 0.0}) == cached[1]


@pytest.mark.parametrize("name", [name for name, row in COLUMNS.items() if row.run.teacher])
def test_teachers_are_published_ones_of_that_size(name: str) -> None:
    [found] = [each for each in published() if each.name == COLUMNS[name].run.teacher]
    assert found.px == COLUMNS[name].run.px


def test_one_extraction_serves_the_runs_that_headers_name() -> None:
    shared = {name for name in RUNS if resolved(name)[0] == resolved("imagenet_r50")[0]}
    assert {"imagenet_r50", "imagenet_convnext_b"} == shared & set(COLUMNS)
    rows = {name for name in ROWS if name.startswith(("table8", "table9"))}
    assert rows <= shared | {name for name in RUNS if resolved(name)[0] == resolved("bdd100k_adm")[0]}


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


def presets_of(names: Sequence[str], teacher: TinyTeacher, folder: Path, dtype: str, **distill: object) -> list[object]:
    """Presets, and over them what a tiny teacher needs."""
    settings = teacher.settings(dtype)
    (folder / "small.yaml").write_text(yaml.safe_dump(settings | {"distill": settings["distill"] | distill}))
    return [word for name in [*names, folder / "small.yaml"] for word in ("-c", name)]


def source_of(teacher: TinyTeacher, images: Path) -> list[object]:
    """Four images, and the teacher."""
    source = ["--num-samples", 4] if teacher.synthesizes else ["--images", images, "-s", "extract.limit=4"]
    return [*source, "--teacher", teacher.path]


def switches(name: str) -> list[object]:
    return [word for key, value in RUNS[name].switch for word in ("-s", f"{key}={value}")]


@pytest.mark.parametrize("name", [*COLUMNS, *(f"{table}-0-imagenet_r50" for table in ABLATIONS)])
def test_every_preset_plans_in_its_cached_form(
    name: str, teacher_of: MakeTeacher, image_folder: Path, tmp_path: Path
) -> None:
    run, teacher = RUNS[name].run, teacher_of(RUNS[name].run.family)
    words = presets_of(configs(name, CACHED), teacher, tmp_path, "float32")
    out = ["--out", tmp_path / "features"]
    plan = invoke("plan", *words, *source_of(teacher, image_folder), *switches(name), *out)
    extract, distill = plan["extract"], plan["distill"]
    assert (extract["num_samples"], extract["views"]) == (4, 2 if run.flips else 1)
    assert {"image", "l2", "l3"} <= set(extract["levels"])
    assert extract["raw_bytes"] == 4 * sum(extract["levels"].values()) and extract["seconds"] > 0
    assert (distill["epochs"], distill["num_steps"], distill["teacher_s"]) == (run.epochs, run.epochs, None)
    assert distill["seconds"] > 0 and not (tmp_path / "features").exists()


@pytest.mark.parametrize("name", [*COLUMNS, *(f"{table}-0-bdd100k_adm" for table in ABLATIONS)])
def test_every_preset_plans_as_the_paper_has_it(
    name: str, teacher_of: MakeTeacher, image_folder: Path, tmp_path: Path
) -> None:
    """Nothing is stored, and the teacher runs in every step."""
    run, teacher = RUNS[name].run, teacher_of(RUNS[name].run.family)
    words = presets_of(configs(name), teacher, tmp_path, "float32")
    out = ["--out", tmp_path / "run", "-n"]
    plan = invoke("distill", *words, *source_of(teacher, image_folder), *switches(name), *out)
    assert (plan["epochs"], plan["num_steps"], plan["read_bytes"]) == (run.epochs, run.epochs, 0)
    assert plan["seconds"] > 4 * run.epochs * plan["teacher_s"] > 0
    assert not (tmp_path / "run").exists()


SHORT = {"epochs": 1, "warmup_epochs": 0, "batch_size": 2}


def test_a_cached_row_extracts_and_distills(teacher_of: MakeTeacher, image_folder: Path, tmp_path: Path) -> None:
    """A plan does not look at flips; training does."""
    name, features = "table6_biggan", tmp_path / "features"
    teacher = teacher_of(RUNS[name].run.family)
    words = presets_of(configs(name, CACHED), teacher, tmp_path, resolved(name)[0].teacher.dtype, **SHORT)
    invoke("extract", *words, *source_of(teacher, image_folder), "--out", features)
    dataset = FeatureDataset.open(str(features))
    assert ([view.flip for view in dataset.views], len(dataset.levels)) == ([False], 3)
    run = invoke("distill", *words, features, "--out", tmp_path / "run")
    assert (run["num_steps"], run["num_samples"], run["flips"]) == (2, 4, False)


def test_a_row_distills_as_the_paper_has_it(teacher_of: MakeTeacher, image_folder: Path, tmp_path: Path) -> None:
    name = "table8-2-bdd100k_adm"
    teacher = teacher_of(RUNS[name].run.family)
    words = presets_of(configs(name), teacher, tmp_path, "float32", **SHORT)
    run = invoke("distill", *words, *source_of(teacher, image_folder), *switches(name), "--out", tmp_path / "run")
    assert (run["num_steps"], run["num_samples"], run["flips"]) == (2, 4, True)


@pytest.mark.parametrize("name", [name for name in OTHERS if name.endswith("_teacher") and name != "bdd100k_teacher"])
def test_teacher_presets_train(name: str, tmp_path: Path) -> None:
    assert (trained(tmp_path, name, 32) / "model_index.json").is_file()


def test_digits_plans_and_a_cpu_times_few_images_at_once(ddpm: Path, image_folder: Path, tmp_path: Path) -> None:
    teacher = TinyTeacher(ddpm, 32)
    words = presets_of(["digits"], teacher, tmp_path, "float32", micro_batch=None)
    plan = invoke("plan", *words, *source_of(teacher, image_folder), "--out", tmp_path / "features")["distill"]
    assert load_document("digits")["distill"]["batch_size"] == 32
    assert (plan["epochs"], plan["timed_images"]) == (6, 16)


def test_a_plan_of_training_with_a_live_teacher_counts_it(ddpm: Path, image_folder: Path, tmp_path: Path) -> None:
    """Of two stored views a live image is one."""
    teacher = TinyTeacher(ddpm, 32)
    words = [*presets_of(["bdd100k_adm"], teacher, tmp_path, "float32"), *source_of(teacher, image_folder)]
    plan = invoke("plan", *words, "--out", tmp_path / "features")
    extract, distill = plan["extract"], plan["distill"]
    assert distill["teacher_s"] == pytest.approx(extract["teacher_s"] / 2)
    training = distill["num_samples"] * distill["epochs"] / distill["throughput_img_s"]
    assert distill["seconds"] == pytest.approx(training + 600 * 4 * distill["teacher_s"])
