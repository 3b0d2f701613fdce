"""Settings of the commands that belong to no stage: eval, export, report, demo."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from dtpipe.distill.downstream.config import ProbeConfig
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.manifests.labels import IGNORE_VALUE
from dtpipe.manifests.schema import DeviceName, ErrorBudget, Resize, Size, StrictModel
from dtpipe.manifests.store.paths import any_place, local_place, whole_if_there, whole_place

_LAYOUT_NAME = re.compile(r"[a-z][a-z0-9-]+")


def whole_labelled(place: str | None) -> str | None:
    """A URL, or a layout's word with its root, as `whole_place` gives it."""
    from dtpipe.extract.sources.layouts.registry import LAYOUTS, parse_layout

    if place is None:
        return None
    parsed = parse_layout(place)
    if parsed is None:
        whole = whole_place(place)
        name = place.partition(":")[0]
        if whole != place and name != place and _LAYOUT_NAME.fullmatch(name) and not Path(whole).exists():
            near = "".join(f"; {near} is one" for near in difflib.get_close_matches(name, LAYOUTS, 1))
            raise ValueError(f" is {place}, and no layout is called {name}{near}; `dtpipe list layouts` names them")
        return whole
    layout, root, split = parsed
    return f"{layout.name}:{whole_place(root)}" + (f"@{split}" if split else "")


class LabelledImages(StrictModel):
    """Which images are learned from and which are held out, with their labels."""

    SECTION: ClassVar[str] = "eval"
    """Of the settings that these are part of, for messages."""

    images: str = Field(
        description="Labelled images: NAME:ROOT@SPLIT of a layout (`dtpipe list layouts`), class folders, or any URL "
        "with --masks."
    )
    masks: str | None = Field(
        default=None,
        description="URL of masks: PNG files with the images' paths and a class number per pixel, 0 background.",
    )
    class_names: str | None = Field(
        default=None,
        description="File with the names of the classes of --masks: a line each, 0 first, or JSON; default: numbers.",
    )
    keys: str | None = Field(
        default=None,
        description="File with one key of --images per line: only these are labelled; all others are held out, where "
        "there is no --test-images.",
    )
    test_images: str | None = Field(
        default=None,
        description="Layout or URL of the labelled images to score on, as --images; default: a share of those.",
    )
    test_masks: str | None = Field(default=None, description="URL of the masks of --test-images.")
    test_share: float = Field(
        default=0.5, gt=0, lt=1, description="Share of --images kept to score on, when there is no --test-images."
    )
    foreground: bool = Field(
        default=False,
        description="Merge all mask classes but 0 into one; for masks of 0 and 255, with --ignore-value null.",
    )
    ignore_value: int | None = Field(
        default=255,
        ge=0,
        le=255,
        description="Mask value that means 'no label': such pixels are not learned from and not scored; null: all are.",
    )
    limit: int | None = Field(default=None, ge=2, description="Use only so many images.")
    seed: int = Field(default=0, ge=0, description="Seed of the split and the draws.")

    _whole = field_validator("masks", "test_masks", "class_names", "keys")(whole_place)
    _whole_labelled = field_validator("images", "test_images")(whole_labelled)

    @model_validator(mode="after")
    def _masks_go_together(self) -> Self:
        if self.test_images and (self.masks is None) != (self.test_masks is None):
            raise ValueError(f"{self.SECTION}.masks and {self.SECTION}.test_masks go together; give both or neither")
        return self

    @model_validator(mode="after")
    def _layouts_say_where_labels_lie(self) -> Self:
        from dtpipe.extract.sources.layouts.registry import parse_layout

        places = [name for name in (self.images, self.test_images) if name is not None]
        layouts = {name: parsed[0] for name in places if (parsed := parse_layout(name))}
        others = {"masks": self.masks, "test_masks": self.test_masks, "class_names": self.class_names}
        given = [name for name, value in others.items() if value is not None]
        if layouts and given:
            raise ValueError(
                f"{next(iter(layouts))} says where its labels are; {self.SECTION}.{given[0]} is for a URL of images"
            )
        fixed = [name for name, layout in layouts.items() if layout.open_ignoring is None]
        if fixed and self.ignore_value != IGNORE_VALUE:
            raise ValueError(
                f"{fixed[0]} says itself what has no label; {self.SECTION}.ignore_value is for --masks and masks:ROOT, "
                "leave it out"
            )
        if self.class_names and not self.masks:
            where = self.SECTION
            raise ValueError(
                f"{where}.class_names names the classes of {where}.masks, and there are none; give --masks"
            )
        return self


