"""Which students work? Trains each for a few steps, exports it, and loads the export again without dtpipe.

One small model of each of timm's families, on features of digit scenes by the teacher that comes with the package. The
exports are read in another process that cannot import dtpipe: timm's full model, its weights by safetensors, and
`forward_intermediates`, whose maps must be the levels of the trained student.

    python benchmarks/students.py [--students resnet10t,vit_tiny_patch16_224] [--steps 8] [--out-json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from common import RESULTS, publish, refuse_to_lose, teacher_digest
from timm.models import model_entrypoint

from dtpipe.distill.config import DistillConfig, DistillRun, RegressorConfig, StudentConfig
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.distill.export.write import export_student
from dtpipe.distill.student.load import load_student
from dtpipe.distill.student.student import Student
from dtpipe.distill.trainer import train
from dtpipe.extract.config import ExtractConfig
from dtpipe.extract.run import run_extraction
from dtpipe.manifests.errors import ConfigError, ExportError
from dtpipe.pipeline.demo.run import shipped_teacher
from dtpipe.pipeline.demo.scenes import write_scenes

PX = 64
STUDENTS = (
    *(
        "resnet10t",
        "resnetv2_18",
        "resnest14d",
        "regnetx_002",
        "densenet121",
        "dla46_c",
        "ese_vovnet19b_slim_dw",
        "hgnetv2_b0",
    ),
    *(
        "convnext_atto",
        "inception_next_atto",
        "mambaout_femto",
        "poolformer_s12",
        "starnet_s1",
        "fasternet_t0",
        "nf_regnet_b0",
    ),
    *(
        "efficientnet_lite0",
        "mobilenetv3_small_050",
        "ghostnet_050",
        "repvit_m0_9",
        "fastvit_t8",
        "hrnet_w18_small",
        "rexnet_100",
    ),
    *(
        "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256",
        "pvt_v2_b0",
        "maxvit_rmlp_pico_rw_256",
        "coat_lite_tiny",
    ),
    *(
        "hiera_tiny_224",
        "tiny_vit_5m_224",
        "efficientformerv2_s0",
        "efficientvit_b0",
        "mobilevit_xxs",
        "edgenext_xx_small",
    ),
    *("vit_tiny_patch16_224", "vit_small_patch14_dinov2", "deit_tiny_patch16_224", "eva02_tiny_patch14_224"),
    *("xcit_nano_12_p16_224", "cait_xxs24_224", "mixer_s32_224"),
)
RELOAD = """
import json, sys
sys.modules["dtpipe"] = None  # importing it would raise
import timm, torch
from safetensors.torch import load_file
found = {}
for name, case in json.load(sys.stdin).items():
    model = timm.create_model(name, num_classes=0, **case["options"]).eval()
    model.load_state_dict(load_file(case["export"]))
    saved = torch.load(case["levels"], weights_only=True)
    with torch.inference_mode():
        maps = model.forward_intermediates(saved["images"], intermediates_only=True)
    levels = saved["levels"]
    closest = [
        min((level - other).abs().max().item() for other in maps if other.shape == level.shape) for level in levels
    ]
    found[name] = [max(closest), max(gap / level.abs().max().item() for gap, level in zip(closest, levels))]
json.dump(found, sys.stdout)
"""


def extract_scenes(root: Path, num: int) -> str:
    """Features of digit scenes by the shipped teacher; the dataset's URL."""
    config = {
        "images": str(write_scenes(root / "scenes", num, seed=0)),
        "teacher": {"path": str(shipped_teacher())},
        "transform": {"px": PX},
        "noise": {"timesteps": [50]},
        "run": {"out": str(root / "features"), "inline": True},
    }
    return run_extraction(ExtractConfig.model_validate(config)).url


def train_and_export(name: str, url: str, root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A row of the table, but for the reload."""
    patch = 14 if "patch14" in name else 1
    config = DistillConfig(
        datasets=(url,),
        student=StudentConfig(name=name),
        student_px=None if patch == 1 else PX // patch * patch,
        regressor=RegressorConfig(width=64),
        epochs=args.steps * args.batch_size // args.num_images,
        batch_size=args.batch_size,
        micro_batch=min(args.batch_size, 16),
        lr=1e-3,
        warmup_steps=2,
        run=DistillRun(out=str(root / name), log_every=1, keep_checkpoints=0),
    )
    train(config)
    losses = [line["loss"] for line in read_metrics(root / name)]
    result = export_student(root / name, root / name / "export")
    student = load_student(root / name)
    save_levels(student, root / name / "levels.pt")
    return {
        "family": model_entrypoint(name).__module__.rpartition(".")[2],
        "parameters": sum(p.numel() for p in student.parameters()),
        "reductions": sorted(set(student.net.feature_info.reduction())),  # type: ignore[operator, union-attr]
        "image_px": student.spec.image_px,
        "strides_from": "simple pyramid" if student.single_scale else "backbone",
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
        "steps": len(losses),
        "untrained_parts": sorted({key.partition(".")[0] for key in result.untrained}),
    }


def save_levels(student: Student, path: Path) -> None:
    """Random images, normalised as timm does it, and the student's levels of them."""
    images = torch.rand(2, 3, *student.spec.image_px, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        torch.save(
            {"images": student.normalise(images), "levels": [level.contiguous() for level in student(images)]}, path
        )


def reload_elsewhere(names: Sequence[str], root: Path) -> dict[str, list[float]]:
    """Largest difference between a student's levels and its export's, absolute and of the level's largest value."""
    cases = {}
    for name in names:
        options = json.loads((root / name / "export" / "config.json").read_text(encoding="utf-8"))["model_args"]
        export = root / name / "export" / "model.safetensors"
        cases[name] = {"options": options, "export": str(export), "levels": str(root / name / "levels.pt")}
    done = subprocess.run(
        [sys.executable, "-c", RELOAD], input=json.dumps(cases), capture_output=True, text=True, check=True
    )
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


def main() -> int:
    """Parse, train, reload, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", type=lambda text: text.split(","), default=STUDENTS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--out-json", type=Path, default=RESULTS / "students.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    refuse_to_lose("students", args.out_json, "students", args.students)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        url = extract_scenes(root, args.num_images)
        for name in args.students:
            try:
                rows[name] = train_and_export(name, url, root, args)
            except (ConfigError, ExportError) as err:
                rows[name] = {"refused": str(err)}
            print(name, rows[name].get("loss") or rows[name], file=sys.stderr, flush=True)
        for name, (absolute, relative) in reload_elsewhere(
            [name for name, row in rows.items() if "refused" not in row], root
        ).items():
            rows[name] |= {"max_abs_difference": absolute, "max_relative_difference": relative}
    settings = {"images_px": PX, "num_images": args.num_images, "batch_size": args.batch_size}
    results = {"settings": settings, "timm": timm.__version__, "students": rows}
    publish("students", results, args.out_json, {"demo": teacher_digest(shipped_teacher())})
    return 0


if __name__ == "__main__":
    sys.exit(main())
