"""Which names are images, which are passed over, and how a name becomes a key: one rule for folders and archives."""

from __future__ import annotations

import posixpath
import unicodedata
from collections import Counter
from collections.abc import Sequence

from dtpipe.extract.sources.base import SourceItem
from dtpipe.manifests.errors import InputError

EXTENSIONS = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "apng", "gif", "bmp", "dib", "webp", "tif", "tiff", "avif", "qoi"}
    | {"jp2", "j2k", "jpx", "jpc", "j2c", "ppm", "pgm", "pbm", "pnm", "pfm"}
    | {"tga", "ico", "icns", "sgi", "dds", "pcx"}
)
CONTAINERS = (".zip", ".tar", ".parquet", ".mdb")  # endings of files that hold images, each a source of its own
MAX_FILE_BYTES = 2**31  # of one image, unpacked


def is_hidden(name: str) -> bool:
    """True for names that are no part of a data set: dot files, and what macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(name: str) -> bool:
    """True when a file's name ends like an image's."""
    return posixpath.splitext(name)[1][1:].lower() in EXTENSIONS


def extension(name: str) -> str:
    """How a file's name ends, in lower case, to count it by."""
    return posixpath.splitext(name)[1].lower() or "without extension"


def takes(path: str, ignored: Counter[str]) -> bool:
    """True for the path of an image; others are counted in `ignored`, by extension or as `hidden`."""
    if any(is_hidden(part) for part in path.split("/")):
        ignored["hidden"] += 1
        return False
    if not is_image(path):
        ignored[extension(path)] += 1
        return False
    return True


def inner_path(name: str) -> str:
    """An archive member's name as a path below the archive: without `./` and a leading slash."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def key_of(path: str) -> str:
    """NFC; bytes of a name that are not Unicode are written as \\xNN."""
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", text)


def in_class_folders(keys: Sequence[str]) -> bool:
    """True when every image lies in a sub-folder, whose name can be its label."""
    return all("/" in key for key in keys)


def labelled_by_folder(files: Sequence[tuple[str, str]]) -> list[SourceItem]:
    """Samples from (key, URI), each with its first folder's name as label."""
    return [SourceItem(key, uri, key.split("/", 1)[0]) for key, uri in files]


def no_images(url: str, ignored: Counter[str]) -> InputError:
    """What to say of a source without a sample."""
    seen = ", ".join(f"{count} {name}" for name, count in ignored.most_common(5)) or "it is empty"
    packed = [name for name in CONTAINERS if name in ignored]
    if packed:
        return InputError(
            f"{url}: no image in it ({seen}); "
            f"name a {' or '.join(packed)} file itself, or the folder right above such files"
        )
    return InputError(
        f"{url}: no image in it ({seen}); images are files that end in .jpg, .png, .webp, .tif and the like"
    )
