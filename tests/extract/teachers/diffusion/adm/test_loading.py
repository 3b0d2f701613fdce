"""ADM checkpoints as files: which are recognised, what must be told about them, and what is refused."""

from __future__ import annotations

import gc
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers.diffusion.adm.layout import AdmLayout, AdmOptions, complete, infer_adm_layout
from dtpipe.extract.teachers.diffusion.adm.teacher import is_adm_file, load_adm_teacher
from dtpipe.extract.teachers.files.published import published_teachers
from dtpipe.extract.teachers.files.weights import weights_digest
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.errors import ConfigError, DtpipeError, TeacherError
from parts import paths
from parts.damage import Attack
from parts.tensors import randn, random_weights, views

FIXTURES = paths.FIXTURES / "adm"
PLAIN: dict[str, Any] = {
    "num_heads": 4,
    "use_new_attention_order": True,
    "noise_schedule": "cosine",
    "image_px": [32, 64],
}
Weights = dict[str, torch.Tensor]


def weights_of(case: str) -> Weights:
    """The tensors of a fixture's network, with other values."""
    return random_weights(json.loads(str(np.load(FIXTURES / f"{case}.npz")["about"]))["shapes"])


@pytest.fixture(scope="module")
def weights() -> Weights:
    return weights_of("plain")


@pytest.fixture(scope="module")
def conditional() -> Weights:
    return weights_of("class_cond")


@pytest.fixture
def file(weights, tmp_path) -> Path:
    torch.save(weights, tmp_path / "ema_0.9999_500000.pt")
    return tmp_path / "ema_0.9999_500000.pt"


def load(file: Path, options: dict[str, Any] = PLAIN, **changes: Any) -> Any:
    return load_adm_teacher(TeacherConfig(path=str(file), options=options, **changes))


def encode(teacher: Any) -> Weights:
    features: Weights = teacher.encode(randn(1, 3, 32, 64), {"forward": randn(1, 1, 3, 32, 64, seed=1)}, views(50))
    return features


# What the file tells


def test_the_spec_says_what_was_read(file, weights):
    spec = load(file).spec
    assert spec.kind == "adm"
    assert spec.weights_blake3 == weights_digest(weights)  # of the tensors as published
    assert spec.image_px == (32, 64)
    assert [(level.name, level.channels, level.tap) for level in spec.levels] == [
        ("l2", 64, "up_blocks.0.attentions.1")
    ]
    assert spec.noise_shapes == {"forward": (3, -1, -1)}
    assert spec.num_timesteps == 1000
    json.dumps(spec.options)


def test_what_changes_features_is_in_the_recipe(file):
    found = {json.dumps(load(file, PLAIN | change).spec.options, sort_keys=True) for change in ({}, *CHANGES)}
    assert len(found) == 1 + len(CHANGES)
    assert load(file, PLAIN | {"image_px": 64}).spec.options == load(file).spec.options


CHANGES: tuple[dict[str, Any], ...] = (
    {"num_heads": 2},
    {"num_heads_upsample": 2},
    {"use_new_attention_order": False},
    {"noise_schedule": "linear"},
    {"diffusion_steps": 500},
    {"predict_xstart": True},
    {"ensemble": 2},
    {"encoding": "ddim_inversion"},
    {"encoding": "ddim_inversion", "clip_denoised": True},
    {"channels_last": True},
)


def test_the_256_px_layout_needs_no_options():
    """The published shapes, as the fixture's with eight times the channels."""
    shapes = {name: tuple(each.shape) for name, each in weights_of("adm256_layout").items()}
    layout = infer_adm_layout(
        {name: tuple(side * 8 if side >= 32 else side for side in shape) for name, shape in shapes.items()}, "file"
    )
    assert layout == AdmLayout(
        widths=(256, 256, 512, 512, 1024, 1024),
        num_res_blocks=2,
        attention=(False, False, False, True, True, True),
        out_channels=6,
        scale_shift=True,
        resblock_updown=True,
        num_classes=None,
    )
    settings = complete(AdmOptions(), layout, "file")
    assert (settings.head_channels, settings.new_attention_order, settings.noise_schedule, settings.image_px) == (
        64,
        False,
        "linear",
        (256, 256),
    )


@pytest.mark.parametrize("steps", [1000, 4000, 250])
def test_linear_betas_are_scaled_to_the_number_of_steps(file, steps):
    """As `get_named_beta_schedule` does: with any number, the last timestep has as little of the image left."""
    schedule = load(file, PLAIN | {"noise_schedule": "linear", "diffusion_steps": steps}).schedule
    kept = np.cumprod([1 - (0.1 + (20 - 0.1) * step / (steps - 1)) / steps for step in range(steps)])
    np.testing.assert_allclose(schedule, kept, rtol=1e-9)
    assert len(schedule) == steps and np.log(schedule[-1]) == pytest.approx(-10.05, rel=0.06)


