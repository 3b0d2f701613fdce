"""Every kept result of a benchmark says where it comes from."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
RESULTS = sorted((REPO / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_names_commit_command_and_teachers(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    origin = document["origin"]
    assert list(document)[:2] == ["benchmark", "origin"]
    assert re.fullmatch(r"[0-9a-f]{40}", origin["commit"])
    python, script, *_ = shlex.split(origin["command"])
    assert python == "python" and (REPO / script).is_file()
    assert Path(script).stem == document["benchmark"]
    assert all(digest is None or re.fullmatch(r"[0-9a-f]{64}", digest) for digest in origin["teacher_digests"].values())
    assert not re.search(r'["\s=]/(work|home|root|tmp)/', path.read_text(encoding="utf-8"))


def test_the_readme_of_results_speaks_of_every_file() -> None:
    text = (REPO / "benchmarks" / "results" / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)\.json`", text, re.MULTILINE)) == [path.stem for path in RESULTS]


def test_a_new_result_carries_its_origin(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    code = (
        "import sys; sys.path.insert(0, 'benchmarks');"
        "sys.argv = ['benchmarks/students.py', '--add-to', '/elsewhere/a.json'];"
        "from common import publish; from pathlib import Path;"
        f"publish('students', {{'rows': 1}}, Path({str(out)!r}), {{'demo': 'ab' * 32}})"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True, capture_output=True)
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["rows"] == 1
    assert document["origin"]["command"] == "python benchmarks/students.py --add-to a.json"  # no folder of a machine
    assert document["origin"]["teacher_digests"] == {"demo": "ab" * 32}
    assert {"commit", "changed_files", "date", "machine", "versions"} <= set(document["origin"])


def test_the_null_teachers_extraction_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `extract.py` asks, of sixteen images: its settings are those of today, and each byte is written once."""
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    import extract

    settings = argparse.Namespace(
        teacher="", images="", px=None, small=True, dtype="float32", format="zarr", batch_size=8, threads=1
    )
    settings.device, settings.decode_threads = "cpu", 1
    bench = extract.Bench(settings, tmp_path)
    found = extract.written(bench)
    assert found["dataset_bytes"] > 16 * 5.6e6
    assert found["amplification"] is None or found["amplification"] == pytest.approx(1, abs=0.05)
    assert {bench.null(256, codec=codec).codec.name for codec in extract.NO_FIT} == set(extract.NO_FIT)


@pytest.mark.parametrize(
    ("script", "arguments", "code", "said"),
    [
        ("gpu.sh", [], 2, "usage: sh benchmarks/gpu.sh OUT"),
        ("gpu.sh", ["OUT", "--tiny"], 2, "unknown argument --tiny"),
        ("gpu_teacher.sh", ["OUT"], 2, "OUT PHOTOS"),
        pytest.param(
            "gpu.sh",
            ["OUT"],
            6,
            "torch sees no GPU here; --device cpu --small proves the script without one",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_the_gpu_scripts_say_what_they_lack(script, arguments, code, said, tmp_path):
    command = ["sh", f"benchmarks/{script}", *(str(tmp_path) if word == "OUT" else word for word in arguments)]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert (done.returncode, said in done.stderr) == (code, True)


@pytest.mark.parametrize(
    ("script", "arguments", "lost"),
    [
        ("codec.py", ["--adm"], "flowers64, taef2, dcgan"),
        ("distill_step.py", ["--teacher", "demo=pipeline/demo/teacher"], "flowers64"),
        ("teacher_forward.py", [], "flowers64, adm_256, sd_1_4"),
        ("extract.py", ["--only", "ratio,cores,written,memory"], "workers"),
        ("images.py", ["--photos", "none=128"], "flowers5_128 at 128 px, coco98 at 256 px"),
    ],
)
def test_a_published_result_is_not_replaced_by_less(
    script: str, arguments: list[str], lost: str, tmp_path: Path
) -> None:
    name = Path(script).stem
    out = Path(shutil.copy(REPO / f"benchmarks/results/{name}.json", tmp_path))
    before = out.read_bytes()
    command = [sys.executable, f"benchmarks/{script}", *arguments, "--out-json", str(out)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{name}.json has {lost}, which these arguments leave out" in done.stderr
    assert out.read_bytes() == before
