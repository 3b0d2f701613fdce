"""Writing what levels are to be coded with, before the plan that names it."""

from __future__ import annotations

from collections.abc import Mapping

from dtpipe.manifests.codecs.fitted import fitted_name
from dtpipe.manifests.store.faults import fault_point
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import put_aside


def keep_fitted(store: Store, files: Mapping[str, bytes]) -> None:
    """Write files by digest where they are not there yet; one with other bytes is put aside. The caller holds the lock.

    Raises: StoreError when the store does not take them.
    """
    for digest, data in sorted(files.items()):
        name = fitted_name(digest)
        if not store.create(name, data) and store.read(name) != data:
            put_aside(store, name)
            store.create(name, data)
        fault_point("fit.kept")
