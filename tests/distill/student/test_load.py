"""The student's levels, normalisation and errors."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.student.distiller import build_distiller, choose_levels, norms_for
from dtpipe.distill.student.load import NAMES_KEY, STUDENT_KEY, load_student
from dtpipe.distill.student.student import StudentSpec, build_student, spec_from_dict, spec_to_dict
from dtpipe.manifests.errors import ConfigError, DamagedDataError, InputError
from parts import paths
from parts.memory import level_spec, tiny_config, write_student


def images(px: int, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, px, px, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(
    ("name", "px", "strides"),
    [
        ("resnet10t", 64, (4, 8, 16, 32)),
        ("convnext_atto", 64, (4, 8, 16, 32)),
        ("swin_tiny_patch4_window7_224", 96, (4, 8, 16, 32)),
    ],
)
def test_levels_are_nchw_at_their_strides(name, px, strides):
    student = build_student(StudentSpec(name, 4, (px, px))).eval()
    levels = student(images(px))
    assert student.strides == strides
    assert [tuple(level.shape) for level in levels] == [
        (2, c, px // s, px // s) for s, c in zip(strides, student.channels, strict=True)
    ]


def test_images_get_timms_mean_and_deviation():
    """A picture normalised as torchvision does it, through plain timm, gives the same levels."""
    student = build_student(StudentSpec("resnet10t", 4, (64, 64))).eval()
    plain = timm.create_model("resnet10t", features_only=True).eval()
    plain.load_state_dict(student.net.state_dict())
    picture = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    theirs = plain((picture - mean[:, None, None]) / std[:, None, None])[1:]
    for ours, other in zip(student(picture * 2 - 1), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


def test_a_model_with_its_own_mean_keeps_it():
    student = build_student(StudentSpec("vit_tiny_patch16_224", 16, (32, 32)))
    assert student.normalise(torch.full((1, 3, 2, 2), 0.7)).flatten().tolist() == pytest.approx([0.7] * 12)


def test_an_unknown_student_is_refused_with_close_names():
    with pytest.raises(ConfigError, match="resnet10t"):
        build_student(StudentSpec("resnet10", 4, (32, 32)))


def test_missing_strides_are_refused_listing_what_the_model_has(tmp_path):
    levels = [level_spec("l0", 1, 4), level_spec("l2", 4, 4), level_spec("l3", 8, 4)]
    with pytest.raises(ConfigError, match=r"no level of stride \[1\].*it has \[2, 4, 8, 16, 32\]; keep l2,l3"):
        build_distiller(tiny_config(tmp_path), levels, (32, 32))
    with pytest.raises(ConfigError, match=r"no level of stride \[1\].*it has \[4, 8, 16, 32\]; keep l2,l3"):
        build_distiller(tiny_config(tmp_path, student={"name": "test_vit"}), levels, (32, 32))
    with pytest.raises(
        ConfigError, match=r"no level of stride \[4, 8\].*it has \[16, 32, 64\]; choose another student"
    ):
        build_distiller(tiny_config(tmp_path, student={"name": "efficientvit_m0"}), levels[1:], (64, 64))


def test_a_size_that_the_model_cannot_take_is_refused_before_training(tmp_path):
    config = tiny_config(tmp_path, student={"name": "test_vit"})
    with pytest.raises(ConfigError, match=r"patches of 16 px, which do not divide its images of 40x47 px; .*\[32,48\]"):
        build_distiller(config, [level_spec("l2", 4, 4)], (40, 47))
    config = tiny_config(tmp_path, student={"name": "convit_tiny"})
    with pytest.raises(ConfigError, match=r"convit_tiny cannot take images of 64x96 px: .*timm's own is 224x224"):
        build_distiller(config, [level_spec("l2", 4, 4)], (64, 96))


def test_levels_are_chosen_by_name_and_ordered_by_stride():
    stored = [level_spec("l4", 16, 4), level_spec("l2", 4, 4), level_spec("l4.b", 16, 4)]
    assert [level.name for level in choose_levels(stored, None)] == ["l2", "l4", "l4.b"]
    assert [level.name for level in choose_levels(stored, ("l4.b",))] == ["l4.b"]
    with pytest.raises(ConfigError, match=r"\['l9'\].*\['l2', 'l4', 'l4.b'\]"):
        choose_levels(stored, ("l9",))


def test_micro_batches_of_one_need_a_model_without_batch_norm(tmp_path):
    levels = [level_spec("l2", 4, 4)]
    with pytest.raises(ConfigError, match="batch norm"):
        build_distiller(tiny_config(tmp_path, micro_batch=1), levels, (32, 32))
    free = tiny_config(
        tmp_path, micro_batch=1, student={"name": "test_convnext"}, regressor={"norm": "group", "width": 8}
    )
    build_distiller(free, levels, (32, 32))


def test_a_single_sample_passes_batch_norms_with_running_statistics(tmp_path):
    model = build_distiller(tiny_config(tmp_path), [level_spec("l5", 32, 4)], (32, 32)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with norms_for(model, 1):
        model(images(32, batch=1))  # a level of one cell: batch statistics would raise
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_initial_weights_follow_the_seed(tmp_path):
    config: DistillConfig = tiny_config(tmp_path)
    states = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            states.append(build_distiller(config, [level_spec("l2", 4, 4)], (32, 32)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["student.net.conv1.0.weight"], states[2]["student.net.conv1.0.weight"])


def test_a_dataset_in_place_of_a_student_is_called_so():
    with pytest.raises(InputError, match=r"v1_zarr: is a feature dataset, not a student; `dtpipe distill .* makes one"):
        load_student(paths.GOLDEN / "v1_zarr")


def test_load_student_reads_folder_and_file_and_prefers_the_average(tmp_path):
    write_student(tmp_path / "last.pt", "resnet10t", ema=True)
    average, trained = load_student(tmp_path), load_student(tmp_path / "last.pt", ema=False)
    assert not average.training
    weight, halved = trained.net.conv1[0].weight, average.net.conv1[0].weight
    torch.testing.assert_close(weight * 0.5, halved)
    assert spec_from_dict(spec_to_dict(average.spec)) == average.spec


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("[" * 100_000, "nests lists or mappings too deep"),
        ('{"name": "resnet10t", "min_stride": ' + "9" * 5000 + "}", "not readable as JSON"),
        ('{"name": "resnet10t"}', "is no description of a student"),
        ("[1]", "is no description of a student"),
    ],
)
def test_an_export_whose_metadata_is_nonsense_is_damaged(tmp_path, metadata, words):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {STUDENT_KEY: metadata})
    with pytest.raises(
        DamagedDataError, match=rf"model.safetensors: its metadata dtpipe_student.* {words}.*export again"
    ):
        load_student(tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("[", "dtpipe_names: is not readable as JSON"),
        ("[1]", "dtpipe_names: is no table of names"),
        ('{"a": 1}', "dtpipe_names: is no table of names"),
        ("{}", "weights are not those of test_resnet"),
        ('{"a": "conv1.weight"}', "weights are not those of test_resnet"),
    ],
)
def test_an_export_of_other_names_or_weights_than_its_students_is_damaged(tmp_path, names, words):
    spec = json.dumps(spec_to_dict(StudentSpec("test_resnet", 4, (32, 32))))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {STUDENT_KEY: spec, NAMES_KEY: names})
    with pytest.raises(DamagedDataError, match=rf"model.safetensors: its .*{words}.*; export again"):
        load_student(tmp_path)
