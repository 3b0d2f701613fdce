"""Which names are images, which are passed over, and how a name becomes a key: one rule for folders and archives."""

from __future__ import annotations

import math
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import cache
from importlib.util import find_spec

from dtpipe.extract.sources.base import SourceItem
from dtpipe.manifests.errors import InputError

EXTENSIONS = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "apng", "gif", "bmp", "dib", "webp", "tif", "tiff", "avif", "qoi"}
    | {"jp2", "j2k", "jpx", "jpc", "j2c", "ppm", "pgm", "pbm", "pnm", "pfm"}
    | {"tga", "ico", "icns", "sgi", "dds", "pcx"}
)
CONTAINERS = (".zip", ".tar", ".parquet", ".mdb")  # endings of files that hold images, each a source of its own
MAX_FILE_BYTES = 2**29  # of one image, unpacked
MAX_RATIO, RATIO_FROM_BYTES = 200, 2**26  # what unpacks to more than both is no image, but made to fill memory
HEIF_EXTENSIONS = frozenset({"heic", "heif", "hif"})  # read where the extra `heic` is installed
HEIF_PACKAGE = "pi_heif"
WITHOUT = "without extension"
IMAGES_WITHOUT = f"{WITHOUT} that look like images"
_MAX_LABEL = 1000  # characters of the name of a class
_MAX_ENDINGS = 20  # named among what is ignored; the others are added up
_OTHER = "of other endings"
_MAGIC = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"qoif", b"DDS ", b"\xffO\xffQ"),
    *(b"\0\0\0\x0cjP  ", b"P5\n", b"P6\n", b"P5 ", b"P6 "),
)
_BRANDS = (b"ftypavi", b"ftyphe", b"ftypmif", b"WEBP")  # behind a length


def is_hidden(name: str) -> bool:
    """True for names that are no part of a data set: dot files, and what macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(name: str) -> bool:
    """True when a file's name ends like an image's."""
    ending = posixpath.splitext(name)[1][1:].lower()
    return ending in EXTENSIONS or (ending in HEIF_EXTENSIONS and reads_heif())


@cache
def reads_heif() -> bool:
    """True where the package that decodes HEIF is installed."""
    return find_spec(HEIF_PACKAGE) is not None


def looks_like_image(head: bytes) -> bool:
    """True when a file that begins so is an image, whatever its name says."""
    return head.startswith(_MAGIC) or any(brand in head[4:16] for brand in _BRANDS)


def extension(name: str) -> str:
    """How a file's name ends, in lower case, to count it by."""
    return key_of(posixpath.splitext(name)[1].lower()) or WITHOUT


def bounded(ignored: Mapping[str, int]) -> dict[str, int]:
    """What is ignored, most first, with the rarest endings added up where there are many."""
    ranked = sorted(ignored.items(), key=lambda entry: (-entry[1], entry[0]))
    rest = sum(count for _, count in ranked[_MAX_ENDINGS:])
    return dict(ranked[:_MAX_ENDINGS]) | ({_OTHER: rest} if rest else {})


def ignored_text(ignored: Mapping[str, int]) -> str:
    """What is ignored for people: `6 .heic, 3 without extension`; empty where nothing is."""
    text = ", ".join(f"{count} {name}" for name, count in bounded(ignored).items())
    advice = [f"`pip install 'dtpipe[heic]'` reads {' and '.join(heif)}"] if (heif := _unread_heif(ignored)) else []
    if IMAGES_WITHOUT in ignored:
        advice.append("images need an ending such as .jpg to be read")
    return text + (f" ({'; '.join(advice)})" if advice else "")


def _unread_heif(ignored: Mapping[str, int]) -> list[str]:
    return [] if reads_heif() else sorted(name for name in ignored if name[1:] in HEIF_EXTENSIONS)


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


def without_ending(name: str) -> str:
    """A path without what follows the last dot of its file's name."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + (last.rpartition(".")[0] or last)


def in_class_folders(keys: Sequence[str]) -> bool:
    """True when every image lies in a sub-folder, whose name can be its label."""
    return all("/" in key for key in keys)


def labels_lost(keys: Sequence[str]) -> dict[str, int]:
    """Labels that class folders would have given to images, had not another one lain in none."""
    num_inside = sum("/" in key for key in keys)
    if num_inside in (0, len(keys)):
        return {}
    outside = next(key for key in keys if "/" not in key)
    return {f"labels by class folder, as {outside} lies in none": num_inside}


def labelled_by_folder(files: Sequence[tuple[str, str]]) -> list[SourceItem]:
    """Samples from (key, URI), each with its first folder's name as label."""
    return [SourceItem(key, uri, key.split("/", 1)[0]) for key, uri in files]


def labels_as_text(values: Sequence[object], of: str, ignored: Counter[str]) -> list[str | None]:
    """Labels as text: text, whole numbers, true and false; None for nulls and for what is no class.

    Tools write whole numbers as floats where some are missing. If one is a fraction they measure something, so that
    none of them is a class. What is left out is counted in `ignored` as labels `of` something.
    """
    measured = any(_is_fraction(value) for value in values)
    texts = []
    for value in values:
        text = None if measured and isinstance(value, float | Decimal) else _label_text(value)
        if not _is_null(value) and (text is None or len(text) > _MAX_LABEL):
            flaw = "no whole numbers" if measured and text is None else type(value).__name__
            ignored[f"labels {of} that are {flaw if text is None else f'over {_MAX_LABEL} characters'}"] += 1
            text = None
        texts.append(text)
    return texts


def _label_text(value: object) -> str | None:
    if isinstance(value, str | int):
        return str(value)
    if _is_null(value):
        return None
    return str(int(value)) if isinstance(value, float | Decimal) and not _is_fraction(value) else None


def _is_fraction(value: object) -> bool:
    return isinstance(value, float | Decimal) and not _is_null(value) and (math.isinf(value) or value != int(value))


def _is_null(value: object) -> bool:
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def no_images(url: str, ignored: Mapping[str, int]) -> InputError:
    """What to say of a source without a sample."""
    seen = ignored_text(ignored) or "it is empty"
    packed = [name for name in CONTAINERS if name in ignored]
    if packed:
        return InputError(
            f"{url}: no image in it ({seen}); "
            f"name a {' or '.join(packed)} file itself, or the folder right above such files"
        )
    return InputError(
        f"{url}: no image in it ({seen}); images are files that end in .jpg, .png, .webp, .tif and the like"
    )
