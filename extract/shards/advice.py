"""One sentence on what would make an extraction faster, from where the time of its workers went."""

from __future__ import annotations

from collections.abc import Mapping

from dtpipe.extract.shards.timeline import CODEC, TEACHING, WAIT, WRITE, Stalls
from dtpipe.manifests.schema import Recipe

_WORTH_IT = 0.1  # a smaller share of the time is not worth a change
_TELLING_S = 1.0  # a shorter time says nothing


def share_text(shares: Mapping[str, float], most: int | None = None) -> str:
    """Shares of the time in order of size, those below a half per cent left out: `teacher 93 %, decode 5 %`."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{cause} {100 * share:.0f} %" for cause, share in ordered if share >= 0.005)


def advice(stalls: Stalls, recipe: Recipe) -> str | None:
    """What holds the teacher up most and what to change, or that nothing does; None where too little ran to tell."""
    shares = stalls.shares()
    if stalls.seconds < _TELLING_S or not shares:
        return None
    cause = max((name for name in shares if name != TEACHING), key=lambda name: shares[name])
    if shares[cause] < _WORTH_IT:
        return (
            f"the teacher is busy {shares[TEACHING]:.0%} of the time: only more or faster devices, or a lower "
            "extract.teacher.dtype, make this faster"
        )
    remedy = _codec(stalls, recipe) if cause == CODEC else _REMEDIES[cause](stalls)
    return f"the teacher is held up {shares[cause]:.0%} of the time by {remedy}"


def _read(stalls: Stalls) -> str:
    threads = stalls.decode_threads
    return (
        f"reading images: raise extract.run.decode_threads from {threads} (to {4 * threads}, say: they wait more than "
        "they work), or bring the images to a faster place"
    )


def _decode(stalls: Stalls) -> str:
    return f"decoding images: {_more_decoders(stalls)}, or store them at the teacher's size beforehand"


def _noise(stalls: Stalls) -> str:
    return f"drawing noise: {_more_decoders(stalls)}"


def _more_decoders(stalls: Stalls) -> str:
    if stalls.decode_threads < stalls.cpus:
        return f"raise extract.run.decode_threads from {stalls.decode_threads} to up to {stalls.cpus}"
    return f"give each worker more than {stalls.cpus} CPUs"


def _codec(stalls: Stalls, recipe: Recipe) -> str:
    on_device, behind = stalls.spans.get(CODEC, 0.0), stalls.spans.get("coding", 0.0)
    if on_device >= behind:
        return "the codec on the teacher's device: store fewer levels or views, or take a simpler extract.codec"
    if stalls.code_threads < stalls.cpus:
        return f"compression: raise extract.run.code_threads from {stalls.code_threads} to up to {stalls.cpus}"
    return f"compression: give each worker more than {stalls.cpus} CPUs{_less_compression(recipe)}"


def _less_compression(recipe: Recipe) -> str:
    """What of a recipe can be set to take less time; tars have no zstd."""
    if recipe.codec.symbols_zstd_level is not None:
        return ", or lower extract.codec.zstd_level, or take the coder rans"
    return ", or lower extract.shard.zstd_level" if recipe.shard.format == "zarr" and recipe.codec.zstd_level else ""


def _write(stalls: Stalls) -> str:
    if stalls.work.get("digest", 0.0) > stalls.work.get("store", 0.0):
        return "digests of what is written: give each worker more CPUs"
    return "writing: bring --out to a faster store, or raise extract.run.memory_gb where room in memory is short"


def _wait(_stalls: Stalls) -> str:
    return (
        "having no shard to do, at the beginning or the end: fewer rows per shard (extract.shard.samples) divide the "
        "work better, or use fewer workers"
    )


_REMEDIES = {"read": _read, "decode": _decode, "noise": _noise, WRITE: _write, WAIT: _wait}
