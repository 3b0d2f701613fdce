"""The sequence of docs/recipes.md, from a teacher to a scored student: planned for each row, and run whole for one.

In place of published teachers, large students and photographs stand tiny ones, of the right format.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import yaml
from click.testing import CliRunner

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.extract.sources.layouts.published.tables import published_classes
from dtpipe.pipeline.cli.main import main
from dtpipe.pipeline.cli.settings import gather, preset_names, validate
from parts.images import png, write_files, write_images
from parts.paper_runs import COLUMNS, header
from parts.paths import REPO
from parts.teachers import write_ddpm

PAGE = (REPO / "docs" / "recipes.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## Few labels")[2].partition("\n## ")[0]
LISTING, RENEWED = re.findall(r"^```sh\n(.*?)^```$", SECTION, re.DOTALL | re.MULTILINE)
PX = 32


def table(first: str) -> list[dict[str, str]]:
    """Rows of the table whose first column has this title."""
    lines = SECTION.partition(f"| {first} |")[2].split("\n\n")[0]
    titles, _, *rows = (f"| {first} |{lines}").splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (titles, *rows)]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]


ROWS, STUDENTS = table("row"), table("student")


def commands(values: Mapping[str, str], text: str = LISTING) -> list[list[str]]:
    """The words of each command, with a row's values in their places."""
    for name, value in values.items():
        text = text.replace(f"${name}", value)
    assert "$" not in text
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words[1:] for words in lines if words[0] == "dtpipe"]


def values_of(row: Mapping[str, str], student: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in {**row, **student}.items() if name.isupper()}


def test_the_sequence_is_set_by_its_first_line() -> None:
    said = dict(word.split("=") for word in LISTING.splitlines()[0].split())
    assert said == values_of(next(row for row in ROWS if row["row"] == "Cat-15"), STUDENTS[0])


def test_the_rows_are_the_papers() -> None:
    """Sets, students and mIoU of the label-efficient benchmark after mix distillation."""
    figures = {row["row"]: (float(row["ConvNeXt-B"]), float(row["ResNet-101"])) for row in ROWS}
    assert figures == {
        "Bedroom-28": (54.8, 49.9),
        "FFHQ-34": (61.2, 59.4),
        "Cat-15": (58.6, 56.7),
        "Horse-21": (67.6, 65.9),
    }
    for student in STUDENTS:
        text = " ".join(header(student["SCORED"]))
        assert all(f"{row['row']} {row[student['student']]}" in text for row in ROWS)
        assert timm.is_model(student["STUDENT"]) and student["SCORED"] in preset_names()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["row"])
def test_bytes_of_soft_labels_are_right(row: Mapping[str, str]) -> None:
    """Two views of float16 logits at stride 4 of 256 px."""
    num_classes = len(published_classes(row["SET"]))
    size = 2 * 2 * num_classes * 64 * 64 * COLUMNS[row["PRESET"]].run.num
    assert float(row["soft labels"].removesuffix(" TB")) == pytest.approx(size / 1e12, rel=0.05)


