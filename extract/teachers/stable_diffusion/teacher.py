"""Latent diffusion: Stable Diffusion 1 and 2 as diffusers writes them, kind `stable_diffusion`.

The image goes through the VAE's encoder, its latent is noised, or carried by DDIM inversion, to timestep T, and ONE
denoising call under a constant text gives the decoder's levels. The finest of them has 8 image px per cell, so the
student's image is by default half as large as the teacher's: strides 8, 16, 32, 64 of the one are 4, 8, 16, 32 of the
other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from dtpipe.extract.teachers.arithmetic import arithmetic, storable
from dtpipe.extract.teachers.base import (
    LatentEncoder,
    TapSpec,
    TeacherKind,
    TeacherSpec,
    check_noise,
    check_sides,
    parse_options,
)
from dtpipe.extract.teachers.diffusion.compiled import compile_layers
from dtpipe.extract.teachers.diffusion.encoding import (
    FORWARD,
    EncodingOptions,
    check_views,
    levels_by_inversion,
    mean_levels,
    predicted_noise,
    timestep_of,
)
from dtpipe.extract.teachers.diffusion.process import Schedule, alphas_cumprod, q_sample
from dtpipe.extract.teachers.files.untrained import drawn_from
from dtpipe.extract.teachers.files.variants import VARIANT
from dtpipe.extract.teachers.files.weights import weights_digest
from dtpipe.extract.teachers.stable_diffusion.files import (
    Component,
    PipelineFiles,
    assign_weights,
    build,
    construct,
    find_pipeline,
    is_pipeline_path,
    open_weights,
)
from dtpipe.extract.teachers.stable_diffusion.levels import VAE, latent_level, levels_of, student_scale, unet_stride
from dtpipe.extract.teachers.stable_diffusion.text import TextEmbedding, embed_prompt, read_embedding
from dtpipe.manifests.canonical import blake3_hex, canonical_json
from dtpipe.manifests.schema import ViewSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dtpipe.extract.config import TeacherConfig

POSTERIOR = "vae"  # the noise stream of the VAE's posterior
_TIMESTEP = 150  # of images of all kinds, as the paper reads its teacher of ImageNet


class StableDiffusionOptions(EncodingOptions):
    """Settings of this family, and how images are encoded."""

    prompt: str = Field(default="", description="The text that all images are encoded under.")
    text_embedding: str | None = Field(
        default=None,
        description="safetensors file with the text's embedding in place of the prompt; "
        "from the teacher's folder if relative.",
    )
    latent: Literal["mean", "sampled"] = Field(
        default="mean", description="The VAE's posterior's mean, or a sample of it by noise draw."
    )
    vae_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Arithmetic of the VAE where the teacher's dtype is not float32; float16 may overflow in it.",
    )

    keep_latents: bool = Field(
        default=False,
        description="Store the VAE's moments too, in float16, from which features are then computed: "
        "more draws, other timesteps and live encoding skip the VAE.",
    )
    variant: str | None = VARIANT

    @model_validator(mode="after")
    def _one_text(self) -> StableDiffusionOptions:
        if self.prompt and self.text_embedding:
            raise ValueError("prompt and text_embedding are both given; leave one out")
        return self


class StableDiffusionTeacher:
    """A frozen VAE encoder and U-Net on their device."""

    def __init__(
        self,
        vae: nn.Module,
        unet: nn.Module,
        schedule: Schedule,
        spec: TeacherSpec,
        files: PipelineFiles,
        options: StableDiffusionOptions,
    ) -> None:
        from dtpipe.extract.teachers.taps import TapReader

        self.spec = spec
        self._vae = vae
        self._unet = unet
        self.schedule = schedule
        self._options = options
        self._keep = options.keep_latents
        self._prediction = files.prediction
        self._total_stride = files.latent_stride * unet_stride(unet)
        self._scaling = float(files.vae.arguments.get("scaling_factor", 0.18215))
        self._reader = TapReader(unet, {level.name: level.tap for level in spec.levels if level.tap != VAE})

    def encode(self, images: Tensor, noise: Mapping[str, Tensor], views: Sequence[ViewSpec]) -> dict[str, Tensor]:
        """Decoder features of latents at each view's timestep, the last denoising call stopped after the last tap.

        Shapes: images (B, 3, H, W) float32 in [-1, 1]; noise[stream] (B, V, 4, H/8, W/8), or (B, V, m, 4, H/8, W/8)
        for an ensemble of m -> {level: (B, V, C, h, w)} float32 or float16.
        Raises: ShapeError when the sides are no multiple of the total stride; ConfigError for an unknown timestep.
        """
        return self.encode_from_latents(self.encode_latents(images, views), noise, views)

    def encode_latents(self, images: Tensor, views: Sequence[ViewSpec]) -> dict[bool, Tensor]:
        """The VAE's posterior, which no noise changes: mean and log variance of the images, by flip as views ask.

        Shapes: images (B, 3, H, W) float32 in [-1, 1] -> {flip: (B, 2 * 4, H/8, W/8)} float32,
        or float16 where latents are kept.
        Raises: ShapeError when the sides are no multiple of the total stride.
        """
        check_sides(images, self._total_stride)
        with arithmetic(images.device):
            moments = {
                flip: self._vae(images.flip(-1) if flip else images).float() for flip in {view.flip for view in views}
            }
        return {flip: level.half() if self._keep else level for flip, level in moments.items()}

    def encode_from_latents(
        self, moments: Mapping[bool, Tensor], noise: Mapping[str, Tensor], views: Sequence[ViewSpec]
    ) -> dict[str, Tensor]:
        """What `encode` gives, from the `encode_latents` of the same images and flips, kept in any float dtype.

        Shapes: {flip: (B, 2 * 4, h, w)}; noise[stream] (B, V, 4, h, w) -> {level: (B, V, C, h', w')}.
        """
        import torch

        self._check(moments, noise, views)
        with arithmetic(moments[views[0].flip].device):  # lower precision is in the U-Net itself
            by_view = (
                self._by_inversion(moments, noise, views)
                if self._options.inverts
                else self._by_noise(moments, noise, views)
            )
            if self._keep:
                by_view = [
                    levels | {self._kept_level: moments[view.flip]} for levels, view in zip(by_view, views, strict=True)
                ]
            return {
                level.name: torch.stack([levels[level.name] for levels in by_view], dim=1) for level in self.spec.levels
            }

    @property
    def _kept_level(self) -> str:
        return next(level.name for level in self.spec.levels if level.tap == VAE)

    def predict_noise(self, noisy: Tensor, timestep: int) -> Tensor:
        """As `Denoiser.predict_noise`. Shapes: (B, 4, h, w) -> the same, float32."""
        return predicted_noise(
            self._call(noisy, timestep)[0].float(), noisy, float(self.schedule[timestep]), self._prediction
        )

    def read_levels(self, noisy: Tensor, timestep: int) -> dict[str, Tensor]:
        """As `Denoiser.read_levels`, in float32, or float16 where the teacher runs in it."""
        return {name: storable(level) for name, level in self._reader.read(lambda: self._call(noisy, timestep)).items()}

    def _call(self, noisy: Tensor, timestep: int) -> Any:
        import torch

        if self._options.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        return self._unet(noisy, timestep, encoder_hidden_states=None, return_dict=False)

    def _by_noise(
        self, moments: Mapping[bool, Tensor], noise: Mapping[str, Tensor], views: Sequence[ViewSpec]
    ) -> list[dict[str, Tensor]]:
        """Levels of each view, the mean over its draws; as in DIFT, each member has its own sample of the posterior."""
        by_view = []
        for view_idx, view in enumerate(views):
            draws, timestep = self._members(noise[FORWARD], view_idx), timestep_of(view)
            latents = [self._latents(moments[view.flip], noise, view_idx, member) for member in range(len(draws))]
            noisy = (
                q_sample(self.schedule, latent, timestep, draw) for latent, draw in zip(latents, draws, strict=True)
            )
            by_view.append(mean_levels(self.read_levels(latent, timestep) for latent in noisy))
        return by_view

    def _by_inversion(
        self, moments: Mapping[bool, Tensor], noise: Mapping[str, Tensor], views: Sequence[ViewSpec]
    ) -> list[dict[str, Tensor]]:
        """Levels of each view; views of one latent share a trajectory."""
        starts = [
            (
                (view.flip, view.draw if POSTERIOR in noise else None),
                partial(self._latents, moments[view.flip], noise, view_idx),
            )
            for view_idx, view in enumerate(views)
        ]
        return levels_by_inversion(self, self._options, views, starts)

    def _members(self, noise: Tensor, view_idx: int) -> tuple[Tensor, ...]:
        """One draw per member. Shapes: (B, V, m, 4, h, w), or without m -> m of (B, 4, h, w)."""
        return (noise[:, view_idx],) if self._options.ensemble == 1 else noise[:, view_idx].unbind(1)

    def _latents(self, moments: Tensor, noise: Mapping[str, Tensor], view_idx: int, member: int = 0) -> Tensor:
        """Shapes: (B, 2 * 4, h, w) -> (B, 4, h, w). Source: Rombach et al., arXiv 2112.10752, appendix G."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        if self._options.latent == "mean":
            return self._scaling * mean
        deviation = log_variance.clamp(-30, 20).mul(0.5).exp()  # the bounds of the original's posterior
        return self._scaling * (mean + deviation * self._members(noise[POSTERIOR], view_idx)[member])

    def _check(self, moments: Mapping[bool, Tensor], noise: Mapping[str, Tensor], views: Sequence[ViewSpec]) -> None:
        batch, channels, height, width = moments[views[0].flip].shape
        shape = (batch, len(views), *self._options.members((channels // 2, height, width)))
        check_noise(noise, self.spec.noise_shapes, shape)
        check_views(views, len(self.schedule), self._options, draws_differ=POSTERIOR in self.spec.noise_shapes)


def load_stable_diffusion(config: TeacherConfig, device: str = "cpu") -> StableDiffusionTeacher:
    """The teacher that `config` names, frozen and in eval mode.

    Raises: TeacherError when it is missing, damaged or none of Stable Diffusion 1 or 2; MissingPackageError when the
    prompt cannot be embedded.
    """
    import torch

    from dtpipe.extract.teachers.stable_diffusion.network import lower_precision, set_text

    options = parse_options(config, StableDiffusionOptions)
    files = find_pipeline(config.path, config.revision, options.variant)
    unet, vae = build("UNet2DConditionModel", files.unet), _vae_encoder(files)
    levels = levels_of(unet, files, config.taps)
    text = _text(files, options)
    if config.dtype != "float32":
        lower_precision(unet, getattr(torch, config.dtype))
        if options.vae_dtype != "float32":
            lower_precision(vae, getattr(torch, options.vae_dtype))
    digests = {
        "text": text.blake3,
        "unet": _load(unet, _tensors("UNet2DConditionModel", files.unet, config), files.unet.weights, device),
        "vae": _load(vae, _tensors("AutoencoderKL", files.vae, config, _encodes), files.vae.weights, device),
    }
    set_text(unet, text.values.to(device))
    if options.channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    if options.compile:
        compile_layers(unet, (level.tap for level in levels.values()))
    spec = _spec(files, options, levels, digests)
    return StableDiffusionTeacher(vae, unet, alphas_cumprod(files.scheduler), spec, files, options)


def _tensors(
    kind: str, part: Component, config: TeacherConfig, keep: Callable[[str], bool] = lambda _: True
) -> Mapping[str, Tensor]:
    """The weights of a network as published, or as diffusers begins with them."""
    if config.untrained is None:
        return open_weights(part.weights, keep)
    with drawn_from(config.untrained):
        network = construct(kind, part)
    return {name: tensor for name, tensor in network.state_dict().items() if keep(name)}


def _load(network: nn.Module, tensors: Mapping[str, Tensor], where: Path, device: str) -> str:
    assign_weights(network, tensors, where, device)
    return weights_digest(tensors)


def _vae_encoder(files: PipelineFiles) -> nn.Sequential:
    """Image to posterior; the VAE's decoder is never read."""
    from torch import nn

    vae = build("AutoencoderKL", files.vae)
    parts = {"encoder": vae.encoder, "quant_conv": vae.quant_conv}
    return nn.Sequential(OrderedDict((name, part) for name, part in parts.items() if part is not None))


def _encodes(name: str) -> bool:
    return name.startswith(("encoder.", "quant_conv."))


def _text(files: PipelineFiles, options: StableDiffusionOptions) -> TextEmbedding:
    width = files.unet.arguments["cross_attention_dim"]
    if options.text_embedding:
        return read_embedding(files.root / options.text_embedding, width)
    return embed_prompt(files.root, options.prompt, width, options.variant)


def _spec(
    files: PipelineFiles, options: StableDiffusionOptions, levels: Mapping[str, TapSpec], digests: Mapping[str, str]
) -> TeacherSpec:
    latent = options.members((files.latent_channels, -files.latent_stride, -files.latent_stride))
    taps = [*levels.values(), *([latent_level(files)] if options.keep_latents else [])]
    networks = {"unet": files.unet.arguments, "vae": files.vae.arguments}
    return TeacherSpec(
        kind="stable_diffusion",
        weights_blake3=blake3_hex(canonical_json(digests)),
        image_px=files.image_px,
        levels=tuple(taps),
        num_timesteps=int(files.scheduler["num_train_timesteps"]),
        timestep=_TIMESTEP,
        student_scale=student_scale(files),
        noise_shapes=({} if options.inverts else {FORWARD: latent})
        | ({POSTERIOR: latent} if options.latent == "sampled" else {}),
        options={
            "scheduler": files.scheduler,
            "networks_blake3": blake3_hex(canonical_json(networks)),
            "text_blake3": digests["text"],
            **options.model_dump(mode="json", exclude={"text_embedding", "variant", *EncodingOptions.model_fields}),
            **options.recipe(),
            **({"prediction_type": files.prediction} if options.inverts else {}),  # plays no part otherwise
        },
    )


KIND = TeacherKind(
    kind="stable_diffusion",
    reads="A diffusers folder of Stable Diffusion 1 or 2 (unet, vae, text_encoder, tokenizer, scheduler), "
    "or a hub id of one with a pinned revision and kind stable_diffusion.",
    protocol=LatentEncoder,
    matches=is_pipeline_path,
    load=load_stable_diffusion,
    options=StableDiffusionOptions,
    untrained=True,
)
