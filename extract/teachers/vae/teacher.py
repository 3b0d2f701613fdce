"""Autoencoders: kind `vae`. An image is encoded to its latent, and the decoder's levels are read on the way back.

The latent is the posterior's mean, or a sample of it with noise that is an argument. Read: diffusers folders of
AutoencoderKL, VQModel and AutoencoderTiny, and the two files of a taesd. Many decoders start at stride 8 or 4, so have
no deeper level: these are left out, or pooled on request.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dtpipe.extract.teachers.arithmetic import arithmetic, storable
from dtpipe.extract.teachers.base import (
    Encoder,
    TapSpec,
    TeacherKind,
    TeacherSpec,
    check_noise,
    check_sides,
    parse_options,
)
from dtpipe.extract.teachers.files.variants import VARIANT
from dtpipe.extract.teachers.vae.files import Autoencoder, is_autoencoder_path, read_autoencoder
from dtpipe.manifests.errors import ConfigError, TeacherError
from dtpipe.manifests.schema import StrictModel, ViewSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dtpipe.extract.config import TeacherConfig

_POSTERIOR = "vae"  # the noise stream of the posterior
PROBE_PX = 64  # side of the image that finds a network's levels

_log = logging.getLogger(__name__)


class VaeOptions(StrictModel):
    """What `extract.teacher.options` may hold."""

    latent: Literal["mean", "sampled"] = Field(
        default="mean", description="The posterior's mean, or a sample of it by noise draw."
    )
    pool_missing: bool = Field(
        default=False, description="Make levels deeper than the decoder's deepest by average pooling it."
    )
    variant: str | None = VARIANT


class VaeTeacher:
    """A frozen autoencoder on its device; its latents are not normal, so it makes no images by itself."""

    def __init__(self, network: nn.Module, spec: TeacherSpec, total_stride: int, dtype: str) -> None:
        from dtpipe.extract.teachers.taps import TapReader, is_pooled

        self.network = network
        self.spec = spec
        self.total_stride = total_stride
        self.dtype = dtype
        self._reader = TapReader(network, {level.name: level.tap for level in spec.levels if not is_pooled(level)})

    def encode(self, images: Tensor, noise: Mapping[str, Tensor], views: Sequence[ViewSpec]) -> dict[str, Tensor]:
        """Decoder features of encoded images, stopped after the last tap. Views that see the same are computed once.

        Shapes: images (B, 3, H, W) float32 in [-1, 1]; noise["vae"], where the latent is sampled, (B, V, n, H, W)
        -> {level: (B, V, C, h, w)}, float32, or float16 where the teacher runs in it.
        Raises: ShapeError when the sides are no multiple of the total stride, or noise is missing.
        """
        import torch

        self._check_input(images, noise, views)
        seen: dict[tuple[bool, int | None], dict[str, Tensor]] = {}
        sampled = _POSTERIOR in self.spec.noise_shapes
        keys = [(view.flip, view.draw if sampled else None) for view in views]
        with arithmetic(images.device, self.dtype):
            for view_idx, key in enumerate(keys):
                if key not in seen:
                    shown = images.flip(-1) if key[0] else images
                    seen[key] = self._levels(shown, noise[_POSTERIOR][:, view_idx] if sampled else None)
            return {
                level.name: torch.stack([seen[key][level.name] for key in keys], dim=1) for level in self.spec.levels
            }

    def latent(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """What the decoder is given: mean + standard deviation * noise of the posterior, its mean without noise.

        A network without a posterior gives its only latent. Shapes: (B, 3, H, W), (B, n, H, W) -> (B, c, H/s, W/s).
        """
        encoded = _encode(self.network, images)
        if not hasattr(encoded, "latent_dist"):
            latents: Tensor = encoded.latents
            return latents
        mean: Tensor = encoded.latent_dist.mean.float()
        if noise is None:
            return mean
        std: Tensor = (encoded.latent_dist.logvar.float() / 2).exp()
        return mean + std * self._latent_noise(noise, mean.shape[1])

    def _latent_noise(self, noise: Tensor, channels: int) -> Tensor:
        """Noise by pixel, each cell's pixels laid out as channels. Shapes: (B, n, H, W) -> (B, c, h, w)."""
        from torch.nn.functional import pixel_unshuffle

        return pixel_unshuffle(noise, self.total_stride)[:, :channels]

    def _levels(self, images: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
        from dtpipe.extract.teachers.taps import add_pooled

        decode: Any = self.network.decode
        levels = self._reader.read(lambda: decode(self.latent(images, noise)))
        return add_pooled({name: storable(level) for name, level in levels.items()}, self.spec.levels)

    def _check_input(self, images: Tensor, noise: Mapping[str, Tensor], views: Sequence[ViewSpec]) -> None:
        check_sides(images, self.total_stride)
        for stream, shape in self.spec.noise_shapes.items():
            check_noise(noise, [stream], (len(images), len(views), shape[0], *images.shape[-2:]))


def load_vae_teacher(config: TeacherConfig, device: str = "cpu") -> VaeTeacher:
    """The teacher that `config` names, frozen and in eval mode.

    Raises: TeacherError when it is missing, damaged or another network; ConfigError for an option that it cannot have.
    """
    import torch

    options = parse_options(config, VaeOptions)
    autoencoder = read_autoencoder(config.path, config.revision, options.variant, config.untrained)
    total_stride, latent_channels, has_posterior = _probe(autoencoder)
    if options.latent == "sampled" and not has_posterior:
        raise ConfigError(
            f"extract.teacher.options.latent is sampled; {autoencoder.name} has one latent per image: "
            f"leave the option out"
        )
    noise_shapes = (
        {_POSTERIOR: (math.ceil(latent_channels / total_stride**2), -1, -1)} if options.latent == "sampled" else {}
    )
    spec = TeacherSpec(
        kind="vae",
        weights_blake3=autoencoder.weights_blake3,
        image_px=autoencoder.image_px,
        levels=_levels_of(autoencoder, total_stride, config.taps, options.pool_missing),
        noise_shapes=noise_shapes,
        options={
            "network": autoencoder.name,
            "network_blake3": autoencoder.architecture_blake3,
            **options.model_dump(exclude={"variant"}),
        },
    )
    return VaeTeacher(torch.nn.Module.to(autoencoder.network, device=device), spec, total_stride, config.dtype)


def _probe(autoencoder: Autoencoder) -> tuple[int, int, bool]:
    """Total stride, channels of the latent, and whether it has a posterior."""
    import torch

    with torch.inference_mode():
        encoded = _encode(autoencoder.network, torch.zeros(1, 3, PROBE_PX, PROBE_PX))
    has_posterior = hasattr(encoded, "latent_dist")
    latents: Tensor = encoded.latent_dist.mean if has_posterior else encoded.latents
    return PROBE_PX // latents.shape[-1], latents.shape[1], has_posterior


def _levels_of(
    autoencoder: Autoencoder, total_stride: int, taps: Mapping[str, str] | None, pool_missing: bool
) -> tuple[TapSpec, ...]:
    """Levels found by stride or at the named taps, from fine to deep; then the pooled ones."""
    import torch

    from dtpipe.extract.teachers.taps import DEFAULT_STRIDES, find_levels, level_name, named_levels, pooled_level

    network: Any = autoencoder.network
    side = 2 * total_stride

    def forward() -> object:
        encoded = _encode(network, torch.zeros(1, 3, side, side))
        return network.decode(encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents)

    with torch.inference_mode():
        named = (
            named_levels(network, forward, side, taps)
            if taps
            else find_levels(network, forward, side, _decoder_layers(network))
        )
    levels = sorted(named.values(), key=lambda level: (level.stride, level.name))
    if not levels:
        raise TeacherError(
            f"{autoencoder.name}: the decoder has none of the strides 4, 8, 16, 32; name taps in extract.teacher.taps"
        )
    deeper = [stride for stride in DEFAULT_STRIDES if stride > levels[-1].stride]
    if pool_missing:
        return (*levels, *(pooled_level(levels[-1], stride) for stride in deeper))
    missing = [level_name(stride) for stride in DEFAULT_STRIDES if stride not in {level.stride for level in levels}]
    if missing and not taps:
        _log.warning(
            "the decoder of this %s has no level %s; left out "
            "(deeper ones can be pooled: -s extract.teacher.options.pool_missing=true)",
            autoencoder.name,
            ", ".join(missing),
        )
    return tuple(levels)


def _encode(network: Any, images: Tensor) -> Any:
    """What diffusers' encode gives: `latents`, or a posterior as `latent_dist`."""
    return network.encode(images)


def _decoder_layers(network: nn.Module) -> list[str]:
    """Residual and attention layers of the decoder, without its upsamplers; a tiny block is known by its `fuse`."""
    return [
        path
        for path, module in network.named_modules()
        if re.fullmatch(r"decoder\..*(resnets|attentions)\.\d+", path)
        or (path.startswith("decoder.") and hasattr(module, "fuse"))
    ]


KIND = TeacherKind(
    kind="vae",
    reads="A diffusers AutoencoderKL, VQModel or AutoencoderTiny folder, a hub id of one with a pinned revision, "
    "or taesd's two files.",
    protocol=Encoder,
    matches=is_autoencoder_path,
    load=load_vae_teacher,
    options=VaeOptions,
    untrained=True,
)
