"""`dtpipe init` writes files that other commands take as they stand."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from dtpipe.pipeline.cli.settings import gather, validate
from dtpipe.pipeline.init.write import Project, batch_size_for, write_project
from parts.command_line import RefusedError, dtpipe, said
from parts.images import write_images


@pytest.fixture(scope="module")
def planned(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A project of 24 images whose paths have a blank, and what the command answered."""
    root = tmp_path_factory.mktemp("init")
    photos = write_images(root / "my photos", 24)
    flags = ["--images", photos, "--teacher", ddpm, "--student", "test_resnet", "--timesteps", 50, "--epochs", 3]
    return root / "the project", dtpipe("init", root / "the project", *flags)


def stubs(folder: Path, *, code: int = 0) -> dict[str, str]:
    """An environment in which srun, ray, scontrol and dtpipe write their words to `said.txt` and do nothing."""
    folder.mkdir()
    for name in ("srun", "ray", "scontrol"):
        (folder / name).write_text(
            f'#!/bin/bash\necho {name} "$@" >> {folder}/said.txt\nexit {code if name == "srun" else 0}\n'
        )
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}


def test_the_settings_are_those_that_were_asked_for_and_a_plan_takes_them(planned):
    folder, _ = planned
    document = gather([str(folder / "config.yaml")], {}, {})
    extract, distill = (validate(document, section) for section in ("extract", "distill"))
    assert extract.images.endswith("/my photos") and extract.noise.timesteps == (50,)
    assert distill.student.name == "test_resnet" and distill.epochs == 3
    assert distill.datasets == (extract.run.out,) == (str(folder / "features"),)
    plan = dtpipe("plan", "-c", folder / "config.yaml")
    assert plan["extract"]["num_samples"] == 24 and plan["distill"]["num_steps"] == 3 * 2
    assert not (folder / "features").exists()


def test_the_figures_of_the_plan_stand_in_the_files(planned):
    folder, answer = planned
    text = (folder / "config.yaml").read_text()
    assert "# Measured by `dtpipe plan`, on" in text and "features: 24 samples, about" in text
    assert f"training: {answer['distill']['num_steps']} steps" in text
    batch_size = yaml.safe_load(text)["distill"]["batch_size"]
    assert answer["distill"]["num_steps"] == 3 * -(-24 // batch_size) == 6  # at the batch size that the file has
    assert "--time=1:00:00" in (folder / "slurm.sh").read_text()


def test_every_key_of_the_settings_is_explained_or_plain(planned):
    lines = (planned[0] / "config.yaml").read_text().splitlines()
    assert sum("#" in line for line in lines) > len(lines) / 2


def test_the_slurm_script_runs_the_commands_in_order(planned, tmp_path):
    folder, _ = planned
    environment = stubs(tmp_path / "bin")
    subprocess.run(["bash", folder / "slurm.sh"], check=True, env=environment)
    lines = [shlex.split(line) for line in (tmp_path / "bin" / "said.txt").read_text().splitlines()]
    assert [line[3] for line in lines if line[2] == "dtpipe"] == ["extract", "verify", "distill"]
    head = (folder / "slurm.sh").read_text()
    assert "#SBATCH --requeue" in head and "#SBATCH --signal=TERM@120" in head


def test_a_step_that_was_stopped_cleanly_is_queued_again_and_another_failure_is_kept(planned, tmp_path):
    stopped = subprocess.run(["bash", planned[0] / "slurm.sh"], check=False, env=stubs(tmp_path / "bin", code=143))
    assert stopped.returncode == 0
    words = (tmp_path / "bin" / "said.txt").read_text().splitlines()
    assert len(words) == 2 and words[1] == "scontrol requeue 7"
    failed = subprocess.run(["bash", planned[0] / "slurm.sh"], check=False, env=stubs(tmp_path / "other", code=4))
    assert failed.returncode == 4


def test_the_ray_job_submits_the_commands(planned, tmp_path):
    subprocess.run(["bash", planned[0] / "ray.sh"], check=True, env=stubs(tmp_path / "bin"))
    lines = (tmp_path / "bin" / "said.txt").read_text().splitlines()
    assert [line.split()[:6] for line in lines] == [["ray", "job", "submit", "--", "env", "RAY_ADDRESS=auto"]] * 3
    assert [line.split()[7] for line in lines] == ["extract", "verify", "distill"]


def test_nothing_is_written_over(planned):
    with pytest.raises(RefusedError, match=r"config\.yaml is there already; choose another folder"):
        said("init", planned[0], "--images", "x", "--teacher", "y", "--student", "z")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--images must be given"),
        (["--images", "a", "--teacher", "b"], "--student must be given"),
        (["--images", "nowhere", "--teacher", "nowhere", "--student", "test_resnet"], "nowhere"),
        (["--images", "a", "--teacher", "b", "--student", "c", "--timesteps", "few"], "no whole numbers"),
    ],
)
def test_what_is_missing_or_wrong_is_said_and_nothing_is_written(flags, words, tmp_path):
    with pytest.raises(RefusedError, match=words):
        said("init", tmp_path / "project", *flags)
    assert not (tmp_path / "project").exists()


def test_without_a_plan_nothing_is_looked_at(tmp_path):
    flags = ["--images", "s3://bucket/train", "--teacher", "adm-imagenet", "--student", "resnet50", "--no-plan"]
    said("init", tmp_path, *flags, "--gpus", 8, "--px", 256, "--features", "s3://bucket/features")
    document = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert document["extract"]["images"] == "s3://bucket/train" and document["extract"]["transform"]["px"] == 256
    assert document["distill"]["datasets"] == ["s3://bucket/features"] and document["distill"]["batch_size"] == 256
    text = (tmp_path / "slurm.sh").read_text()
    assert "torchrun --standalone --nproc-per-node 8" in text and "a guess: nothing was measured" in text


@pytest.mark.parametrize(
    ("num", "expected"), [(None, 256), (50, 16), (1000, 16), (3251, 64), (10_240, 256), (10**6, 256)]
)
def test_batches_are_the_papers_where_an_epoch_has_steps_enough(num, expected):
    """By hand: 3251 / 40 = 81, so 64; 10240 / 40 = 256."""
    assert batch_size_for(num) == expected


@pytest.mark.parametrize("name", ["plain", "with blank", 'quo"te', "it's", "a: b", "#no", "ünï", "$HOME `x`"])
def test_names_of_all_kinds_come_through_yaml_and_shell(name, tmp_path):
    project = Project(tmp_path / name, f"/data/{name}", f"/teachers/{name}", "resnet18")
    write_project(project, None, None, None)
    document = yaml.safe_load((project.folder / "config.yaml").read_text())
    assert document["extract"]["images"] == f"/data/{name}"
    assert document["distill"]["datasets"] == [str(project.folder / "features")]
    for idx, script in enumerate(("slurm.sh", "ray.sh")):
        place = tmp_path / f"bin{idx}"
        subprocess.run(["bash", project.folder / script], check=True, env=stubs(place))
        spoken = (place / "said.txt").read_text()
        assert f"extract -c {project.folder / 'config.yaml'}\n" in spoken
        assert f"verify {project.folder / 'features'}\n" in spoken


def test_the_answer_as_json_names_the_files(planned):
    folder, answer = planned
    assert answer["files"] == [str(folder / name) for name in ("config.yaml", "slurm.sh", "ray.sh")]
    assert json.dumps(answer)
