"""Exports that any runtime of ONNX runs: the levels of normalised images, finest first, for inference alone.

Batch and image size are free where the network is not tied to one size.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtpipe.distill.export.base import ExportFormat, Reloaded, input_config
from dtpipe.distill.student.load import STUDENT_KEY
from dtpipe.distill.student.student import Student, model_options, spec_to_dict
from dtpipe.manifests.errors import ConfigError, MissingPackageError

_INPUT = "images"
_MISSING = "layout onnx needs packages that are not installed; run `pip install 'dtpipe[onnx]'`"


def check(_student: Student) -> None:
    """Raises: MissingPackageError without onnx, onnxscript and onnxruntime."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as err:
        raise MissingPackageError(_MISSING) from err


class _Levels(nn.Module):
    """The student behind its normalisation."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> list[Tensor]:
        levels = self.student.net(images)
        chosen = [levels[idx] for idx in self.student.level_idxs]
        return [level.permute(0, 3, 1, 2) for level in chosen] if self.student.channels_last else chosen


def level_names(student: Student) -> list[str]:
    """`l2` of stride 4 and so on: the outputs."""
    return [f"l{stride.bit_length() - 1}" for stride in student.strides]


def write(path: Path, _weights: Mapping[str, Tensor], student: Student) -> None:
    """The network as it runs; sizes are free if it can be traced so. Raises: ConfigError when it cannot at all."""
    tied = bool(model_options(student.spec)) or student.single_scale
    batch = torch.export.Dim.DYNAMIC
    free: list[dict[int, Any]] = [{0: batch}, {}] if tied else [{0: batch, 2: batch, 3: batch}, {0: batch}, {}]
    errors = []
    for dims in free:
        try:
            return _trace(path, student, dims)
        except torch.onnx.OnnxExporterError as err:
            errors.append(err)
    reason = str(errors[-1]).strip().partition("\n")[0]
    raise ConfigError(f"student {student.spec.name} cannot be traced for ONNX: {reason}; export it in timm's layout")


def _trace(path: Path, student: Student, dims: Mapping[int, Any]) -> None:
    images = torch.zeros(2, 3, *student.spec.image_px)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the tracer, about itself
        program = torch.onnx.export(
            _Levels(student).eval(),
            (images,),
            input_names=[_INPUT],
            output_names=level_names(student),
            dynamic_shapes=({**dims},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    own = {STUDENT_KEY: spec_to_dict(student.spec), **input_config(student)}
    program.model.metadata_props.update({name: json.dumps(value) for name, value in own.items()})
    program.save(path, external_data=False)


def _session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def reload(path: Path, _student: Student) -> Reloaded:
    """onnxruntime on the CPU."""
    session = _session(path)

    def levels(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(level) for level in session.run(None, {_INPUT: images.numpy()})]

    return levels


def sizes(path: Path, student: Student) -> list[tuple[int, int, int]]:
    """The student's size, and another batch and size where the file says that these are free."""
    height, width = student.spec.image_px
    batch, _, *px = _session(path).get_inputs()[0].shape
    other = (height + 64, width + 32) if all(isinstance(side, str) for side in px) else (height, width)
    return [(2, height, width), (3 if isinstance(batch, str) else 2, *other)]


def snippet(path: Path, student: Student) -> str:
    """A session of onnxruntime."""
    height, width = student.spec.image_px
    return (
        f"import numpy, onnxruntime\nmodel = onnxruntime.InferenceSession({str(path)!r})\n"
        f"images = numpy.zeros((1, 3, {height}, {width}), 'float32')  # normalised as config.json says\n"
        f"{', '.join(level_names(student))} = model.run(None, {{{_INPUT!r}: images}})\n"
    )


def finetune(_path: Path, _student: Student) -> str:
    """ONNX is not trained."""
    return ""


FORMAT = ExportFormat(
    "onnx",
    "onnxruntime and other runtimes run it: the levels of any student",
    check,
    reload,
    snippet,
    finetune,
    file="model.onnx",
    write=write,
    sizes=sizes,
    tolerance=1e-4,
)
