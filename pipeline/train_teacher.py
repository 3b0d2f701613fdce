"""What the training of a teacher needs of the other stage: images, another teacher's weights, and drawing samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from numpy.typing import NDArray

from dtpipe.distill.engine.progress import OnTrainProgress
from dtpipe.distill.teacher import trainer
from dtpipe.distill.teacher.config import TrainTeacherConfig
from dtpipe.distill.teacher.data import TrainImages
from dtpipe.distill.teacher.network import build_unet, noise_schedule
from dtpipe.distill.teacher.trainer import TrainTeacherResult
from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.pixels import to_pixels
from dtpipe.extract.sources.base import SourceItem
from dtpipe.extract.sources.images import decode_image, resize_image
from dtpipe.extract.sources.registry import open_source
from dtpipe.extract.teachers.diffusion.ddpm import load_ddpm_teacher
from dtpipe.extract.teachers.diffusion.files import find_unet
from dtpipe.extract.teachers.diffusion.process import alphas_cumprod, ddim_sample
from dtpipe.extract.teachers.files.weights import load_strictly, read_weights, weights_digest
from dtpipe.manifests.errors import BadImage, ConfigError, ErrorBudgetError, InputError, TeacherError
from dtpipe.manifests.phases import counted, phase
from dtpipe.manifests.schema import TransformRecipe
from dtpipe.manifests.words import count_of

if TYPE_CHECKING:
    import torch


_MAX_PIXELS = 128_000_000  # of one image, as in extract
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CHUNK = 4096  # images handed to the decode threads at once
_GIB = 2**30
_NOT_WEIGHTS = frozenset({"sample_size", "num_train_timesteps"})
"""Of a network's settings: the size it saw, and what is unused without learned steps."""


def train_teacher(config: TrainTeacherConfig, on_progress: OnTrainProgress | None = None) -> TrainTeacherResult:
    """Train, or go on training, and write the teacher with its sample grid. Raises: see `distill.teacher.trainer`."""
    return trainer.train_ddpm(config, load_images, start_from, draw_images, on_progress)


def load_images(config: TrainTeacherConfig, copies: int = 1) -> TrainImages:
    """All images of the source, decoded and resized; `copies` is how many processes of this machine hold them.

    Raises: InputError when no image is readable, or one has no class and needs it; ErrorBudgetError for more bad images
    than `max_bad`; ConfigError when they would not fit into memory.
    """
    with phase("listing images"):
        source = open_source(config.images, config.kind)
        items = sorted(source.list(), key=lambda item: item.key)
    classes = _classes(config, items)
    if config.limit and config.limit < len(items):  # some of every class folder
        items = [items[idx] for idx in np.linspace(0, len(items) - 1, config.limit).astype(int)]
    height, width = config.image_px
    _refuse_too_large(config, len(items), copies)
    recipe = TransformRecipe(resize=config.resize, height=height, width=width, filter=config.filter)
    pixels = np.empty((len(items), height, width, 3), np.uint8)

    def decode(row: int) -> str | None:
        try:
            pixels[row] = resize_image(decode_image(source.read(items[row].uri), _MAX_PIXELS), recipe)
        except BadImage as err:
            return f"{items[row].key}: {err}"
        return None

    decoded = _in_threads(decode, len(items), config.run.decode_threads)
    reasons = list(counted(decoded, len(items), "reading images"))
    bad = tuple(reason for reason in reasons if reason is not None)
    _refuse_too_many_bad(config, bad, len(items))
    good = [row for row, reason in enumerate(reasons) if reason is None]
    for to, row in enumerate(good if bad else ()):
        pixels[to] = pixels[row]  # in place: a second copy might not fit
    labels = np.array([classes.index(str(items[row].label)) for row in good]) if classes else None
    return TrainImages(pixels[: len(good)], tuple(items[row].key for row in good), labels, classes, bad)


def _classes(config: TrainTeacherConfig, items: Sequence[SourceItem]) -> tuple[str, ...]:
    if not config.class_conditional:
        return ()
    if nameless := [item.key for item in items if item.label is None]:
        raise InputError(
            f"{config.images}: {len(nameless)} of {count_of(len(items), 'image')} without a class, the first is "
            f"{nameless[0]}; put every image into a folder of its class, or leave out train_teacher.class_conditional"
        )
    return tuple(sorted({str(item.label) for item in items}))


def _in_threads(decode: Callable[[int], str | None], num: int, threads: int) -> Iterator[str | None]:
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for start in range(0, num, _CHUNK):
            yield from pool.map(decode, range(start, min(start + _CHUNK, num)))


