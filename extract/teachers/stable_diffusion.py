"""Latent diffusion: Stable Diffusion 1 and 2 as diffusers writes them, kind `stable_diffusion`.

The image goes through the VAE's encoder, its latent is noised to timestep T, and ONE denoising call under a constant
text gives the decoder's levels. The finest of them has 8 image px per cell, so the student's image is by default half
as large as the teacher's: strides 8, 16, 32, 64 of the one are 4, 8, 16, 32 of the other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from dtpipe.extract.teachers.arithmetic import arithmetic, storable
from dtpipe.extract.teachers.base import (
    PublishedTeacher,
    TapSpec,
    TeacherKind,
    TeacherSpec,
    makes_no_images,
    parse_options,
    register_teacher,
)
from dtpipe.extract.teachers.ddim import Schedule, alphas_cumprod, q_sample
from dtpipe.extract.teachers.sd_files import PipelineFiles, assign_weights, build, find_pipeline, is_pipeline_path, open_weights
from dtpipe.extract.teachers.sd_text import TextEmbedding, embed_prompt, read_embedding
from dtpipe.extract.teachers.weights import weights_digest
from dtpipe.manifests.canonical import blake3_hex, canonical_json
from dtpipe.manifests.errors import ConfigError, ShapeError, TeacherError
from dtpipe.manifests.schema import LATENT_SUFFIX, StrictModel, ViewSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dtpipe.extract.config import TeacherConfig

KIND = "stable_diffusion"
FORWARD, POSTERIOR = "forward", "vae"  # noise streams: of q(x_T | x_0), and of the VAE's posterior
VAE = "vae"  # what stands for a tap where a level is the VAE's posterior
FINEST_STRIDE = 4  # of the levels that a student is taught


class StableDiffusionOptions(StrictModel):
    """Settings of this family."""

    prompt: str = Field(default="", description="The text that all images are encoded under.")
    text_embedding: str | None = Field(
        default=None,
        description="safetensors file with the text's embedding in place of the prompt; from the teacher's folder if relative.",
    )
    latent: Literal["mean", "sampled"] = Field(default="mean", description="The VAE's posterior's mean, or a sample of it by noise draw.")
    vae_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Arithmetic of the VAE where the teacher's dtype is not float32; float16 may overflow in it."
    )

    keep_latents: bool = Field(
        default=False,
        description="Store the VAE's moments too, in float16, from which features are then computed: more draws, other timesteps and "
        "live encoding skip the VAE.",
    )

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
        self._schedule = schedule
        self._latent = options.latent
        self._keep = options.keep_latents
        self._total_stride = files.latent_stride * _unet_stride(unet)
        self._scaling = float(files.vae.arguments.get("scaling_factor", 0.18215))
        self._reader = TapReader(unet, {level.name: level.tap for level in spec.levels if level.tap != VAE})

    def encode(self, images: Tensor, noise: Mapping[str, Tensor], views: Sequence[ViewSpec]) -> dict[str, Tensor]:
        """Decoder features of noised latents, one denoising call per view, stopped after the last tap.

        Shapes: images (B, 3, H, W) float32 in [-1, 1]; noise[stream] (B, V, 4, H/8, W/8) -> {level: (B, V, C, h, w)},
        float32, or float16 where the teacher runs in it.
        Raises: ShapeError when the sides are no multiple of the total stride; ConfigError for an unknown timestep.
        """
        return self.encode_from_latents(self.encode_latents(images, views), noise, views)

    def encode_latents(self, images: Tensor, views: Sequence[ViewSpec]) -> dict[bool, Tensor]:
        """The VAE's posterior, which no noise changes: mean and log variance of the images, and flipped if views ask for that.

        Shapes: images (B, 3, H, W) float32 in [-1, 1] -> {flip: (B, 2 * 4, H/8, W/8)} float32,
        or float16 where latents are kept.
        Raises: ShapeError when the sides are no multiple of the total stride.
        """
        height, width = images.shape[-2:]
        if height % self._total_stride or width % self._total_stride:
            raise ShapeError(
                f"images are {height}x{width}; this teacher needs sides that are multiples of {self._total_stride}: "
                f"set extract.transform.px"
            )
        with arithmetic(images.device, "float32"):
            moments = {flip: self._vae(images.flip(-1) if flip else images).float() for flip in {view.flip for view in views}}
        return {flip: each.half() if self._keep else each for flip, each in moments.items()}

    def encode_from_latents(
        self, moments: Mapping[bool, Tensor], noise: Mapping[str, Tensor], views: Sequence[ViewSpec]
    ) -> dict[str, Tensor]:
        """What `encode` gives, from the `encode_latents` of the same images and flips, kept from before in any float dtype.

        Shapes: {flip: (B, 2 * 4, h, w)}; noise[stream] (B, V, 4, h, w) -> {level: (B, V, C, h', w')}.
        """
        import torch

        self._check(moments, noise, views)
        encoded: dict[str, list[Tensor]] = {level.name: [] for level in self.spec.levels}
        with arithmetic(noise[FORWARD].device, "float32"):  # lower precision is in the U-Net itself
            for view_idx, view in enumerate(views):
                latents = self._latents(moments[view.flip], noise, view_idx)
                noisy = q_sample(self._schedule, latents, _timestep(view), noise[FORWARD][:, view_idx])
                for name, level in self._levels(noisy, _timestep(view)).items():
                    encoded[name].append(level)
                if self._keep:
                    encoded[self._kept_level].append(moments[view.flip])
        return {name: torch.stack(levels, dim=1) for name, levels in encoded.items()}

    @property
    def _kept_level(self) -> str:
        return next(level.name for level in self.spec.levels if level.tap == VAE)

    def synthesize(self, noise: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Raises: TeacherError; the paper's diffusion teachers encode."""
        raise makes_no_images(self.spec.kind)

    def _latents(self, moments: Tensor, noise: Mapping[str, Tensor], view_idx: int) -> Tensor:
        """Shapes: (B, 2 * 4, h, w) -> (B, 4, h, w). Source: Rombach et al., arXiv 2112.10752, section 3.1 and appendix G."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        if self._latent == "mean":
            return self._scaling * mean
        deviation = log_variance.clamp(-30, 20).mul(0.5).exp()  # the bounds of the original's posterior
        return self._scaling * (mean + deviation * noise[POSTERIOR][:, view_idx])

    def _levels(self, noisy: Tensor, timestep: int) -> dict[str, Tensor]:
        levels = self._reader.read(lambda: self._unet(noisy, timestep, encoder_hidden_states=None, return_dict=False))
        return {name: storable(level) for name, level in levels.items()}

    def _check(self, moments: Mapping[bool, Tensor], noise: Mapping[str, Tensor], views: Sequence[ViewSpec]) -> None:
        batch, channels, height, width = moments[views[0].flip].shape
        wanted = (batch, len(views), channels // 2, height, width)
        for stream in self.spec.noise_shapes:
            found = tuple(noise[stream].shape) if stream in noise else None
            if found != wanted:
                raise ShapeError(f"noise[{stream!r}] is {found}, latents and views ask for {wanted}")
        if late := [view.timestep for view in views if _timestep(view) >= len(self._schedule)]:
            raise ConfigError(f"timestep {late[0]} is beyond this teacher's {len(self._schedule)} (0..{len(self._schedule) - 1}); lower it")


def _timestep(view: ViewSpec) -> int:
    if view.timestep is None:
        raise ConfigError("a diffusion teacher needs a timestep in every view; set extract.noise.timesteps")
    return view.timestep


def load_stable_diffusion(config: TeacherConfig, device: str = "cpu") -> StableDiffusionTeacher:
    """The teacher that `config` names, frozen and in eval mode.

    Raises: TeacherError when it is missing, damaged or none of Stable Diffusion 1 or 2; MissingPackageError when the
    prompt cannot be embedded.
    """
    import torch

    from dtpipe.extract.teachers.sd_network import compute_in, set_text

    options = parse_options(config, StableDiffusionOptions)
    files = find_pipeline(config.path, config.revision)
    unet, vae = build("UNet2DConditionModel", files.unet), _vae_encoder(files)
    levels = _levels_of(unet, files, config.taps)
    text = _text(files, options)
    if config.dtype != "float32":
        compute_in(unet, getattr(torch, config.dtype))
        if options.vae_dtype != "float32":
            compute_in(vae, getattr(torch, options.vae_dtype))
    digests = {
        "text": text.blake3,
        "unet": _load(unet, open_weights(files.unet.weights), files.unet.weights, device),
        "vae": _load(vae, open_weights(files.vae.weights, _encodes), files.vae.weights, device),
    }
    set_text(unet, text.values.to(device))
    spec = _spec(files, options, levels, digests)
    return StableDiffusionTeacher(vae, unet, alphas_cumprod(files.scheduler), spec, files, options)


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
    return embed_prompt(files.root, options.prompt, width)


def _spec(files: PipelineFiles, options: StableDiffusionOptions, levels: Mapping[str, TapSpec], digests: Mapping[str, str]) -> TeacherSpec:
    latent = (files.latent_channels, -files.latent_stride, -files.latent_stride)
    taps = [*levels.values(), *([_latent_level(files)] if options.keep_latents else [])]
    networks = {"unet": files.unet.arguments, "vae": files.vae.arguments}
    return TeacherSpec(
        kind=KIND,
        weights_blake3=blake3_hex(canonical_json(digests)),
        image_px=files.image_px,
        levels=tuple(taps),
        num_timesteps=int(files.scheduler["num_train_timesteps"]),
        student_scale=_student_scale(files),
        noise_shapes={FORWARD: latent} | ({POSTERIOR: latent} if options.latent == "sampled" else {}),
        options={
            "scheduler": files.scheduler,
            "networks_blake3": blake3_hex(canonical_json(networks)),
            "text_blake3": digests["text"],
            **options.model_dump(mode="json", exclude={"text_embedding"}),
        },
    )


def _latent_level(files: PipelineFiles) -> TapSpec:
    """The posterior's moments as a level."""
    stride = files.latent_stride
    return TapSpec(f"l{stride.bit_length() - 1}{LATENT_SUFFIX}", stride, 2 * files.latent_channels, VAE)


