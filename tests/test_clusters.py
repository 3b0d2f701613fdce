"""The files of examples/cluster, as far as they can be tried without a cloud: schemas, versions, stand-ins."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from parts.documents import parse
from parts.paths import REPO

FOLDER = REPO / "examples" / "cluster"
PINNED = dict(line.split("==") for line in (REPO / "constraints.txt").read_text().splitlines() if "==" in line)
STUBS = {  # `srun` runs its command here; `ray` notes its words and, as a node, stays until it is killed
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "ray": 'echo "$*" "token=${RAY_AUTH_TOKEN:+set}" >> said.txt\n[[ "$*" != *--block ]] || exec sleep 60',
    "scontrol": '[ "$1" = show ] && printf "node1\\nnode2\\n" || echo "scontrol $*" >> said.txt',
}


def document(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return loaded


def test_rays_own_schema_takes_the_cluster_file() -> None:
    import jsonschema
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config

    config = document("ray_aws.yaml")
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"max_worker": 8}, schema)
    whole = prepare_config(config)
    assert whole["head_node_type"] in whole["available_node_types"]
    assert whole["available_node_types"]["gpu"]["max_workers"] <= whole["max_workers"]
    assert any("ray start --head" in command for command in whole["head_start_ray_commands"])


def test_the_kubernetes_job_is_one_and_its_command_parses() -> None:
    job = document("kuberay.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    parse(shlex.split(job["spec"]["entrypoint"])[1:])
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == PINNED["ray"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert limits == requests and {"cpu", "memory"} <= set(limits)
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]


def test_the_image_is_of_a_python_and_of_extras_that_there_are() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert [word for word, _ in steps] == ["FROM", "RUN", "COPY", "RUN", "ENV", "WORKDIR", "CMD"]
    said = dict(steps)
    python = re.fullmatch(r"python:(\d+\.\d+)-slim-\w+", said["FROM"])
    assert python is not None and project["requires-python"] == f">={python[1]}"
    install = shlex.split(said["RUN"])
    place = said["COPY"].split()[1]
    assert install[install.index("-c") + 1] == f"{place}/constraints.txt"
    (extras,) = (match[1] for word in install if (match := re.fullmatch(rf"{place}\[(.*)\]", word)))
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    parse(json.loads(said["CMD"])[1:])
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert not {"manifests", "extract", "distill", "pipeline", "constraints.txt", "pyproject.toml"} & set(ignored)


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_commands_in_the_comments_parse(path: Path) -> None:
    text = re.sub(r"\\\n#? *", " ", path.read_text())
    lines = [line.lstrip("# ") for line in text.splitlines() if " dtpipe extract" in line and line.startswith("#")]
    for line in lines:
        words = shlex.split(line)
        parse(words[words.index("extract") :])
    assert lines or path.suffix not in (".sh", "")


@pytest.fixture
def allocation(tmp_path: Path) -> dict[str, str]:
    """An environment as Slurm gives it, of two nodes that are both this machine; the stand-ins write `said.txt`."""
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "70123", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    return {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def start(allocation: dict[str, str], folder: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["bash", FOLDER / "slurm_ray.sh", *words], cwd=folder, env=allocation)


@pytest.mark.parametrize("code", [0, 4])
def test_the_slurm_script_starts_ray_on_all_nodes_and_ends_as_its_command(code, allocation, tmp_path) -> None:
    both = "until grep -q 'start --head' said.txt && grep -q 'start --address' said.txt; do sleep 0.05; done"
    command = f'{both}; echo "command at $RAY_ADDRESS" >> said.txt; exit {code}'
    assert start(allocation, tmp_path, "bash", "-c", command).wait(30) == code
    said = (tmp_path / "said.txt").read_text().splitlines()
    assert "command at node1:20123" in said and "scontrol" not in " ".join(said)
    assert any(line.startswith("start --head --port=20123") and line.endswith("token=set") for line in said)
    assert any(line.startswith("start --address=node1:20123") and line.endswith("token=set") for line in said)


def test_the_slurm_script_hands_a_stop_on_waits_for_it_and_queues_the_job_again(allocation, tmp_path) -> None:
    command = "trap 'sleep 0.3; touch saved; exit 143' TERM; touch running; while :; do sleep 0.05; done"
    process = start(allocation, tmp_path, "bash", "-c", command)
    while not (tmp_path / "running").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert (tmp_path / "saved").exists()
    assert "scontrol requeue 70123" in (tmp_path / "said.txt").read_text()