def test_another_layout_must_be_told_what_shapes_do_not_show(file):
    with pytest.raises(
        ConfigError, match=r"num_head_channels or num_heads, use_new_attention_order, noise_schedule, image_px.*options"
    ):
        load(file, {})
    for name in ("num_heads", "use_new_attention_order", "noise_schedule", "image_px"):
        with pytest.raises(ConfigError, match=f"does not say its .*{name}"):
            load(file, {key: value for key, value in PLAIN.items() if key != name})


def test_a_file_in_half_precision_or_torchs_old_format_is_the_same_network(weights, tmp_path):
    new, old, half = (tmp_path / f"{name}.pt" for name in ("new", "old", "half"))
    torch.save(weights, new)
    torch.save(weights, old, _use_new_zipfile_serialization=False)
    torch.save({name: each.half() for name, each in weights.items()}, half)
    assert not zipfile.is_zipfile(old)
    assert is_adm_file(str(old))
    assert load(old).spec == load(new).spec
    exact, found = encode(load(new)), encode(load(half))
    assert found["l2"].dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0, atol=0.02)


def anonymous_bytes() -> int:
    """Memory of this process that is no mapped file."""
    gc.collect()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's memory counters")
def test_weights_are_mapped_not_copied(tmp_path):
    options = {"num_head_channels": 64, "use_new_attention_order": False, "noise_schedule": "linear", "image_px": 64}
    shapes = {name: tuple(each.shape) for name, each in weights_of("adm256_layout").items()}
    wide = {name: torch.zeros([side * 3 if side >= 32 else side for side in shape]) for name, shape in shapes.items()}
    torch.save(wide, tmp_path / "wide.pt")
    del wide
    size, before = (tmp_path / "wide.pt").stat().st_size, anonymous_bytes()
    teacher = load(tmp_path / "wide.pt", options | {"num_head_channels": 32})
    assert size > 300e6
    assert anonymous_bytes() - before < 0.3 * size
    assert teacher.spec.levels[0].channels == 192


# Class-conditional networks


def test_a_class_conditional_network_needs_one_class(conditional, tmp_path):
    file, options = (
        tmp_path / "classes.pt",
        {key: value for key, value in PLAIN.items() if key != "num_heads"} | {"num_head_channels": 32},
    )
    torch.save(conditional, file)
    for label in ({}, {"class_label": 11}):
        with pytest.raises(ConfigError, match=r"class-conditional; give all images one class, 0 to 10, .*class_label"):
            load(file, options | label)
    first, other = load(file, options | {"class_label": 3}), load(file, options | {"class_label": 4})
    assert first.spec.weights_blake3 == other.spec.weights_blake3 == weights_digest(conditional)
    assert first.spec.options["class_label"] == 3
    assert (encode(first)["l2"] - encode(other)["l2"]).abs().max() > 0.01


def test_an_unconditional_network_takes_no_class(file):
    with pytest.raises(ConfigError, match=r"not class-conditional; leave out .*class_label"):
        load(file, PLAIN | {"class_label": 0})


# Which files are recognised


