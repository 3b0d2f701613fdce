"""Do the full-size teachers fit a small machine? Random weights in the published layouts, extracted with on the CPU.

Two checkpoints are written as their authors publish them: ADM of 256 px (guided-diffusion's
`256x256_diffusion_uncond.pt`, 552.8 M parameters) and the U-Net and VAE of Stable Diffusion 1.4 (a diffusers folder,
859.5 M and 83.7 M). Each is loaded in a process of its own, whose memory is watched; then `dtpipe extract --inline`
runs over a few images, and its peak is taken from the kernel.

    python benchmarks/full_size.py [--images 3] [--work DIR] [--out-json FILE]

Needs 8 GB of disk under --work and 8 GB of memory. Loading peaks count a process's own pages; pages of the mapped file
do not count, since the kernel takes them back when it likes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import REPO, RESULTS, publish

GIB = 2**30
ADM_IMAGENET = {
    "widths": (256, 256, 512, 512, 1024, 1024),
    "num_res_blocks": 2,
    "attention": (False, False, False, True, True, True),
    "out_channels": 6,
    "scale_shift": True,
    "resblock_updown": True,
    "num_classes": None,
}
SD_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
}
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
SD_SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def write_adm(root: Path) -> tuple[Path, int]:
    """guided-diffusion's file of the unconditional 256 px network; its path and bytes of weights."""
    import torch

    from dtpipe.extract.teachers.diffusion.adm.keys import published_shapes
    from dtpipe.extract.teachers.diffusion.adm.layout import AdmLayout, AdmSettings
    from dtpipe.extract.teachers.diffusion.adm.network import AdmNetwork

    layout = AdmLayout(**ADM_IMAGENET)  # type: ignore[arg-type]
    with torch.device("meta"):
        unet = AdmNetwork(layout, AdmSettings(64, False, "linear", (256, 256)))
    wanted = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: random_tensor(name, shape, generator) for name, shape in published_shapes(layout, wanted).items()}
    path = root / "256x256_diffusion_uncond.pt"
    torch.save(tensors, path)
    return path, sum(tensor.nbytes for tensor in tensors.values())


def random_tensor(name: str, shape: tuple[int, ...], generator: Any) -> Any:
    """Norms near 1, small biases, matrices that keep the variance of what they get."""
    import torch

    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + 0.1 * values if name.endswith("weight") else 0.02 * values
    return values / float(np.prod(shape[1:])) ** 0.5


def write_sd(root: Path) -> tuple[Path, int]:
    """U-Net, VAE and schedule of Stable Diffusion 1.4, and a text embedding; the folder and bytes of weights."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from safetensors.torch import save_file

    folder, size = root / "sd14", 0
    torch.manual_seed(0)
    for name, kind, settings in (("unet", UNet2DConditionModel, SD_UNET), ("vae", AutoencoderKL, SD_VAE)):
        network = kind(**settings)
        network.save_pretrained(folder / name)
        kept = network if name == "unet" else network.encoder  # the decoder makes images, which no student needs
        size += sum(tensor.nbytes for tensor in kept.state_dict().values())
    PNDMScheduler(**SD_SCHEDULE, steps_offset=1, skip_prk_steps=True).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    save_file({"text": torch.randn(77, 768)}, folder / "text.safetensors")
    return folder, size


def write_images(folder: Path, count: int, px: int) -> Path:
    """Smooth random pictures."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.Philox(0))
    for idx in range(count):
        coarse = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((px, px), Image.Resampling.BICUBIC).save(folder / f"{idx}.png")
    return folder


def own_bytes() -> int:
    """Memory of this process that is not pages of a file, from Linux's /proc."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def load_only(path: str, options: str) -> None:
    """Load a teacher, watching this process's memory, and print what was seen."""
    from dtpipe.extract.config import TeacherConfig
    from dtpipe.extract.teachers.registry import load_teacher

    config = TeacherConfig(path=path, options=json.loads(options))
    warm_imports()
    before, seen, done = own_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            seen.append(own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    teacher = load_teacher(config, "cpu")
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    levels = {level.name: [level.stride, level.channels] for level in teacher.spec.levels}
    peak, after = max(seen) - before, own_bytes() - before
    digest = teacher.spec.weights_blake3
    print(json.dumps({"peak": peak, "after": after, "seconds": seconds, "levels": levels, "weights_blake3": digest}))


def warm_imports() -> None:
    """Import what loading imports, so that only the weights are counted."""
    import diffusers
    import torch

    torch.zeros(1).isfinite().all()
    _ = diffusers.UNet2DModel, diffusers.UNet2DConditionModel, diffusers.AutoencoderKL


def measure(
    root: Path, write: Callable[[Path], tuple[Path, int]], px: int, num_images: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Write a checkpoint, load it, extract a few images with it."""
    path, weights = write(root)
    at_once = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # what is freed is given back
    command = [sys.executable, __file__, "--load-only", str(path), json.dumps(options)]
    loaded = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True, env=at_once).stdout.splitlines()[-1]
    )
    images = write_images(root / f"images{px}", num_images, px)
    out = root / f"features-{path.stem}"
    started = time.perf_counter()
    sets = [part for name, value in options.items() for part in ("-s", f"extract.teacher.options.{name}={value}")]
    extract = [
        "dtpipe",
        "extract",
        "--images",
        str(images),
        "--teacher",
        str(path),
        "--out",
        str(out),
        "--inline",
        "--batch-size",
        "1",
    ]
    subprocess.run([*extract, "--timesteps", "150", *sets, "--json"], check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    subprocess.run(["dtpipe", "verify", str(out), "--level", "decode"], check=True, capture_output=True)
    return {
        "weights_blake3": loaded["weights_blake3"],
        "weights_gib": round(weights / GIB, 3),
        "load_peak_gib": round(loaded["peak"] / GIB, 3),
        "load_peak_over_weights": round(loaded["peak"] / weights, 3),
        "load_s": round(loaded["seconds"], 1),
        "levels_stride_channels": loaded["levels"],
        "image_px": px,
        "num_images": num_images,
        "extract_s": round(seconds, 1),
        "extract_peak_gib": round(peak / GIB, 3),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument(
        "--work", type=Path, default=REPO / "runs" / "benchmark-full-size", help="checkpoints and features"
    )
    parser.add_argument("--out-json", type=Path, default=RESULTS / "full_size.json")
    parser.add_argument("--load-only", nargs=2, metavar=("PATH", "OPTIONS"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure both teachers and write one JSON document."""
    args = parse()
    if args.load_only:
        load_only(*args.load_only)
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    text = {"text_embedding": "text.safetensors"}
    teachers = {
        "adm_256": measure(args.work, write_adm, 256, args.images, {}),
        "stable_diffusion_1_4": measure(args.work, write_sd, 512, args.images, text),
    }
    digests = {name: teacher["weights_blake3"] for name, teacher in teachers.items()}
    publish("full_size", {"teachers": teachers}, args.out_json, digests)
    return 0


if __name__ == "__main__":
    sys.exit(main())
