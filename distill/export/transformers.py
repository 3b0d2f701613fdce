"""Exports that transformers loads as the backbone of its detectors and segmenters: a `TimmBackbone`.

`from_pretrained` of transformers takes a name of timm's there, not a folder, so the weights go in by `load_state_dict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file
from torch import Tensor

from dtpipe.distill.export.base import CONFIG, ExportFormat, Reloaded, input_config
from dtpipe.distill.student.student import Student, model_options, student_name, untagged
from dtpipe.manifests.errors import ConfigError, MissingPackageError

_PREFIX = "_backbone."


def check(student: Student) -> None:
    """Raises: ConfigError for a model that gives (B, H, W, C), or is tied to another image size than timm's."""
    name = student.spec.name
    if student.channels_last:
        raise ConfigError(f"student {name} gives channels last, which transformers' heads do not take; use layout timm")
    cfg = timm.get_pretrained_cfg(name)
    if model_options(student.spec) and cfg is not None and student.spec.image_px != tuple(cfg.input_size[1:]):
        raise ConfigError(
            f"student {name} is tied to images of {student.spec.image_px} px, for which TimmBackbone has no setting; "
            "use layout timm"
        )


def to_backbone_name(name: str, weight: Tensor, student: Student) -> tuple[str, Tensor] | None:
    """The name in TimmBackbone, which holds timm's features_only model; None for what that has not."""
    own = student_name(name, student.net.state_dict())
    return None if own is None else (f"{_PREFIX}{own}", weight)


def documents(student: Student) -> dict[str, Mapping[str, Any] | str]:
    """config.json of transformers, with the normalisation, which it passes over."""
    info: Any = student.net.feature_info
    config = {
        "architectures": ["TimmBackbone"],
        "model_type": "timm_backbone",
        "backbone": untagged(student.spec.name),
        "num_channels": 3,
        "features_only": True,
        "out_indices": [info.out_indices[idx] for idx in student.level_idxs],
        **input_config(student),
    }
    return {CONFIG: config}


def reload(path: Path, student: Student) -> Reloaded:
    """A clean backbone of transformers. Raises: MissingPackageError without the package."""
    try:
        from transformers import TimmBackbone, TimmBackboneConfig
    except ImportError as err:
        raise MissingPackageError(
            "layout transformers is checked by the package; run `pip install 'dtpipe[sd]'`, or use layout timm"
        ) from err
    config = documents(student)[CONFIG]
    assert isinstance(config, Mapping)
    names = ("backbone", "num_channels", "features_only", "out_indices")
    model: Any = TimmBackbone(TimmBackboneConfig(**{name: config[name] for name in names}))
    model.load_state_dict(load_file(path))
    model.eval()

    def levels(images: Tensor) -> list[Tensor]:
        return list(model(images).feature_maps)

    return levels


def snippet(path: Path, _student: Student) -> str:
    """A backbone alone."""
    return (
        "from safetensors.torch import load_file\nfrom transformers import AutoBackbone, AutoConfig\n"
        f"model = AutoBackbone.from_config(AutoConfig.from_pretrained({str(path.parent)!r}))\n"
        f"model.load_state_dict(load_file({str(path)!r}))\n"
    )


def finetune(path: Path, student: Student) -> str:
    """UPerNet of five classes on it."""
    channels = student.channels[max(0, len(student.channels) - 2)]
    return (
        "from safetensors.torch import load_file\n"
        "from transformers import AutoConfig, UperNetConfig, UperNetForSemanticSegmentation\n"
        f"config = UperNetConfig(\n    backbone_config=AutoConfig.from_pretrained({str(path.parent)!r}),\n"
        f"    num_labels=5, auxiliary_in_channels={channels},\n)\n"
        "model = UperNetForSemanticSegmentation(config)\n"
        f"model.backbone.load_state_dict(load_file({str(path)!r}))\n"
    )


FORMAT = ExportFormat(
    "transformers",
    "Hugging Face's detectors and segmenters load it as their TimmBackbone",
    check,
    reload,
    snippet,
    finetune,
    to_backbone_name,
    documents=documents,
)
