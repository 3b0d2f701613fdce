"""measured.json: what verification measured of a dataset, for those who train on it. Not content, and may be
missing."""

from __future__ import annotations

from pydantic import Field

from dtpipe.manifests.canonical import dump_record, load_record
from dtpipe.manifests.errors import MissingObjectError
from dtpipe.manifests.schema import StrictModel
from dtpipe.manifests.store.store import Store

MEASURED_FILE = "measured.json"


class Measured(StrictModel):
    """The newest measurement; an older one is replaced."""

    flip_error: dict[str, float] = Field(
        default={},
        description="By level: |mirror(f(x)) - f(mirror(x))| / |f(mirror(x))|, mean over samples, noise mirrored too.",
    )
    num_samples: int = Field(ge=1, description="Samples it was measured on.")


def read_measured(store: Store) -> Measured | None:
    """What was measured; None where nothing was. Raises: ManifestError when the file was changed."""
    try:
        return load_record(Measured, store.read(MEASURED_FILE), store.where(MEASURED_FILE))
    except MissingObjectError:
        return None


def write_measured(store: Store, measured: Measured) -> None:
    """Keep a measurement beside the dataset. Raises: StoreError when it cannot be written."""
    store.write(MEASURED_FILE, dump_record(measured))
