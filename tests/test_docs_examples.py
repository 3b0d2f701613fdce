"""Code of one's own that the documents show: each example is what it says, and the teacher is extracted with."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.neighbors import NearestCentroid

from dtpipe.distill.config import LossConfig
from dtpipe.distill.downstream import registry as tasks
from dtpipe.distill.downstream.compare import run_probe
from dtpipe.extract.noise import draw_noise
from dtpipe.extract.run import run_extraction
from dtpipe.extract.teachers import plugins
from dtpipe.manifests.codecs import registry as codecs
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_image, read_level
from parts.command_line import RefusedError, dtpipe, said
from parts.documents import blocks
from parts.images import write_images
from parts.labelled import all_images, with_classes
from parts.packing import contents, folder_files
from parts.paths import REPO

CONTRIBUTING = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXTEND = (REPO / "docs" / "extend.md").read_text(encoding="utf-8")
TEMPLATE = REPO / "examples" / "teacher"


def example(path: str) -> dict[str, Any]:
    """What the example file of that path defines."""
    (code,) = (code for code in blocks(EXTEND, "python") if code.startswith(f"# {path}\n"))
    module = ModuleType(path)
    sys.modules[path] = module  # dataclasses look their module up
    exec(compile(code, path, "exec"), vars(module))
    return vars(module)


def test_the_rooms_and_registries_are_there() -> None:
    named = [path for text in (CONTRIBUTING, EXTEND) for path in re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)`", text)]
    assert len(named) >= 20
    assert [path for path in named if not (REPO / path).exists()] == []


def test_the_example_of_a_loss_is_one() -> None:
    loss = example("distill/losses/huber.py")["LOSS"].build(LossConfig())
    student, teacher = torch.tensor([0.5, 3.0]).view(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    assert float(loss(student, teacher, teacher)) == pytest.approx((0.5 * 0.5**2 + (3 - 0.5)) / 2)


def test_the_example_of_a_source_reads_images(image_folder: Path, tmp_path: Path) -> None:
    kind = example("extract/sources/path_list.py")["KIND"]
    files = folder_files(image_folder)
    (image_folder / "train.list").write_text("\n".join(reversed(files)))
    assert kind.recognise(str(image_folder)) is None
    assert contents(kind.recognise(f"{image_folder}/train.list")) == files


def test_the_example_of_a_codec_rounds_as_torch_does_and_keeps_its_promise() -> None:
    codec = example("manifests/codecs/bfloat16.py")["CODEC"]
    spec = SimpleNamespace(channels=4, height=8, width=8, dtype="float32", codec=SimpleNamespace(parameters={}))
    level = codec.open(spec, None)
    features = np.random.default_rng(0).normal(size=(3, 4, 8, 8)).astype("f4") * np.float32(10) ** np.arange(
        -9, 9, 6
    ).reshape(3, 1, 1, 1)
    parts = level.encode(features)
    decoded = level.decode(parts)
    np.testing.assert_array_equal(decoded, torch.from_numpy(features).bfloat16().float().numpy())
    lost = np.sqrt(np.square(decoded - features.astype(np.float64)).mean(axis=(1, 2, 3)))
    assert (lost <= level.error(parts)).all() and (level.error(parts) < 8 * lost).all()


def test_a_dataset_is_stored_under_the_example_of_a_codec(make_config: Any, tmp_path: Path, monkeypatch) -> None:
    codec = example("manifests/codecs/bfloat16.py")["CODEC"]
    exact = FeatureDataset.open(run_extraction(make_config(shard={"dtype": "float32"})).url)
    monkeypatch.setitem(codecs.CODECS, codec.name, codec)
    other = {"out": str(tmp_path / "coded"), "codec": {"name": "bfloat16"}}
    coded = FeatureDataset.open(run_extraction(make_config(shard={"dtype": "float32"}, **other)).url)
    for level in exact.levels:
        truth = torch.from_numpy(read_level(exact, level.name, 2)).bfloat16().float()
        np.testing.assert_array_equal(read_level(coded, level.name, 2), truth.numpy())


def test_the_example_of_a_task_scores_as_scikit_learn_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from dtpipe.distill.downstream.extractors import FeatureExtractor

    task = example("distill/downstream/frozen/centroid.py")["TASK"]
    monkeypatch.setitem(tasks.FROZEN_TASKS, task.name, task)
    rng, sets = np.random.default_rng(0), []
    for part in range(2):
        labels = np.arange(60) % 3
        pixels = 80 + 30 * labels[:, None] + rng.normal(0, 25, (60, 3))
        images = np.repeat(pixels.clip(0, 255).astype(np.uint8), 64, axis=0).reshape(60, 8, 8, 3)
        sets.append(with_classes(images, [f"{part}/{idx}" for idx in range(60)], labels))
    colours = FeatureExtractor("colours", lambda images: {"l3": images.permute(0, 3, 1, 2).float()})
    (score,) = run_probe("centroid", [colours], *sets, [None], [0]).scores
    means = [all_images(part).mean(axis=(1, 2)) for part in sets]
    truth = NearestCentroid().fit(means[0], sets[0].read_classes()).score(means[1], sets[1].read_classes())
    assert 0.5 < truth < 1 and score.value == pytest.approx(truth)


# --- the template of a teacher ---------------------------------------------------------------------------------------


@pytest.fixture
def my_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The template, installed as pip leaves it: the module, and a record of its entry points."""
    site = tmp_path / "site"
    record = site / "my_teacher-0.1.dist-info"
    record.mkdir(parents=True)
    project = tomllib.loads((TEMPLATE / "pyproject.toml").read_text())
    for name in project["tool"]["setuptools"]["py-modules"]:
        (site / f"{name}.py").write_text((TEMPLATE / f"{name}.py").read_text())
    (points,) = project["project"]["entry-points"].items()
    lines = [f"[{points[0]}]", *(f"{name} = {value}" for name, value in points[1].items())]
    (record / "entry_points.txt").write_text("\n".join(lines))
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: my-teacher\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(str(site))
    plugins._kind_of.cache_clear()
    import importlib

    yield importlib.import_module("my_teacher")
    del sys.modules["my_teacher"]
    plugins._kind_of.cache_clear()


