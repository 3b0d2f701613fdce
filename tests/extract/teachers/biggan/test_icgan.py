"""IC-GAN teachers: what they compute, against arrays of the original code, and their files of instances."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib import format as npy

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.noise import draw_noise
from dtpipe.extract.teachers.biggan.icgan import load_icgan_teacher, read_instances
from dtpipe.extract.teachers.files.npy import read_arrays
from dtpipe.manifests.errors import ConfigError, TeacherError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_image, read_level
from parts import biggan_cases as cases

TOLERANCE = 1e-4  # float32 sums in another order; measured: 5e-6 at most
WITH_CLASS = ("with_class", "running")
Load = Callable[..., Any]


def published(features: np.ndarray, labels: object, path: Path) -> Path:
    """A file of instances as the authors' are: a dict in an object array without sides."""
    np.save(path, {"instance_features": features, "labels": labels, "image_path": ["n01440764/1.JPEG"] * len(features)})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("icgan")
    for case in ("icgan256", "raw_features", *WITH_CLASS):
        cases.save(cases.weights(case), root, f"{case}.pth")
    published(cases.features(), np.array(cases.CLASSES), root / "instances.npy")
    return root


@pytest.fixture(scope="module")
def load(folder) -> Load:
    def _load(case: str, taps: dict[str, str] | None = None, dtype: str = "float32", **options: Any) -> Any:
        options = {"instances": str(folder / "instances.npy"), **options}
        return load_icgan_teacher(
            TeacherConfig.model_validate(
                {"path": str(folder / f"{case}.pth"), "taps": taps, "dtype": dtype, "options": options}
            )
        )

    return _load


@pytest.mark.parametrize("case", ["icgan256", "raw_features", *WITH_CLASS])
def test_images_and_all_features_are_those_of_the_original_code(case, load):
    for sample in range(2):
        teacher = load(case, cases.taps_of(case), instance=sample)
        images, levels = teacher.synthesize({"z": cases.latents(teacher.network.layout.z_size)})
        errors = cases.largest_errors(case, sample, images, levels)
        assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.skipif(not cases.PARITY.is_dir(), reason="the original networks' own arrays are not beside the repository")
@pytest.mark.parametrize(("call", "options"), [("main", {}), ("trunc", {"truncation": "clamp", "threshold": 0.8})])
def test_whole_arrays_of_the_original_network(call, options, tmp_path):
    stored = torch.load(cases.PARITY / "icgan" / "io.pt", weights_only=True)
    np.save(tmp_path / "h.npy", stored["h"].numpy())
    sides = [int(name.rpartition("_")[2]) for name in stored if name.startswith(f"{call}/feat_")]
    taps = {
        f"l{(64 // px).bit_length() - 1}": "linear" if px == 4 else f"blocks.{px.bit_length() - 4}.0" for px in sides
    }
    path = str(cases.PARITY / "icgan" / "G_ema.pth")
    for sample in range(2):
        given = {"instances": str(tmp_path / "h.npy"), "instance": sample, **options}
        teacher = load_icgan_teacher(TeacherConfig(path=path, taps=taps, options=given))
        images, levels = teacher.synthesize({"z": stored["z"]})
        for level in levels.values():
            assert (level[sample] - stored[f"{call}/feat_{level.shape[-1]}"][sample]).abs().max() < TOLERANCE
        if f"{call}/image" in stored:
            assert (images[sample] - stored[f"{call}/image"][sample]).abs().max() < TOLERANCE


def test_synchronised_statistics_beside_a_plain_last_gain_give_the_same(load, folder):
    renamed = {"output_layer.0.bn.weight": "output_layer.0.gain", "output_layer.0.bn.bias": "output_layer.0.bias"}
    tensors = {renamed.get(name, name): tensor for name, tensor in cases.weights("running").items()}
    cases.save(tensors, folder, "ajbrock.pth")
    images = [load(case, instance=0).synthesize({"z": cases.latents(12)})[0] for case in ("running", "ajbrock")]
    assert torch.equal(*images)


# What is chosen for each image


def test_a_sampled_instance_brings_its_class(load):
    teacher = load("with_class")
    assert teacher.spec.noise_shapes == {"z": (25,), "label": (2,)}
    noise = {"z": cases.latents(25), "label": torch.tensor([[0.0, 1], [1, 0]])}
    images = teacher.synthesize(noise)[0]
    for row, instance in enumerate((1, 0)):
        alone = load("with_class", instance=instance, class_label=cases.CLASSES[instance]).synthesize(
            {"z": noise["z"]}
        )[0]
        assert torch.equal(images[row], alone[row])


