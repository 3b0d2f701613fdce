"""The records of the formats v1 and v2: recipe, plan, shard entry, manifest.

Everything that determines the content of a dataset stands in `Recipe` and nowhere else; times, hosts and library
versions are provenance and stay outside the digest. Unknown fields are refused. What v2 added is left out of a record
where it says what v1 implied, so that a dataset which v1 can describe is written, and digested, as v1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from dtpipe.manifests.image_coding import PLAIN, ImageCoding, misfit

Format = Literal["dtpipe-features/1", "dtpipe-features/2"]
FORMAT: Final = "dtpipe-features/1"
CODECS_AND_ROLES: Final = "dtpipe-features/2"  # where a level names a codec, or a role that its name does not imply,
# or images are not plain, or chunks are not compressed
FORMATS: Final[tuple[Format, ...]] = (FORMAT, CODECS_AND_ROLES)
FLOAT32_ERROR: Final = "float32_error"  # in provenance: by level, how far low precision is from float32
MEASURED_SHARD: Final = 0  # whose entry holds it
SYNTHESIZED: Final = "synthesized"  # source kind of images that the teacher makes itself
LATENT_SUFFIX: Final = ".latent"  # of a level's name: in v1 the only sign of its role
IMAGE = "image"  # name of the array that holds the stored images
MAX_INTEGER: Final = 2**53 - 1  # any reader of JSON keeps so many
MAX_SHARDS: Final = 2**31 - 1  # Parquet's columns of shards are int32

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="blake3, 64 hexadecimal digits.")]
LevelName = Annotated[
    str, Field(pattern=r"^l[0-9](\.[a-z0-9]+)?$", description="l{n} has stride 2^n; l4.b is a second tap.")
]
StoredDtype = Literal["float16", "float32"]
Role = Literal["features", "latent", "soft_labels", "noise"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Resize = Literal["center_crop", "stretch", "none"]
Filter = Literal["box", "bilinear", "bicubic", "lanczos"]
ShardFormat = Literal["zarr", "webdataset"]
Order = Literal["permuted", "container"]
_Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
_Number32 = Annotated[int, Field(ge=0, le=MAX_SHARDS)]
_Positive32 = Annotated[int, Field(ge=1, le=MAX_SHARDS)]
_Crc32c = Annotated[int, Field(ge=0, lt=2**32)]
_Side = Annotated[int, Field(ge=1)]
Size = _Side | tuple[_Side, _Side]
"""A size in px as settings give it: the side of a square, or height and width."""


def height_width(size: Size) -> tuple[int, int]:
    """Both sides of a size."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class StrictModel(BaseModel):
    """A frozen record that refuses unknown fields, and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ErrorBudget(StrictModel):
    """How many samples may be bad."""

    max_bad: int | float = Field(
        default=0.01, ge=0, description="Bad samples allowed: an integer is a count, a fraction a share."
    )

    def max_bad_samples(self, num_rows: int) -> int:
        """Bad samples that so many rows may have."""
        return self.max_bad if isinstance(self.max_bad, int) else math.floor(self.max_bad * num_rows)

    @field_validator("max_bad")
    @classmethod
    def _share(cls, max_bad: int | float) -> int | float:
        if isinstance(max_bad, float) and max_bad > 1:
            raise ValueError(f" is {max_bad}; write a count as an integer and a share as a fraction up to 1")
        return max_bad


class Settings(StrictModel):
    """Settings in two halves: `run` says how, where and with what resources; all other fields determine the result."""

    PLACES: ClassVar[frozenset[str]] = frozenset()
    """Fields that name a place whose content is compared in another way, so that it may move."""

    def identity(self) -> dict[str, Any]:
        """What must stay the same where a run is gone on with."""
        return self.identity_of(self.model_dump(mode="json"))

    @classmethod
    def identity_of(cls, record: Mapping[str, Any]) -> dict[str, Any]:
        """The identity within recorded settings, which may lack fields that came later."""
        return {name: value for name, value in cls.in_halves(record).items() if name not in {"run", *cls.PLACES}}

    @classmethod
    def in_halves(cls, record: Mapping[str, Any]) -> dict[str, Any]:
        """Recorded settings with the fields of `run` inside it; before there were halves, all stood side by side."""
        half = cls.model_fields.get("run")
        if half is None:
            return dict(record)
        run = half.annotation
        assert isinstance(run, type) and issubclass(run, StrictModel)
        inner = {name for name in run.model_fields if name in record and name not in cls.model_fields}
        outer = {name: value for name, value in record.items() if name not in inner}
        return {**outer, "run": {**(record.get("run") or {}), **{name: record[name] for name in inner}}}


class ViewSpec(StrictModel):
    """One stored encoding of an image; its position in `Recipe.views` is its index on the V axis."""

    draw: int = Field(ge=0, description="Index k of the noise draw.")
    timestep: int | None = Field(default=None, ge=0, description="Diffusion timestep, 0-based; null without diffusion.")
    flip: bool = Field(default=False, description="True when the horizontally flipped image was encoded.")


class CodecSpec(StrictModel):
    """Which codec turns a level into stored arrays, and back."""

    name: str = Field(default="cast", description="Registered codec; `cast` rounds to the level's dtype.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Of this codec.")


class LevelSpec(StrictModel):
    """One level: features [N, V, channels, height, width], stored as the arrays that its codec makes of them."""

    name: LevelName
    stride: _Positive32 = Field(description="Student pixels per cell.")
    channels: _Positive32
    height: _Positive32
    width: _Positive32
    dtype: StoredDtype = Field(default="float16", description="Of the features, as they are read.")
    tap: str = Field(description="Module path in the teacher where the level is read.")
    codec: CodecSpec = CodecSpec()
    role: Role = Field(
        default="features",
        description="What it holds: features to regress, a latent teacher's own input, soft labels, or noise. "
        "A level called `l{n}.latent` that says nothing is a latent.",
    )

    @model_validator(mode="before")
    @classmethod
    def _imply_role(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "role" not in fields and isinstance(fields.get("name"), str):
            return {**fields, "role": implied_role(fields["name"])}
        return fields

    @model_serializer(mode="wrap")
    def _leave_out_implied(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        implied = {"codec": self.codec == CodecSpec(), "role": self.role == implied_role(self.name)}
        return {name: value for name, value in fields.items() if not implied.get(name)}


def implied_role(name: str) -> Role:
    """The role of a level that names none: all that v1 has."""
    return "latent" if name.endswith(LATENT_SUFFIX) else "features"


class SourceRecipe(StrictModel):
    """How rows follow from the listing. URIs are not content and are kept out."""

    kind: str = Field(description="Registered source kind, e.g. `folder`.")
    order: Order = "permuted"
    seed: int = Field(default=0, description="Seed of the permutation of rows.")


class TransformRecipe(StrictModel):
    """How a decoded image becomes the teacher's input, which is the stored image."""

    resize: Resize = "center_crop"
    height: _Positive32 = Field(description="Stored height in px.")
    width: _Positive32 = Field(description="Stored width in px.")
    filter: Filter = "bicubic"
    antialias: bool = True


