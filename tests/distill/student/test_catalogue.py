"""What is said of timm's models as students is true of the models."""

from __future__ import annotations

import random

import pytest
import timm

from dtpipe.distill.student import catalogue
from dtpipe.distill.student.catalogue import level_strides, stride_text, students


def test_recorded_strides_are_those_of_the_models():
    """One of each group, another one for each version of timm."""
    groups = catalogue._recorded()
    generator = random.Random(timm.__version__)
    chosen = {name: strides for strides, names in groups.items() for name in generator.sample(names, 1)}
    chosen = {name: strides for name, strides in chosen.items() if timm.is_model(name)}
    assert len(chosen) > 8
    assert {name: level_strides(name) for name in chosen} == chosen


@pytest.mark.skipif(timm.__version__ != catalogue._document()["timm"], reason="another timm than the recorded one")
def test_every_model_of_the_recorded_timm_is_there_once():
    names = [name for group in catalogue._recorded().values() for name in group]
    assert sorted(names) == sorted(timm.list_models())


def test_a_model_that_is_not_recorded_is_built_to_see(monkeypatch):
    monkeypatch.setattr(catalogue, "_recorded", dict)
    assert students(["test_vit", "test_resnet", "efficientvit_m0"]) == {
        "test_vit": (16,),
        "test_resnet": (2, 4, 8, 16, 32),
        "efficientvit_m0": (16, 32, 64),
    }


def test_the_text_says_what_a_student_cannot_serve():
    assert stride_text((2, 4, 8, 16, 32)) == "strides 2, 4, 8, 16, 32"
    assert stride_text((16,)) == "stride 16; a simple pyramid makes 4, 8, 16, 32"
    assert stride_text((16, 32, 64)) == "strides 16, 32, 64; not for levels of stride 4, 8"