def test_a_class_and_an_instance_are_sampled_from_two_parts_of_the_label_noise(load):
    teacher = load("with_class", class_label="sampled")
    assert teacher.spec.noise_shapes == {"z": (25,), "label": (7 + 2,)}
    noise = {
        "z": cases.latents(25),
        "label": torch.tensor([[0.0, 0, 0, 4, 0, 0, 0, 9, 8], [3, 0, 0, 0, 0, 0, 0, 8, 9]]),
    }
    images = teacher.synthesize(noise)[0]
    for row, (label, instance) in enumerate(((3, 0), (0, 1))):
        alone = load("with_class", instance=instance, class_label=label).synthesize({"z": noise["z"]})[0]
        assert torch.equal(images[row], alone[row])


def test_the_recipe_knows_instances_by_their_content(load, folder, tmp_path):
    options = load("icgan256").spec.options
    assert json.loads(json.dumps(options)) == options
    assert options["instance"] == "sampled" and "instances" not in options and "class_label" not in options
    np.save(tmp_path / "same.npy", cases.features())
    np.save(tmp_path / "other.npy", cases.features()[::-1])
    np.save(tmp_path / "longer.npy", 7 * cases.features().astype(np.float64))
    digest = {
        name: load("icgan256", instances=str(tmp_path / f"{name}.npy")).spec.options["instances_blake3"]
        for name in ("same", "other")
    }
    assert digest["same"] == options["instances_blake3"] != digest["other"]
    with_labels = load("with_class").spec.options
    assert with_labels["class_label"] == "of_instance" and with_labels["instances_blake3"] != digest["same"]
    images = [load("icgan256", instance=0, instances=str(tmp_path / f"{name}.npy")) for name in ("same", "longer")]
    torch.testing.assert_close(*(each.synthesize({"z": cases.latents(14)})[0] for each in images), atol=1e-5, rtol=0)


def test_a_dataset_follows_from_its_keys(folder, extract):
    teacher = {
        "path": str(folder / "with_class.pth"),
        "options": {"instances": str(folder / "instances.npy"), "class_label": "sampled"},
    }
    exact = {"samples": 2, "dtype": "float32"}
    dataset = FeatureDataset.open(extract(images=None, num_samples=3, teacher=teacher, shard=exact))
    assert dataset.recipe.teacher.kind == "icgan" and [level.name for level in dataset.levels] == ["l2", "l3"]
    for row in range(3):
        noise = {
            stream: draw_noise(0, f"z/{row:09d}", 0, stream, (size,))[None]
            for stream, size in (("z", 25), ("label", 9))
        }
        label, instance = int(noise["label"][0, :7].argmax()), int(noise["label"][0, 7:].argmax())
        options = {**teacher["options"], "class_label": label, "instance": instance}
        alone = load_icgan_teacher(TeacherConfig(path=teacher["path"], options=options))
        images, levels = alone.synthesize({"z": torch.from_numpy(noise["z"])})
        np.testing.assert_allclose(read_level(dataset, "l2", row), levels["l2"][0], atol=1e-5)
        assert np.abs(read_image(dataset, row) - ((images[0].permute(1, 2, 0) + 1) * 127.5).round().numpy()).max() <= 1


# Files of instances