def test_the_template_of_a_teacher_extracts_what_its_network_gives(my_teacher: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = my_teacher.Network().eval()
    save_file(network.state_dict(), tmp_path / "net.mine.safetensors")
    photos, out = write_images(tmp_path / "photos", 4), tmp_path / "features"
    flags = ["--images", photos, "--teacher", tmp_path / "net.mine.safetensors", "--out", out, "--px", 64]
    exact = ["-s", "extract.shard.dtype=float32", "-s", "extract.teacher.options.sigma=0.5"]
    dtpipe("extract", *flags, *exact, "--flips", "--inline")
    dataset = FeatureDataset.open(out)
    assert dataset.recipe.teacher.options == {"sigma": 0.5}
    for row, key in enumerate(dataset.columns.keys):
        image = torch.from_numpy(read_image(dataset, row)).permute(2, 0, 1)[None].float() / 127.5 - 1
        noise = torch.from_numpy(draw_noise(0, key, 0, "forward", (1, 3, 64, 64)))
        for view, shown in enumerate((image, image.flip(-1))):
            with torch.no_grad():
                inner = network.down(shown + 0.5 * noise)
                levels = {"l3": inner, "l2": network.up[:2](inner)}
            for name, level in levels.items():
                np.testing.assert_allclose(read_level(dataset, name, row, view), level[0], rtol=1e-4, atol=1e-5)


def test_the_template_says_what_is_wrong_in_sentences(my_teacher: Any, tmp_path: Path) -> None:
    save_file({"other": torch.zeros(1)}, tmp_path / "net.mine.safetensors")
    flags = ["--images", write_images(tmp_path / "photos", 1), "--teacher", tmp_path / "net.mine.safetensors"]
    with pytest.raises(RefusedError, match=r"weights do not fit .*; give another"):
        said("extract", *flags, "--out", tmp_path / "out", "--inline")
    with pytest.raises(RefusedError, match=r"options\.sigma: Input should be greater.*options of this teacher: sigma"):
        said("extract", *flags, "--out", tmp_path / "out", "--inline", "-s", "extract.teacher.options.sigma=-1")
    assert "my_teacher" in json.dumps(dtpipe("list", "teachers"))
