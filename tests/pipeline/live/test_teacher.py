"""What is encoded live is what `extract` stores for the same draw, of one dataset and of several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.stream.batch import FeatureBatch
from dtpipe.distill.stream.data import StoredData, TrainingData, open_data
from dtpipe.distill.stream.live import LiveSamples, LiveTeacher
from dtpipe.distill.stream.order import StreamPosition
from dtpipe.distill.stream.stream import FeatureStream
from dtpipe.distill.trainer import stream_settings, train
from dtpipe.extract.noise import draw_noise
from dtpipe.manifests.codecs.fitted import fitted_names
from dtpipe.manifests.errors import ConfigError, DeviceMemoryError, TeacherError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_image, read_level
from dtpipe.pipeline.live.source import LiveData
from dtpipe.pipeline.live.teacher import LiveRecipes, open_live
from parts import sd_pipelines
from parts.extractions import Extract, MakeConfig, live_config
from parts.fits import relative_mse
from parts.settings import build
from parts.teachers import gan_network

CPU = torch.device("cpu")
FLIPS = {"timesteps": [50, 150], "draws": 2, "flips": True}
LEVELS = ("l2", "l3")
TOLERANCE = {"rtol": 2**-11, "atol": 1e-5}
"""Of the codec: float16 has 11 significant bits, so rounding to nearest is off by up to 2^-12 of a value; twice that,
and what float32 sums differ by (threads, kernels)."""


def config(*urls: str, **changes: Any) -> DistillConfig:
    base = {"datasets": urls, "out": "unused", "epochs": 2, "batch_size": 4, "micro_batch": 3, "device": "cpu"}
    return build(DistillConfig, base, **changes)


def stream_of(settings: DistillConfig, data: TrainingData | None = None, **teacher: object) -> FeatureStream:
    data = data or StoredData(partial(open_live, teacher) if settings.reencode else None)
    opened = data.open(settings)
    names = tuple(level.name for level in opened.source.levels)
    live = data.teacher(opened.source, CPU)
    return FeatureStream(opened.source, stream_settings(settings, names), CPU, live, opened.sampling)


def samples(batches: Iterator[FeatureBatch]) -> dict[tuple[int, str], tuple[np.ndarray, dict[str, np.ndarray]]]:
    """(epoch, key) to image and levels; the order within a batch is no content."""
    return {
        (batch.epoch, key): (
            batch.images[idx].numpy(),
            {name: level[idx].float().numpy() for name, level in batch.levels.items()},
        )
        for batch in batches
        for idx, key in enumerate(batch.keys)
    }


class StoredDraws:
    """A live teacher that is made to take the draws that are stored."""

    makes_images = False

    def __init__(self, teacher: LiveTeacher, source: FeatureDataset) -> None:
        self.teacher, self.source = teacher, source

    def _stored(self, live: LiveSamples) -> LiveSamples:
        num_stored = 1 + max(view.draw for view in self.source.views)
        draws = np.array([self.source.views[view].draw for view in live.views])
        return LiveSamples(live.keys, live.views, live.flip, draws - num_stored)

    def prepare(self, live: LiveSamples) -> Any:
        return self.teacher.prepare(self._stored(live))

    def encode(self, images: torch.Tensor, live: LiveSamples, prepared: Any) -> Any:
        return self.teacher.encode(images, self._stored(live), prepared)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_with_the_stored_draws_forced_live_batches_equal_the_cached_ones_within_the_codecs_error(
    extract: Extract, dtype: str
) -> None:
    url = extract("features", noise=FLIPS, shard={"samples": 3, "dtype": dtype})
    cached = stream_of(config(url))
    live = stream_of(config(url, reencode=1.0))
    assert isinstance(live.source, FeatureDataset) and live.live is not None
    live.live = StoredDraws(live.live, live.source)
    stored, fresh = samples(cached.batches(StreamPosition())), samples(live.batches(StreamPosition()))
    assert stored.keys() == fresh.keys() and len(stored) == 16
    assert [b.num_global for b in cached.batches(StreamPosition())] == [
        b.num_global for b in live.batches(StreamPosition())
    ]
    tolerance = TOLERANCE if dtype == "float16" else {"rtol": 1e-5, "atol": 1e-5}
    for at, (image, levels) in stored.items():
        np.testing.assert_array_equal(fresh[at][0], image)
        for name in LEVELS:
            np.testing.assert_allclose(fresh[at][1][name], levels[name], **tolerance)


def test_a_live_teacher_without_room_says_what_to_lower(extract: Extract, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of(config(extract("features"), reencode=1.0))
    monkeypatch.setattr("dtpipe.pipeline.live.teacher.encode", lambda *_: torch.empty(1 << 55))
    with pytest.raises(DeviceMemoryError, match=r"encoding live: cpu has no memory for \d images .* --micro-batch"):
        next(stream.batches(StreamPosition()))


def test_the_fresh_draw_of_an_epoch_is_the_one_that_extract_would_store_next(extract: Extract) -> None:
    """One stored draw: epoch 0 sees draw 1 and epoch 1 draw 2, which a dataset of three draws holds."""
    one = extract("one", noise={"timesteps": [50], "draws": 1})
    three = FeatureDataset.open(extract("three", noise={"timesteps": [50], "draws": 3}))
    found = samples(stream_of(config(one, reencode=1.0)).batches(StreamPosition()))
    for (epoch, key), (_, levels) in found.items():
        row = three.columns.row_of(key)
        for name in LEVELS:
            np.testing.assert_allclose(
                levels[name], read_level(three, name, row, 1 + epoch).astype(np.float32), **TOLERANCE
            )
            assert np.abs(levels[name] - read_level(three, name, row, 0)).max() > 0.01  # noise is seen at all


def test_a_share_of_live_samples_leaves_the_others_as_stored_whatever_the_cut(extract: Extract) -> None:
    url = extract("features", noise=FLIPS)
    stored = samples(stream_of(config(url)).batches(StreamPosition()))
    by_cut = [
        samples(stream_of(config(url, reencode=0.5, micro_batch=micro, read_threads=threads)).batches(StreamPosition()))
        for micro, threads in ((1, 1), (3, 4), (None, 2))
    ]
    same = 0
    for at, (_, levels) in stored.items():
        same += np.array_equal(levels["l2"], by_cut[0][at][1]["l2"])
        for other in by_cut[1:]:  # float32 sums in another order: the teacher's batches are of other sizes
            np.testing.assert_allclose(other[at][1]["l2"], by_cut[0][at][1]["l2"], rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(other[at][0], by_cut[0][at][0])
    assert 2 < same < 14


def test_flips_encoded_live_equal_stored_flipped_views(extract: Extract) -> None:
    """No flipped view in the dataset that is trained on; the reference dataset has them."""
    plain = extract("plain", noise={"timesteps": [50]})
    flipped = FeatureDataset.open(extract("flipped", noise={"timesteps": [50], "draws": 2, "flips": True}))
    found = samples(stream_of(config(plain, reencode=1.0, flip=True, epochs=1)).batches(StreamPosition()))
    num_flipped = 0
    for (_, key), (image, levels) in found.items():
        row = flipped.columns.row_of(key)
        flip = not np.array_equal(image, read_image(flipped, row))
        view = next(idx for idx, each in enumerate(flipped.views) if (each.draw, each.flip) == (1, flip))
        np.testing.assert_allclose(levels["l2"], read_level(flipped, "l2", row, view).astype(np.float32), **TOLERANCE)
        num_flipped += flip
    assert 0 < num_flipped < 8


def test_concatenated_datasets_are_each_encoded_with_their_own_noise(
    extract: Extract, image_folder: Path, tmp_path: Path
) -> None:
    keys = sorted(path.relative_to(image_folder).as_posix() for path in image_folder.rglob("*.png"))
    files = []
    for idx, part in enumerate((keys[:5], keys[5:])):
        files.append(tmp_path / f"keys{idx}.txt")
        files[-1].write_text("\n".join(part))
    urls = [extract(f"part{seed}", keys=str(files[seed]), noise={"timesteps": [50], "seed": seed}) for seed in (0, 1)]
    wanted = [
        FeatureDataset.open(extract(f"whole{seed}", noise={"timesteps": [50], "draws": 2, "seed": seed}))
        for seed in (0, 1)
    ]
    found = samples(stream_of(config(*urls, reencode=1.0, epochs=1)).batches(StreamPosition()))
    assert {key for _, key in found} == set(keys)
    for (_, key), (image, levels) in found.items():
        dataset = wanted[0 if key in keys[:5] else 1]
        np.testing.assert_array_equal(image, read_image(dataset, dataset.columns.row_of(key)))
        np.testing.assert_allclose(
            levels["l3"], read_level(dataset, "l3", dataset.columns.row_of(key), 1).astype(np.float32), **TOLERANCE
        )


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_joined_timesteps_are_encoded_at_the_timestep_of_the_view(extract: Extract, order: tuple[int, int]) -> None:
    urls = [
        extract("early", noise={"timesteps": [50]}),
        extract("late", noise={"timesteps": [150], "seed": 4}, source={"seed": 3}),
    ]
    wanted = [
        FeatureDataset.open(extract("early2", noise={"timesteps": [50], "draws": 2})),
        FeatureDataset.open(extract("late2", noise={"timesteps": [150], "draws": 2, "seed": 4})),
    ]
    found = samples(
        stream_of(config(*(urls[idx] for idx in order), join=True, reencode=1.0, epochs=1)).batches(StreamPosition())
    )
    seen = {0: 0, 1: 0}
    for (_, key), (_, levels) in found.items():
        stored = [read_level(dataset, "l2", dataset.columns.row_of(key), 1).astype(np.float32) for dataset in wanted]
        nearest = min((0, 1), key=lambda idx: np.abs(stored[idx] - levels["l2"]).max())
        np.testing.assert_allclose(levels["l2"], stored[nearest], **TOLERANCE)
        seen[nearest] += 1
    assert min(seen.values()) > 0


def test_live_samples_are_coded_by_the_fit_of_their_dataset(extract: Extract) -> None:
    """With the stored draws they are the cached ones. With draws of their own they lie from the true features, which a
    dataset without a fit holds, about as far as the fit was for; the cached ones beside them stay as stored."""
    coded = extract("coded", codec={"max_error": 0.1})
    true = FeatureDataset.open(extract("true", noise={"timesteps": [50], "draws": 3}, shard={"dtype": "float32"}))
    stored = samples(stream_of(config(coded)).batches(StreamPosition()))
    forced = stream_of(config(coded, reencode=1.0))
    assert isinstance(forced.source, FeatureDataset) and forced.live is not None
    forced.live = StoredDraws(forced.live, forced.source)
    for at, (_, levels) in samples(forced.batches(StreamPosition())).items():
        assert max(relative_mse(levels[name], stored[at][1][name]) for name in LEVELS) < 1e-3  # a symbol may turn over
    errors = []
    for (epoch, key), (_, levels) in samples(stream_of(config(coded, reencode=0.5)).batches(StreamPosition())).items():
        if not np.array_equal(levels["l2"], stored[epoch, key][1]["l2"]):
            row = true.columns.row_of(key)
            errors += [relative_mse(levels[name], read_level(true, name, row, 1 + epoch)) for name in LEVELS]
    assert 2 < len(errors) / len(LEVELS) < 14
    assert 0.03 < np.mean(errors) < 0.3


def test_datasets_under_different_fits_are_joined_each_by_its_own(extract: Extract, tmp_path: Path) -> None:
    urls = [
        extract("fine", codec={"max_error": 0.02}),
        extract("coarse", codec={"max_error": 0.3}, noise={"timesteps": [150]}),
    ]
    fine, coarse = map(FeatureDataset.open, urls)
    assert set(fitted_names(*fine.levels)).isdisjoint(fitted_names(*coarse.levels))
    seen = set()
    for batch in stream_of(config(*urls, join=True)).batches(StreamPosition()):
        for idx, key in enumerate(batch.keys):
            for name in LEVELS:
                timestep = int(batch.timesteps[name][idx])
                part = {50: fine, 150: coarse}[timestep]
                expected = read_level(part, name, part.columns.row_of(key), 0)
                np.testing.assert_allclose(batch.levels[name][idx], expected, rtol=2**-9, atol=1e-3)
                seen.add(timestep)
    assert seen == {50, 150}
    small = {"student": {"name": "test_resnet"}, "regressor": {"width": 8}}
    result = train(config(*urls, join=True, out=str(tmp_path / "run"), **small), StoredData())
    assert result.num_steps == 4


def test_joined_teachers_each_give_their_own_levels(extract: Extract, ddpm: Path, other_ddpm: Path) -> None:
    """One path is given, of the second teacher; the first is found where its extraction recorded it."""
    urls = [
        extract("one"),
        extract(
            "other", teacher={"path": str(other_ddpm)}, source={"seed": 9}, shard={"images": "joined", "samples": 3}
        ),
    ]
    wanted = [
        FeatureDataset.open(
            extract(f"wanted-{path.name}", teacher={"path": str(path)}, noise={"timesteps": [50], "draws": 2})
        )
        for path in (ddpm, other_ddpm)
    ]
    settings = config(*urls, join=True, reencode=1.0, epochs=1, loss_weights=(1, 0.3))
    assert open_data(settings).level_weights == {"l2": 1, "l3": 1, "l2.b": 0.3, "l3.b": 0.3}
    found = samples(stream_of(settings, path=str(other_ddpm)).batches(StreamPosition()))
    for (_, key), (_, levels) in found.items():
        for name, (dataset, level) in {
            "l2": (wanted[0], "l2"),
            "l2.b": (wanted[1], "l2"),
            "l3.b": (wanted[1], "l3"),
        }.items():
            stored = read_level(dataset, level, dataset.columns.row_of(key), 1).astype(np.float32)
            np.testing.assert_allclose(levels[name], stored, **TOLERANCE)


def test_a_teacher_of_none_of_the_datasets_is_refused(extract: Extract, other_ddpm: Path, tmp_path: Path) -> None:
    url = extract("one")
    with pytest.raises(TeacherError, match=rf"{url} cannot be encoded live: {other_ddpm} is not the teacher"):
        open_live({"path": str(other_ddpm)}, FeatureDataset.open(url), CPU)
    with pytest.raises(TeacherError, match=r"cannot be encoded live.*nowhere"):
        open_live({"path": str(tmp_path / "nowhere")}, FeatureDataset.open(url), CPU)


# --- without a dataset -----------------------------------------------------------------------------------------------


@pytest.fixture
def live_data(make_config: MakeConfig) -> Callable[..., LiveData]:
    return lambda **changes: LiveData(live_config(make_config(batch_size=3, **changes)))


def test_without_a_dataset_epoch_e_sees_what_extract_stores_as_draw_e(
    extract: Extract, live_data: Callable[..., LiveData]
) -> None:
    stored = FeatureDataset.open(extract("features", noise={"timesteps": [50], "draws": 2}))
    data = live_data().open(config(reencode=1.0))
    assert (data.source.levels, data.source.image_px, data.student_px) == (
        stored.levels,
        stored.image_px,
        stored.recipe.student_px,
    )
    assert sorted(data.source.columns.keys) == sorted(stored.columns.keys)
    found = samples(stream_of(config(reencode=1.0), live_data()).batches(StreamPosition()))
    assert len(found) == 16
    for (epoch, key), (image, levels) in found.items():
        row = stored.columns.row_of(key)
        np.testing.assert_array_equal(image, read_image(stored, row))
        for name in LEVELS:
            np.testing.assert_allclose(
                levels[name], read_level(stored, name, row, epoch).astype(np.float32), **TOLERANCE
            )


def test_a_gan_synthesizes_online_the_dataset_in_epoch_0_and_new_images_after(
    extract: Extract, live_data: Callable[..., LiveData], gan: dict[str, str]
) -> None:
    stored = FeatureDataset.open(extract("features", images=None, num_samples=7, teacher=gan))
    found = samples(
        stream_of(config(reencode=1.0), live_data(images=None, num_samples=7, teacher=gan)).batches(StreamPosition())
    )
    assert {key for _, key in found} == {f"z/{idx:09d}" for idx in range(7)}
    network = gan_network()
    for (epoch, key), (image, levels) in found.items():
        if epoch == 0:
            np.testing.assert_array_equal(image, read_image(stored, stored.columns.row_of(key)))
            np.testing.assert_allclose(
                levels["l2"], read_level(stored, "l2", stored.columns.row_of(key)).astype(np.float32), **TOLERANCE
            )
        latent = torch.from_numpy(draw_noise(0, key, epoch, "z", (6,)))[None, :, None, None]
        with torch.inference_mode():  # one plain forward pass per image
            expected = (((2 * network(latent)[0]).clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
        assert np.abs(image - expected).max() <= 0.51


def test_a_share_of_a_synthesized_dataset_may_be_made_anew(extract: Extract, gan: dict[str, str]) -> None:
    url = extract("features", images=None, num_samples=9, teacher=gan)
    stored = samples(stream_of(config(url)).batches(StreamPosition()))
    found = samples(stream_of(config(url, reencode=0.5)).batches(StreamPosition()))
    new = sum(not np.array_equal(image, stored[at][0]) for at, (image, _) in found.items())
    assert 3 < new < 15
    with pytest.raises(ConfigError, match="is synthesized, and a new image has no features"):
        other = extract("b", images=None, num_samples=9, teacher=gan, shard={"dtype": "float32"})
        stream_of(config(url, other, join=True, reencode=0.5))


def test_live_encoding_from_kept_latents_skips_the_vae_and_gives_the_same(extract: Extract, tmp_path: Path) -> None:
    """The teacher's VAE is taken away; what it would have given lies in the dataset."""
    teacher = {"path": str(sd_pipelines.save_pipeline(tmp_path / "sd")), "options": {"keep_latents": True}}
    url = extract("features", teacher=teacher, noise={"timesteps": [50], "flips": True})
    settings = config(url, reencode=1.0, levels=("l2", "l5"))
    whole, kept = stream_of(settings), stream_of(settings)
    assert isinstance(whole.live, LiveRecipes) and isinstance(kept.live, LiveRecipes)
    whole.live = replace(whole.live, parts=[replace(part, latents=None) for part in whole.live.parts])
    kept.live.parts[0].opened.teacher._vae = None  # type: ignore[attr-defined]
    expected, found = samples(whole.batches(StreamPosition())), samples(kept.batches(StreamPosition()))
    assert found.keys() == expected.keys()
    for at, (_, levels) in expected.items():
        for (
            name,
            level,
        ) in levels.items():  # float32 sums in another order: the VAE's latents have another memory layout
            np.testing.assert_allclose(found[at][1][name], level, rtol=0, atol=1e-5 * np.abs(level).max())
