"""One batch of real images, from the teacher to bytes and back: what it takes, and how long."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from dtpipe.distill.stream.decode import decode_on_device, unpacks_rans
from dtpipe.extract.device import NOTHING_YET
from dtpipe.extract.encode import Encoded
from dtpipe.extract.fitting.base import FitRequest
from dtpipe.extract.fitting.budget import CURVE_ERRORS
from dtpipe.extract.fitting.fit import fit_codecs, refuse_too_little
from dtpipe.extract.fitting.sample import FitSample, sample_plan
from dtpipe.extract.shards.buffer import CodedBatch
from dtpipe.extract.shards.producer import PreparedRow, Producer
from dtpipe.extract.teachers.arithmetic import exact
from dtpipe.manifests.codecs.base import FittedArrays, LevelCodec, parts_of
from dtpipe.manifests.codecs.fitted import NOT_FITTED, HeldFitted
from dtpipe.manifests.codecs.registry import level_codecs
from dtpipe.manifests.errors import InputError, saying_what_to_lower
from dtpipe.manifests.layout.arrays import CodedRows, ShardArrays, stored_arrays
from dtpipe.manifests.pieces import blake3_of
from dtpipe.manifests.schema import ComputeRecipe, IndexRow, Plan, Recipe
from dtpipe.manifests.write.listing import Listing
from dtpipe.manifests.write.shard import SHARD_FORMATS, encode_rows, join_rows
from dtpipe.manifests.write.size import foretell_size
from dtpipe.pipeline.plan.arrays import ArrayPlan, plan_arrays

PROBE_TRIES: Final = 4  # times the probe's images that are looked at to find good ones
_TRIAL_SAMPLES: Final = 16  # that a codec is fitted to for its times


@dataclass(frozen=True)
class Coding:
    """Seconds of one image, or of one that is read back."""

    codec_s: float
    """By its codecs, where the teacher runs."""
    code_s: float
    """Compression, checksums and digest, one thread."""
    decode_s: float
    """From its bytes to the image and what one view of each level is stored as, one thread."""
    restore_s: float
    """From that to features, one view of each level, where the teacher runs: students are most often on the like."""


@dataclass(frozen=True)
class Probe:
    """One batch. Seconds are of one image."""

    rows: Sequence[PreparedRow]
    produced: Encoded
    compute: ComputeRecipe
    arrays: tuple[ArrayPlan, ...]
    teacher_s: float
    coding: Coding
    """By the codecs of the plan."""
    device_bytes: int | None


def probe_rows(producer: Producer, listing: Listing, num: int) -> tuple[list[PreparedRow], float]:
    """The first good rows of the listing, numbered from 0, and the seconds per row it took to prepare them."""
    rows: list[PreparedRow] = []
    started = time.perf_counter()
    for row in range(min(len(listing), PROBE_TRIES * num)):
        prepared = producer.prepare(IndexRow(row=row, key=listing.keys[row], shard=0))
        if prepared.content is not None:
            rows.append(prepared)
        if len(rows) == num:
            break
    if not rows:
        raise InputError(
            f"none of the first {PROBE_TRIES * num} samples can be used, such as {listing.keys[0]!r}; look at it"
        )
    return rows, (time.perf_counter() - started) / len(rows)


def probe(producer: Producer, plan: Plan, rows: Sequence[PreparedRow], compute: ComputeRecipe) -> Probe:
    """A full batch, after one to warm up.

    Raises: DeviceMemoryError where there is no room for it.
    """
    import torch

    recipe, codecs = plan.recipe, level_codecs(plan.recipe)
    if compute.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with exact(torch.device(compute.device), compute.threads), _no_room(compute):
        producer.produce(rows, compute.batch_size)
        _wait(compute)
        started_s = time.perf_counter()
        produced = producer.produce(rows, compute.batch_size)
        _wait(compute)
        teacher_s = (time.perf_counter() - started_s) / compute.batch_size
    coded = _Coded.of(recipe, NOT_FITTED, rows, produced, compute)
    numbered = [row.model_copy(update={"row": idx}) for idx, row in enumerate(coded.rows.rows)]  # bad ones are left out
    objects = list(join_rows(sample_plan(recipe, len(rows)), 0, [replace(coded.rows, rows=numbered)]))
    size = foretell_size(plan, objects, numbered, {})
    features = {name: level[: len(rows)].float().cpu().numpy() for name, level in produced.levels.items()}
    return Probe(
        rows,
        produced,
        compute,
        arrays=plan_arrays(plan, codecs, coded.arrays, coded.rows, size, features),
        teacher_s=teacher_s,
        coding=coded.coding,
        device_bytes=torch.cuda.max_memory_allocated() if compute.device == "cuda" else None,
    )


def time_trial_fit(probed: Probe, draft: Recipe, request: FitRequest, arrays: Sequence[ArrayPlan]) -> Coding:
    """As `Probe.coding`, by codecs that are fitted to some rows of the probe, for the errors that `arrays` have.

    A fit to so few samples costs what another does: times follow from shapes and errors. With no finite row, that of
    the probe. Raises: as `probe`; ConfigError for an error that no codec keeps.
    """
    import torch

    levels = {name: probed.produced.levels[name][: len(probed.rows), 0].float().cpu() for name in request.codecs}
    finite = torch.stack([torch.isfinite(level).flatten(1).all(dim=1) for level in levels.values()]).all(dim=0)
    if not finite.any():
        return probed.coding
    index = [row.index for row, fits in zip(probed.rows, finite.tolist(), strict=True) if fits]
    features = {name: level[finite][:_TRIAL_SAMPLES].numpy() for name, level in levels.items()}
    sample = FitSample(tuple(index[:_TRIAL_SAMPLES]), features, None)
    error = next(array.error for array in arrays if array.name in request.codecs)
    target = replace(request, max_error=min(error or CURVE_ERRORS[0], CURVE_ERRORS[-1]), budget_bytes=None)
    fit = fit_codecs(draft, sample, target, len(sample.rows), _say_nothing)
    refuse_too_little(request, fit.least_mse)
    return _Coded.of(fit.recipe(draft), HeldFitted(fit.files), probed.rows, probed.produced, probed.compute).coding


def _say_nothing(_seen: int, _total: int, _event: str | None) -> None:
    """The fit of a trial is nobody's news."""


