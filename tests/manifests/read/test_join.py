"""Joining by key and one after the other: true values from the right part, and refusals that say what differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.join import ConcatDataset, JoinedDataset
from dtpipe.manifests.read.source import FeatureSource, read_image, read_level
from dtpipe.manifests.schema import ViewSpec
from parts import golden

Make = Callable[..., FeatureDataset]
L2, L3, L4 = golden.LEVELS


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes and opens a dataset by name; keyword arguments are its settings."""

    def write(name: str, **settings: Any) -> FeatureDataset:
        golden.write_shards(tmp_path / name, golden.Settings(**settings))
        return FeatureDataset.open(tmp_path / name)

    return write


def test_other_timesteps_of_a_teacher_join_along_the_views(make: Make) -> None:
    late = (ViewSpec(draw=0, timestep=150), ViewSpec(draw=1, timestep=150))
    one = make("one", num_rows=6, samples=2)
    other = make("other", num_rows=6, samples=4, format="webdataset", views=late, salt=1, images="joined")
    joined: FeatureSource = JoinedDataset([one, other])
    assert joined.views == (*one.views, *late)
    assert joined.levels == one.levels
    rows = [int(row) for row in joined.columns.ok_rows for _ in range(4)]
    views = [0, 1, 2, 3] * len(joined.columns.ok_rows)
    images, coded = joined.read(rows, ("l2", "l4.b"), views)
    levels = coded.decode()
    for idx, (row, view) in enumerate(zip(rows, views, strict=True)):
        key = joined.columns.keys[row]
        np.testing.assert_array_equal(images[idx], golden.true_image(key))
        for level in (L2, L4):
            np.testing.assert_array_equal(levels[level.name][idx], golden.true_level(level, key, view // 2)[view % 2])


def test_another_teachers_levels_lie_beside_under_free_names(make: Make) -> None:
    one = make("one", levels=(L2, L3), bad=())
    other = make("other", weights="cd" * 32, levels=(L2, L4), salt=2, bad=("cat/0.png",), images="joined")
    joined = JoinedDataset([one, other])
    assert [level.name for level in joined.levels] == ["l2", "l3", "l2.b", "l4.b"]
    row = joined.columns.row_of("cat/2.png")
    np.testing.assert_array_equal(read_level(joined, "l2", row, 1), golden.true_level(L2, "cat/2.png")[1])
    np.testing.assert_array_equal(read_level(joined, "l2.b", row, 1), golden.true_level(L2, "cat/2.png", salt=2)[1])
    np.testing.assert_array_equal(read_image(joined, row), read_image(one, one.columns.row_of("cat/2.png")))
    assert joined.columns.row_of("cat/0.png") not in joined.columns.ok_rows
    with pytest.raises(InputError, match="bad: truncated file"):
        read_level(joined, "l3", joined.columns.row_of("cat/0.png"))


def test_images_may_come_from_any_part(make: Make) -> None:
    one = make("one", images="joined")
    other = make("other", views=(ViewSpec(draw=5),))
    row = int(JoinedDataset([one, other]).columns.ok_rows[0])
    np.testing.assert_array_equal(
        read_image(JoinedDataset([one, other]), row), read_image(other, other.columns.row_of(one.columns.keys[row]))
    )
    with pytest.raises(ConfigError, match="stores images"):
        read_image(JoinedDataset([one]), row)


def test_join_refuses_what_does_not_fit(make: Make) -> None:
    one = make("one")
    with pytest.raises(ConfigError, match=r"both hold view .*'timestep': 50"):
        JoinedDataset([one, make("again")])
    with pytest.raises(ConfigError, match=r"not over the same keys: 2 keys of one alone \('cat/6\.png' only in .*more"):
        JoinedDataset([one, make("more", num_rows=7)])
    with pytest.raises(ConfigError, match=r"views do not pair up \(flips \[False, True\] and \[False\]\)"):
        JoinedDataset([one, make("flips", weights="cd" * 32, views=(ViewSpec(draw=0),))])
    with pytest.raises(ConfigError, match="no dataset"):
        JoinedDataset([])


def test_concatenation_reads_each_row_from_its_part(make: Make) -> None:
    parts = [
        make("one", num_rows=5),
        make("two", num_rows=4, samples=3, prefix="z/", format="webdataset", bad=()),
    ]
    both: FeatureSource = ConcatDataset(parts)
    assert len(both.columns) == 9
    assert list(both.columns.keys) == [*parts[0].columns.keys, *parts[1].columns.keys]
    assert len(both.columns.ok_rows) == 8
    rows = [8, *both.columns.ok_rows[:-1][::-1].tolist()]
    views = [idx % 2 for idx in range(len(rows))]
    images, coded = both.read(rows, ("l3",), views)
    levels = coded.decode()
    for idx, (row, view) in enumerate(zip(rows, views, strict=True)):
        key = both.columns.keys[row]
        assert both.columns.row_of(key) == row
        np.testing.assert_array_equal(images[idx], golden.true_image(key))
        np.testing.assert_array_equal(levels["l3"][idx], golden.true_level(L3, key)[view])
    assert both.read([], ("l3",), [])[1].decode()["l3"].shape == (0, 3, 2, 2)
    with pytest.raises(InputError, match="no row 9"):
        read_image(both, 9)


def test_concatenation_refuses_what_does_not_fit(make: Make) -> None:
    one = make("one")
    with pytest.raises(ConfigError, match=r"share 5 keys .*join them by key"):
        ConcatDataset([one, make("same")])
    with pytest.raises(ConfigError, match=r'teacher\.weights_blake3: "abab.*" -> "cdcd'):
        ConcatDataset([one, make("teacher", weights="cd" * 32, prefix="z/")])
    with pytest.raises(ConfigError, match="views"):
        ConcatDataset([one, make("views", views=(ViewSpec(draw=0),), prefix="z/")])


# --- images that a generator made ------------------------------------------------------------------------------------

LABELS = L2.model_copy(update={"name": "l2.labels", "role": "soft_labels"})


@pytest.mark.parametrize("changed", [{"weights": "cd" * 32}, {"noise_seed": 1}])
def test_images_of_two_generators_or_noise_seeds_do_not_join_though_their_keys_are_equal(
    make: Make, changed: dict[str, Any]
) -> None:
    one = make("one", kind="synthesized", levels=(L2,))
    other = make("other", kind="synthesized", levels=(L3,), **changed)
    with pytest.raises(ConfigError, match=r"one and .*other hold images of two generators, or of two noise seeds"):
        JoinedDataset([one, other])
    same = make("same", kind="synthesized", levels=(L3,))
    assert [level.name for level in JoinedDataset([one, same]).levels] == ["l2", "l3"]
    seen_by_another = make("seen", kind="features", levels=(L3,), **changed)  # another teacher on the stored images
    assert [level.name for level in JoinedDataset([one, seen_by_another]).levels] == ["l2", "l3"]


def test_labels_of_other_generated_images_do_not_join(make: Make) -> None:
    features = make("features", kind="synthesized", levels=(L2,))
    assert features.manifest is not None
    own = make("own", kind="synthesized", levels=(LABELS,), labels_of=features.manifest.digest, images="joined")
    assert [level.name for level in JoinedDataset([features, own]).levels] == ["l2", "l2.labels"]
    others = make("others", kind="synthesized", levels=(LABELS,), labels_of="ef" * 32, images="joined")
    for parts in ([features, others], [others, features]):
        with pytest.raises(ConfigError, match=r"others holds soft labels of other features .* --from .*features"):
            JoinedDataset(parts)
