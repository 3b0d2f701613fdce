"""What the benchmarks share: results that say where they come from, and a teacher with random weights."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dtpipe.extract.cluster.preflight import package_versions
from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers.registry import load_teacher

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"


def publish(name: str, results: Mapping[str, Any], path: Path, teachers: Mapping[str, str]) -> None:
    """Print a benchmark's results, and keep them as JSON at `path`, opened by what it takes to make them again.

    `teachers`: the digest of the weights of each teacher that took part, see `teacher_digest`.
    """
    text = json.dumps({"benchmark": name, "origin": origin(teachers), **results}, indent=1, allow_nan=False)
    print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def published(name: str, path: Path) -> dict[str, Any]:
    """A result that `publish` wrote under a name. Ends the process, saying why, where `path` is another file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        sys.exit(f"{path} cannot be read as JSON ({err}); give a result of benchmarks/{name}.py")
    if not isinstance(document, dict) or document.get("benchmark") != name:
        sys.exit(f"{path} is no result of benchmarks/{name}.py; give one that it wrote")
    return document


def refuse_to_lose(name: str, path: Path, part: str | None, names: Collection[str]) -> None:
    """See that a result of these names leaves out none that the file it is to replace has; asked before any work.

    `part`: the key whose content they name; None: the document's own keys. Ends the process, saying what is left out.
    """
    if not path.exists():
        return
    earlier = published(name, path)
    known = (
        earlier.get(part, {}) if part else [key for key in earlier if key not in ("benchmark", "origin", "settings")]
    )
    if lost := [known_name for known_name in known if known_name not in names]:
        sys.exit(
            f"{path} has {', '.join(lost)}, which these arguments leave out; give those that it was made with (its "
            "origin says them), or another --out-json"
        )


def origin(teachers: Mapping[str, str]) -> dict[str, Any]:
    """Commit, command, teachers and machine of the running benchmark."""
    places = {"--work": "WORK", "--out": "OUT", "--out-json": "OUT", "--peers": "PYTHON", "--folder": "FOLDER"}
    words = [places.get(flag, word) for flag, word in zip(["", *sys.argv[1:]], sys.argv[1:], strict=False)]
    known = [
        Path(word).name if Path(word).is_absolute() and REPO.parent not in Path(word).parents else word
        for word in words
    ]
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *known])
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": len(_git("status", "--porcelain", "--untracked-files=no").splitlines()),
        "command": command.replace(f"{REPO}/", "").replace(f"{REPO.parent}/", "../"),
        "date": datetime.now(UTC).date().isoformat(),
        "teacher_digests": dict(teachers),
        "machine": {
            "processor": _processor(),
            "vector_code": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": package_versions(),
    }


def teacher_digest(path: Path | str, options: Mapping[str, Any] | None = None) -> str:
    """Digest of a teacher's weights, as a dataset's recipe names it."""
    return load_teacher(TeacherConfig(path=str(path), options=dict(options or {}))).spec.weights_blake3


def _processor() -> str:
    """Its name where Linux tells one, else its kind."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    """What git says of the code that runs; empty in a copy without history."""
    done = subprocess.run(["git", "-C", str(REPO), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def write_random_teacher(path: Path, px: int = 64, width: int = 32) -> Path:
    """Write a DDPM pipeline folder (random weights, for speed and rounding) with levels at strides 4 to 32."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=px,
        block_out_channels=(width, width, 2 * width, 2 * width, 3 * width, 4 * width),
        down_block_types=("DownBlock2D",) * 6,
        up_block_types=("UpBlock2D",) * 6,
        layers_per_block=1,
        norm_num_groups=8,
        add_attention=False,
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler(num_train_timesteps=1000)).save_pretrained(path)
    return path
