"""dtpipe: pre-train an image backbone with the features of a generative model, extracted once.

    dataset = dtpipe.open("features/")            # len(dataset), dataset[key].levels["l3"], dataset.torch()
    dtpipe.extract(images="photos/", teacher="teacher/", out="features/")
    dtpipe.distill("features/", student="resnet50", out="runs/r50")
    print(dtpipe.evaluate("runs/r50", "probe", "labelled/").to_table())
    backbone = dtpipe.load_backbone("runs/r50")

Importing this imports nothing of weight; each name is loaded when it is used first. `dtpipe.extract` and
`dtpipe.distill` are packages too, which are called as the functions above.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dtpipe import distill as _distill
from dtpipe import extract as _extract

if TYPE_CHECKING:
    from dtpipe.manifests.errors import DtpipeError as DtpipeError
    from dtpipe.pipeline.library.dataset import Dataset as Dataset
    from dtpipe.pipeline.library.dataset import FeatureSample as Sample
    from dtpipe.pipeline.library.dataset import open_dataset as open
    from dtpipe.pipeline.library.stages import distill as distill
    from dtpipe.pipeline.library.stages import evaluate_run as evaluate
    from dtpipe.pipeline.library.stages import extract as extract
    from dtpipe.pipeline.library.stages import load_backbone as load_backbone

    __version__: str

__all__ = [
    "Dataset",
    "DtpipeError",
    "Sample",
    "__version__",
    "distill",
    "evaluate",
    "extract",
    "load_backbone",
    "open",
]

_STAGES = "dtpipe.pipeline.library.stages"
_PLACES = {
    "Dataset": "dtpipe.pipeline.library.dataset:Dataset",
    "DtpipeError": "dtpipe.manifests.errors:DtpipeError",
    "Sample": "dtpipe.pipeline.library.dataset:FeatureSample",
    "evaluate": f"{_STAGES}:evaluate_run",
    "load_backbone": f"{_STAGES}:load_backbone",
    "open": "dtpipe.pipeline.library.dataset:open_dataset",
}


class _Stage(ModuleType):
    """A package whose name is also that of the function which runs its stage."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module(_STAGES), name)(*args, **kwargs)


_extract.__class__ = _Stage
_distill.__class__ = _Stage


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("dtpipe")
    if name not in _PLACES:
        raise AttributeError(f"module 'dtpipe' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, _, own = _PLACES[name].partition(":")
    return getattr(importlib.import_module(module), own)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