class TeacherRecipe(StrictModel):
    """Which teacher, by content: the digest of its weights, not where they lay."""

    kind: str = Field(description="Registered teacher kind, e.g. `ddpm`.")
    weights_blake3: Digest
    options: dict[str, Any] = Field(default_factory=dict, description="Options of this kind that change features.")


class ComputeRecipe(StrictModel):
    """What floating point depends on; equal digests need an equal one."""

    device: str = Field(description="Device type: cpu or cuda.")
    dtype: str = Field(default="float32", description="Arithmetic of the teacher's forward pass.")
    batch_size: int = Field(ge=1, description="Images per forward pass; short batches are padded.")
    threads: int = Field(ge=1, description="CPU threads per worker.")

    def in_batches(self, batch_size: int) -> Self:
        """The same with batches of another size."""
        return self.model_copy(update={"batch_size": batch_size})


class CodecRecipe(StrictModel):
    """How stored arrays become bytes."""

    name: Literal["cast"] = Field(default="cast", description="Codec of the levels that name none of their own.")
    zstd_level: int = Field(default=3, ge=0, le=19, description="Of the zarr store; 0: chunks are not compressed.")
    symbols_zstd_level: int | None = Field(default=None, ge=1, le=19, description="Of fitted symbols; null: as all.")
    dense_zstd_level: Literal[0] | None = Field(default=None, description="Of other features; null: as all.")

    def level_of(self, sparse: bool) -> int:
        """The level of zstd of an array of a feature level; `sparse`: of symbols that are mostly 0."""
        own = self.symbols_zstd_level if sparse else self.dense_zstd_level
        return self.zstd_level if own is None else own

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value is not None}


class ShardRecipe(StrictModel):
    """How rows are cut into shards."""

    format: ShardFormat = "zarr"
    samples: _Positive32 = Field(description="Rows per shard; the last shard may be shorter.")


class Recipe(StrictModel):
    """All that determines the content of a feature dataset."""

    source: SourceRecipe
    transform: TransformRecipe
    student_px: tuple[int, int] = Field(description="Height and width of the student's image; strides refer to it.")
    teacher: TeacherRecipe
    noise_seed: int = 0
    views: tuple[ViewSpec, ...] = Field(min_length=1)
    levels: tuple[LevelSpec, ...] = Field(min_length=1)
    images: Literal["stored", "joined"] = "stored"
    image_coding: ImageCoding = Field(default=PLAIN, description="How stored images become bytes, without loss.")
    codec: CodecRecipe = CodecRecipe()
    shard: ShardRecipe
    compute: ComputeRecipe

    @property
    def synthesized(self) -> bool:
        """True when the teacher made the images too."""
        return self.source.kind == SYNTHESIZED

    @property
    def format(self) -> Format:
        """The oldest format that can describe this."""
        v1 = all(level.codec == CodecSpec() and level.role == implied_role(level.name) for level in self.levels)
        under_zstd = self.codec.zstd_level > 0 and self.codec.dense_zstd_level is None
        return FORMAT if v1 and self.image_coding == PLAIN and under_zstd else CODECS_AND_ROLES

    @model_validator(mode="after")
    def _coding_fits(self) -> Self:
        px = self.transform.height, self.transform.width
        if wrong := misfit(self.image_coding, self.shard.format, self.images == "stored", px):
            raise ValueError(f"image_coding {wrong}")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_plain(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if (name, value) != ("image_coding", PLAIN)}


