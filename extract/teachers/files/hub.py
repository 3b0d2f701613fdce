"""Teachers on the Hugging Face hub: a repository at one commit, through huggingface_hub's own cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dtpipe.manifests.errors import TeacherError

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
COMMIT = re.compile(r"^[0-9a-f]{40}$")


def download(path: str, revision: str | None, files: Sequence[str]) -> Path:
    """A snapshot of `files` (shell patterns) at one commit; huggingface_hub's offline switch is respected.

    Raises: TeacherError for what is no hub id, a revision that may move, and files that cannot be had.
    """
    if not HUB_ID.match(path):
        raise TeacherError(
            f"{path}: no such folder; give the path of the teacher's folder, or a hub id with its commit"
        )
    if revision is None or not COMMIT.match(revision):
        raise TeacherError(
            f"{path}: no such folder; for a hub repository of this name give its commit (40 hex digits) as "
            f"-s extract.teacher.revision=..., since branches and tags move (found {revision!r})"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(files)))
    except Exception as err:  # network, access and cache errors of many libraries
        reason = str(err).strip().splitlines()[0][:160] if str(err).strip() else type(err).__name__
        raise TeacherError(
            f"{path} at {revision[:12]}: cannot be had from the hub or its cache ({reason}); "
            f"download it and give the folder"
        ) from err
