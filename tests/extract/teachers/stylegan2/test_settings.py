"""Settings that the weights of a StyleGAN2 do not tell: taken as they are, or refused by their name, never ignored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.extract.teachers.stylegan2.network import StyleGan2Layout
from dtpipe.extract.teachers.stylegan2.teacher import StyleGan2Teacher, is_stylegan2_file, load_stylegan2_teacher
from dtpipe.manifests.errors import ConfigError, TeacherError
from parts import paths
from parts import stylegan2_snapshots as files

LAYOUT = StyleGan2Layout(
    z_dim=6,
    w_dim=5,
    num_classes=3,
    embed_dim=5,
    mapping_widths=(7, 5),
    base_px=(4, 4),
    channels=(4, 5, 3),
    conv_clamp=2.0,
    mapping_lr=0.02,
)
TENSORS: dict[str, Tensor] = files.random_weights(LAYOUT)
ROSINALITY = paths.FIXTURES / "stylegan2" / "rosinality.pt"


def write(folder: Path, content: Any) -> Path:
    (folder / "x.pkl").write_bytes(files.dumps(content))
    return folder / "x.pkl"


def load(path: Path, **options: Any) -> StyleGan2Teacher:
    return load_stylegan2_teacher(TeacherConfig(path=str(path), options=options))


Changes = dict[tuple[str, ...], dict[str, Any]]  # settings by module
CONV = ("synthesis", "b8", "conv1")
REFUSED: dict[str, tuple[Changes, str]] = {
    "activation of the mapping": ({("mapping", "fc1"): {"activation": "relu"}}, r"mapping\.fc1 has activation 'relu'"),
    "linear mapping": ({("mapping", "fc0"): {"activation": "linear"}}, r"mapping\.fc0 has activation 'linear'"),
    "activation of the classes": ({("mapping", "embed"): {"activation": "lrelu"}}, r"embed has activation 'lrelu'"),
    "learning rate of the classes": ({("mapping", "embed"): {"bias_gain": 0.01}}, r"embed has bias_gain 0\.01"),
    "two learning rates": ({("mapping", "fc1"): {"bias_gain": 0.5}}, "bias_gain is not one number"),
    "gain of a mapping layer": ({("mapping", "fc1"): {"weight_gain": 1.0}}, r"mapping\.fc1 has weight_gain 1\.0"),
    "activation of a style": ({(*CONV, "affine"): {"activation": "tanh"}}, r"affine has activation 'tanh'"),
    "gain of an activation": ({CONV: {"act_gain": np.float64(1.0)}}, r"b8\.conv1 has act_gain 1\.0"),
    "activation of a convolution": ({CONV: {"activation": "swish"}}, r"b8\.conv1 has activation 'swish'"),
    "no noise": ({CONV: {"use_noise": False}}, r"use_noise False \(it was trained without noise maps\)"),
    "upsampling elsewhere": ({CONV: {"up": 2}}, r"b8\.conv1 has up 2; kind stylegan2 reads networks with 1"),
    "no upsampling": ({("synthesis", "b8", "conv0"): {"up": 1}}, r"b8\.conv0 has up 1"),
    "padding": ({CONV: {"padding": 0}}, r"b8\.conv1 has padding 0"),
    "gain of colours": ({("synthesis", "b4", "torgb"): {"weight_gain": np.float64(2)}}, r"torgb has weight_gain 2\.0"),
    "architecture": ({("synthesis", "b8"): {"architecture": "orig"}}, r"architecture 'orig' \(its images are not sums"),
    "truth for a number": ({CONV: {"padding": True}}, r"b8\.conv1 has padding True"),
    "IC-GAN's": ({("mapping",): {"h_dim": 2048}}, r"mapping has h_dim 2048 \(it is IC-GAN's, .*kind icgan reads"),
    "a setting of another code": ({CONV: {"demodulate": False}}, r"conv1 has a setting demodulate \(False\) that no"),
    "a setting of the whole": ({(): {"residual": 1}}, r"the network has a setting residual \(1\)"),
}


def changed(changes: Changes) -> dict[str, Any]:
    content = files.snapshot(TENSORS, LAYOUT)
    for path, settings in changes.items():
        files.state_of(content, *path).update(settings)
    return content


@pytest.mark.parametrize("case", REFUSED)
def test_a_setting_that_makes_it_another_network_is_refused_by_its_name(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(TeacherError, match=message) as refused:
        load(write(tmp_path, changed(changes)))
    assert "\n" not in str(refused.value)


def test_settings_of_both_of_nvidias_codes_are_known(tmp_path: Path) -> None:
    """Attributes as NVlabs/stylegan2-ada-pytorch and NVlabs/stylegan3 have them, gains in numpy's numbers."""
    gain = {"bias_gain": LAYOUT.mapping_lr, "activation": "lrelu"}
    content = changed(
        {
            (): {"z_dim": 6, "c_dim": 3, "w_dim": 5, "img_resolution": 16, "img_channels": 3, "num_ws": 6},
            ("mapping",): {"num_layers": 2, "w_avg_beta": None, "num_ws": 6, "h_dim": 0},
            ("mapping", "fc0"): {**gain, "weight_gain": np.float64(0.02 / np.sqrt(11)), "in_features": 11},
            ("mapping", "embed"): {"activation": "linear", "bias_gain": 1.0, "weight_gain": 1 / np.sqrt(3)},
            ("synthesis",): {"block_resolutions": [4, 8, 16], "num_fp16_res": 4, "img_resolution_log2": 4},
            ("synthesis", "b8"): {"fused_modconv_default": "inference_only", "use_fp16": True, "num_conv": 2},
            ("synthesis", "b8", "conv0"): {"up": 2, "padding": 1, "act_gain": np.sqrt(2), "in_channels": 4},
            ("synthesis", "b8", "torgb"): {"weight_gain": np.float64(1 / np.sqrt(5)), "out_channels": 3},
        }
    )
    plain = load(write(tmp_path, files.snapshot(TENSORS, LAYOUT))).spec
    assert load(write(tmp_path, content)).spec == plain