@pytest.mark.parametrize("student", STUDENTS, ids=lambda student: student["student"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["row"])
def test_distillation_is_equation_6_with_the_settings_of_the_preset(
    row: Mapping[str, str], student: Mapping[str, str]
) -> None:
    words = commands(values_of(row, student))[3]
    presets = [words[idx + 1] for idx, word in enumerate(words) if word == "-c"]
    given = {"distill.datasets": ["features", "labels"], "distill.join": True, "distill.run.out": "run"}
    config: DistillConfig = validate(gather(presets, {}, given), "distill")
    assert (config.loss.mse_weight, config.loss.at_weight) == (1, 10)
    assert (config.labels.temperature, config.labels.confidence) == (4, None)
    assert config.labels.weight in (None, 1)  # None: 1 where there are soft labels


@pytest.mark.parametrize("student", STUDENTS, ids=lambda student: student["student"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["row"])
def test_the_scored_head_has_the_layers_of_the_decoder(row: Mapping[str, str], student: Mapping[str, str]) -> None:
    """A head of another width, norm or pooling would start anew."""
    given = {"distill.run.out": "run", "eval.checkpoint": "run", "eval.images": "images"}
    document = gather([row["PRESET"], student["SCORED"]], {}, given)
    regressor, head = validate(document, "distill").regressor, validate(document, "eval").tune.head
    assert (head.width, head.norm, head.ppm_scales) == (regressor.width, regressor.norm, regressor.ppm_scales)


@dataclass(frozen=True)
class Workshop:
    """A folder with what the commands name, and settings that make them small."""

    root: Path
    teacher: Path

    def words(self, step: int, row: Mapping[str, str], student: Mapping[str, str], tiny: str) -> list[str]:
        """A step's command with places of this folder, a tiny student, and what the tiny teacher needs."""
        values = values_of(row, student) | {"STUDENT": tiny, "IMAGES": "images"}
        return self.small(commands(values)[step], step, live=step == 0)

    def small(self, words: Sequence[str], *steps: int, live: bool) -> list[str]:
        place = re.compile(r"^(ddpm-seg:)?((?:datasets|features|few|head|labels|runs|images)(?:/.*)?)$")
        placed = [place.sub(lambda found: f"{found[1] or ''}{self.root / found[2]}", word) for word in words]
        settings = [word for step in steps for word in ("-c", str(self.root / f"small{step}.yaml"))]
        return [*placed, *settings, *(["--teacher", str(self.teacher)] if live else []), "--json"]

    def write(self, sets: Sequence[str]) -> None:
        write_images(self.root / "images", px=PX)
        for name in sets:
            write_files(self.root / "datasets" / name / "real", few_labels(len(published_classes(name))))
        for step, small in enumerate(SMALL):
            (self.root / f"small{step}.yaml").write_text(yaml.safe_dump(small))


def few_labels(num_classes: int) -> dict[str, bytes]:
    """Three images to learn from and two held out; masks of two classes, as arrays beside them."""
    rng = np.random.default_rng(0)
    files: dict[str, bytes] = {}
    for split, num in (("train", 3), ("test", 2)):
        for idx in range(num):
            mask = np.full((PX, PX), num_classes - 1, np.int64)
            mask[: PX // 2] = 1
            image = rng.integers(0, 128, (PX, PX, 3)) + 120 * (mask == 1)[..., None]
            files[f"{split}/{idx}.png"] = png(image.astype(np.uint8))
            files[f"{split}/{idx}.npy"] = array_file(mask)
    return files


def array_file(array: np.ndarray) -> bytes:
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


STORED = {"shard": {"samples": 4}, "batch_size": 4, "run": {"inline": True, "device": "cpu"}}
TUNE = {
    **{"steps": 1, "batch_size": 2, "layer_groups": [], "drop_path": 0.0, "head": {"width": 32}},
    **{"augment": {"crop_px": [PX, PX], "short_px": [PX]}, "inference": {"short_px": PX}},
}
RIVALS = {"pixel_models": 1, "pixel_epochs": 1}
SMALL: tuple[dict[str, Any], ...] = (
    {"extract": {"transform": {"px": PX}, "teacher": {"dtype": "float32"}, **STORED}},
    {"interpret": {"width": 32, "epochs": 2, "warmup_epochs": 1, "rivals": RIVALS}},
    {"extract": STORED},
    {
        "distill": {
            **{"epochs": 1, "warmup_epochs": 0, "batch_size": 4, "micro_batch": 4},
            **{"regressor": {"width": 32}, "run": {"device": "cpu"}},
        }
    },
    {"eval": {"seeds": 1, "tune": TUNE}},
)
"""Of each step, laid over its presets."""
TINY = {"ConvNeXt-B": "test_convnext", "ResNet-101": "test_resnet"}


def invoke(words: Sequence[str]) -> dict[str, Any]:
    """A command's answer as JSON."""
    done = CliRunner().invoke(main, list(words))
    assert done.exit_code == 0, (words, done.output, done.exception)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """After the whole sequence of one row, but for its scores."""
    root = tmp_path_factory.mktemp("recipes")
    shop = Workshop(root, write_ddpm(root / "teacher"))
    shop.write([row["SET"] for row in ROWS])
    cat, resnet = next(row for row in ROWS if row["row"] == "Cat-15"), STUDENTS[1]
    for step in range(4):
        invoke(shop.words(step, cat, resnet, TINY["ResNet-101"]))
    return shop


def test_the_sequence_of_a_row_runs(workshop: Workshop) -> None:
    """The student of a mix knows the classes, and is scored from its backbone and decoder."""
    cat = next(row for row in ROWS if row["row"] == "Cat-15")
    answer = invoke(workshop.words(4, cat, STUDENTS[1], TINY["ResNet-101"]))
    assert {score["extractor"] for score in answer["scores"]} == {"distilled", "random initialisation"}
    assert "starts from the backbone and the decoder of its run" in json.dumps(answer)


def test_with_noise_renewed_in_every_step_few_features_are_enough(workshop: Workshop, tmp_path: Path) -> None:
    cat = next(row for row in ROWS if row["row"] == "Cat-15")
    values = values_of(cat, STUDENTS[1]) | {"STUDENT": TINY["ResNet-101"], "IMAGES": "images"}
    shop = Workshop(tmp_path, workshop.teacher)
    shop.write([cat["SET"]])
    extract, interpret, distill = commands(values, RENEWED)
    assert invoke(shop.small(extract, 0, live=True))["num_ok"] <= int(extract[extract.index("--limit") + 1])
    assert invoke(shop.small(interpret, 1, live=False))["num_labelled"] == 3
    invoke(shop.small(distill, 0, 3, live=True))
    assert {"mse", "at", "labels"} <= read_metrics(tmp_path / "runs" / "mix")[-1].keys()
    config = load_checkpoint(tmp_path / "runs" / "mix" / "last.pt", "distill")
    assert config["flips"] is True


@pytest.mark.parametrize(("row", "student"), [(row, STUDENTS[idx % 2]) for idx, row in enumerate(ROWS)])
def test_each_step_of_a_row_plans(row: Mapping[str, str], student: Mapping[str, str], workshop: Workshop) -> None:
    for step in range(5):
        words = workshop.words(step, row, student, TINY[student["student"]])
        fresh = [f"{word}-{row['SET']}" if words[idx - 1] == "--out" else word for idx, word in enumerate(words)]
        assert invoke([*fresh, "-n"])