class EvalConfig(LabelledImages):
    """What to score, on which labels, beside what."""

    checkpoint: str = Field(
        description="Run folder, checkpoint or export of the student to score; several, one for each seed, are one arm."
    )
    task: str = Field(description="Downstream task, on frozen features or trained; `dtpipe list tasks` names them.")
    resplit: bool = Field(
        default=False,
        description="Of tasks that train: each seed holds out other images, as many of all as are held out otherwise; "
        "with --test-images these are the splits of the label-efficient benchmark.",
    )
    px: Size | None = Field(
        default=None,
        description="Side, or height and width, in px of images; default: the student's; tasks that train: whole.",
    )
    resize: Resize = Field(default="center_crop", description="How images come to that size; masks follow.")
    labelled: tuple[int | Literal["all"], ...] | None = Field(
        default=None,
        min_length=1,
        description="Numbers of labelled images, of all classes together (of 5 classes, 10 is two of each); "
        "default: 5, 20, 80 and all for masks; 1, 5 and 20 times the number of classes and all for classes.",
    )
    seeds: int | None = Field(
        default=None,
        ge=1,
        description="Draws of the labelled images, initialisations and runs, that pair across arms; "
        "default: as many as an arm has runs, else 3.",
    )
    compare: tuple[str, ...] = Field(
        default=(),
        description="Another arm: [NAME=]RUN, RUN,RUN for seeds of one arm, or a file of another project's weights as "
        "MODEL@FILE (a timm model), or timm:MODEL. Repeatable.",
    )
    teacher: str | None = Field(
        default=None,
        description="Teacher whose own features are scored too; default: the one that made the run's dataset.",
    )
    timestep: int | None = Field(
        default=None, ge=0, description="Timestep of the teacher's features; default: the dataset's."
    )
    device: DeviceName = Field(default="auto", description="Where features are computed.")
    out: str | None = Field(default=None, description="JSON file to write; default: eval/TASK.json in the run folder.")
    add_to: str | None = Field(
        default=None,
        description="Of tasks that train: JSON file of an earlier table, made here or elsewhere, that these seeds are "
        "added to; eval.seed is the first of them. They train at its rates, unless each seed chooses its own.",
    )
    probe: ProbeConfig = ProbeConfig()
    tune: TuneConfig | None = Field(default=None, description="How backbone and head are trained, by tasks that train.")

    _whole_teacher = field_validator("teacher")(whole_if_there)
    _local = field_validator("checkpoint", "compare", "out", "add_to")(local_place)

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _one_arm(cls, value: object) -> object:
        """Runs that were given one by one are one arm."""
        return ",".join(value) if isinstance(value, list) and all(isinstance(run, str) for run in value) else value

    @model_validator(mode="after")
    def _keys_say_what_is_labelled(self) -> EvalConfig:
        if self.keys and self.resplit:
            raise ValueError("eval.keys names the labelled images, and eval.resplit draws them anew; leave out one")
        return self

    @model_validator(mode="after")
    def _rates_see_no_held_out_image(self) -> EvalConfig:
        if self.resplit and self.tune is not None and self.tune.lr_choice == "first_seed" and self.tune.lr_grid:
            raise ValueError(
                "with eval.resplit, the first seed's labelled images are held out at others, and must not choose their "
                "rate; give -s eval.tune.lr_choice=each_seed"
            )
        return self


class ExportConfig(StrictModel):
    """Which student to write, for whom."""

    checkpoint: str = Field(
        description="Run folder or checkpoint, also of a tuned training; with --head of that, or of a distillation of "
        "soft labels."
    )
    out: str = Field(
        description="Folder to write: the weights, config.json, student.json and export.yaml, these settings."
    )
    layout: str = Field(default="timm", description="Which library loads it; `dtpipe list exports` names them.")
    head: bool = Field(
        default=False,
        description="Write backbone and head of a tuned training, or of a distillation of soft labels, as a predictor "
        "for `dtpipe predict`.",
    )

    _local = field_validator("checkpoint", "out")(local_place)

    @model_validator(mode="after")
    def _a_head_has_no_layout(self) -> ExportConfig:
        if self.head and self.layout != "timm":
            raise ValueError(f"a predictor has no layout, and export.layout is {self.layout}; leave out one of both")
        return self


