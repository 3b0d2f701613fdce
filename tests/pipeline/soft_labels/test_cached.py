"""Soft labels of stored features, by commands: what is in them, whose rows and views they have, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtpipe.distill.labels.head import features_record
from dtpipe.manifests.check.repair import repair
from dtpipe.manifests.check.verify import verify
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.join import JoinedDataset
from dtpipe.manifests.read.source import read_level
from dtpipe.manifests.schema import ViewSpec
from dtpipe.manifests.soft_labels import soft_labels_of
from dtpipe.manifests.store.store import Store
from parts.command_line import RefusedError, dtpipe, said
from parts.damage import flip
from parts.extractions import extract_config
from parts.images import write_images
from parts.interpreters import CLASSES, logits_of, write_interpreter

Run = Callable[..., Any]
FLIPS = {"timesteps": [50, 7], "flips": True}


@pytest.fixture(scope="module")
def features(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Nine samples, one of them bad, of two timesteps with flips."""
    from dtpipe.extract.run import run_extraction

    folder = tmp_path_factory.mktemp("features")
    images = write_images(folder / "images", 9)
    next(iter(sorted(images.rglob("*.png")))).write_bytes(b"no image")
    return run_extraction(extract_config(images, ddpm, folder / "features", noise=FLIPS, max_bad=1)).url