@pytest.mark.parametrize("labels", [np.array([2, 5]), [2, 5], [np.int64(2), np.int64(5)], np.array([2, 5], np.int32)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_published_file_is_read_as_numpy_reads_it(labels, order, tmp_path):
    path = published(np.asarray(cases.features(), order=order), labels, tmp_path / "instances.npy")
    trusted = np.load(path, allow_pickle=True).item()
    read = read_arrays(path, ("instance_features", "labels"))
    np.testing.assert_array_equal(read["instance_features"], trusted["instance_features"])
    np.testing.assert_array_equal(read["labels"], trusted["labels"])
    np.testing.assert_array_equal(read_instances(path).labels, [2, 5])


@pytest.mark.parametrize("protocol", [3, 4])
def test_files_of_older_and_newer_numpy_are_read(protocol, tmp_path):
    content = pickle.dumps(np.array({"instance_features": cases.features()}, dtype=object), protocol=protocol)
    named = {"old": content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")} if protocol == 3 else {}
    for name, pickled in {"new": content, **named}.items():
        write_object_file(tmp_path / f"{name}.npy", pickled)
        np.testing.assert_array_equal(
            read_arrays(tmp_path / f"{name}.npy", ("instance_features",))["instance_features"], cases.features()
        )


def write_object_file(path: Path, pickled: bytes, shape: tuple[int, ...] = ()) -> Path:
    with path.open("wb") as file:
        npy.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": shape})
        file.write(pickled)
    return path


class Trap:
    """Something whose pickle calls `function(*args)`."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path):
    target = tmp_path / "executed"
    features = cases.features()
    traps = [Trap(Path.touch, target), Trap(eval, f"open({str(target)!r}, 'w')"), Trap(np.save, str(target), features)]
    contents = [
        each
        for trap in traps
        for each in (trap, {"instance_features": trap}, {"instance_features": features, "other": trap})
    ]
    for idx, content in enumerate(contents):
        for protocol in (0, 2, 3, 4, 5):
            pickled = pickle.dumps(np.array(content, dtype=object), protocol=protocol)
            path = write_object_file(tmp_path / f"{idx}.{protocol}.npy", pickled)
            with pytest.raises(TeacherError, match=r"\.npy"):
                read_instances(path)
            assert list(tmp_path.glob("executed*")) == []


HEADER = b"\x93NUMPY\x01\x00"


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 2048)})


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(HEADER),
        lambda path: path.write_bytes(HEADER + b"\x10\x00{'descr': exit()}"),
        lambda path: path.write_bytes(b"\x93NUMPY\x07\x00" + bytes(50)),
        lambda path: path.write_text("not an array"),
        lambda path: write_object_file(path, b""),
        lambda path: write_object_file(path, pickle.dumps([1, 2])),
        lambda path: write_object_file(path, pickle.dumps(np.array([1, 2], dtype=object)), (2,)),
        lambda path: write_object_file(
            path, pickle.dumps(np.array({"instance_features": {"a": 1}}, dtype=object), protocol=4)
        ),
        lambda path: write_object_file(
            path, pickle.dumps(np.array({"instance_features": ["a"]}, dtype=object), protocol=4)
        ),
        lambda path: write_object_file(
            path, pickle.dumps(np.array({"instance_features": cases.features()}, dtype=object))[:9000]
        ),
        _huge,
        Path.mkdir,
    ],
)
def test_damaged_files_are_refused(write, tmp_path):
    path = tmp_path / "instances.npy"
    write(path)
    with pytest.raises(TeacherError, match=r"instances\.npy"):
        read_instances(path)


def _with_zero_row() -> np.ndarray:
    return np.concatenate([cases.features(), np.zeros((1, 2048), np.float32)])


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (_with_zero_row(), [1, 2, 3], "of instance 2 are zero or not finite"),
        (np.full((2, 2048), np.nan, np.float32), [1, 2], "of instance 0 are zero or not finite"),
        (np.zeros((2, 2048), np.int64), [1, 2], "has no table of instance_features"),
        (np.ones(2048, np.float32), [1], "has no table of instance_features"),
        (cases.features(), [1, 2, 3], r"labels are int64 \(3,\), not one class for each of 2"),
        (cases.features(), [0.5, 2], "labels are float64"),
    ],
)
def test_instances_that_cannot_be_used_are_refused(features, labels, message, tmp_path):
    with pytest.raises(TeacherError, match=message):
        read_instances(published(features, labels, tmp_path / "instances.npy"))


# What is refused


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("icgan256", {"instances": None}, r"options\.instances=FILE\.npy; its authors' are in https://"),
        ("icgan256", {"instance": 2}, r"instance is 2; .*instances\.npy has 0 to 1"),
        ("icgan256", {"class_label": 3}, "takes no class"),
        ("icgan256", {"class_conditional": True}, "blocks take 7 numbers, which is not an instance and a class"),
        ("with_class", {"class_conditional": False}, "blocks take 16 numbers"),
        ("with_class", {"class_label": 7}, "classes 0 to 6"),
    ],
)
def test_options_that_do_not_fit_are_refused(case, options, message, load):
    with pytest.raises((ConfigError, TeacherError), match=message):
        load(case, **options)


def test_files_that_do_not_belong_together_are_refused(load, tmp_path):
    np.save(tmp_path / "short.npy", cases.features()[:, :512])
    with pytest.raises(TeacherError, match=r"shared_feat has shape \(5, 2048\), instances have 512 features"):
        load("icgan256", instances=str(tmp_path / "short.npy"))
    np.save(tmp_path / "unlabelled.npy", cases.features())
    with pytest.raises(ConfigError, match=r"does not give each instance a class from 0 to 6; .*or to sampled"):
        load("with_class", instances=str(tmp_path / "unlabelled.npy"))
    assert load("with_class", instances=str(tmp_path / "unlabelled.npy"), class_label=0).spec.kind == "icgan"
    published(cases.features(), [1, 7], tmp_path / "labels.npy")
    with pytest.raises(ConfigError, match="does not give each instance a class"):
        load("with_class", instances=str(tmp_path / "labels.npy"))


def test_shapes_that_fit_two_readings_are_asked_about(load, folder):
    tensors = cases.weights("icgan256")
    chunk = tensors["linear.weight"].shape[1]
    cases.save({**tensors, "shared.weight": torch.ones(7, chunk)}, folder, "ambiguous.pth")
    with pytest.raises(
        ConfigError, match=r"may be an instance or an instance and a class; set .*class_conditional to true or false"
    ):
        load("ambiguous")
    assert load("ambiguous", class_conditional=False).network.layout.hierarchical
    assert not load("ambiguous", class_conditional=True, class_label=0).network.layout.hierarchical