def test_a_setting_that_is_known_to_change_nothing_may_be_ignored(tmp_path: Path) -> None:
    path = write(tmp_path, changed({CONV: {"trained_on": "cats"}}))
    with pytest.raises(TeacherError, match=r"set extract\.teacher\.options\.ignored_settings=\[trained_on\]"):
        load(path)
    plain = load(write(tmp_path / ".." / tmp_path.name, files.snapshot(TENSORS, LAYOUT))).spec
    path = write(tmp_path, changed({CONV: {"trained_on": "cats"}}))
    assert load(path, ignored_settings=["trained_on"]).spec == plain
    with pytest.raises(TeacherError, match="use_noise False"):  # a known one is never passed over
        load(write(tmp_path, changed({CONV: {"use_noise": False}})), ignored_settings=["use_noise"])


def test_a_network_of_other_parts_is_named(tmp_path: Path) -> None:
    content = files.snapshot(TENSORS, LAYOUT)
    files.state_of(content, "synthesis")["_modules"]["input"] = files.module("SynthesisInput", {}, {})
    with pytest.raises(TeacherError, match="is a StyleGAN3 generator; kind stylegan2 reads StyleGAN2"):
        load(write(tmp_path, content))
    content = files.snapshot(TENSORS, LAYOUT)
    files.state_of(content, "synthesis", "b8")["_modules"]["skip"] = files.module("Conv2dLayer", {}, {})
    with pytest.raises(TeacherError, match=r"synthesis\.b8\.skip is a Conv2dLayer, as in no StyleGAN2"):
        load(write(tmp_path, content))
    other = {"G_ema": files.module("TriPlaneGenerator", {}, {})}
    with pytest.raises(TeacherError, match=r"no network 'G_ema' of NVlabs.* \(it is a TriPlaneGenerator\)"):
        load(write(tmp_path, other))


