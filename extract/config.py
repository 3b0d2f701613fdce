"""Settings of `dtpipe extract`, one pydantic model of two halves.

The recipe half changes the content of the dataset: another value into the same output is refused. The half `run` says
how the dataset is written, and may change between runs of one dataset.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dtpipe.manifests.codecs.rans_tables import Coder
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.image_coding import COMPACT, PLAIN, ImageCoding, misfit
from dtpipe.manifests.schema import (
    DeviceName,
    ErrorBudget,
    Filter,
    Order,
    Resize,
    Settings,
    ShardFormat,
    Size,
    StoredDtype,
    StrictModel,
)
from dtpipe.manifests.store.paths import any_place, local_place, whole_if_there, whole_place
from dtpipe.manifests.words import parse_bytes


class SourceConfig(StrictModel):
    """Where images come from and in which order they become rows."""

    kind: str = Field(
        default="auto", description="Source kind (`dtpipe list sources`), or auto: by what the URL holds."
    )
    order: Order | Literal["auto"] = Field(
        default="auto", description="Rows: permuted (seeded), or container order; auto: container for tars and Parquet."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the permutation.")
    max_pixels: int = Field(
        default=128_000_000,
        ge=1,
        description="Images with more pixels are bad samples; a decode thread takes up to 24 bytes a pixel.",
    )


class TransformConfig(StrictModel):
    """How an image becomes the teacher's input."""

    resize: Resize = Field(
        default="center_crop", description="How an image comes to that size; center_crop is guided-diffusion's."
    )
    px: Size | None = Field(default=None, description="Side, or height and width, in px; default: the teacher's.")
    filter: Filter = Field(default="bicubic", description="Resampling filter.")
    antialias: bool = Field(default=True, description="Widen the filter when shrinking.")


class TeacherConfig(StrictModel):
    """Which teacher, and where its levels are read."""

    path: str = Field(description="Folder, file, URL or name of the teacher (`dtpipe list teachers`).")
    kind: str = Field(default="auto", description="Teacher kind, or auto: by what the path holds.")
    revision: str | None = Field(default=None, description="Commit of a hub repository; needed for hub ids.")
    taps: dict[str, str] | None = Field(
        default=None, description="Level name to module path; default: found by stride."
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32", description="Arithmetic of the forward pass."
    )
    untrained: int | None = Field(
        default=None,
        ge=0,
        description="Seed of new weights in place of the trained ones, as a control; default: the trained ones.",
    )
    options: dict[str, Any] = Field(
        default={}, description="Settings of the teacher's family (`dtpipe list teachers`)."
    )

    _whole = field_validator("path")(whole_if_there)


class NoiseConfig(StrictModel):
    """Which noise the teacher sees; each combination of draw, timestep and flip is one view."""

    seed: int = Field(default=0, ge=0, description="Seed of all noise draws.")
    timesteps: tuple[int, ...] | None = Field(
        default=None,
        min_length=1,
        description="Diffusion timesteps at which the teacher is read, 0-based; default: 50, of a published teacher of "
        "ImageNet and of Stable Diffusion 150, of a dataset or run that is gone on with its own.",
    )
    draws: int = Field(default=1, ge=1, description="Stored noise draws per image and timestep.")
    flips: bool = Field(default=False, description="Also store the flipped image's features, as views of their own.")


class ShardConfig(StrictModel):
    """How the dataset lies on disk."""

    format: ShardFormat = Field(default="zarr", description="zarr (v3, sharded) or webdataset (tars).")
    samples: int | None = Field(
        default=None, ge=1, description="Rows per shard; default: the power of two in 16..4096 nearest 256 MiB."
    )
    dtype: StoredDtype = Field(default="float16", description="Stored dtype of feature levels.")
    images: Literal["stored", "joined"] = Field(
        default="stored",
        description="joined: leave the images out, since another dataset of the same keys has them (distill --join).",
    )
    image_coding: ImageCoding | Literal["auto"] = Field(
        default="auto",
        description="How stored images become bytes, without loss: plain (pixels under zstd in zarr, PNG in tars), "
        "predicted (zarr: residuals under zstd, a third smaller), webp (tars, a fifth smaller), or auto: plain where "
        "the codec is cast, so that any reader opens all of it.",
    )
    zstd_level: int | None = Field(
        default=None,
        ge=0,
        le=19,
        description="Compression level of zstd in zarr, of images and features alike; 0: none. Default: 3 of images, "
        "none of features: it takes 8% off bytes that are cast, and reading several times as long. Symbols of codecs "
        "that are fitted have a level of their own, extract.codec.zstd_level.",
    )

    @model_validator(mode="after")
    def _coding_fits(self) -> Self:
        wrong = None
        if self.image_coding != "auto":
            wrong = misfit(self.image_coding, self.format, self.images == "stored")
        if wrong:
            raise ValueError(f"extract.shard.image_coding {wrong}")
        return self

    def image_coding_of(self, image_px: tuple[int, int], plain: bool = True) -> ImageCoding:
        """The coding of images of a height and width in px, after `auto`; `plain`: any reader opens the levels.

        Raises: ConfigError for one that has none.
        """
        coding = self.image_coding
        if coding == "auto":
            compact, stored = COMPACT[self.format], self.images == "stored"
            return PLAIN if plain or misfit(compact, self.format, stored, image_px) else compact
        if wrong := misfit(coding, self.format, self.images == "stored", image_px):
            raise ConfigError(f"extract.shard.image_coding {wrong}")
        return coding


