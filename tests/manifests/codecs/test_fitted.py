"""Arrays that codecs were fitted with, as a dataset's readers load them."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from dtpipe.manifests.codecs.fitted import StoredFitted, encode_fitted, fitted_name
from dtpipe.manifests.store.store import Store


def _load(fitted: StoredFitted, digest: str, connection: object) -> None:
    connection.send(fitted.load(digest))  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_loads_whatever_other_threads_held(tmp_path: Path) -> None:
    basis = np.arange(6, dtype=np.float32)
    digest, data = encode_fitted({"basis": basis})
    Store(tmp_path).write(fitted_name(digest), data)
    fitted, context = StoredFitted(Store(tmp_path)), multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    child = context.Process(target=_load, args=(fitted, digest, sender), daemon=True)
    with fitted._turn:  # as another thread may hold it
        child.start()
        assert receiver.poll(30)
    np.testing.assert_array_equal(receiver.recv()["basis"], basis)
    child.join()