def _levels_of(unet: Any, files: PipelineFiles, taps: Mapping[str, str] | None) -> dict[str, TapSpec]:
    """Levels found by stride, or at the named taps, on the network without values.

    Raises: TeacherError when a tap is unknown or the decoder has none of the strides.
    """
    import torch

    from dtpipe.extract.teachers.taps import DEFAULT_STRIDES, find_levels, named_levels

    side = 2 * _unet_stride(unet)
    with torch.device("meta"), torch.inference_mode():
        latent, text = torch.zeros(1, files.latent_channels, side, side), torch.zeros(1, 1, files.unet.arguments["cross_attention_dim"])

        def forward() -> object:
            return unet(latent, 0, text)

        if taps:
            return named_levels(unet, forward, side * files.latent_stride, taps)
        strides = [stride * _student_scale(files) for stride in DEFAULT_STRIDES]
        levels = find_levels(unet, forward, side * files.latent_stride, _decoder_layers(unet), strides)
    if not levels:
        raise TeacherError(f"{files.unet.folder}: the decoder has none of the strides {strides}; name taps in extract.teacher.taps")
    return levels


def _student_scale(files: PipelineFiles) -> int:
    """How many times smaller than the image a student's must be, for the finest level to have stride 4 in it."""
    return max(1, files.latent_stride // FINEST_STRIDE)


def _unet_stride(unet: Any) -> int:
    """Latent cells per cell of the coarsest level."""
    return int(2 ** sum(block.downsamplers is not None for block in unet.down_blocks))


def _decoder_layers(unet: Any) -> list[str]:
    """Residual and attention layers of the up blocks, without their upsamplers."""
    return [
        f"up_blocks.{block_idx}.{kind}.{idx}"
        for block_idx, block in enumerate(unet.up_blocks)
        for kind in ("resnets", "attentions")
        for idx, _ in enumerate(getattr(block, kind, None) or [])
    ]


_OPENRAIL = "CreativeML OpenRAIL-M"
_LEVELS = "l3 320, l4 640, l5 1280, l6 1280"  # of the teacher's image; l2 to l5 of a student's at half the size

register_teacher(
    TeacherKind(
        kind=KIND,
        reads="A diffusers folder of Stable Diffusion 1 or 2 (unet, vae, text_encoder, tokenizer, scheduler), or a hub id of one "
        "with a pinned revision and kind stable_diffusion.",
        matches=is_pipeline_path,
        load=load_stable_diffusion,
        options=StableDiffusionOptions,
        published=(
            PublishedTeacher(
                "stable-diffusion-1.4",
                "hf://CompVis/stable-diffusion-v1-4@133a221b8aa7292a167afc5127cb63fb5005638b",
                _OPENRAIL,
                _LEVELS,
                (512, 512),
            ),
            PublishedTeacher(
                "stable-diffusion-1.5",
                "hf://stable-diffusion-v1-5/stable-diffusion-v1-5@451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
                _OPENRAIL,
                _LEVELS,
                (512, 512),
            ),
        ),
    )
)
