"""The decoder that label distillation trained beside a student: where a head of masks or of classes may start from.

One rule: a head of other layers starts anew, which is said; of other classes the last layer does, which is all that a
head of whole images' classes has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dtpipe.distill.downstream.tuned.base import TunedTask
from dtpipe.distill.downstream.tuned.config import HeadConfig, TuneConfig
from dtpipe.distill.engine.checkpoint import load_checkpoint, state_digest
from dtpipe.distill.labels.decoder import DECODER, DECODER_EMA, DECODER_SPEC
from dtpipe.manifests.labels import Class, ClassTable

_CLASSIFIER, _LINEAR = "classifier.", "linear."
"""Last layer of a decoder, and of a `Classifier`."""
_MOST_NAMED = 5  # classes in a note
_OWN_NORM = "auto", "none"
"""Settings of `head.pooled_norm` under which a classifier can do without a norm: a distilled one has none."""


@dataclass(frozen=True)
class DistilledDecoder:
    """A decoder of soft labels as a checkpoint holds it."""

    head: Mapping[str, Tensor]
    """UPerNet's weights by name; of classes of whole images, a linear layer's."""
    pyramid: Mapping[str, Tensor]
    """Of a plain transformer's levels; else empty."""
    of_maps: bool
    classes: tuple[str, ...]
    width: int
    norm: str
    ppm_scales: tuple[int, ...]
    dropout: float

    @property
    def head_settings(self) -> dict[str, Any]:
        """Fields of `HeadConfig` that make the same layers. It reads levels as they are, a ConvNeXt's too."""
        if not self.of_maps:
            return {"dropout": self.dropout, "pooled_norm": "none"}
        shape = {"width": self.width, "norm": self.norm, "ppm_scales": self.ppm_scales}
        return {**shape, "dropout": self.dropout, "level_norms": False}

    @property
    def digest(self) -> str:
        """blake3 of all weights by name."""
        return state_digest([*sorted(self.head.items()), *sorted(self.pyramid.items())])

    def misfit(self, task: TunedTask[Any], config: HeadConfig, classes: ClassTable) -> str | None:
        """Why a task's head of these settings and classes cannot start from it; None where it can."""
        if self.of_maps != (task.kind is not Class):
            return "the decoder of its run is of " + ("masks" if self.of_maps else "whole images' classes")
        return self._misfit_of_maps(config) if self.of_maps else self._misfit_of_classes(config, classes)

    def other_classes(self, classes: ClassTable) -> str | None:
        """In what its last layer's classes are not these, in a clause; None where they are, in this order."""
        names = tuple(classes.names)
        if names == self.classes:
            return None
        if set(names) == set(self.classes):
            return "the run has these classes in another order"
        more = len(self.classes) - _MOST_NAMED
        return f"the run's classes are {', '.join(self.classes[:_MOST_NAMED])}{f' and {more} more' if more > 0 else ''}"

    def _misfit_of_maps(self, config: HeadConfig) -> str | None:
        own, other = ((of.width, of.norm, tuple(of.ppm_scales)) for of in (self, config))
        if own == other:
            return None
        settings = f"-s eval.tune.head.width={self.width} -s eval.tune.head.norm={self.norm}"
        scales = f" -s eval.tune.head.ppm_scales={list(self.ppm_scales)}" if own[2] != other[2] else ""
        return (
            f"the decoder of its run has width {self.width} and norm {self.norm}; a head as {settings}{scales} would do"
        )

    def _misfit_of_classes(self, config: HeadConfig, classes: ClassTable) -> str | None:
        if config.pooled_norm in _OWN_NORM:
            return self.other_classes(classes)
        return "the decoder of its run has no norm; a head as -s eval.tune.head.pooled_norm=none would do"


def decoder_in(state: Mapping[str, Any], ema: bool = True) -> DistilledDecoder | None:
    """The decoder of a checkpoint's content, the average where there is one and `ema` asks for it; None without any."""
    spec = state.get(DECODER_SPEC)
    if spec is None:
        return None
    average = state[DECODER_EMA] if ema else None
    weights = state[DECODER] if average is None else average
    parts = {
        part: {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")}
        for part in ("head", "pyramid")
    }
    return DistilledDecoder(
        **parts,
        of_maps=spec["kind"] == "masks",
        classes=tuple(spec["classes"]),
        width=int(spec["width"]),
        norm=str(spec["norm"]),
        ppm_scales=tuple(spec["ppm_scales"]),
        dropout=float(spec["dropout"]),
    )


def decoder_of(run: str | Path) -> DistilledDecoder | None:
    """The decoder of a run folder or checkpoint; None for one without, and for exports.

    Raises: as `load_checkpoint`.
    """
    path = Path(run)
    path = path / "last.pt" if path.is_dir() else path
    if path.suffix != ".pt" or not path.is_file():
        return None
    return decoder_in(load_checkpoint(path, "distill", "eval"))


def take_decoder(network: nn.Module, decoder: DistilledDecoder, classes: ClassTable) -> None:
    """Give a `Segmenter` with a UPerNet, or a `Classifier`, the decoder's weights; the last layer's for its classes."""
    names = _maps_weights(decoder, classes) if decoder.of_maps else _linear_weights(decoder)
    rest = network.load_state_dict(names, strict=False)
    assert not rest.unexpected_keys, rest.unexpected_keys


def _maps_weights(decoder: DistilledDecoder, classes: ClassTable) -> dict[str, Tensor]:
    same = decoder.other_classes(classes) is None
    taken = {name: value for name, value in decoder.head.items() if same or not name.startswith(_CLASSIFIER)}
    names = {f"head.{name}": value for name, value in taken.items()}
    return names | {f"levels.pyramid.{name}": value for name, value in decoder.pyramid.items()}


def _linear_weights(decoder: DistilledDecoder) -> dict[str, Tensor]:
    """Its convolution of one cell, (K, C, 1, 1), is a linear layer, (K, C)."""
    return {
        _LINEAR + name.removeprefix(_CLASSIFIER): value.flatten(1) if value.ndim > 1 else value
        for name, value in decoder.head.items()
    }


def start_note(decoder: DistilledDecoder, classes: ClassTable) -> str:
    """What a training starts from, in a clause."""
    start = "starts from the backbone and the decoder of its run"
    other = decoder.other_classes(classes)
    return start if other is None else f"{start}, all but the classifier: {other}"


def reading_as_distilled(config: TuneConfig, decoder: DistilledDecoder) -> TuneConfig:
    """The settings of a head that reads levels as a distilled decoder does: without norms between."""
    plain: dict[str, Any] = {"level_norms": False} if decoder.of_maps else {"pooled_norm": "none"}
    return config.model_copy(update={"head": config.head.model_copy(update=plain)})
