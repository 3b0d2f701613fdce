"""`dtpipe list`: every registry shows, and published teachers say size, place and licence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dtpipe.extract.teachers.files.published import published_teachers
from dtpipe.extract.teachers.registry import KINDS
from dtpipe.pipeline.cli.main import main
from dtpipe.pipeline.cli.names import LISTED, catalogue, published


@pytest.mark.parametrize("kind", LISTED)
def test_every_name_has_a_sentence(kind: str) -> None:
    names = catalogue(kind)[kind]
    assert names
    assert all(text for text in names.values())


def test_published_teachers_say_what_one_image_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTPIPE_CACHE", str(tmp_path))
    [found] = published("adm-imagenet")
    image, cells = 3 * 256 * 256, {4: 512, 8: 512, 16: 1024, 32: 1024}
    assert found.size_bytes == image + sum(2 * channels * (256 // stride) ** 2 for stride, channels in cells.items())
    assert found.url.startswith("https://") and found.licence == "MIT" and not found.cached
    path = tmp_path / "teachers" / "adm-imagenet" / found.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    path.touch()
    assert published("adm-imagenet")[0].cached


def test_list_students_says_which_levels_each_can_serve() -> None:
    text = CliRunner().invoke(main, ["list", "students", "--match", "*vit_*m0*"]).stdout
    assert "efficientvit_m0 strides 16, 32, 64; not for levels of stride 4, 8" in text
    text = CliRunner().invoke(main, ["list", "students", "--match", "vit_tiny_patch16_224"]).stdout
    assert "stride 16; a simple pyramid makes 4, 8, 16, 32" in text


def test_every_published_teacher_is_complete() -> None:
    teachers = published_teachers()
    assert len({teacher.name for teacher in teachers}) == len(teachers)
    for teacher in teachers:
        assert teacher.url.startswith(("https://", "hf://")) and teacher.licence, teacher.name
        assert min(teacher.image_px) >= 32 and all(level.startswith("l") for level in teacher.levels), teacher.name
        KINDS[teacher.kind].options.model_validate(teacher.options)


def test_list_teachers_prints_families_and_published_files_and_of_those_that_match_all_there_is() -> None:
    text = CliRunner().invoke(main, ["list", "teachers"]).stdout
    assert "guided-diffusion" in text and "adm-imagenet " in text and "list teachers --match NAME" in text
    assert "inversion_stride=10" not in text and "https://" not in text
    text = CliRunner().invoke(main, ["list", "teachers", "--match", "adm-imagenet"]).stdout
    assert "inversion_stride=10" in text and "https://openaipublic" in text and "biggan" not in text
    assert "teachers:" not in text  # no family is called so
    result = CliRunner().invoke(main, ["list", "losses", "--match", "adm"])
    assert result.stdout == "" and "no name matches 'adm'; `dtpipe list` shows what there is" in result.stderr
    text = CliRunner().invoke(main, ["list", "teachers", "--match", "module"]).stdout
    assert "z_shape=null" in text and "from:" not in text
    document = json.loads(CliRunner().invoke(main, ["list", "teachers", "--json", "--match", "adm*"]).stdout)
    assert {each["kind"] for each in document["published"]} == {"adm"} == set(document["teachers"])
