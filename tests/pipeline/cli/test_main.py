"""The command line as a user meets it: exit codes, one-line errors, and the whole path on a few tiny images."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from dtpipe.distill.downstream.registry import TASKS
from dtpipe.manifests import errors
from dtpipe.pipeline.cli.main import COMMANDS, DtpipeGroup, main
from parts.damage import flip
from parts.extractions import Extract

SMALL = ["--inline", "-s", "extract.noise.timesteps=50", "-s", "extract.shard.samples=4", "-s", "extract.batch_size=4"]


def run(*args: object) -> Result:
    """Run a command line in this process; its exit code is the one a shell would see."""
    return CliRunner().invoke(main, [str(arg) for arg in args])


def document(*args: object) -> dict[str, object]:
    """The JSON that a command prints on stdout; it must be the only thing there."""
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny diffusers folder with random weights, 32 px, levels l2 to l5."""
    from parts.teachers import write_ddpm

    return write_ddpm(tmp_path_factory.mktemp("teacher"), channels=(8, 8, 8, 8, 16, 16))


@pytest.fixture
def extraction(image_folder: Path, teacher: Path, tmp_path: Path) -> list[object]:
    """Command line of a small extraction of eight images into the folder `features`."""
    return ["extract", "--images", image_folder, "--teacher", teacher, "--out", tmp_path / "features", *SMALL]


