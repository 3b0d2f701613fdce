"""Exports that detectron2 loads: a pickle of arrays under its names, and the settings that go with them.

detectron2 reads images as BGR unless told; these weights take RGB, with the mean and deviation in detectron2.yaml.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from dtpipe.distill.export.base import ExportFormat, Reloaded, check_counterpart, input_documents
from dtpipe.distill.export.timm import full_model
from dtpipe.distill.export.torchvision import RESNETS
from dtpipe.distill.student.student import Student, normalisation, untagged
from dtpipe.manifests.errors import ExportError

_CONFIG = "detectron2.yaml"
_GROUPS = {  # name in torchvision: groups of the 3x3 convolutions, and channels of each in the first stage
    "wide_resnet50_2": (1, 128),
    "wide_resnet101_2": (1, 128),
    "resnext50_32x4d": (32, 4),
    "resnext101_32x8d": (32, 8),
    "resnext101_64x4d": (64, 4),
}
_NEW_NUMPY, _ANY_NUMPY = b"cnumpy._core.multiarray\n_reconstruct\n", b"cnumpy.core.multiarray\n_reconstruct\n"
_ARRAYS = {("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct")}


def check(student: Student) -> None:
    """Raises: ConfigError for a student that detectron2's ResNet has no like of."""
    check_counterpart(student, RESNETS, "detectron2")


def to_detectron2(name: str, weight: Tensor, _student: Student) -> tuple[str, Tensor]:
    """detectron2's name of a weight.

    Source: detectron2, tools/convert-torchvision-to-d2.py.
    """
    theirs = name if name.startswith("layer") else f"stem.{name}"
    theirs = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", theirs)
    theirs = re.sub(r"\bbn(\d)", r"conv\1.norm", theirs)
    return theirs.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm"), weight


def write(path: Path, weights: Mapping[str, Tensor], _student: Student) -> None:
    """A pickle that any numpy reads: numpy 2 writes names that those before 1.26 have not."""
    arrays = {name: weight.numpy() for name, weight in weights.items()}
    content = {"model": arrays, "__author__": "dtpipe", "matching_heuristics": True}
    data = pickle.dumps(content, protocol=3)
    path.write_bytes(data.replace(_NEW_NUMPY, _ANY_NUMPY, 1))


class _Arrays(pickle.Unpickler):
    """Reads arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Raises: ExportError for anything but what makes an array."""
        if (module, name) not in _ARRAYS:
            raise ExportError(f"the pickle names {module}.{name}, which no array needs")
        return super().find_class(module, name)


def reload(path: Path, student: Student) -> Reloaded:
    """timm's model with the arrays under their first names: detectron2 is compiled for one torch."""
    arrays = _Arrays(io.BytesIO(path.read_bytes())).load()["model"]
    model: Any = full_model(student)
    model.load_state_dict({_to_timm(name): torch.from_numpy(np.asarray(array)) for name, array in arrays.items()})
    return partial(model.forward_intermediates, intermediates_only=True)


def _to_timm(name: str) -> str:
    """The inverse of `to_detectron2`."""
    if name.startswith("stem."):
        return re.sub(r"conv1\.norm", "bn1", name.removeprefix("stem."))
    ours = re.sub(r"^res(\d)", lambda match: f"layer{int(match[1]) - 1}", name)
    ours = re.sub(r"conv(\d)\.norm", r"bn\1", ours)
    return re.sub(r"shortcut(?!\.norm)", "downsample.0", ours).replace("shortcut.norm", "downsample.1")


def documents(student: Student) -> dict[str, Mapping[str, Any] | str]:
    """Beside config.json the settings of detectron2 that the weights need."""
    name = untagged(student.spec.name)
    mean, std = normalisation(student.spec.name)
    depth = int(re.findall(r"\d+", name)[0])
    groups, width = _GROUPS.get(name, (1, 64))
    resnets = {"DEPTH": depth, "STRIDE_IN_1X1": False, "NUM_GROUPS": groups, "WIDTH_PER_GROUP": width}
    model = {
        "PIXEL_MEAN": [round(255 * value, 3) for value in mean],
        "PIXEL_STD": [round(255 * value, 3) for value in std],
        "RESNETS": resnets | ({"RES2_OUT_CHANNELS": 64} if depth < 50 else {}),
    }
    text = yaml.safe_dump({"INPUT": {"FORMAT": "RGB"}, "MODEL": model}, sort_keys=False)
    return {**input_documents(student), _CONFIG: text}


def finetune(path: Path, _student: Student) -> str:
    """Mask R-CNN with a pyramid, of five classes; the settings come from the file beside the weights."""
    return (
        "from detectron2 import model_zoo\nfrom detectron2.config import get_cfg\ncfg = get_cfg()\n"
        'cfg.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"))\n'
        f"cfg.merge_from_file({str(path.parent / _CONFIG)!r})  # RGB, mean and deviation, depth\n"
        f"cfg.MODEL.WEIGHTS = {str(path)!r}\n"
        "cfg.MODEL.BACKBONE.FREEZE_AT = 0\ncfg.MODEL.ROI_HEADS.NUM_CLASSES = 5\n"
    )


FORMAT = ExportFormat(
    "detectron2",
    "detectron2's ResNets load it: a .pkl and settings",
    check,
    reload,
    finetune,
    finetune,
    to_detectron2,
    "model.pkl",
    write,
    documents,
)
