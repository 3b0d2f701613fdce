"""Pixel diffusion models as diffusers writes them: kind `ddpm`.

An image is noised to timestep T by q(x_T | x_0), then ONE denoising call is made and the decoder's levels are read
(DreamTeacher, section 3.1). The noise is an argument. Read: a `UNet2DModel` folder, a `DDPMPipeline` folder, or a hub
repository of either at a pinned commit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.extract.teachers.base import TapSpec, TeacherKind, TeacherSpec, makes_no_images, register_teacher
from dtpipe.extract.teachers.ddim import Schedule, alphas_cumprod, ddim_sample, q_sample, to_pixels
from dtpipe.extract.teachers.diffusers_files import UNetFiles, find_unet, is_unet_path
from dtpipe.extract.teachers.weights import load_strictly, read_weights, weights_digest
from dtpipe.manifests.canonical import blake3_hex, canonical_json
from dtpipe.manifests.errors import ConfigError, ShapeError, TeacherError
from dtpipe.manifests.schema import ViewSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dtpipe.extract.config import TeacherConfig

FORWARD = "forward"  # the noise stream of q(x_T | x_0)
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # attention before diffusers 0.14


class DiffusionTeacher:
    """A frozen UNet2DModel on its device."""

    def __init__(self, unet: nn.Module, schedule: Schedule, spec: TeacherSpec, total_stride: int, prediction: str) -> None:
        from dtpipe.extract.teachers.taps import TapReader

        self.unet = unet
        self.schedule = schedule
        self.spec = spec
        self.total_stride = total_stride
        self.prediction = prediction
        self._reader = TapReader(unet, {level.name: level.tap for level in spec.levels})

    def encode(self, images: Tensor, noise: Mapping[str, Tensor], views: Sequence[ViewSpec]) -> dict[str, Tensor]:
        """Decoder features of noised images, one denoising call per view, stopped after the last tap.

        Shapes: images (B, 3, H, W) float32 in [-1, 1]; noise["forward"] (B, V, 3, H, W) -> {level: (B, V, C, h, w)},
        float32, or float16 where the teacher runs in it.
        Raises: ShapeError when the sides are no multiple of the total stride; ConfigError for an unknown timestep.
        """
        import torch

        self._check_input(images, noise, views)
        encoded: dict[str, list[Tensor]] = {level.name: [] for level in self.spec.levels}
        with torch.inference_mode(), _exact_convolutions(images):
            for view_idx, view in enumerate(views):
                shown = images.flip(-1) if view.flip else images
                noisy = self.noised(shown, noise[FORWARD][:, view_idx], _timestep(view))
                for name, level in self._levels(noisy, _timestep(view)).items():
                    encoded[name].append(level)
        return {name: torch.stack(levels, dim=1) for name, levels in encoded.items()}

    def synthesize(self, noise: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Raises: TeacherError; the paper's diffusion teachers encode."""
        raise makes_no_images(self.spec.kind)

    def noised(self, images: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """x_T of q(x_T | x_0). Shapes: (B, 3, H, W) both -> the same, float32."""
        return q_sample(self.schedule, images, timestep, noise)

    def predict_noise(self, noisy: Tensor, timestep: int) -> Tensor:
        """The noise that one whole denoising call sees. Shapes: (B, 3, H, W) -> the same, float32."""
        output: Tensor = self._call(noisy, timestep)[0][:, :3].float()
        kept = float(self.schedule[timestep])
        if self.prediction == "v_prediction":  # v = sqrt(a) eps - sqrt(1 - a) x_0
            return math.sqrt(kept) * output + math.sqrt(1 - kept) * noisy
        if self.prediction == "sample":
            return (noisy - math.sqrt(kept) * output) / math.sqrt(1 - kept)
        return output

    def sample(self, num: int, seed: int = 0, steps: int = 50) -> NDArray[np.uint8]:
        """Images the teacher makes up, by DDIM: uint8 [num, H, W, 3]; image i depends on (seed, i) alone."""
        import torch

        draws = [
            np.random.Generator(np.random.Philox([seed, idx])).standard_normal((3, *self.spec.image_px), np.float32) for idx in range(num)
        ]
        start = torch.from_numpy(np.stack(draws)).to(next(self.unet.parameters()).device)
        with torch.inference_mode(), _exact_convolutions(start):
            return to_pixels(ddim_sample(self.predict_noise, self.schedule, start, steps))

    def _levels(self, noisy: Tensor, timestep: int) -> dict[str, Tensor]:
        import torch

        levels = self._reader.read(lambda: self._call(noisy, timestep))
        return {name: level.float() if level.dtype == torch.bfloat16 else level for name, level in levels.items()}

    def _call(self, noisy: Tensor, timestep: int) -> Any:
        return self.unet(noisy.to(next(self.unet.parameters()).dtype), timestep, return_dict=False)

    def _check_input(self, images: Tensor, noise: Mapping[str, Tensor], views: Sequence[ViewSpec]) -> None:
        height, width = images.shape[-2:]
        if height % self.total_stride or width % self.total_stride:
            raise ShapeError(
                f"images are {height}x{width}; this teacher needs sides that are multiples of {self.total_stride}: set extract.transform.px"
            )
        wanted = (len(images), len(views), *images.shape[1:])
        found = tuple(noise[FORWARD].shape) if FORWARD in noise else None
        if found != wanted:
            raise ShapeError(f"noise[{FORWARD!r}] is {found}, images and views ask for {wanted}")
        if late := [view.timestep for view in views if _timestep(view) >= len(self.schedule)]:
            raise ConfigError(f"timestep {late[0]} is beyond this teacher's {len(self.schedule)} (0..{len(self.schedule) - 1}); lower it")


def _timestep(view: ViewSpec) -> int:
    if view.timestep is None:
        raise ConfigError("a diffusion teacher needs a timestep in every view; set extract.noise.timesteps")
    return view.timestep


def _exact_convolutions(images: Tensor) -> Any:
    """On a GPU: float32 means float32, and no algorithm is chosen by timing."""
    import torch

    if images.device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def load_diffusion_teacher(config: TeacherConfig, device: str = "cpu") -> DiffusionTeacher:
    """The teacher that `config` names, frozen and in eval mode.

    Raises: TeacherError when it is missing, damaged, or a network that this family cannot represent.
    """
    import torch

    files = find_unet(config.path, config.revision)
    tensors = _modern_names(read_weights(files.weights))
    digest = weights_digest(tensors)
    unet = _build(files)
    load_strictly(unet, tensors, files.weights)
    unet = unet.requires_grad_(False).eval()
    total_stride = 2 ** sum(block.downsamplers is not None for block in unet.down_blocks)
    levels = _levels_of(unet, total_stride, config.taps)
    if not levels:
        raise TeacherError(f"{files.folder}: the decoder has none of the strides 4, 8, 16, 32; name taps in extract.teacher.taps")
    spec = TeacherSpec(
        kind="ddpm",
        weights_blake3=digest,
        image_px=files.image_px,
        levels=tuple(levels.values()),
        num_timesteps=files.num_timesteps,
        noise_shapes={FORWARD: (3, -1, -1)},
        options={"scheduler": files.scheduler, "unet_blake3": blake3_hex(canonical_json(files.architecture))},
    )
    dtype = getattr(torch, config.dtype)
    cast = torch.nn.Module.to(unet, device=device, dtype=dtype)
    return DiffusionTeacher(cast, alphas_cumprod(files.scheduler), spec, total_stride, files.scheduler["prediction_type"])


def _build(files: UNetFiles) -> Any:
    from diffusers import UNet2DModel

    try:
        return UNet2DModel(**files.architecture)
    except Exception as err:  # the constructor raises what its parts raise
        raise TeacherError(f"{files.folder}/config.json: diffusers cannot build this UNet2DModel ({err}); check the file") from err


def _modern_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Old attention names in today's spelling."""
    renamed = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "attentions" in parts:
            parts[-2] = _RENAMED.get(parts[-2], parts[-2])
        renamed[".".join(parts)] = tensor
    return renamed


def _levels_of(unet: Any, total_stride: int, taps: Mapping[str, str] | None) -> dict[str, TapSpec]:
    """Levels found by stride on the smallest input that the network takes, or at the named taps."""
    import torch

    from dtpipe.extract.teachers.taps import find_levels, named_levels

    tiny = torch.zeros(1, 3, total_stride, total_stride)

    def forward() -> object:
        return unet(tiny, 0)

    with torch.inference_mode():
        if taps:
            return named_levels(unet, forward, total_stride, taps)
        return find_levels(unet, forward, total_stride, _decoder_layers(unet))


def _decoder_layers(unet: Any) -> list[str]:
    """Residual and attention layers of the up blocks, without their upsamplers."""
    return [
        f"up_blocks.{block_idx}.{kind}.{idx}"
        for block_idx, block in enumerate(unet.up_blocks)
        for kind in ("resnets", "attentions")
        for idx, _ in enumerate(getattr(block, kind, None) or [])
    ]


register_teacher(
    TeacherKind(
        kind="ddpm",
        reads="A diffusers UNet2DModel or DDPMPipeline folder, or a hub id of one with a pinned revision.",
        matches=is_unet_path,
        load=load_diffusion_teacher,
    )
)
