"""Codec and role of a level: what v1 can say is written as v1, and all else is v2."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from dtpipe.manifests.canonical import canonical_json, dump_record, load_record, seal, unseal
from dtpipe.manifests.check.verify import verify
from dtpipe.manifests.errors import ManifestError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.schema import CodecSpec, LevelSpec, Manifest, Plan, Recipe, ShardEntry
from parts import golden
from parts.paths import GOLDEN

V1_FIELDS = {"name", "stride", "channels", "height", "width", "dtype", "tap"}


def level(**changes: object) -> LevelSpec:
    return golden.LEVELS[0].model_validate({**golden.LEVELS[0].model_dump(), **changes})


def recipe(*levels: LevelSpec) -> Recipe:
    return golden.make_recipe(golden.Settings(levels=levels))


@pytest.mark.parametrize("name", ["v1_zarr", "v1_webdataset"])
def test_records_of_v1_come_out_byte_for_byte(name: str) -> None:
    records = {"plan.json": Plan, "manifest.json": Manifest, "commits/00000.json": ShardEntry}
    for file, model in records.items():
        data = (GOLDEN / name / file).read_bytes()
        assert dump_record(load_record(model, data, file)) == data


def test_what_v1_implies_is_not_written() -> None:
    for plain in (level(), level(name="l2.latent"), level(name="l2.latent", role="latent", codec={"name": "cast"})):
        assert plain.model_dump().keys() == V1_FIELDS
        assert plain.model_dump(mode="json", exclude={"dtype"}).keys() == V1_FIELDS - {"dtype"}
        assert LevelSpec.model_validate_json(plain.model_dump_json()) == plain
        assert recipe(plain).format == "dtpipe-features/1"
    assert (level().role, level(name="l2.latent").role) == ("features", "latent")


@pytest.mark.parametrize(
    ("changes", "written"),
    [
        ({"codec": CodecSpec(name="int8")}, {"codec": {"name": "int8", "parameters": {}}}),
        ({"codec": CodecSpec(parameters={"bits": 4})}, {"codec": {"name": "cast", "parameters": {"bits": 4}}}),
        ({"role": "soft_labels"}, {"role": "soft_labels"}),
        ({"role": "latent"}, {"role": "latent"}),
        ({"name": "l2.latent", "role": "features"}, {"role": "features"}),
    ],
)
def test_what_v1_cannot_say_is_written_as_v2(changes: dict[str, object], written: dict[str, object]) -> None:
    other = level(**changes)
    dumped = other.model_dump()
    assert {name: dumped[name] for name in dumped.keys() - V1_FIELDS} == written
    assert LevelSpec.model_validate_json(other.model_dump_json()) == other
    assert canonical_json(recipe(other).model_dump(mode="json")) != canonical_json(
        recipe(level()).model_dump(mode="json")
    )
    assert recipe(level(), other).format == "dtpipe-features/2"


def test_chunks_that_are_not_compressed_are_of_v2() -> None:
    for zstd_level, expected in ((1, "dtpipe-features/1"), (0, "dtpipe-features/2")):
        assert golden.make_recipe(golden.Settings(zstd_level=zstd_level)).format == expected


def test_a_level_keeps_its_role_under_another_name() -> None:
    renamed = level(name="l2.latent").model_copy(update={"name": "l2.b"})
    assert renamed.role == "latent"
    assert LevelSpec.model_validate(renamed.model_dump()).role == "latent"


def test_a_record_in_another_format_than_its_recipe_needs_is_refused() -> None:
    fields = {"num_rows": 1, "num_shards": 1, "listing_blake3": "0" * 64}
    labels = recipe(level(role="soft_labels"))
    with pytest.raises(ValidationError, match="the levels of its recipe need dtpipe-features/2"):
        Plan(recipe=labels, **fields)
    plan = Plan(format=labels.format, recipe=labels, **fields)
    assert load_record(Plan, dump_record(plan), "plan.json") == plan
    later = seal({**unseal(dump_record(plan), "plan.json"), "format": "dtpipe-features/3"})
    with pytest.raises(ManifestError, match=r"'dtpipe-features/3', this dtpipe reads .*/1' and .*/2'; install"):
        load_record(Plan, later, "plan.json")


@pytest.mark.parametrize("shard_format", ["zarr", "webdataset"])
def test_soft_labels_are_levels_of_a_dataset_of_v2(shard_format: str, tmp_path: Path) -> None:
    settings = golden.Settings(format=shard_format, levels=(level(role="soft_labels"),))
    manifest = golden.write_shards(tmp_path, settings)
    assert manifest is not None
    dataset = FeatureDataset.open(tmp_path)
    assert (manifest.format, dataset.levels[0].role) == ("dtpipe-features/2", "soft_labels")
    assert verify(tmp_path, "decode").ok