def _refuse_too_many_bad(config: TrainTeacherConfig, bad: Sequence[str], num: int) -> None:
    if len(bad) == num:
        raise InputError(
            f"{config.images}: none of {count_of(num, 'image')} can be read; "
            f"the first: {bad[0] if bad else 'none listed'}"
        )
    if len(bad) > config.run.max_bad_samples(num):
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ErrorBudgetError(
            f"{config.images} has {count_of(len(bad), 'bad image')}, train_teacher.run.max_bad allows "
            f"{config.run.max_bad_samples(num)} ({'; '.join(bad[:5])}{more}); mend the images, or run again with a "
            "larger train_teacher.run.max_bad"
        )


def _refuse_too_large(config: TrainTeacherConfig, num: int, copies: int) -> None:
    height, width = config.image_px
    needed, free = num * height * width * 3 * copies, _free_memory_bytes()
    if needed > free:
        held = f" in each of {copies} processes" if copies > 1 else ""
        raise ConfigError(
            f"{config.images}: {count_of(num, 'image')} of {height}x{width} px{held} would take "
            f"{needed / _GIB:.1f} GiB of memory, {free / _GIB:.1f} GiB are free; use fewer (train_teacher.limit) or "
            "smaller ones (train_teacher.px)"
        )


def _free_memory_bytes() -> int:
    """Memory that this process may still take; a container's limit counts as a whole."""
    free = int(psutil.virtual_memory().available)
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    return min(free, int(limit)) if limit.isdecimal() else free


def start_from(config: TrainTeacherConfig, unet: Any) -> str:
    """Put the weights of the teacher that `init_from` names into `unet`; returns their digest.

    Raises: TeacherError when it is missing or damaged, or another network, or learned another noise schedule.
    """
    folder = str(config.init_from)
    if not Path(folder).is_dir():
        raise TeacherError(
            f"{folder}: no such folder; train_teacher.init_from names the folder of a teacher (diffusers DDPMPipeline)"
        )
    files = find_unet(folder)
    if other := _other_network(files.architecture, unet):
        raise TeacherError(
            f"{folder}: its network is another one than train_teacher asks for: {'; '.join(other)}; make them equal"
        )
    if not _learns_our_noise(files.scheduler, config):
        raise TeacherError(
            f"{folder}: was trained for another noise schedule or target than epsilon under {config.timesteps} linear "
            "steps; train_teacher.init_from cannot go on from it"
        )
    tensors = read_weights(files.weights)
    load_strictly(unet, tensors, files.weights)
    return weights_digest(tensors)


def _other_network(architecture: Mapping[str, Any], unet: Any) -> list[str]:
    """In what a network is not ours, a clause each."""
    import torch
    from diffusers import UNet2DModel

    with torch.device("meta"):
        theirs, ours = dict(UNet2DModel(**architecture).config), dict(unet.config)
    names = sorted(name for name in ours if not name.startswith("_") and name not in _NOT_WEIGHTS)
    return [
        f"{name} is {theirs[name]}, not {ours[name]}" for name in names if _plain(theirs[name]) != _plain(ours[name])
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _learns_our_noise(scheduler: Mapping[str, Any], config: TrainTeacherConfig) -> bool:
    ours, theirs = noise_schedule(config), alphas_cumprod(scheduler)
    same = len(ours) == len(theirs) and np.allclose(ours, theirs, rtol=1e-6)
    return same and scheduler["prediction_type"] == "epsilon"


def draw_images(config: TrainTeacherConfig, folder: Path, num_classes: int, device: torch.device) -> NDArray[np.uint8]:
    """Images of the teacher in `folder`, uint8 [N, H, W, 3]; with classes, one of each in turn."""
    if num_classes:
        return _draw_classes(config, folder, num_classes, device)
    teacher = load_ddpm_teacher(TeacherConfig(path=str(folder)), str(device))
    return teacher.sample(config.run.num_samples, config.seed, config.run.sample_steps)


def _draw_classes(
    config: TrainTeacherConfig, folder: Path, num_classes: int, device: torch.device
) -> NDArray[np.uint8]:
    import torch

    unet = build_unet(config, num_classes)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    load_strictly(unet, read_weights(weights), weights)
    unet = unet.to(device).eval()
    labels = torch.arange(config.run.num_samples, device=device) % num_classes
    rngs = [np.random.Generator(np.random.Philox([config.seed, idx])) for idx in range(config.run.num_samples)]
    start = torch.from_numpy(np.stack([rng.standard_normal((3, *config.image_px), np.float32) for rng in rngs]))
    with torch.inference_mode():
        images = ddim_sample(
            lambda noisy, at: unet(noisy, at, labels).sample,
            noise_schedule(config),
            start.to(device),
            config.run.sample_steps,
        )
    pixels: NDArray[np.uint8] = to_pixels(images).cpu().numpy()
    return pixels