class CodecConfig(StrictModel):
    """How feature levels are coded."""

    name: str | None = Field(
        default=None,
        description="Codec of feature levels (`dtpipe list codecs`); default: cast, which rounds to shard.dtype, or "
        "transform where max_error or budget is given.",
    )
    levels: dict[str, str] = Field(default={}, description="Codec of single levels by name, in place of that.")
    max_error: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of the features' variance that a level may lose, mean over samples, for codecs that are "
        "fitted; 0.03 if neither this nor budget is given.",
    )
    budget: str | None = Field(
        default=None,
        description="In place of max_error: bytes that the whole dataset may take, images included, as 500GB.",
    )
    fit_samples: int = Field(default=512, ge=1, description="Samples that a codec is fitted to before the plan.")
    coder: Coder = Field(
        default="zstd",
        description="How the symbols of codecs that are fitted become bytes: zstd, which any zarr reader opens (tars "
        "hold them as plain npy), or rans under fitted tables, which takes a quarter less than zstd.",
    )
    zstd_level: int | None = Field(
        default=None,
        ge=1,
        le=19,
        description="Compression level of zstd for these symbols, in zarr; default: 12 where the teacher runs on a "
        "CPU, 3 beside a GPU, which would wait. All else has extract.shard.zstd_level.",
    )

    @field_validator("budget")
    @classmethod
    def _size(cls, budget: str | None) -> str | None:
        if budget is not None:
            parse_bytes(budget)
        return budget

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.max_error is not None and self.budget is not None:
            raise ValueError(
                "extract.codec.max_error and extract.codec.budget are both set; give one, the other follows from it"
            )
        return self

    @property
    def plain(self) -> bool:
        """True where every level is only rounded."""
        return {self.name_for(level) for level in ("", *self.levels)} == {"cast"}

    def name_for(self, level: str) -> str:
        """The codec of a level."""
        fitted = self.max_error is not None or self.budget is not None
        return self.levels.get(level) or self.name or ("transform" if fitted else "cast")


class ExtractRun(ErrorBudget):
    """How an extraction is carried out: where, and with what resources."""

    out: str = Field(description="Folder or URL of the feature dataset to write.")
    save_png: str | None = Field(
        default=None, description="Folder to write the stored images to as PNG files too, when all is done."
    )
    inline: bool = Field(default=False, description="Run in this process, without Ray.")
    workers: int | None = Field(
        default=None, ge=1, description="Most actors at once; default: one per GPU, or one per 2 CPUs without."
    )
    gpus_per_worker: float | None = Field(
        default=None, ge=0, description="GPUs per actor; default: 1 if the cluster has any."
    )
    cpus_per_worker: float = Field(default=1, gt=0, description="CPUs per actor that Ray reserves.")
    decode_threads: int = Field(default=2, ge=1, description="Threads per worker that read and decode images.")
    code_threads: int | None = Field(
        default=None,
        ge=1,
        description="Threads per worker that compress; default: 2, beside a GPU half of its share of the CPUs.",
    )
    memory_gb: float = Field(
        default=2.0,
        gt=0,
        description="Gigabytes that shards on their way to the store take per worker; one shard is always held whole.",
    )
    ray_address: str | None = Field(default=None, description="Ray cluster; default: RAY_ADDRESS, else a local one.")
    retries: int = Field(default=2, ge=0, description="Times a failed shard is tried again.")
    shard_deadline_s: float = Field(
        default=3600, gt=0, description="A shard that takes longer is taken away and retried (Ray only)."
    )
    worker_wait_s: float = Field(
        default=600, gt=0, description="With no worker at all for so long, the run ends and asks to be run again."
    )
    stop_grace_s: float = Field(
        default=60, ge=0, description="After SIGTERM or SIGINT, how long nearly finished shards may take."
    )
    lock_stale_s: float = Field(default=120, gt=0, description="A lock without a heartbeat for so long is taken over.")
    device: DeviceName = Field(default="auto", description="Where the teacher runs.")
    lower_batch_to: int | None = Field(
        default=None,
        ge=1,
        description="Images per forward pass for the shards that are left, where extract.batch_size does not fit; "
        "each shard's record says it.",
    )

    _at_home = field_validator("out")(any_place)
    _local = field_validator("save_png")(local_place)


class ExtractRecipeConfig(Settings):
    """What is encoded, and how: all that determines a dataset."""

    images: str | None = Field(default=None, description="Folder, archive or URL of the images.")
    num_samples: int | None = Field(
        default=None, ge=1, description="In place of images: so many that the teacher (a GAN) makes itself."
    )
    source: SourceConfig = SourceConfig()
    transform: TransformConfig = TransformConfig()
    teacher: TeacherConfig
    noise: NoiseConfig = NoiseConfig()
    shard: ShardConfig = ShardConfig()
    codec: CodecConfig = CodecConfig()
    student_px: Size | None = Field(
        default=None,
        description="Student's image size in px; default: the stored one, half of it for Stable Diffusion.",
    )
    batch_size: int = Field(default=32, ge=1, description="Images per forward pass of the teacher.")
    threads: int = Field(default=1, ge=1, description="CPU threads per worker for the forward pass.")
    limit: int | None = Field(default=None, ge=1, description="Use only so many samples: the first of the order.")
    keys: str | None = Field(default=None, description="File with one key per line: take only these samples.")

    _whole = field_validator("images", "keys")(whole_place)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.images is None) == (self.num_samples is None):
            raise ValueError(
                "give either extract.images, or extract.num_samples for a teacher that makes its own images"
            )
        return self


class ExtractConfig(ExtractRecipeConfig):
    """All settings of one extraction."""

    run: ExtractRun


class LiveConfig(ExtractRecipeConfig):
    """Settings of samples that are encoded while a student trains, and stored nowhere."""

    run: ErrorBudget = ErrorBudget()
