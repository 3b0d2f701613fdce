"""Held-out images with their masks, as people and each arm have them, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.downstream.tuned.predictions import MaskPrediction
from dtpipe.distill.labels.arms import ArmScore
from dtpipe.manifests.errors import StoreError
from dtpipe.manifests.labels import Mask
from dtpipe.manifests.store.publish import whole_file
from dtpipe.pipeline.predict.overlay import painted

_CAPTION_PX, _PAD_PX = 16, 4


def draw_pictures(out: Path, test: LabelledSet, arms: Sequence[ArmScore]) -> list[Path]:
    """A PNG in `pictures/` for each held-out image that arms have drawn; none for classes.

    Raises: StoreError when one cannot be written.
    """
    paths = []
    for row in range(min((len(arm.drawn) for arm in arms), default=0)):
        path = out / "pictures" / f"{row:03d}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                _picture(test, row, arms).save(temporary, "PNG")
        except OSError as err:
            raise StoreError(f"{path} cannot be written: {err}; make room or choose another --out") from err
        paths.append(path)
    return paths


def _picture(test: LabelledSet, row: int, arms: Sequence[ArmScore]) -> Image.Image:
    """The image, the truth, and what each arm says, in a row under their names."""
    image, target = test.image(row), test.target(row)
    assert isinstance(target, Mask)
    truth = MaskPrediction(target.numbers * target.known)
    columns = [("truth", truth), *((arm.name, arm.drawn[row]) for arm in arms)]
    panels = [(name, painted(image, prediction, test.classes, 0.0)[0]) for name, prediction in columns]
    width, height = panels[0][1].size
    plain = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
    panels = [(test.keys[row], plain), *panels]
    whole = Image.new("RGB", (len(panels) * (width + _PAD_PX), height + _CAPTION_PX), "white")
    draw = ImageDraw.Draw(whole)
    for idx, (name, panel) in enumerate(panels):
        left = idx * (width + _PAD_PX)
        whole.paste(panel, (left, _CAPTION_PX))
        draw.text((left, 0), name, fill="black")
    return whole