@dataclass(frozen=True)
class _Coded:
    arrays: ShardArrays
    rows: CodedRows
    coding: Coding

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        fitted: FittedArrays,
        rows: Sequence[PreparedRow],
        produced: Encoded,
        compute: ComputeRecipe,
    ) -> _Coded:
        """Code a batch, after one row to warm up, and decode a row of it."""
        import torch

        codecs = level_codecs(recipe, fitted)
        with exact(torch.device(compute.device), compute.threads), _no_room(compute):
            _start(rows[:1], produced, codecs)
            started_s = time.perf_counter()
            batch = _start(rows, produced, codecs)
            codec_s = (time.perf_counter() - started_s) / len(rows)
        arrays = batch.arrays(recipe)
        row = ShardArrays({name: values[:1] for name, values in arrays.arrays.items()}, arrays.rows[:1])
        _time_decoding(recipe, fitted, encode_rows(recipe, row, fitted), compute.device)  # loads compiled code
        started_s = time.perf_counter()
        coded = encode_rows(recipe, arrays, fitted)
        blake3_of(chunk.data for chunks in coded.chunks.values() for chunk in chunks)
        code_s = (time.perf_counter() - started_s) / len(rows)
        decode_s = _time_decoding(recipe, fitted, coded, compute.device)
        return cls(arrays, coded, Coding(codec_s, code_s, decode_s, _time_restoring(codecs, arrays, compute)))


def _start(rows: Sequence[PreparedRow], produced: Encoded, codecs: Mapping[str, LevelCodec]) -> CodedBatch:
    """Encoded on the device, and on the host."""
    batch = CodedBatch([prepared.index for prepared in rows], produced.images)
    batch.start(produced.levels, codecs)
    batch.wait()
    return batch


def _no_room(compute: ComputeRecipe) -> AbstractContextManager[None]:
    """Where the device has no room: DeviceMemoryError saying what to lower."""
    return saying_what_to_lower("a first batch", compute.device, compute.batch_size, NOTHING_YET)


def _wait(compute: ComputeRecipe) -> None:
    """Until the device has done what it was given."""
    if compute.device == "cuda":
        import torch

        torch.cuda.synchronize()


def _time_decoding(recipe: Recipe, fitted: FittedArrays, coded: CodedRows, device: str) -> float:
    """Seconds to get one row back from its bytes, but for chunks that the device unpacks: image, one view of levels."""
    import torch

    form, specs = SHARD_FORMATS[recipe.shard.format], stored_arrays(recipe, fitted)
    elsewhere = unpacks_rans(torch.device(device))
    started_s = time.perf_counter()
    for name, spec in specs.items():
        if spec.tables is not None and elsewhere:
            continue
        chunk = coded.chunks[name][0]
        trailer = chunk.crc32c.to_bytes(form.trailer_bytes, "little") if form.trailer_bytes else b""
        form.decode(spec, chunk.data, trailer, np.empty(spec.chunk_shape, spec.dtype))
    return time.perf_counter() - started_s


def _time_restoring(codecs: Mapping[str, LevelCodec], arrays: ShardArrays, compute: ComputeRecipe) -> float:
    """Seconds of a row to make features of parts, one view of each level, in a batch; the second time counts."""
    import torch

    seconds = 0.0
    with exact(torch.device(compute.device), compute.threads), _no_room(compute):
        for codec in codecs.values():
            parts = {
                part: torch.from_numpy(np.ascontiguousarray(values[:, 0])).to(compute.device)
                for part, values in parts_of(codec, arrays.arrays).items()
            }
            decode_on_device(codec, parts)
            _wait(compute)
            started_s = time.perf_counter()
            decode_on_device(codec, parts)
            _wait(compute)
            seconds += time.perf_counter() - started_s
    return seconds / len(arrays.rows)


def peak_memory() -> int:
    """The most memory this process has held so far."""
    import resource  # not everywhere

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
