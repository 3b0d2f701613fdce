"""The decoder of soft labels is UPerNet's; beside a regressor both are one up to their last layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.downstream.tuned.heads.upernet import UPerNet
from dtpipe.distill.student.distiller import Distiller, build_distiller
from dtpipe.manifests.schema import LevelSpec
from parts.memory import level_spec, tiny_config
from parts.soft_labels import LABELS, POOLED

FEATURES = (level_spec("l3", 8, 6), level_spec("l4", 16, 10))


def built(config: DistillConfig, levels=FEATURES, labels: LevelSpec | None = LABELS) -> Distiller:
    torch.manual_seed(0)
    return build_distiller(config, levels, (32, 32), labels=labels).eval()


@pytest.fixture
def config(tmp_path: Path) -> DistillConfig:
    return tiny_config(tmp_path)


def decoder_names(model: Distiller) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith("decoder.")}


def test_a_mix_shares_laterals_and_outputs_and_computes_what_upernet_does(config):
    model = built(config)
    assert decoder_names(model) == {
        "decoder.head.fuse.0.weight",
        *(f"decoder.head.fuse.1.{name}" for name in ("weight", "bias")),
        *(f"decoder.head.classifier.{name}" for name in ("weight", "bias")),
    }
    assert model.student.strides[0] == 4  # finer than any feature level, as UPerNet reads it
    images = torch.rand(2, 3, 32, 32)
    predicted = model(images)
    assert predicted[LABELS.name].shape == (2, 3, 4, 4)
    alone = UPerNet(model.student.channels, 3, config.regressor).eval()
    alone.load_state_dict(model.decoder.head.state_dict())
    expected = torch.nn.functional.interpolate(alone(model.student(images)), (4, 4), mode="bilinear")
    torch.testing.assert_close(predicted[LABELS.name], expected)


def test_a_mix_leaves_the_regressor_of_all_strides_as_it_was(config):
    """So that arms with and without labels start from one student and regressor."""
    levels = (level_spec("l2", 4, 3), *FEATURES, level_spec("l5", 32, 4))
    mix, features = built(config, levels), built(config, levels, None)
    images = torch.rand(2, 3, 32, 32)
    predicted, expected = mix(images), features(images)
    assert expected.keys() == {"l2", "l3", "l4", "l5"}
    assert all(torch.equal(predicted[name], level) for name, level in expected.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": {"width": 16}},
        {"regressor": {"width": 8, "kind": "pafpn"}},
        {"regressor": {"width": 8, "kind": "fpn"}},
    ],
)
def test_layers_of_another_shape_are_the_decoders_own(tmp_path, changes):
    model = built(tiny_config(tmp_path, **changes))
    assert any(name.startswith("decoder.head.laterals.") for name in decoder_names(model))
    assert model(torch.rand(2, 3, 32, 32))[LABELS.name].shape == (2, 3, 4, 4)


def test_labels_alone_have_no_regressor(config):
    model = built(config, ())
    assert model.regressor is None
    assert model(torch.rand(2, 3, 32, 32)).keys() == {LABELS.name}


def test_classes_of_whole_images_are_linear_in_the_pooled_coarsest_level(config):
    model = built(config, (), POOLED)
    images = torch.rand(2, 3, 32, 32)
    layer = model.decoder.head.classifier
    pooled = model.student(images)[-1].mean(dim=(2, 3))
    expected = pooled @ layer.weight[:, :, 0, 0].T + layer.bias
    torch.testing.assert_close(model(images)[POOLED.name][:, :, 0, 0], expected)


@pytest.mark.parametrize("levels", [FEATURES, ()])
def test_a_plain_transformer_gets_the_strides_of_a_pyramid(tmp_path, levels):
    model = built(tiny_config(tmp_path, student={"name": "test_vit"}, student_px=32), levels)
    assert (model.decoder.pyramid is (model.regressor.pyramid if model.regressor else None)) == bool(levels)
    assert [level.shape[-1] for level in model.decoder.pyramid(model.student(torch.rand(1, 3, 32, 32))[0])] == [
        *(8, 4, 2, 1)
    ]
    assert model(torch.rand(2, 3, 32, 32))[LABELS.name].shape == (2, 3, 4, 4)