def _check_format(record: Plan | Manifest) -> None:
    if record.format != record.recipe.format:
        raise ValueError(f"format is {record.format}, the levels of its recipe need {record.recipe.format}")


class Plan(StrictModel):
    """plan.json: the recipe and the fixed rows, written before any work."""

    format: Format = Field(default=FORMAT, description="That of the recipe.")
    recipe: Recipe
    num_rows: int = Field(ge=1, le=MAX_INTEGER)
    num_shards: int = Field(ge=1, le=MAX_SHARDS)
    listing_blake3: Digest
    provenance: dict[str, Any] = Field(default_factory=dict, description="Time, host, versions, config; not content.")

    @model_validator(mode="after")
    def _format_fits(self) -> Self:
        _check_format(self)
        return self

    def shard_rows(self, shard_idx: int) -> range:
        """Rows of one shard; only the last may be short."""
        samples = self.recipe.shard.samples
        return range(shard_idx * samples, min((shard_idx + 1) * samples, self.num_rows))


class Members(StrictModel):
    """Byte ranges of one array's chunks inside an object, in (row, view) order; rows of a shard are consecutive.

    crc32c is of the `size` bytes at `offset`, as they lie in the object. A reader checks it on each read, so a
    flipped byte, a stale object and a swapped one all fail where they are touched.
    """

    offset: tuple[_Count, ...]
    size: tuple[_Count, ...]
    crc32c: tuple[_Crc32c, ...]


class ObjectEntry(StrictModel):
    """One stored object of a shard: a zarr shard of one array, or a whole tar."""

    name: str = Field(description="POSIX path inside the dataset.")
    size_bytes: _Count
    blake3: Digest
    identity: str = Field(
        description="The store's etag, or mtime in ns: changes when the object is written again. Not content."
    )
    arrays: dict[str, Members] = Field(description="Array name (image, l2, ..; tar also: key) to its chunks.")


class IndexRow(StrictModel):
    """One sample as it came out."""

    row: _Count
    key: str
    shard: _Number32
    status: str = Field(default="ok", pattern=r"^(ok|bad: .+)$", description="`ok`, or `bad: ` and the reason.")
    label: str | None = None
    original_height: _Number32 | None = None
    original_width: _Number32 | None = None


class BatchRange(StrictModel):
    """Consecutive shards that were made in smaller batches than the recipe says."""

    batch_size: int = Field(ge=1)
    first: _Number32
    last: _Number32


class ShardEntry(StrictModel):
    """commits/00042.json: written last; its presence is the commit."""

    format: Format = Field(default=FORMAT, description="That of the plan.")
    shard: _Number32
    plan_blake3: Digest = Field(description="Digest of plan.json's bytes: an entry of another plan is refused.")
    epoch: _Count = Field(description="Epoch of the writer's lock.")
    batch_size: int | None = Field(
        default=None, ge=1, description="Images per forward pass that made it, where fewer than the recipe says."
    )
    objects: tuple[ObjectEntry, ...]
    rows: tuple[IndexRow, ...]
    provenance: dict[str, Any] = Field(default_factory=dict, description="Host, seconds, versions; not content.")

    @model_serializer(mode="wrap")
    def _leave_out_planned(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if (name, value) != ("batch_size", None)}


class FileEntry(StrictModel):
    """Size and digest of a whole file beside the manifest."""

    size_bytes: _Count
    blake3: Digest


class Totals(StrictModel):
    """Counts over the dataset."""

    num_rows: _Count
    num_ok: _Count
    num_bad: _Count
    num_shards: _Number32
    size_bytes: _Count = Field(description="Bytes of all shard objects.")


class Manifest(StrictModel):
    """manifest.json: the only entry point for readers; written by the merge."""

    format: Format = Field(default=FORMAT, description="That of the recipe.")
    complete: bool = Field(description="False after a repair has sent shards back to work.")
    digest: Digest = Field(description="Digest of the content: equal for any number of workers and after kills.")
    recipe: Recipe
    batch_sizes: tuple[BatchRange, ...] = Field(
        default=(), description="Shards that were made in smaller batches than the recipe says, in order."
    )
    totals: Totals
    files: dict[str, FileEntry] = Field(description="plan.json, listing, shards, index, zarr metadata.")
    provenance: dict[str, Any] = Field(default_factory=dict, description="Versions, devices, commands; not content.")

    @model_validator(mode="after")
    def _format_fits(self) -> Self:
        _check_format(self)
        return self

    @model_serializer(mode="wrap")
    def _leave_out_planned(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if name != "batch_sizes" or value}