def test_a_network_without_noise_maps_is_recognised_and_named(tmp_path: Path) -> None:
    """As it is pickled: neither the setting nor the tensors of noise are there."""
    tensors = {name: tensor for name, tensor in TENSORS.items() if "noise" not in name}
    content = files.snapshot(tensors, LAYOUT)
    for block, conv in (("b4", "conv1"), ("b8", "conv0"), ("b8", "conv1"), ("b16", "conv0"), ("b16", "conv1")):
        files.state_of(content, "synthesis", block, conv).update(use_noise=False)
    path = write(tmp_path, content)
    assert is_stylegan2_file(str(path))
    with pytest.raises(TeacherError, match="trained without noise maps"):
        load_teacher(TeacherConfig(path=str(path)))


def test_arrays_that_repeat_their_values_are_refused(tmp_path: Path) -> None:
    """A TensorFlow pickle whose many variables are one array, which its pickle holds once."""
    repeated = np.zeros(1 << 20, np.float32)
    networks = files.tensorflow({name: tensor for name, tensor in TENSORS.items() if "embed" not in name})
    synthesis = networks[2].__dict__["components"]["synthesis"].__dict__
    synthesis["variables"] = [(f"noise{idx}", repeated) for idx in range(20)]
    with pytest.raises(TeacherError, match=r"claims 67,.* in memory \(its arrays repeat their values\)"):
        load(write(tmp_path, networks))


def test_how_tensorflow_computes_is_no_setting_of_the_network(tmp_path: Path) -> None:
    tensors = files.random_weights(replace(LAYOUT, num_classes=0, embed_dim=0))
    plain, fused = (files.tensorflow(tensors, **settings) for settings in ({}, {"fused_modconv": False}))
    assert load(write(tmp_path, plain)).spec == load(write(tmp_path, fused)).spec


# rosinality's


def test_the_mappings_learning_rate_of_a_torch_file_is_an_option(tmp_path: Path) -> None:
    noise = {"z": torch.linspace(-1, 1, 48)[None], "style_noise": torch.zeros(1, 1)}
    default, same, other = (
        load(ROSINALITY, noise_mode="none", **given) for given in ({}, {"lr_mlp": 0.01}, {"lr_mlp": 1})
    )
    assert same.spec == default.spec and "lr_mlp" not in default.spec.options
    assert other.network.layout == replace(default.network.layout, mapping_lr=1)
    assert other.spec.options["network"]["mapping_lr"] == 1 != default.spec.options["network"]["mapping_lr"]
    latent = noise["z"][0].double().numpy()
    by_hand = files.mapped(default.network.state_dict(), other.network.layout, latent)
    np.testing.assert_allclose(other.network.mapping(noise["z"])[0], by_hand, rtol=1e-4)
    with pytest.raises(ConfigError, match="tells the mapping's learning rate; leave out"):
        load(write(tmp_path, files.snapshot(TENSORS, LAYOUT)), lr_mlp=0.01)


def test_a_wavelet_generator_is_named(tmp_path: Path) -> None:
    torch.save({"g_ema": {"iwt.ll": torch.ones(2, 2), "style.1.weight": torch.ones(2, 2)}}, tmp_path / "x.pt")
    with pytest.raises(TeacherError, match="is a SWAGAN"):
        load(tmp_path / "x.pt")


def test_weights_that_training_wrapped_are_the_same(tmp_path: Path) -> None:
    stored = torch.load(ROSINALITY, weights_only=True)
    stored["g_ema"] = {f"module.{name}": tensor for name, tensor in stored["g_ema"].items()}
    torch.save(stored, tmp_path / "x.pt")
    assert is_stylegan2_file(str(tmp_path / "x.pt"))
    assert load(tmp_path / "x.pt").spec == load(ROSINALITY).spec
