"""Whose a BigGAN file is: conversions of DeepMind's compute with their epsilons, and no BigBiGAN passes for another."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers.biggan.icgan import load_icgan_teacher
from dtpipe.extract.teachers.biggan.network import BigGanLayout
from dtpipe.extract.teachers.biggan.origin import CONVERTED, TRAINED, default_epsilons, say_what_is_assumed
from dtpipe.extract.teachers.biggan.teacher import load_biggan_teacher
from dtpipe.extract.teachers.files.published import locate, published_teachers
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.errors import ConfigError, TeacherError
from parts import biggan_cases as cases

Weights = dict[str, Tensor]
TOLERANCE = 1e-4  # as in test_teacher.py


def load(tensors: Weights, folder: Path, name: str = "G_ema.pth", **options: Any) -> Any:
    path = cases.save(tensors, folder, name)
    return load_biggan_teacher(TeacherConfig(path=str(path), options=options))


CONVERSIONS: dict[str, Callable[[str, Tensor], Tensor | None]] = {
    "without sv0": lambda name, tensor: None if name.endswith("sv0") else tensor,
    "with the sv0 that a fresh network has": lambda name, tensor: torch.ones(1) if name.endswith("sv0") else tensor,
    "with gamma as a vector": lambda name, tensor: tensor.reshape(1) if name.endswith("gamma") else tensor,
    "as BigGAN-PyTorch's converter leaves it": lambda name, tensor: (
        None if name.endswith("sv0") else tensor.reshape(1) if name.endswith("gamma") else tensor
    ),
}


def converted(form: str, case: str = "biggan512") -> Weights:
    changed = {name: CONVERSIONS[form](name, tensor) for name, tensor in cases.weights(case).items()}
    return {name: tensor for name, tensor in changed.items() if tensor is not None}


@pytest.mark.parametrize("form", CONVERSIONS)
def test_a_conversion_computes_with_deepminds_epsilons(form: str, tmp_path: Path) -> None:
    path = cases.save(converted(form), tmp_path)
    config = TeacherConfig(path=str(path), taps=cases.taps_of("biggan512"), options={"class_label": cases.CLASSES[0]})
    teacher = load_biggan_teacher(config)
    assert (teacher.spec.options["bn_eps"], teacher.spec.options["sn_eps"]) == (1e-4, 1e-4)
    images, levels = teacher.synthesize({"z": cases.latents(teacher.network.layout.z_size)})
    assert max(cases.largest_errors("biggan512", 0, images, levels).values()) < TOLERANCE


def test_a_trained_network_keeps_its_own_epsilons() -> None:
    assert default_epsilons(cases.weights("class_cond")) == TRAINED
    assert default_epsilons(cases.weights("lookup")) == TRAINED  # has no spectral norms at all
    assert default_epsilons(converted("without sv0", "class_cond")) == CONVERTED


def test_a_wrong_epsilon_would_show(tmp_path: Path) -> None:
    """Otherwise the tests above could pass with any."""
    tensors = converted("with the sv0 that a fresh network has")
    noise = {"z": cases.latents(16)}
    right, wrong = (load(tensors, tmp_path, class_label=0, bn_eps=eps).synthesize(noise)[1] for eps in (1e-4, 1e-5))
    assert max(float((right[name] - wrong[name]).abs().max()) for name in right) > 1e-4


# BigBiGAN


def test_a_conversion_that_may_be_a_bigbigan_needs_its_class_said(tmp_path: Path) -> None:
    tensors = converted("with the sv0 that a fresh network has", "class_cond")
    with pytest.raises(ConfigError, match=r"class_label to 0 for a BigBiGAN, to sampled for a class-conditional"):
        load(tensors, tmp_path)
    assert load(tensors, tmp_path, class_label=0).spec.noise_shapes == {"z": (24,)}
    assert load(tensors, tmp_path, class_label="sampled").spec.noise_shapes["label"] == (7,)


def test_a_file_called_bigbigan_needs_its_epsilons_said_where_tensors_do_not_show_them(tmp_path: Path) -> None:
    tensors = cases.weights("class_cond")
    with pytest.raises(ConfigError, match=r"BigBiGAN_x1\.pth: .*\{bn_eps: 0\.0001, sn_eps: 0\.0001, class_label: 0\}"):
        load(tensors, tmp_path, "BigBiGAN_x1.pth", class_label=0)
    given = {"bn_eps": 1e-4, "sn_eps": 1e-4, "class_label": 0}
    assert load(tensors, tmp_path, "BigBiGAN_x1.pth", **given).spec.options.items() >= given.items()


def test_the_name_of_bigbigan_brings_its_epsilons_and_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTPIPE_CACHE", str(tmp_path))
    config = TeacherConfig(path="bigbigan-imagenet128")
    with pytest.raises(
        TeacherError, match=r"by hand at https://github\.com/.*options=\{bn_eps: 0\.0001, .*class_label: 0"
    ):
        locate(config, published_teachers())
    place = tmp_path / "teachers" / "bigbigan-imagenet128"
    place.mkdir(parents=True)
    cases.save(cases.weights("class_cond"), place, "pytorch-pretrained-gans")
    options = load_teacher(config).spec.options
    assert (options["bn_eps"], options["sn_eps"], options["class_label"]) == (1e-4, 1e-4, 0)


@pytest.mark.parametrize(
    ("form", "said"), [(None, "ajbrock's, with 1e-5"), ("without sv0", "a conversion of DeepMind's")]
)
def test_what_is_assumed_of_the_shapes_that_three_networks_share_is_said(
    form: str | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = converted(form, "class_cond") if form else cases.weights("class_cond")
    shared = BigGanLayout(4, (1536, 1536, 768, 384, 192, 96), (False,) * 5, 20, 128, True)
    say_what_is_assumed(tensors, shared, {"bn_eps"}, "x.pth")
    say_what_is_assumed(tensors, BigGanLayout(4, (16, 16), (False,), 20, 128, True), (), "x.pth")
    assert not caplog.records
    say_what_is_assumed(tensors, shared, (), "x.pth")
    assert said in caplog.text


# Synchronised batch norm


def test_ajbrocks_synchronised_norms_multiply_by_their_gain_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = cases.weights("class_cond")
    synchronised = {name.replace(".stored_", ".bn.running_"): tensor for name, tensor in plain.items()}
    noise = {"z": cases.latents(24)}
    expected = load(plain, tmp_path, class_label=1).synthesize(noise)[0]
    assert "cross_replica" not in caplog.text
    assert torch.equal(load(synchronised, tmp_path, class_label=1).synthesize(noise)[0], expected)
    assert "cross_replica), whose own code multiplies" in caplog.text


def test_ic_gans_synchronised_norms_multiply_there_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    np.save(tmp_path / "instances.npy", cases.features())
    path = cases.save(cases.weights("running"), tmp_path)
    options = {"instances": str(tmp_path / "instances.npy"), "class_label": 1}
    load_icgan_teacher(TeacherConfig(path=str(path), options=options))
    assert "cross_replica" not in caplog.text


# Refusals that say what is the matter


def _without_statistics(tensors: Weights) -> Weights:
    return {name: tensor for name, tensor in tensors.items() if "blocks" not in name or "stored_" not in name}


def test_norms_without_statistics_are_named(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="trained with norm_style gn or nonorm; kind biggan and icgan read"):
        load(_without_statistics(cases.weights("class_cond")), tmp_path)


def test_the_kind_that_reads_a_file_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "instances.npy", cases.features())
    sees_instances = cases.save(cases.weights("icgan256"), tmp_path)
    with pytest.raises(TeacherError, match=r"shared_feat shows an IC-GAN, .*kind=icgan"):
        load_biggan_teacher(TeacherConfig(path=str(sees_instances)))
    tensors = cases.weights("class_cond")
    for leaf in ("weight", "bias", "u0", "sv0"):  # there, and not used
        tensors[f"shared_feat.{leaf}"] = cases.weights("icgan256")[f"shared_feat.{leaf}"]
    path = str(cases.save(tensors, tmp_path))
    with pytest.raises(TeacherError, match=r"needs -s extract\.teacher\.kind=biggan, even where it has shared_feat"):
        load_icgan_teacher(TeacherConfig(path=path, options={"instances": str(tmp_path / "instances.npy")}))
    assert load_biggan_teacher(TeacherConfig(path=path)).spec.noise_shapes["label"] == (7,)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("blocks.0.0.conv3.weight", "is a BigGAN-deep generator, whose blocks"),
        ("generator.gen_z.weight_orig", "is a BigGAN-deep generator of pytorch-pretrained-biggan"),
        ("GBlock.0.conv0.module.weight_bar", "under the names of an older converter"),
    ],
)
def test_a_relative_of_biggan_is_recognised_and_named(name: str, said: str, tmp_path: Path) -> None:
    path = cases.save({name: torch.ones(1), "linear.weight": torch.ones(4, 2)}, tmp_path, "biggan-128.pth")
    with pytest.raises(TeacherError, match=said):
        load_teacher(TeacherConfig(path=str(path)))


def test_a_pickle_is_no_biggan(tmp_path: Path) -> None:
    (tmp_path / "best.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(TeacherError, match=r"is a pickle, as of IC-GAN's StyleGAN2 backbone"):
        load_biggan_teacher(TeacherConfig(path=str(tmp_path / "best.pkl")))
