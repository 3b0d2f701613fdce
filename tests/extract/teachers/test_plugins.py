"""Teachers of other packages, installed as pip leaves them: a module and a dist-info folder with entry points."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers import plugins
from dtpipe.extract.teachers.registry import load_teacher, teacher_kinds
from dtpipe.manifests.errors import ConfigError, TeacherError

GOOD = '''
import torch
from dtpipe.extract.teachers.base import Encoder, TapSpec, TeacherKind, TeacherSpec


class Brightness:
    """Level l2: the mean of each 4x4 px, per channel."""

    def __init__(self):
        self.spec = TeacherSpec("brightness", "0" * 64, (32, 32), (TapSpec("l2", 4, 3, "mean"),))

    def encode(self, images, noise, views):
        return {"l2": torch.stack([torch.nn.functional.avg_pool2d(images, 4) for _ in views], 1)}


def kind(name, reads, matches, teacher=Brightness):
    return TeacherKind(name, reads, Encoder, matches, lambda config, device: teacher())


BRIGHTNESS = kind("brightness", "Any .bright file.", lambda path: path.endswith(".bright"))


def give():
    return BRIGHTNESS


def nothing():
    pass


def number():
    return 3


def fail():
    raise RuntimeError("half way")


def leave():
    raise SystemExit("needs a licence")


def rude():
    return kind("rude", "Everything.", lambda path: 1 / 0)


def mute():
    return kind("mute", "Any .mute file.", lambda path: path.endswith(".mute"), object)


def taken():
    return kind("ddpm", "Mine.", lambda path: True)
'''


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to install into."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    plugins._kind_of.cache_clear()
    yield folder
    plugins._kind_of.cache_clear()
    for name in [name for name in sys.modules if name.startswith("plugin_of_a_test")]:
        del sys.modules[name]


def install(site: Path, source: str, package: str = "plugin-of-a-test", **entry_points: str) -> None:
    """One distribution; an entry point is written as what follows its module's name."""
    module = package.replace("-", "_")
    (site / f"{module}.py").write_text(source)
    info = site / f"{module}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    lines = "".join(f"{name} = {module}{target}\n" for name, target in entry_points.items())
    (info / "entry_points.txt").write_text(f"[dtpipe.teachers]\n{lines}")


@pytest.mark.parametrize(
    ("source", "target"),
    [(GOOD, ":give"), (GOOD, ":BRIGHTNESS"), (f"{GOOD}\nKIND = BRIGHTNESS\n", "")],
    ids=["function that returns a kind", "a kind", "module that declares one"],
)
def test_each_form_of_entry_point_brings_its_teacher(
    source: str, target: str, site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(site, source, brightness=target)
    assert teacher_kinds() == teacher_kinds()
    assert caplog.text == ""
    assert teacher_kinds()["brightness"].reads == "Any .bright file."
    assert load_teacher(TeacherConfig(path="some.bright")).spec.kind == "brightness"


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        (
            "import a_package_that_is_not_there",
            "",
            "ModuleNotFoundError: No module named 'a_package_that_is_not_there'",
        ),
        ("def x(:", "", "SyntaxError"),
        (GOOD, ":absent", "AttributeError"),
        (GOOD, ":fail", "RuntimeError: half way"),
        (GOOD, ":leave", "SystemExit: needs a licence"),
        (GOOD, ":nothing", "it declares no teacher"),
        (GOOD, "", "it declares no teacher"),
        (GOOD, ":number", "it gives a int, not a TeacherKind"),
        (GOOD, ":taken", "kind 'ddpm' is registered already"),
    ],
)
def test_a_broken_plugin_is_named_and_harms_no_other(
    source: str, target: str, reason: str, site: Path, ddpm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = teacher_kinds()
    install(site, source, bad=target)
    install(site, GOOD, "plugin-of-a-test-that-works", brightness=":give")
    assert teacher_kinds() == teacher_kinds()
    assert len(caplog.records) == 1
    assert "plugin-of-a-test 1.2 (bad = plugin_of_a_test" in caplog.text
    assert reason in caplog.text
    kinds = teacher_kinds()
    assert {name: kinds[name] for name in before} == before
    assert kinds.keys() - before.keys() == {"bad", "brightness"}
    assert reason in kinds["bad"].reads
    assert load_teacher(TeacherConfig(path="some.bright")).spec.kind == "brightness"
    assert load_teacher(TeacherConfig(path=str(ddpm))).spec.kind == "ddpm"
    with pytest.raises(TeacherError, match=r"plugin-of-a-test 1\.2 .* is broken: .* mend or uninstall the package"):
        load_teacher(TeacherConfig(path="anything", kind="bad"))


def test_a_plugin_that_fails_to_match_does_not_keep_others_from_it(
    site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(site, GOOD, a_rude=":rude", brightness=":give")
    assert load_teacher(TeacherConfig(path="some.bright")).spec.kind == "brightness"
    assert "plugin-of-a-test 1.2: matches('some.bright') of kind rude raised ZeroDivisionError" in caplog.text


def test_a_plugin_whose_teacher_lacks_the_methods_it_declares_is_refused(site: Path) -> None:
    install(site, GOOD, mute=":mute")
    with pytest.raises(TeacherError, match=r"some\.mute: kind mute gives a object, which lacks the methods"):
        load_teacher(TeacherConfig(path="some.mute"))


def test_options_that_a_family_does_not_declare_are_refused(site: Path) -> None:
    """This one reads none, so it would pass over them in silence."""
    install(site, GOOD, brightness=":give")
    with pytest.raises(ConfigError, match=r"extract\.teacher\.options\.seed: .*options of this teacher: none"):
        load_teacher(TeacherConfig(path="some.bright", options={"seed": 3}))


def test_images_are_extracted_with_an_installed_teacher(site: Path, image_folder: Path, tmp_path: Path) -> None:
    install(site, GOOD, brightness=":give")
    install(site, "raise ValueError('worn out')", "plugin-of-a-test-worn", worn="")
    config = {
        "images": str(image_folder),
        "teacher": {"path": "some.bright"},
        "shard": {"samples": 4, "dtype": "float32"},
        "run": {"out": str(tmp_path / "features"), "inline": True, "device": "cpu"},
    }
    program = f"""
import json, sys
import numpy as np
sys.path.insert(0, {str(site)!r})
from dtpipe.extract.config import ExtractConfig
from dtpipe.extract.run import run_extraction
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_image, read_level
result = run_extraction(ExtractConfig.model_validate(json.loads({json.dumps(config)!r})))
dataset = FeatureDataset.open(result.url)
cells = [read_image(dataset, row).reshape(8, 4, 8, 4, 3).mean((1, 3)) for row in range(8)]
wanted = [mean.transpose(2, 0, 1) / 127.5 - 1 for mean in cells]
error = max(float(np.abs(read_level(dataset, "l2", row) - wanted[row]).max()) for row in range(8))
print(json.dumps([dataset.recipe.teacher.kind, result.num_ok, error]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kind, num_ok, error = json.loads(done.stdout)
    assert (kind, num_ok) == ("brightness", 8)
    assert error < 1e-6
    assert "plugin-of-a-test-worn 1.2 (worn = plugin_of_a_test_worn) is broken: ValueError: worn out" in done.stderr
