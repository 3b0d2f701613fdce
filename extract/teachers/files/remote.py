"""A teacher that lies behind a URL (s3://, gs://, https:// ..): copied once into the local cache.

The copy's name follows from the URL and from what the store says about each file (size, etag or time), so that a file
that was replaced is fetched again and an old copy is never mistaken for it.
"""

from __future__ import annotations

import os
import posixpath
import shutil
from pathlib import Path
from typing import Any

from dtpipe.manifests.canonical import blake3_hex, canonical_json
from dtpipe.manifests.errors import DtpipeError, MissingPackageError, TeacherError
from dtpipe.manifests.records.document import write_document
from dtpipe.manifests.records.files import FILES, check_files, file_digests
from dtpipe.manifests.store.publish import rename
from dtpipe.manifests.store.reading import PatientFiles
from dtpipe.manifests.store.reasons import reason_of

_RECORD = ".copied.json"
_IDENTITY = ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "last_modified", "updated")


def fetch_remote(url: str, cache: Path) -> Path:
    """The local copy of a file or folder.

    Raises: TeacherError when there is nothing or it cannot be read; DamagedDataError when a copy was changed since;
    MissingPackageError for a protocol's package.
    """
    try:
        fs = PatientFiles(url)
        files = _files(fs)
    except MissingPackageError:
        raise
    except DtpipeError as err:
        raise TeacherError(str(err)) from err
    except Exception as err:  # each file system raises its own
        reason = reason_of(err)
        raise TeacherError(f"{url}: cannot be read ({reason}); {reason.advice_for_input}") from err
    root = fs.path
    if not files:
        raise TeacherError(f"{url}: nothing lies there; check the path of your teacher")
    copy = cache / "remote" / blake3_hex(canonical_json([url, files]))[:16]
    name = str(posixpath.basename(root.rstrip("/")))
    if not copy.is_dir():
        _copy(fs, root, name, files, copy, url)
    else:
        check_files(copy, _RECORD, f"delete {copy} to copy it from {url} again")
    return copy / name


def _files(fs: PatientFiles) -> dict[str, list[Any]]:
    """Path below the root (empty for the root itself) to size and what else tells one content from another."""
    root, listed = fs.path, fs.find(fs.path)
    return {
        "" if path == root else posixpath.relpath(path, root): [
            info["size"],
            *(str(info[name]) for name in _IDENTITY if info.get(name)),
        ]
        for path, info in sorted(listed.items())
        if info["type"] == "file"
    }


def _copy(fs: PatientFiles, root: str, name: str, files: dict[str, list[Any]], copy: Path, url: str) -> None:
    """Copy beside the place, then move there in one step; where two processes do so, the first copy stays."""
    partial = copy.with_name(f".{copy.name}.{os.getpid()}.partial")
    try:
        for path, (size, *_) in files.items():
            target = partial / name / path if path else partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(f"{root}/{path}" if path else root, str(target), size or 0)
            if size is not None and target.stat().st_size != size:
                raise OSError(f"{path or name} came with {target.stat().st_size} of {size} bytes")
        write_document(partial / _RECORD, {"url": url, FILES: file_digests(partial)}, "make room")
        if not copy.is_dir():
            rename(partial, copy)
    except Exception as err:  # each file system raises its own
        if not copy.is_dir():
            raise TeacherError(
                f"{url}: cannot be copied to {copy} ({reason_of(err)}); make room, or run again"
            ) from err
    finally:
        shutil.rmtree(partial, ignore_errors=True)