@pytest.fixture
def features(extraction: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A feature dataset of eight images, written by the command."""
    monkeypatch.setattr(sys, "argv", ["dtpipe", *map(str, extraction)])  # what records of commands go by
    result = run(*extraction)
    assert result.exit_code == 0, result.output
    return tmp_path / "features"


def test_unknown_command_is_one_line_with_a_near_match() -> None:
    result = run("extrakt")
    assert result.exit_code == 2
    assert (
        result.stderr == "error: no command 'extrakt', did you mean 'extract'?; `dtpipe --help` lists what there is\n"
    )


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ("extract", 2, ["--teacher (extract.teacher.path), --out (extract.run.out) must be given"]),
        ("extract --imagess a", 2, ["--imagess"]),
        ("extract -s extract.noise.step=3", 2, ["unknown key", "extract.noise.timesteps"]),
        ("extract -c imagenett", 2, ["no such preset", "imagenet_r50"]),
        ("extract --images nowhere --teacher TEACHER --out OUT --inline", 3, ["nowhere"]),
        ("extract --images EMPTY --teacher TEACHER --out OUT --inline", 3, ["EMPTY"]),
        ("extract --images IMAGES --teacher IMAGES --out OUT --inline", 3, ["IMAGES"]),
        ("extract --images IMAGES --teacher TEACHER --out OUT --px 33 --inline", 2, ["33"]),
        ("distill nowhere --out OUT", 3, ["nowhere"]),
        ("distill --out OUT", 2, ["URL... (distill.datasets)"]),
        ("verify nowhere", 3, ["nowhere"]),
        ("inspect nowhere", 3, ["nowhere"]),
        ("inspect nowhere --sample a", 2, ["--sample and --png go together"]),
        ("eval nowhere probe --images IMAGES", 3, ["nowhere"]),
        ("eval nowhere guess --images IMAGES", 2, ["'guess'", "choose one of probe, knn, readout"]),
        ("export nowhere --out OUT", 3, ["nowhere"]),
        ("report nowhere", 3, ["nowhere", "no run"]),
        ("train-teacher --images nowhere --out OUT", 3, ["nowhere"]),
        ("demo --out IMAGES", 2, ["no demo wrote"]),
        ("demo --images EMPTY --out OUT", 3, ["EMPTY"]),
        ("extract -c DEEP", 2, ["-c DEEP: nests lists or mappings too deep"]),
        ("distill -c EMPTY", 2, ["-c EMPTY: is a folder, not a file", "preset"]),
        ("eval -c DANGLING", 2, ["-c DANGLING: is a link to moved/away, which is not there"]),
        ("distill -s distill.lr=1e999", 2, ["distill.lr is inf: input should be a finite number"]),
        ("distill -s distill.seed=99999999999999999999", 2, ["-s distill.seed: holds a number of 67 bits"]),
        ("train-teacher -s train_teacher.channels=[[[[", 2, ["-s train_teacher.channels: not valid YAML"]),
        ("extract --images IMAGES --keys EMPTY --teacher TEACHER --out OUT --inline", 3, ["EMPTY: is a folder"]),
        ("extract --images IMAGES --keys DANGLING --teacher TEACHER --out OUT --inline", 3, ["link to moved/away"]),
        ("extract --images IMAGES --teacher NESTED --out OUT --inline", 3, ["NESTED/unet/config.json: nests lists"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_is_one_sentence_and_the_right_code(
    args: str,
    code: int,
    words: list[str],
    image_folder: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "DEEP").write_text("[" * 10_000)
    (tmp_path / "DANGLING").symlink_to("moved/away")
    (tmp_path / "NESTED" / "unet").mkdir(parents=True)
    (tmp_path / "NESTED" / "model_index.json").write_text("{}")
    (tmp_path / "NESTED" / "unet" / "config.json").write_text("[" * 100_000)
    places = {"IMAGES": str(image_folder), "TEACHER": str(teacher), "EMPTY": "EMPTY", "OUT": "OUT"}
    result = run(*(places.get(arg, arg) for arg in args.split()))
    errors_shown = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == code, result.output
    assert len(errors_shown) == 1
    assert "Traceback" not in result.output
    for word in words:
        assert places.get(word, word) in errors_shown[0]


class Failing(DtpipeGroup):
    """The command line, at work on something that fails."""

    def __init__(self, error: Exception) -> None:
        super().__init__("dtpipe")
        self.error = error

    def invoke(self, ctx: click.Context) -> None:
        raise self.error


def test_every_error_of_ours_ends_with_its_own_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.DtpipeError)]
    assert len(kinds) > 10
    for kind in kinds:
        result = CliRunner().invoke(Failing(kind("what\nwhere; next")), ["list"])
        assert (result.exit_code, result.stderr) == (kind.exit_code, "error: what where; next\n")


def test_the_page_of_exit_codes_has_every_one_of_them() -> None:
    page = (Path(__file__).parents[3] / "docs" / "settings.md").read_text()
    listed = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", page, re.MULTILINE) for code in row.split(", ")}
    codes = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.DtpipeError)
    }
    assert listed == codes | {0, 130}


def test_training_that_diverges_has_an_exit_code_of_its_own(extract: Extract, tmp_path: Path) -> None:
    small = ["--student", "resnet10t", "--batch-size", 4, "-s", "distill.regressor.width=8", "--warmup-epochs", 0]
    result = run("distill", extract(), "--out", tmp_path / "run", *small, "--lr", "1e30", "--epochs", 5)
    assert result.exit_code == 9
    assert re.search("(loss|gradient's norm) is (nan|inf) in step .*lower distill.lr", result.stderr)


def test_an_unexpected_error_shows_its_traceback() -> None:
    result = CliRunner().invoke(Failing(ZeroDivisionError("surprise")), ["list"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError: surprise" in result.stderr


def test_list_names_what_the_registries_hold() -> None:
    found = document("list")
    assert "ddpm" in found["teachers"]
    assert {"folder", "class_folder"} <= set(found["sources"])
    assert all(text for rows in found.values() for text in rows.values())
    assert set(document("list", "students", "--match", "resnet10[a-z]")["students"]) == {"resnet10t"}


def test_dry_run_writes_nothing_and_counts_bytes_right(extraction: list[object], tmp_path: Path) -> None:
    planned = document(*extraction, "--dry-run")
    assert not (tmp_path / "features").exists()
    levels = {"l2": 8 * 8 * 8, "l3": 8 * 4 * 4, "l4": 16 * 2 * 2, "l5": 16}
    image = 3 * 32 * 32
    assert planned["num_samples"] == 8
    assert planned["num_shards"] == 2
    assert planned["levels"]["image"] == image
    per_sample = image + sum(planned["levels"][name] for name in levels)
    assert planned["raw_bytes"] == 8 * per_sample
    result = run(*extraction)
    assert result.exit_code == 0, result.output
    written = sum(path.stat().st_size for path in (tmp_path / "features").rglob("*") if path.is_file())
    assert planned["stored_bytes"] == pytest.approx(written, rel=0.25)  # half the images; records by their usual size


def test_extract_says_what_where_and_what_next(extraction: list[object], tmp_path: Path) -> None:
    result = run(*extraction)
    assert f"wrote    {tmp_path / 'features'}" in result.stdout
    assert "8 ok, 0 bad, of 8" in result.stdout
    few = "--student resnet50 --out runs/first --batch-size 16 --lr 0.001"
    assert f"next: dtpipe distill {tmp_path / 'features'} {few}\n" in result.stdout
    assert "8/8" in result.stderr
    assert run(*extraction).exit_code == 0
    changed = run(*extraction[:-1], "extract.batch_size=2")
    assert changed.exit_code == 2
    assert "batch_size" in changed.stderr


def test_verify_offers_the_levels_that_there_are() -> None:
    from dtpipe.manifests.check.verify import LEVELS

    assert f"--level {'|'.join(LEVELS)}\n" in run("verify", "--help").stdout


def test_verify_finds_a_flipped_byte_and_repair_mends_it(features: Path, extraction: list[object]) -> None:
    clean = document("verify", features, "--level", "decode")
    assert clean["ok"] is True
    recomputed = document("verify", features, "--level", "recompute", "--rows", "4")
    assert set(recomputed["max_relative_error"].values()) == {0.0}
    damaged = next(path for path in sorted((features / "data.zarr" / "l2" / "c").rglob("*")) if path.is_file())
    flip(damaged, 10)
    found = run("verify", features)
    assert found.exit_code == 4
    problem = re.escape(damaged.relative_to(features).as_posix())
    assert re.search(rf"^problem: {problem}: .*\(repair sends its shard back to work\)$", found.stdout, re.MULTILINE)
    assert found.stdout.endswith("\n1 problem\n")
    assert "has 1 problem; run" in found.stderr
    assert run("verify", features, "--repair").exit_code == 0
    assert run("verify", features).exit_code == 5
    assert run(*extraction).exit_code == 0
    assert document("verify", features)["ok"] is True


def test_another_teacher_is_refused_for_recompute(features: Path, tmp_path: Path, teacher: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    path = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: value + torch.ones(()) for key, value in load_file(path).items()}, path)
    result = run("verify", features, "--level", "recompute", "--teacher", other)
    assert result.exit_code == 3
    assert "digest" in result.stderr


def test_distill_eval_export_report_follow_each_other(features: Path, image_folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    small = [
        "--student",
        "resnet10t",
        "--batch-size",
        "4",
        "--epochs",
        "1",
        "-s",
        "distill.regressor.width=8",
        "-s",
        "distill.run.log_every=1",
    ]
    trained = document("distill", features, "--out", run_dir, *small, "--reencode", 0.5)
    assert trained["num_steps"] == 2
    probe = ["-s", "eval.probe.max_iter=5", "--seeds", 1, "--labelled", "2,all"]
    scored = document("eval", run_dir, "probe", "--images", image_folder, *probe)
    names = {summary["extractor"] for summary in scored["summaries"]}
    assert names == {"raw pixels", "random initialisation", "teacher", "distilled"}
    assert json.loads((run_dir / "eval" / "probe.json").read_text())["config"]["images"] == str(image_folder)
    assert document("export", run_dir, "--out", tmp_path / "export")["layout"] == "timm"
    assert "layout: timm" in (tmp_path / "export" / "export.yaml").read_text()
    assert run("export", run_dir, "--out", image_folder / "cat" / "001.png").exit_code == 2
    assert run("report", run_dir, "--num-images", 2).exit_code == 0
    page = (run_dir / "report.html").read_text()
    assert "random initialisation" in page
    assert f"dtpipe extract --images {image_folder}" in page
    assert "Segmentation maps" in page and "Activation maps" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def test_faults_are_armed_by_the_command_line_only(extraction: list[object]) -> None:
    command = [sys.executable, "-m", "dtpipe.pipeline.cli.main", *map(str, extraction)]

    def ended(fault: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "DTPIPE_FAULT": fault}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    assert ended("commit.before").returncode == -signal.SIGKILL
    wrong = ended("commit.maybe")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: fault point 'commit.maybe' does not exist")


def test_ctrl_c_stops_with_130_and_one_line(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom dtpipe.pipeline.cli import main as cli\n"
        "def wait(self, ctx):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "cli.DtpipeGroup.invoke = wait\ncli.main(['list'])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.strip() == "stopped"


def test_every_command_is_listed_once_with_a_module() -> None:
    assert len({module for module, _ in COMMANDS.values()}) == len(COMMANDS)


def test_eval_with_a_run_alone_asks_for_the_task_and_its_help_names_all() -> None:
    result = run("eval", "runs/r10")
    assert result.exit_code == 2
    assert "no task is given, only runs/r10" in result.stderr
    text = " ".join(run("eval", "--help").output.split("Options:")[0].split())
    for name in TASKS:
        assert name in result.stderr and re.search(rf"\b{name}\b", text), name