@pytest.fixture(scope="module")
def head(features: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_interpreter(tmp_path_factory.mktemp("head"), FeatureDataset.open(features).levels)


@pytest.fixture
def run(features: str, head: str, tmp_path: Path) -> Run:
    """`dtpipe extract --interpreter .. --from ..` inline into `labels`; its answer, or its error."""

    def call(*flags: str, out: str = "labels", of: str = features, by: str = head, command: str = "extract") -> Any:
        there = ["--from", of, "--out", str(tmp_path / out)] if command != "verify" else []
        inline = ["--inline", "--device", "cpu"] if command == "extract" else []
        return dtpipe(command, "--interpreter", by, *there, *inline, *flags)

    return call


def opened(tmp_path: Path, name: str = "labels") -> FeatureDataset:
    return FeatureDataset.open(tmp_path / name)


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_labels_are_the_heads_logits_of_each_view_in_the_rows_of_the_features(
    form: str, run: Run, features: str, head: str, tmp_path: Path
) -> None:
    answer = run("--format", form, "-s", "extract.shard.samples=4", "--batch-size", "3")
    labels, dataset = opened(tmp_path), FeatureDataset.open(features)
    assert (answer["num_ok"], answer["num_bad"], answer["num_shards"]) == (8, 1, 3)
    assert list(labels.columns.keys) == list(dataset.columns.keys)
    assert list(labels.columns.labels) == list(dataset.columns.labels)
    assert list(labels.columns.status) == list(dataset.columns.status)
    assert labels.views == dataset.views and len(labels.views) == 4
    assert labels.recipe.images == "joined"
    said = soft_labels_of(labels.recipe)
    assert said is not None and dataset.manifest is not None
    assert (said.classes, said.features) == (CLASSES, {"dataset": dataset.manifest.digest})
    assert (said.level.name, said.level.stride, said.level.channels) == ("l2.labels", 4, 4)
    for row in dataset.columns.ok_rows:
        for view in range(4):
            stored = read_level(labels, "l2.labels", int(row), view)
            assert stored.dtype == np.float16
            # half a step of float16 at these sizes, and batches of other sizes
            np.testing.assert_allclose(stored, logits_of(head, dataset, int(row), [view]), rtol=1e-3, atol=2e-3)
    assert verify(str(tmp_path / "labels"), "decode").ok


def test_batches_workers_and_shards_change_no_logit_and_running_again_writes_nothing(run: Run, tmp_path: Path) -> None:
    first = run("-s", "extract.shard.samples=4", "--batch-size", "4")
    again = run("-s", "extract.shard.samples=4", "--batch-size", "4")
    assert (again["digest"], again["shards_written"]) == (first["digest"], 0)
    other = run("-s", "extract.shard.samples=4", "-s", "extract.run.decode_threads=4", "--batch-size", "4", out="other")
    assert other["digest"] == first["digest"]
    run("-s", "extract.shard.samples=2", "--batch-size", "4", out="smaller")
    one, small = opened(tmp_path), opened(tmp_path, "smaller")
    for row in map(int, one.columns.ok_rows):
        np.testing.assert_array_equal(read_level(one, "l2.labels", row, 3), read_level(small, "l2.labels", row, 3))
    with pytest.raises(RefusedError, match="another recipe"):
        run("--stride", "8", "-s", "extract.shard.samples=4", "--batch-size", "4")


def test_logits_are_averaged_down_to_a_stride_and_kept_by_top_k(
    run: Run, features: str, head: str, tmp_path: Path
) -> None:
    run("--stride", "16", "-s", "extract.shard.dtype=float32")
    run("--top-k", "2", out="top")
    labels, top, dataset = opened(tmp_path), opened(tmp_path, "top"), FeatureDataset.open(features)
    assert [(level.name, level.height, level.width) for level in labels.levels] == [("l4.labels", 2, 2)]
    row = int(dataset.columns.ok_rows[0])
    logits = logits_of(head, dataset, row, [1])
    blocks = logits.reshape(4, 2, 4, 2, 4).mean(axis=(2, 4))
    np.testing.assert_allclose(read_level(labels, "l4.labels", row, 1), blocks, rtol=1e-4, atol=1e-4)
    kept = read_level(top, "l2.labels", row, 1)
    largest = np.argsort(-logits, axis=0)[:2]
    chosen = (np.take_along_axis(values, largest, axis=0) for values in (kept, logits))
    np.testing.assert_allclose(*chosen, rtol=1e-3, atol=2e-3)
    assert verify(str(tmp_path / "top"), "decode").ok


def test_views_that_are_read_together_give_one_for_each_draw_and_flip(run: Run, features: str, tmp_path: Path) -> None:
    dataset = FeatureDataset.open(features)
    both = write_interpreter(tmp_path / "both", dataset.levels, num_views=2)
    run(by=both)
    labels = opened(tmp_path)
    assert labels.views == (ViewSpec(draw=0), ViewSpec(draw=0, flip=True))
    row = int(dataset.columns.ok_rows[2])
    reads = [[idx for idx, view in enumerate(dataset.views) if view.flip == flip] for flip in (False, True)]
    for view, together in enumerate(reads):
        expected = logits_of(both, dataset, row, together)
        np.testing.assert_allclose(read_level(labels, "l2.labels", row, view), expected, rtol=1e-3, atol=2e-3)
    three = write_interpreter(tmp_path / "three", dataset.levels, num_views=3)
    with pytest.raises(RefusedError, match="reads 3 views together, and draw 0 has timesteps 50, 7"):
        run(by=three, out="none")


def test_views_are_read_in_the_order_of_the_timesteps_that_the_head_was_trained_on(
    run: Run, features: str, tmp_path: Path
) -> None:
    dataset = FeatureDataset.open(features)
    late_first = write_interpreter(tmp_path / "both", dataset.levels, num_views=2, record={"timesteps": [7, 50]})
    run(by=late_first)
    row, reads = int(dataset.columns.ok_rows[2]), [0, 0]
    for idx, view in enumerate(dataset.views):
        if not view.flip:
            reads[[7, 50].index(view.timestep or 0)] = idx
    expected = logits_of(late_first, dataset, row, reads)
    np.testing.assert_allclose(read_level(opened(tmp_path), "l2.labels", row, 0), expected, rtol=1e-3, atol=2e-3)
    other = write_interpreter(tmp_path / "other", dataset.levels, num_views=2, record={"timesteps": [7, 150]})
    with pytest.raises(
        RefusedError, match="reads 2 views together of timesteps 7, 150, and draw 0 has timesteps 50, 7"
    ):
        run(by=other, out="none")


def test_a_class_of_the_image_is_one_cell(run: Run, features: str, tmp_path: Path) -> None:
    dataset = FeatureDataset.open(features)
    whole = write_interpreter(tmp_path / "whole", dataset.levels[1:], kind="classes")
    run(by=whole)
    (level,) = opened(tmp_path).levels
    assert (level.name, level.stride, level.channels, level.height, level.width) == ("l5.labels", 32, 4, 1, 1)
    with pytest.raises(RefusedError, match="--stride is 8, and the interpreter gives one class for the whole image"):
        run("--stride", "8", by=whole, out="none")


def test_views_of_a_join_are_paired_by_draw_timestep_and_flip(run: Run, features: str, tmp_path: Path) -> None:
    dataset = FeatureDataset.open(features)
    run()
    run(by=write_interpreter(tmp_path / "both", dataset.levels, 1, num_views=2), out="together")
    labels, together = opened(tmp_path), opened(tmp_path, "together")
    row = int(dataset.columns.ok_rows[1])
    for parts in ([dataset, labels, together], [labels, dataset, together], [together, labels, dataset]):
        joined = JoinedDataset(parts)
        assert joined.views == dataset.views
        names = [level.name for level in joined.levels if level.role == "soft_labels"]
        own, of_both = names if parts.index(labels) < parts.index(together) else names[::-1]
        for view, spec in enumerate(joined.views):
            np.testing.assert_array_equal(read_level(joined, "l2", row, view), read_level(dataset, "l2", row, view))
            np.testing.assert_array_equal(
                read_level(joined, own, row, view), read_level(labels, "l2.labels", row, view)
            )
            expected = read_level(together, "l2.labels", row, int(spec.flip))
            np.testing.assert_array_equal(read_level(joined, of_both, row, view), expected)


def test_views_that_do_not_pair_are_refused(run: Run, features: str, ddpm: Path, head: str, tmp_path: Path) -> None:
    """Labels without flips do not go with flipped features; of two timesteps neither is of a third."""
    from dtpipe.extract.run import run_extraction

    images = Path(features).parent / "images"
    plain = extract_config(images, ddpm, tmp_path / "plain", noise={"timesteps": [150]}, max_bad=1)
    run(of=run_extraction(plain).url)
    run(out="of-both")
    dataset, third = FeatureDataset.open(features), FeatureDataset.open(tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"no one view of them goes with view .*'flip': True"):
        JoinedDataset([dataset, opened(tmp_path)])
    with pytest.raises(ConfigError, match=r"no one view of them goes with view .*'timestep': 150"):
        JoinedDataset([third, opened(tmp_path, "of-both")])
    del head


def test_verify_runs_the_head_again_and_finds_what_changed(run: Run, head: str, features: str, tmp_path: Path) -> None:
    run("--format", "webdataset", "-s", "extract.shard.samples=4")
    labels = str(tmp_path / "labels")
    report = dtpipe("verify", labels, "--level", "recompute", "--device", "cpu")
    assert (report["num_recomputed"], report["ok"]) == (8, True)
    with pytest.raises(RefusedError, match="soft labels of stored features, which no teacher makes"):
        dtpipe("verify", labels, "--level", "recompute", "--device", "cpu", "--teacher", str(tmp_path))
    other = write_interpreter(tmp_path / "other", FeatureDataset.open(features).levels, 9)
    with pytest.raises(RefusedError, match="the plan says"):
        dtpipe("verify", labels, "--level", "recompute", "--device", "cpu", "--interpreter", other)
    first = run("--format", "webdataset", "-s", "extract.shard.samples=4")["digest"]
    flip(tmp_path / "labels" / "data" / "00001.tar", 3000)
    assert repair(labels, stale_s=1).shards == (1,)
    answer = run("--format", "webdataset", "-s", "extract.shard.samples=4")
    assert (answer["digest"], answer["shards_written"]) == (first, 1)


def test_features_that_were_replaced_are_refused_when_an_extraction_goes_on(
    run: Run, ddpm: Path, tmp_path: Path
) -> None:
    from dtpipe.extract.run import run_extraction

    images = write_images(tmp_path / "images", 3)
    config = extract_config(images, ddpm, tmp_path / "mine")
    run(of=run_extraction(config).url)
    for name in Store(tmp_path / "mine").list():
        (tmp_path / "mine" / name).unlink()
    again = extract_config(images, ddpm, tmp_path / "mine", noise={"timesteps": [7]})
    run_extraction(again)
    with pytest.raises(RefusedError, match=r"another recipe .*teacher\.options\.features\.dataset"):
        run(of=str(tmp_path / "mine"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--px", "64"), "--px says what a teacher is to encode, and --from names features that are there"),
        (("--images", "photos"), "--images says what a teacher is to encode"),
        (("--save-png", "pngs"), "--save-png writes stored images, and soft labels of --from store none"),
        (("--keep-features", "kept"), "--keep-features keeps what a teacher makes, and --from has it already"),
        (("--stride", "12"), "--stride is 12; logits of this interpreter have stride 4 and 8x8 cells"),
        (("--stride", "2"), "--stride is 2; logits of this interpreter have stride 4"),
        (("--stride", "64"), "--stride is 64; logits of this interpreter"),
        (("--stride", "32"), "--stride is 32, which leaves one cell for the whole image"),
        (("--top-k", "4"), "is to keep 4 of 4 classes"),
    ],
)
def test_settings_that_say_nothing_or_too_much_are_refused(
    flags: tuple[str, ...], message: str, run: Run, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError) as refusal:
        run(*flags)
    assert message in str(refusal.value)
    assert not (tmp_path / "labels").exists()


def test_a_head_of_other_features_is_refused(run: Run, features: str, tmp_path: Path) -> None:
    levels = FeatureDataset.open(features).levels
    wide = [level.model_copy(update={"channels": 99}) for level in levels]
    with pytest.raises(RefusedError, match=r"reads level l2 of stride 4 with 99 channels, and .*has l2 \(stride 4, 8"):
        run(by=write_interpreter(tmp_path / "wide", wide))
    own = features_record(FeatureDataset.open(features).recipe, [level.name for level in levels])
    run(by=write_interpreter(tmp_path / "own", levels, record=own), command="plan")
    others = {
        "teacher": ({**own["teacher"], "weights_blake3": "ab" * 32}, r'teacher.weights_blake3: "abab.*" -> "'),
        "taps": ({**own["taps"], "l2": "up_blocks.9"}, r'taps.l2: "up_blocks.9" -> "up_blocks'),
        "transform": ({**own["transform"], "height": 512}, r"transform.height: 512 -> 32"),
    }
    for name, (changed, message) in others.items():
        stranger = write_interpreter(tmp_path / name, levels, record={**own, name: changed})
        with pytest.raises(RefusedError, match=rf"was trained on other features than .* has \({message}"):
            run(by=stranger)
    early = write_interpreter(tmp_path / "early", levels, record={"timesteps": [50]})
    with pytest.raises(RefusedError, match="of timestep 50, and there are views of 7"):
        run(by=early)
    with pytest.raises(RefusedError, match=r"holds no interpreter"):
        run(by=str(tmp_path / "nothing"))
    with pytest.raises(RefusedError, match=r"--from .*|.*holds no feature dataset|.*is no feature dataset"):
        run(of=str(tmp_path / "nothing"))


def test_plan_and_dry_run_say_what_it_takes_and_write_nothing(run: Run, tmp_path: Path) -> None:
    dry = run("-n")
    planned = run(command="plan")["soft_labels"]
    for plan in (dry, planned):
        assert (plan["num_samples"], plan["views"], plan["levels"]) == (9, 4, {"l2.labels": 4 * 4 * 64 * 2})
    assert not (tmp_path / "labels").exists()


def test_inspect_describes_and_draws_labels(run: Run, features: str, tmp_path: Path) -> None:
    run()
    labels = str(tmp_path / "labels")
    described = said("inspect", labels)
    assert "interpreter" in described and "l2.labels" in described
    dataset = FeatureDataset.open(features)
    key = dataset.columns.keys[int(dataset.columns.ok_rows[0])]
    said("inspect", labels, "--sample", key, "--png", tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000