def test_files_are_recognised_by_their_tensors_names(file, weights, tmp_path):
    assert is_adm_file(str(file))
    others = {
        "latent.pt": {f"model.diffusion_model.{name}": torch.zeros(1) for name in weights},
        "gan.pt": {"g_ema": {"style.1.weight": torch.zeros(1)}},
        "list.pt": [torch.zeros(1)],
    }
    for name, content in others.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("input_blocks.0.0.weight time_embed.0.weight")
    (tmp_path / "folder.pt").mkdir()
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme", "nothing")
    with zipfile.ZipFile(tmp_path / "damaged.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000))
    damaged = (tmp_path / "damaged.pt").read_bytes()
    (tmp_path / "damaged.pt").write_bytes(damaged[:50] + b"\xff" * 4 + damaged[54:])
    file.rename(tmp_path / "weights.ckpt")
    for path in [
        *tmp_path.iterdir(),
        tmp_path / "nowhere.pt",
        Path("https://example.org/a.pt"),
        Path("a" * 300 + ".pt"),
    ]:
        assert not is_adm_file(str(path)), path


def test_a_pickle_is_never_executed(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attack = Attack(tmp_path / "attacked")
    torch.save(weights | {"extra": attack}, "attack.pt")
    Path("plain.pt").write_bytes(
        pickle.dumps({"input_blocks.0.0.weight": attack, "time_embed.0.weight": 0}, protocol=2)
    )
    for name in ("attack.pt", "plain.pt"):
        assert is_adm_file(name)
        with pytest.raises(
            TeacherError, match=r"not readable as weights .it holds other things than tensors, none of which was run"
        ):
            load(Path(name))
    assert not attack.trap.exists()


def test_the_kind_can_be_named(file):
    assert load_teacher(TeacherConfig(path=str(file), kind="adm", options=PLAIN)).spec == load(file).spec


def test_published_files_and_their_options_are_listed():
    family = [published for published in published_teachers() if published.kind == "adm"]
    assert {
        f"adm-{name}" for name in ("imagenet", "imagenet-conditional", "lsun-bedroom", "lsun-cat", "lsun-horse", "ffhq")
    } <= {each.name for each in family}
    for each in family:
        assert each.url.startswith("https://")
        assert each.url.endswith(".pt")
        AdmOptions.model_validate(each.options)


# Refusals


def widen(name: str, *shape: int) -> Callable[[Weights], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def drop(prefix: str) -> Callable[[Weights], None]:
    def apply(tensors: Weights) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return apply


DAMAGES: dict[str, tuple[Callable[[Weights], Any], str]] = {
    "a classifier": (drop("output_blocks."), "classifier"),
    "an upsampler": (widen("input_blocks.0.0.weight", 32, 6, 3, 3), "takes 6 channels .*upsampler"),
    "latent output": (widen("out.2.weight", 4, 32, 3, 3), "gives 4 channels"),
    "another time embedding": (
        widen("time_embed.0.weight", 256, 64),
        r"emb_layers.1.weight has shape .*, the network asks for \(32, 256\)",
    ),
    "few channels": (
        lambda each: each.update({"input_blocks.3.0.in_layers.2.weight": torch.zeros(40, 32, 3, 3)}),
        "40 channels, no multiple of",
    ),
    "no such network": (drop("time_embed.0"), "time_embed.0.weight is missing"),
    "a block missing": (drop("output_blocks.5."), "5 output_blocks with upsamplers in"),
    "an upsampling layer missing": (drop("output_blocks.1.2."), "output_blocks"),
    "a tensor missing": (drop("input_blocks.3.0.in_layers.0.bias"), "input_blocks.3.0.in_layers.0.bias is missing"),
    "a tensor too many": (widen("extra", 1), "extra is unexpected"),
    "a wrong shape": (widen("out.0.bias", 5), r"out.0.bias has shape \(5,\), the network asks for \(32,\)"),
    "q, k, v of another size": (widen("middle_block.1.qkv.weight", 190, 64, 1), r"qkv.weight has shape \(190, 64, 1\)"),
    "not finite": (
        lambda each: each.update({"out.0.bias": torch.full((32,), float("nan"))}),
        "out.0.bias holds values that are not finite",
    ),
    "integers": (
        lambda each: each.update({"out.0.bias": torch.zeros(32, dtype=torch.int32)}),
        "out.0.bias holds values",
    ),
    "training state": (lambda each: each.update(step=3), "other things than named tensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_cannot_be_used_is_one_sentence(weights, tmp_path, damage):
    apply, message = DAMAGES[damage]
    changed = dict(weights)
    apply(changed)
    torch.save(changed, tmp_path / "file.pt")
    with pytest.raises(TeacherError, match=message) as caught:
        load(tmp_path / "file.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1000, 0.5, 0.999])
def test_a_download_that_broke_off_is_named(file, keep):
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    assert is_adm_file(str(file)) == (keep > 0)  # ours by the names at its beginning
    with pytest.raises(TeacherError, match=r"ema_.*pt: (is empty; download|not readable as weights \(it is cut off)"):
        load(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TeacherError, match=r"nowhere\.pt: no such file.*list teachers"):
        load(tmp_path / "nowhere.pt")


OPTION_ERRORS: dict[str, tuple[dict[str, Any], type[DtpipeError], str]] = {
    "both": ({"num_head_channels": 16}, ConfigError, "both num_heads and num_head_channels"),
    "heads": ({"num_heads": 5}, ConfigError, r"num_heads is 5, .* 64 channels"),
    "head channels": (
        {"num_heads": None, "num_head_channels": 48},
        ConfigError,
        r"num_head_channels is 48, .* 64 channels",
    ),
    "heads of the decoder": ({"num_heads_upsample": 5}, ConfigError, r"num_heads_upsample is 5, .* 64 channels"),
    "heads of the decoder alone": (
        {"num_heads": None, "num_head_channels": 16, "num_heads_upsample": 2},
        ConfigError,
        r"num_heads_upsample without num_heads; give both",
    ),
    "timesteps": ({"rescale_timesteps": True}, ConfigError, "rescale_timesteps.*options of this teacher: encoding"),
    "schedule": ({"noise_schedule": "sigmoid"}, ConfigError, r"noise_schedule.*'linear' or 'cosine'"),
}


@pytest.mark.parametrize("case", OPTION_ERRORS)
def test_options_that_do_not_fit_are_named(file, case):
    change, error, message = OPTION_ERRORS[case]
    with pytest.raises(error, match=message):
        load(file, PLAIN | change)