class PredictConfig(ErrorBudget):
    """Which predictor, on which images."""

    predictor: str = Field(description="Folder that `dtpipe export --head` wrote.")
    images: str = Field(description="Images: NAME:ROOT@SPLIT of a layout, or the URL of any source.")
    out: str = Field(description="Folder to write.")
    overlay: bool = Field(default=False, description="Draw the predictions on the images too.")
    min_score: float = Field(default=0.5, ge=0, le=1, description="Lowest score of objects drawn on overlays.")
    px: Size | None = Field(
        default=None,
        description="Side, or height and width, in px that images are brought to first; default: as they are.",
    )
    resize: Resize = Field(default="center_crop", description="How images come to that size.")
    batch_size: int = Field(
        default=8, ge=1, description="Images at once; fewer where they have over 4 million pixels together."
    )
    device: DeviceName = Field(default="auto", description="Where predictions are made.")

    _whole = field_validator("images")(whole_labelled)
    _local = field_validator("predictor", "out")(local_place)


class ReportConfig(StrictModel):
    """What the page about a run, or a dataset, shows."""

    run: tuple[str, ...] = Field(
        min_length=1,
        description="Run folder of `dtpipe distill`, several beside each other on one page; or a feature dataset, or "
        "several as one.",
    )
    out: str | None = Field(
        default=None,
        description="HTML file to write; default: report.html in the run folder, of several comparison.html in the "
        "first one, of a dataset NAME-report.html in the working directory.",
    )
    join: bool = Field(
        default=False, description="Several datasets are joined by key, as `distill --join` does; else they follow."
    )
    samples: int = Field(default=256, ge=2, description="Samples of a dataset that are looked at, drawn by the seed.")
    num_images: int = Field(default=4, ge=1, le=64, description="Images shown with their maps and predictions.")
    clusters: int = Field(default=10, ge=2, le=64, description="Clusters of the segmentation maps.")
    cluster_images: int = Field(default=32, ge=1, description="Images whose cells are clustered together.")
    timesteps: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(50, 150, 250, 350),
        description="Timesteps of the activation maps of a diffusion teacher; []: no such maps.",
    )
    teacher: str | None = Field(default=None, description="Teacher to draw samples from.")
    num_samples: int = Field(default=16, ge=1, le=256, description="Samples drawn from the teacher.")
    sample_steps: int = Field(default=50, ge=1, description="Denoising steps per sample.")
    seed: int = Field(default=0, ge=0, description="Seed of the samples and of the choice of images.")

    _whole_teacher = field_validator("teacher")(whole_if_there)
    _places = field_validator("run")(any_place)
    _local = field_validator("out")(local_place)

    @field_validator("run", mode="before")
    @classmethod
    def _one_run(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


class DemoConfig(StrictModel):
    """How large the demonstration is."""

    out: str = Field(default="demo-out", description="Folder for everything that the demo writes.")
    images: str | None = Field(default=None, description="Your own folder of images instead of digit scenes.")
    teacher: str | None = Field(
        default=None, description="Teacher; default: the one shipped, or for --images a small one trained first."
    )
    num_images: int = Field(default=2000, ge=16, description="Scenes to make, or images of yours to use.")
    num_held_out: int = Field(
        default=400, ge=16, description="More scenes, of other digits and photographs, to score on."
    )
    epochs: int = Field(default=6, ge=1, description="Epochs of distillation.")
    teacher_steps: int = Field(default=600, ge=1, description="Training steps of the teacher for --images.")
    workers: int = Field(default=2, ge=1, description="Ray workers of the extraction.")
    seed: int = Field(default=0, ge=0, description="Seed of scenes, order, noise and initial weights.")

    _whole = field_validator("images")(whole_place)
    _whole_teacher = field_validator("teacher")(whole_if_there)
    _local = field_validator("out")(local_place)
