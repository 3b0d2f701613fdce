"""An extraction onto a disk that is really full: one sentence, exit code 8, and the same dataset once there is room."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtpipe.extract.run import run_extraction
from dtpipe.manifests.errors import StoreError
from parts.disks import files_on, fill, small_disk
from parts.extractions import MakeConfig


@pytest.mark.parametrize("leave_bytes", [0, 40_000, 120_000])
def test_an_extraction_that_finds_no_room_goes_on_once_there_is_some(
    make_config: MakeConfig, tmp_path: Path, leave_bytes: int
) -> None:
    """Before the plan, and in the middle of the shards."""
    with small_disk(tmp_path / "disk", 2**22) as disk:
        config = make_config(out=str(disk / "features"), shard={"samples": 2})
        filling = fill(disk, leave_bytes)
        with pytest.raises(StoreError, match=r"No space left|GB free, .* free some space") as error:
            run_extraction(config)
        assert error.value.exit_code == 8
        assert not [name for name in files_on(disk) if name.endswith(".tmp")]
        filling.unlink()
        digest = run_extraction(config).digest
    assert digest == run_extraction(make_config(out=str(tmp_path / "elsewhere"), shard={"samples": 2})).digest
