"""A whole inline extraction: right features, resume, refusals, budget, and what settings make of a recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dtpipe.extract.cluster.inline import HERE
from dtpipe.extract.config import CodecConfig, TeacherConfig
from dtpipe.extract.noise import draw_noise
from dtpipe.extract.recipe import make_recipe, stored_levels
from dtpipe.extract.run import run_extraction
from dtpipe.extract.shards.progress import Progress, ProgressMeter
from dtpipe.extract.shards.queue import ShardQueue
from dtpipe.extract.teachers.base import TapSpec, TeacherSpec
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.errors import (
    ConfigError,
    ErrorBudgetError,
    IncompleteError,
    InputError,
    PlanChangedError,
    StoreError,
)
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.join import JoinedDataset
from dtpipe.manifests.read.source import read_image, read_level
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import load_manifest
from parts.codecs import register_turned
from parts.extractions import Extract, MakeConfig
from parts.stored import recomputed, stored_level
from parts.tensors import hooked


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_stored_features_are_those_of_plain_diffusers(form: str, make_config: MakeConfig, ddpm: Path) -> None:
    from diffusers import DDPMScheduler, UNet2DModel

    config = make_config(
        shard={"samples": 3, "format": form, "dtype": "float32"},
        noise={"timesteps": [50, 300], "draws": 2, "flips": True},
    )
    dataset = FeatureDataset.open(run_extraction(config).url)
    unet = UNet2DModel.from_pretrained(ddpm / "unet").eval()
    scheduler = DDPMScheduler.from_pretrained(ddpm / "scheduler")
    for row in (0, 4, 7):
        pixels = torch.from_numpy(read_image(dataset, row)).permute(2, 0, 1)[None].float() / 127.5 - 1
        for idx, view in enumerate(dataset.views):
            noise = torch.from_numpy(draw_noise(0, dataset.columns.keys[row], view.draw, "forward", (3, 32, 32)))[None]
            clean = pixels.flip(-1) if view.flip else pixels
            expected = _levels(unet, scheduler.add_noise(clean, noise, torch.tensor([view.timestep])), view.timestep)
            for name, level in expected.items():
                # float32 sums in another order: oneDNN picks kernels by batch size
                np.testing.assert_allclose(read_level(dataset, name, row, idx), level[0], rtol=1e-4, atol=1e-5)


def _levels(unet: torch.nn.Module, noisy: torch.Tensor, timestep: int) -> dict[str, torch.Tensor]:
    """l2 and l3 of the tiny teacher: the last residual layer at strides 4 and 8, by a full forward pass."""
    taps = {"l3": "up_blocks.0.resnets.1", "l2": "up_blocks.1.resnets.1"}
    return hooked(unet, taps, lambda: unet(noisy, timestep))


def test_rerun_writes_nothing_and_needs_no_listing(make_config: MakeConfig, image_folder: Path) -> None:
    first = run_extraction(make_config())
    assert (first.num_rows, first.num_ok, first.num_shards, first.shards_written) == (8, 8, 3, 3)
    assert first.throughput_img_s > 0
    (image_folder / "cat" / "new.png").write_bytes(b"appeared later")
    again = run_extraction(make_config(decode_threads=1, retries=0))
    assert (again.digest, again.shards_written) == (first.digest, 0)


def test_shard_size_and_decode_threads_do_not_change_features(extract: Extract) -> None:
    datasets = [
        FeatureDataset.open(extract(f"out{samples}", shard={"samples": samples}, decode_threads=samples))
        for samples in (1, 3, 8)
    ]
    for name in ("l2", "l3"):
        values = [stored_level(dataset, name, range(8)) for dataset in datasets]
        np.testing.assert_array_equal(values[0], values[1])  # padding and neighbours leave no trace
        np.testing.assert_array_equal(values[0], values[2])


def test_recomputed_features_are_the_stored_ones_before_rounding(extract: Extract, ddpm: Path) -> None:
    dataset = FeatureDataset.open(extract(student_px=16))
    rows = [1, 6, 3]
    assert [level.name for level in dataset.levels] == ["l1", "l2"]
    for name, level in recomputed(dataset, load_teacher(TeacherConfig(path=str(ddpm))), rows).items():
        assert level.dtype == torch.float32
        np.testing.assert_array_equal(level.numpy().astype(np.float16), stored_level(dataset, name, rows))


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_images_that_another_dataset_has_can_be_left_out(form: str, extract: Extract, tmp_path: Path) -> None:
    whole = FeatureDataset.open(extract())
    shard = {"samples": 4, "format": form, "images": "joined"}
    bare = FeatureDataset.open(extract("bare", shard=shard, noise={"timesteps": [300]}))
    assert not [path for path in (tmp_path / "bare").rglob("*") if path.name == "image" or "image.png" in path.name]
    both = JoinedDataset([bare, whole])
    assert len(both.columns) == len(whole.columns)
    for row in range(len(both.columns)):
        assert np.array_equal(read_image(both, row), read_image(whole, whole.columns.row_of(both.columns.keys[row])))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_low_precision_costs_stands_in_the_manifest(
    dtype: str, make_config: MakeConfig, ddpm: Path, tmp_path: Path
) -> None:
    teacher = {"path": str(ddpm), "dtype": dtype}
    low = run_extraction(make_config(teacher=teacher, shard={"samples": 3, "dtype": "float32"}))
    exact = run_extraction(make_config(out=str(tmp_path / "exact"), shard={"samples": 3, "dtype": "float32"}))
    assert exact.float32_error == {}
    one, other = FeatureDataset.open(low.url), FeatureDataset.open(exact.url)
    for level in one.levels:
        found = np.stack([read_level(one, level.name, row) for row in range(3)])  # the first shard
        wanted = np.stack([read_level(other, level.name, row) for row in range(3)])
        expected = np.abs(found - wanted).max() / np.abs(wanted).max()
        assert 0 < expected < 0.05
        assert low.float32_error[level.name] == pytest.approx(expected, rel=0.01)
    assert one.manifest is not None and one.manifest.provenance["float32_error"] == low.float32_error


def test_another_recipe_is_refused_by_name_and_execution_settings_may_change(make_config: MakeConfig) -> None:
    run_extraction(make_config())
    with pytest.raises(PlanChangedError, match="batch_size: 2 -> 4"):
        run_extraction(make_config(batch_size=4))
    with pytest.raises(PlanChangedError, match="limit"):
        run_extraction(make_config(limit=5))
    with pytest.raises(ConfigError, match="--fresh"):
        run_extraction(make_config(), fresh=True)


def test_keys_file_and_limit_choose_samples(make_config: MakeConfig, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("cat/001.png\ndog/004.png\n\n")
    dataset = FeatureDataset.open(run_extraction(make_config(keys=str(keys))).url)
    assert sorted(dataset.columns.keys) == ["cat/001.png", "dog/004.png"]
    assert run_extraction(make_config(out=str(tmp_path / "few"), limit=5)).num_rows == 5
    with pytest.raises(InputError, match=r"extract\.keys"):
        run_extraction(make_config(out=str(tmp_path / "none"), keys=str(tmp_path / "absent")))


def test_bad_samples_are_named_within_the_budget_and_end_the_run_beyond_it(
    make_config: MakeConfig, image_folder: Path
) -> None:
    (image_folder / "cat" / "001.png").write_bytes(b"")
    (image_folder / "dog" / "002.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(
        ErrorBudgetError, match=r"extract\.run\.max_bad allows 1 \(.*cat/001\.png: empty file"
    ) as caught:
        run_extraction(make_config(max_bad=1))
    assert caught.value.exit_code == 7
    result = run_extraction(make_config(max_bad=2))
    assert (result.num_ok, result.num_bad) == (6, 2)
    assert {each.key: each.reason for each in result.bad}["cat/001.png"] == "empty file"
    dataset = FeatureDataset.open(result.url)
    assert dataset.columns.status[dataset.columns.row_of("cat/001.png")] == "bad: empty file"
    assert run_extraction(make_config(max_bad=2)).bad == result.bad
    assert run_extraction(make_config(max_bad=0.25)).digest == result.digest  # two of eight


def test_progress_counts_to_the_end(make_config: MakeConfig) -> None:
    seen: list[Progress] = []
    run_extraction(make_config(), seen.append)
    assert (seen[-1].shards_done, seen[-1].samples_done, seen[-1].shards_total) == (3, 8, 3)
    assert seen[-1].samples_encoded == 8
    assert [each.samples_done for each in seen] == sorted(each.samples_done for each in seen)
    assert max(each.throughput_img_s for each in seen) > 0


def test_progress_moves_inside_a_shard_and_time_is_accounted_for(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtpipe.extract.cluster.inline._TICK_S", 0.005)
    seen: list[Progress] = []
    result = run_extraction(make_config(shard={"samples": 8}, batch_size=1), seen.append)
    inside = [each for each in seen if each.samples_done == 0 and 0 < each.samples_encoded < 8]
    assert len({each.samples_encoded for each in inside}) >= 2
    assert all(each.eta_s is not None and each.stalls for each in inside)
    (stalls,) = result.stalls.values()
    assert sum(stalls.shares().values()) == pytest.approx(1)
    recorded = load_manifest(Store(result.url)).provenance["stalls"]
    assert {name: of_one["spans"].keys() for name, of_one in recorded.items()} == {HERE: stalls.spans.keys()}


def test_rate_and_eta_come_from_what_was_encoded_lately(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("dtpipe.extract.shards.progress.time.monotonic", lambda: clock[0])
    meter = ProgressMeter(shards_total=10, samples_total=1000)
    meter.now()
    for _ in range(60):
        clock[0] += 1
        meter.encoded(int((clock[0] - 100) * 4 + max(0, clock[0] - 130) * 4))  # 4 images/s, then 8
        now = meter.now()
    assert now.throughput_img_s == pytest.approx(8, rel=0.05)
    meter.committed(200, 3, 10**6)
    assert meter.now().eta_s == pytest.approx((1000 - 360) / 8, rel=0.05)  # those in flight are done with


TAPS = (TapSpec("l2", 4, 8, "a"), TapSpec("l5", 32, 16, "b"), TapSpec("l5.b", 32, 4, "c"))
SPEC = TeacherSpec("toy", "0" * 64, (64, 64), TAPS, 1000, {"forward": (3, -1, -1)})
TEACHER: Any = SimpleNamespace(spec=SPEC)


def test_levels_are_named_by_strides_of_the_students_image() -> None:
    levels = stored_levels(SPEC.levels, (64, 128), (32, 64), "float16")
    assert [(level.name, level.stride, level.height, level.width) for level in levels] == [
        ("l1", 2, 16, 32),
        ("l4", 16, 2, 4),
        ("l4.b", 16, 2, 4),
    ]


def test_a_codec_is_of_features_and_latents_stay_rounded_as_the_teacher_reads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register_turned(monkeypatch)
    taps = (*TAPS[:2], TapSpec("l3.latent", 8, 8, "VAE"))
    levels = stored_levels(taps, (64, 64), (64, 64), "float16", CodecConfig(name="turned"))
    assert [(level.role, level.codec.name) for level in levels] == [("features", "turned")] * 2 + [("latent", "cast")]


def test_an_unknown_codec_is_refused_before_anything_is_written(make_config: MakeConfig) -> None:
    config = make_config(shard={"samples": 3}, codec={"name": "nf4"})
    with pytest.raises(ConfigError, match="codec 'nf4' of level l2 is unknown; choose one of cast"):
        run_extraction(config)
    assert not Path(config.run.out).exists()


@pytest.mark.parametrize(("image_px", "student_px"), [((48, 64), (48, 64)), ((64, 64), (48, 48)), ((64, 64), (32, 64))])
def test_sizes_that_do_not_fit_the_teacher_are_refused(image_px: tuple[int, int], student_px: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="extract"):
        stored_levels(SPEC.levels, image_px, student_px, "float16")


def test_views_are_every_combination_and_timesteps_must_exist(make_config: MakeConfig) -> None:
    recipe = make_recipe(make_config(noise={"timesteps": [50, 7], "draws": 2, "flips": True}), TEACHER, "folder", "cpu")
    assert [(view.timestep, view.draw, view.flip) for view in recipe.views] == [
        (step, draw, flip) for step in (50, 7) for draw in (0, 1) for flip in (False, True)
    ]
    assert recipe.shard.samples == 3
    assert (
        make_recipe(make_config(shard={}), TEACHER, "folder", "cpu").shard.samples == 4096
    )  # 64 px images and small levels
    for wrong in ([1000], [5, 5]):
        with pytest.raises(ConfigError, match=r"extract\.noise\.timesteps"):
            make_recipe(make_config(noise={"timesteps": wrong}), TEACHER, "folder", "cpu")


def test_a_deterministic_encoding_has_one_draw_and_stops_at_its_stride(make_config: MakeConfig) -> None:
    teacher: Any = SimpleNamespace(spec=replace(SPEC, noise_shapes={}, options={"inversion_stride": 10}))
    assert make_recipe(make_config(noise={"timesteps": [50, 150]}), teacher, "folder", "cpu").views
    with pytest.raises(ConfigError, match="has no noise"):
        make_recipe(make_config(noise={"draws": 2}), teacher, "folder", "cpu")
    with pytest.raises(ConfigError, match=r"has 55, no multiple of .*inversion_stride 10"):
        make_recipe(make_config(noise={"timesteps": [50, 55]}), teacher, "folder", "cpu")


def test_queue_retries_then_sets_aside_and_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("dtpipe.extract.shards.queue.time.monotonic", lambda: clock[0])
    queue = ShardQueue([4, 5], retries=1)
    task = queue.take()
    assert task is not None
    assert queue.fail(task, RuntimeError("boom"), alone=True)
    other = queue.take()
    assert other is not None
    assert other.shard_idx == 5
    assert queue.take() is None  # shard 4 pauses
    clock[0] = 1.0
    assert queue.take(share=True) is None  # and wants a worker of its own
    assert queue.take() is task
    assert not queue.fail(task, RuntimeError("boom"))
    queue.put_back(other)
    assert queue.take() is other
    with pytest.raises(ErrorBudgetError, match=r"1 shard failed 2 times each \(shard 4: RuntimeError: boom"):
        queue.raise_if_failed()


def test_queue_ends_the_run_where_no_shard_would_fare_better() -> None:
    queue = ShardQueue([0, 1, 2], retries=1)
    first, second, third = (queue.take() for _ in range(3))
    assert first and second and third
    with pytest.raises(ConfigError, match="wrong"):
        queue.fail(first, ConfigError("wrong"))
    full = StoreError("disk full")
    assert queue.fail(second, full)
    with pytest.raises(StoreError, match="disk full"):
        queue.fail(second, full)
    assert not queue.fail(third, IncompleteError("another attempt committed other content"))  # the merge decides
    queue.raise_if_failed()
