"""What StyleGAN2 teachers compute, against the original code (fixtures/stylegan2/README.md) and plain float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.noise import draw_noise
from dtpipe.extract.teachers.stylegan2.network import StyleGan2Layout, StyleGan2Network
from dtpipe.extract.teachers.stylegan2.teacher import StyleGan2Teacher, load_stylegan2_teacher, make_images
from dtpipe.extract.teachers.taps import TapReader
from dtpipe.manifests.errors import ConfigError, TeacherError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_image, read_level
from parts import paths
from parts import stylegan2_snapshots as files
from parts.extractions import Extract

FIXTURES = paths.FIXTURES / "stylegan2"
PARITY = paths.PARITY
CALLS: dict[str, dict[str, Any]] = {
    "const": {"noise_mode": "const"},
    "none": {"noise_mode": "none"},
    "trunc": {"noise_mode": "const", "truncation_psi": 0.7},
    "explicit": {},
}
PARITY_TOLERANCE = 1e-4  # the originals', on values up to 12; 7e-6 is reached
LAYOUT = StyleGan2Layout(
    z_dim=6,
    w_dim=5,
    num_classes=3,
    embed_dim=4,
    mapping_widths=(7, 5),
    base_px=(4, 4),
    channels=(4, 5, 3),
    conv_clamp=2.0,
    mapping_lr=0.01,
)


def teacher_of(path: Path, **options: Any) -> StyleGan2Teacher:
    return load_stylegan2_teacher(TeacherConfig(path=str(path), options=options))


def written(tmp_path: Path, layout: StyleGan2Layout = LAYOUT, seed: int = 0) -> tuple[Path, dict[str, Tensor]]:
    """A snapshot with random weights, and those weights."""
    tensors = files.random_weights(layout, seed)
    path = tmp_path / "snapshot.pkl"
    path.write_bytes(files.dumps(files.snapshot(tensors, layout)))
    return path, tensors


def drawn(teacher: StyleGan2Teacher, batch: int = 2) -> dict[str, Tensor]:
    rows = [
        {stream: draw_noise(0, str(row), 0, stream, shape) for stream, shape in teacher.spec.noise_shapes.items()}
        for row in range(batch)
    ]
    return {stream: torch.from_numpy(np.stack([row[stream] for row in rows])) for stream in rows[0]}


def compare(path: Path, arrays: Mapping[str, np.ndarray], call: str) -> dict[str, float]:
    """Greatest error of each array of one call; arrays may be cropped to their first channels or every n-th pixel."""
    teacher = teacher_of(path, **CALLS[call])
    noise = {"z": torch.from_numpy(arrays["z"])}
    if call == "explicit":
        maps = [torch.from_numpy(arrays[f"explicit/noise_{idx}"]).flatten(1) for idx in range(9)]
        noise["style_noise"] = torch.cat(maps, dim=1)
        assert teacher.spec.noise_shapes["style_noise"] == noise["style_noise"].shape[1:]
    found: dict[str, Tensor] = {}
    taps = {f"feat_{res}": f"synthesis.b{res}.conv1" for res in (4, 8, 16, 32)}
    with torch.inference_mode():
        found["ws"] = found["latent"] = teacher.network.styles(noise["z"], None, teacher.options.truncation_psi)
        made: list[Tensor] = []
        found |= TapReader(teacher.network, taps).read(
            lambda: made.append(make_images(teacher.network, noise, teacher.options)), stop_early=False
        )
        found["image"] = made[0]
    errors = {}
    for name, array in arrays.items():
        part, _, kind = name.partition("/")
        if part == call and kind in found:
            step = found[kind].shape[-1] // array.shape[-1]
            ours = (
                found[kind][:, : array.shape[1], ..., ::step]
                if kind in ("ws", "latent")
                else found[kind][:, : array.shape[1], ::step, ::step]
            )
            errors[name] = float(np.abs(ours.numpy() - array).max())
    return errors


@pytest.mark.parametrize(
    ("file", "call", "num_arrays"),
    [
        ("nvidia.pkl", "const", 5),
        ("nvidia.pkl", "none", 1),
        ("nvidia.pkl", "trunc", 2),
        ("rosinality.pt", "const", 5),
        ("rosinality.pt", "trunc", 2),
        ("rosinality.pt", "explicit", 1),
    ],
)
def test_styles_images_and_features_are_those_of_the_original(file: str, call: str, num_arrays: int) -> None:
    prefix = file.split(".")[0] + "/"
    with np.load(FIXTURES / "io.npz") as stored:
        arrays = {name.removeprefix(prefix): stored[name] for name in stored.files if name.startswith(prefix)}
    errors = compare(FIXTURES / file, arrays, call)
    assert len(errors) == num_arrays
    assert max(errors.values()) < PARITY_TOLERANCE, errors


@pytest.mark.skipif(not PARITY.exists(), reason="the whole arrays of the original code are not here")
@pytest.mark.parametrize(
    ("folder", "file"), [("stylegan2_nvidia", "network-snapshot-tiny.pkl"), ("stylegan2_rosinality", "checkpoint.pt")]
)
def test_all_arrays_of_the_original(folder: str, file: str) -> None:
    arrays = {name: value.numpy() for name, value in torch.load(PARITY / folder / "io.pt", weights_only=True).items()}
    errors: dict[str, float] = {}
    for call in {name.split("/")[0] for name in arrays} - {"z"}:
        errors |= compare(PARITY / folder / file, arrays, call)
    assert len(errors) == len([name for name in arrays if name != "z" and "noise_" not in name])
    assert max(errors.values()) < PARITY_TOLERANCE, errors


@pytest.mark.parametrize(
    "layout",
    [
        LAYOUT,
        replace(LAYOUT, num_classes=0, embed_dim=0, conv_clamp=None, mapping_lr=0.02),
        replace(LAYOUT, base_px=(3, 5), channels=(3, 4, 2, 2)),
    ],
    ids=["classes and clamp", "plain", "not square"],
)
def test_it_computes_the_papers_equations(layout: StyleGan2Layout, tmp_path: Path) -> None:
    """Against loops in float64 with weights per sample; options that the originals' arrays leave open."""
    path, tensors = written(tmp_path, layout)
    teacher = teacher_of(path, truncation_psi=0.6, truncation_cutoff=3)
    noise = drawn(teacher)
    images, levels = teacher.synthesize(noise)
    assert images.shape[2:] == teacher.spec.image_px == layout.image_px
    for row in range(2):
        label = int(noise["label"][row].argmax()) if layout.num_classes else None
        style = files.mapped(tensors, layout, noise["z"][row].double().numpy(), label)
        mean = tensors["mapping.w_avg"].double().numpy()
        styles = np.stack([mean + 0.6 * (style - mean)] * 3 + [style] * (layout.num_styles - 3))
        maps = [each[row, 0].double().numpy() for each in teacher.network.noise_maps(noise["style_noise"])]
        image, outputs = files.reference(tensors, layout, styles, maps)
        np.testing.assert_allclose(images[row], np.clip(image, -1, 1), rtol=1e-5, atol=2e-5)
        for level in teacher.spec.levels:
            assert outputs[level.tap].shape[1:] == tuple(side // level.stride for side in layout.image_px)
            np.testing.assert_allclose(levels[level.name][row], outputs[level.tap], rtol=1e-5, atol=2e-5)
    if layout.conv_clamp:
        assert max(float(level.abs().max()) for level in levels.values()) == layout.conv_clamp


@pytest.mark.parametrize("scaled_epsilon", [False, True])
def test_weights_as_small_as_epsilon_are_demodulated_as_in_either_code(scaled_epsilon: bool) -> None:
    layout = replace(LAYOUT, num_classes=0, embed_dim=0, conv_clamp=None, scaled_epsilon=scaled_epsilon)
    tensors = {
        name: tensor * (1e-5 if tensor.shape[2:] == (3, 3) else 1)
        for name, tensor in files.random_weights(layout).items()
    }
    network = StyleGan2Network(layout)
    network.load_state_dict(tensors)
    styles = torch.randn(1, layout.num_styles, layout.w_dim, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        image = network.synthesis(styles, None)[0]
    np.testing.assert_allclose(
        image, files.reference(tensors, layout, styles[0].double().numpy(), None)[0], rtol=1e-4, atol=1e-5
    )


def test_noise_maps_are_random_the_checkpoints_or_none(tmp_path: Path) -> None:
    path, tensors = written(tmp_path)
    random, const, none = (teacher_of(path, noise_mode=mode) for mode in ("random", "const", "none"))
    assert random.spec.noise_shapes == {"z": (6,), "style_noise": (16 + 2 * 64 + 2 * 256,), "label": (3,)}
    assert const.spec.noise_shapes == none.spec.noise_shapes == {"z": (6,), "label": (3,)}
    noise = drawn(random)
    layers = ("b4.conv1", "b8.conv0", "b8.conv1", "b16.conv0", "b16.conv1")
    stored = torch.cat([tensors[f"synthesis.{layer}.noise_const"].flatten() for layer in layers])
    same = random.synthesize({**noise, "style_noise": stored.expand(2, -1)})[0]
    assert torch.equal(same, const.synthesize(noise)[0])
    silent = random.synthesize({**noise, "style_noise": torch.zeros(2, 656)})[0]
    torch.testing.assert_close(silent, none.synthesize(noise)[0], rtol=0, atol=1e-6)
    assert len({random.synthesize(noise)[0].sum().item(), same.sum().item(), silent.sum().item()}) == 3


def test_a_constant_class_is_the_drawn_one(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    teacher = teacher_of(path)
    noise = drawn(teacher, 6)
    images, _ = teacher.synthesize(noise)
    classes = noise["label"].argmax(dim=1).tolist()
    assert len(set(classes)) > 1
    for row, label in enumerate(classes):
        constant = teacher_of(path, class_label=label)
        assert "label" not in constant.spec.noise_shapes
        torch.testing.assert_close(constant.synthesize(noise)[0][row], images[row], rtol=0, atol=1e-5)


def test_a_sample_does_not_depend_on_its_neighbours_and_padding_is_finite(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    teacher = teacher_of(path)
    noise = drawn(teacher, 4)
    images, levels = teacher.synthesize(noise)
    broken = {stream: each.clone() for stream, each in noise.items()}
    broken["z"][3] = float("nan")
    padded = {stream: torch.cat([each[2:3], torch.zeros_like(each[:3])]) for stream, each in noise.items()}
    for other, row in ((broken, 2), (padded, 0), ({stream: each[2:3] for stream, each in noise.items()}, 0)):
        found, features = teacher.synthesize(other)
        torch.testing.assert_close(found[row], images[2], rtol=0, atol=1e-6)
        torch.testing.assert_close(features["l2"][row], levels["l2"][2], rtol=0, atol=1e-6)
    assert teacher.synthesize(padded)[0].isfinite().all()
    assert teacher.synthesize(broken)[0][3].isnan().all()


def test_an_overflow_is_no_white_pixel(tmp_path: Path) -> None:
    layout = replace(LAYOUT, num_classes=0, embed_dim=0, conv_clamp=None)
    tensors = files.random_weights(layout)
    tensors["synthesis.b16.torgb.bias"][:] = 3e38
    tensors["synthesis.b8.torgb.bias"][:] = 3e38
    (tmp_path / "x.pkl").write_bytes(files.dumps(files.snapshot(tensors, layout)))
    teacher = teacher_of(tmp_path / "x.pkl", noise_mode="none")
    assert teacher.synthesize({"z": torch.ones(1, 6)})[0].isnan().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_low_precision_is_close_and_its_features_can_be_stored(dtype: str, tolerance: float) -> None:
    config = TeacherConfig(path=str(FIXTURES / "nvidia.pkl"), dtype=dtype)
    exact, low = teacher_of(FIXTURES / "nvidia.pkl"), load_stylegan2_teacher(config)
    noise = drawn(exact, 3)
    found, wanted = low.synthesize(noise), exact.synthesize(noise)
    assert found[0].dtype == torch.float32
    for level, values in wanted[1].items():
        assert found[1][level].dtype in (torch.float16, torch.float32)
        assert 0 < float((found[1][level] - values).norm() / values.norm()) < tolerance
    with torch.inference_mode(), torch.autocast("cpu", getattr(torch, dtype)):
        assert torch.equal(low.network.styles(noise["z"], None), exact.network.styles(noise["z"], None))


def test_float16_keeps_clear_of_its_range(tmp_path: Path) -> None:
    """Plain weights of this size would sum to more than 65504 before the demodulation brings them back."""
    layout = replace(LAYOUT, num_classes=0, embed_dim=0, conv_clamp=256.0, channels=(64, 64, 64))
    tensors = {
        name: tensor * (40 if tensor.shape[2:] == (3, 3) else 1)
        for name, tensor in files.random_weights(layout).items()
    }
    tensors["synthesis.b4.const"] *= 250
    (tmp_path / "x.pkl").write_bytes(files.dumps(files.snapshot(tensors, layout)))
    exact = teacher_of(tmp_path / "x.pkl", noise_mode="none")
    low = load_stylegan2_teacher(
        TeacherConfig(path=str(tmp_path / "x.pkl"), dtype="float16", options={"noise_mode": "none"})
    )
    noise = drawn(exact)
    for level, values in exact.synthesize(noise)[1].items():
        assert float((low.synthesize(noise)[1][level] - values).norm() / values.norm()) < 0.01


def test_levels_have_the_usual_strides_and_taps_can_be_named(tmp_path: Path) -> None:
    path, _ = written(tmp_path, replace(LAYOUT, channels=(9, 8, 7, 6, 5, 4)))
    levels = [(level.name, level.stride, level.channels, level.tap) for level in teacher_of(path).spec.levels]
    wanted = [("l2", 4, 6, 32), ("l3", 8, 7, 16), ("l4", 16, 8, 8), ("l5", 32, 9, 4)]
    assert levels == [(name, stride, width, f"synthesis.b{res}.conv1") for name, stride, width, res in wanted]
    config = TeacherConfig(
        path=str(path), taps={"l3": "synthesis.b16.conv0", "l3.b": "synthesis.b16", "l0": "synthesis.b128.conv1"}
    )
    teacher = load_stylegan2_teacher(config)
    assert [(level.name, level.stride) for level in teacher.spec.levels] == [("l0", 1), ("l3", 8), ("l3.b", 8)]
    noise = drawn(teacher)
    plain = TapReader(teacher.network, config.taps or {}).read(
        lambda: make_images(teacher.network, noise, teacher.options)
    )
    found = teacher.synthesize(noise)[1]
    assert all(torch.equal(found[name], plain[name]) for name in found)


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    with pytest.raises(ConfigError, match="classes 0 to 2"):
        teacher_of(path, class_label=3)
    with pytest.raises(ConfigError, match="no classes"):
        teacher_of(FIXTURES / "nvidia.pkl", class_label=0)
    with pytest.raises(ConfigError, match="has 6 styles"):
        teacher_of(path, truncation_cutoff=7)
    for options in ({"truncation_psi": -0.1}, {"noise_mode": "fixed"}, {"psi": 0.7}):
        with pytest.raises(ConfigError, match=r"extract.teacher.options"):
            teacher_of(path, **options)
    path, _ = written(tmp_path, replace(LAYOUT, channels=(4, 4)))
    with pytest.raises(TeacherError, match="too small"):
        teacher_of(path)


def test_the_spec_tells_apart_what_gives_other_features(tmp_path: Path) -> None:
    """Also settings that are no weights: the clamp and the truncation."""
    path, tensors = written(tmp_path)
    first = teacher_of(path).spec
    (tmp_path / "other.pkl").write_bytes(files.dumps(files.snapshot(tensors, replace(LAYOUT, conv_clamp=3.0))))
    other, drawn_in = teacher_of(tmp_path / "other.pkl").spec, teacher_of(path, truncation_psi=0.5).spec
    assert first.weights_blake3 == other.weights_blake3 == drawn_in.weights_blake3
    assert len({str(dict(spec.options)) for spec in (first, other, drawn_in)}) == 3
    assert math.prod(first.image_px) == 256


def test_a_dataset_holds_what_the_generator_makes(extract: Extract, tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    exact = {"samples": 3, "dtype": "float32"}
    dataset = FeatureDataset.open(extract(images=None, num_samples=5, teacher={"path": str(path)}, shard=exact))
    teacher = teacher_of(path)
    for row in dataset.columns.ok_rows:
        streams = {
            stream: draw_noise(0, f"z/{row:09d}", 0, stream, shape)
            for stream, shape in teacher.spec.noise_shapes.items()
        }
        image, levels = teacher.synthesize({stream: torch.from_numpy(each[None]) for stream, each in streams.items()})
        np.testing.assert_allclose(read_level(dataset, "l2", row), levels["l2"][0], atol=1e-5)
        assert np.abs(read_image(dataset, row) - (image[0].permute(1, 2, 0).numpy() + 1) * 127.5).max() <= 0.51
    assert len(dataset.columns.ok_rows) == 5
