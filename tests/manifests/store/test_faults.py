from __future__ import annotations

import re
import subprocess
import sys

import pytest

from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.store import faults
from parts.paths import REPO


def run(spec: str, passes: int) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; from dtpipe.manifests.store.faults import arm_spec, fault_point\narm_spec(sys.argv[1])\n"
        "for idx in range(int(sys.argv[2])):\n    fault_point('commit.before'); print(idx, flush=True)"
    )
    return subprocess.run([sys.executable, "-c", code, spec, str(passes)], capture_output=True, text=True, check=False)


def test_an_armed_step_kills_at_its_turn_and_says_so():
    killed = run("commit.before:3", 5)
    assert (killed.returncode, killed.stdout.split()) == (-9, ["0", "1"])
    assert killed.stderr == "fault point commit.before: kill\n"


def test_unarmed_steps_do_nothing():
    assert run("", 3).stdout.split() == run("merge.shards", 3).stdout.split() == ["0", "1", "2"]


@pytest.mark.parametrize("spec", ["nothing", "commit.before:x", "commit.before:0", "commit.before:1:explode"])
def test_wrong_specs_are_refused(spec):
    with pytest.raises(ConfigError):
        faults.arm_spec(spec)
    assert not faults._armed


def test_every_step_that_code_passes_is_listed():
    packages = [REPO / name for name in ("manifests", "extract", "pipeline", "distill")]
    code = "\n".join(path.read_text() for package in packages for path in package.rglob("*.py"))
    passed = set(re.findall(r"""fault_point\(["']([a-z._]+)["']\)""", code))
    assert passed <= set(faults.FAULT_POINTS)
