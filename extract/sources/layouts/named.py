"""Images that a file names: by their path below a root, or by the end of it where no other image ends so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dtpipe.extract.sources.base import SourceItem
from dtpipe.extract.sources.layouts.files import few
from dtpipe.extract.sources.names import key_of, without_ending
from dtpipe.manifests.errors import InputError


def match_names(
    names: Iterable[str], images: Mapping[str, SourceItem], where: str, without_endings: bool = False
) -> dict[str, str]:
    """Name in a file to name below the root, of the images that are there; `where` is how messages name the file.

    Without endings, `a` names `a.jpg` too, where no image is called `a`. Raises: InputError when a name may mean
    several images, or two names mean one.
    """
    by_last, stems = _by_last(images), _by_stem(images if without_endings else ())
    by_last_of_stem = _by_last(stems)
    places: dict[str, str] = {}
    taken: dict[str, str] = {}
    for stated in names:
        name = key_of(stated.replace("\\", "/").removeprefix("./"))
        ends = [name] if name in images else _ending_so(name, by_last)
        if not ends and without_endings:
            ends = stems.get(name) or [place for stem in _ending_so(name, by_last_of_stem) for place in stems[stem]]
        if len(ends) > 1:
            raise InputError(f"{where}: image {stated} may be {few(sorted(ends))}; name a root that holds one of them")
        if ends and ends[0] in taken:
            raise InputError(f"{where}: lists {ends[0]} twice, as {taken[ends[0]]} and {stated}; join them")
        if ends:
            places[stated] = ends[0]
            taken[ends[0]] = stated
    return places


def _by_last(names: Iterable[str]) -> dict[str, list[str]]:
    """The names that have each last part."""
    by_last: dict[str, list[str]] = {}
    for name in names:
        by_last.setdefault(name.rpartition("/")[2], []).append(name)
    return by_last


def _by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    """The names that are one but for their endings."""
    stems: dict[str, list[str]] = {}
    for name in names:
        stems.setdefault(without_ending(name), []).append(name)
    return stems


def _ending_so(name: str, by_last: Mapping[str, list[str]]) -> list[str]:
    return [place for place in by_last.get(name.rpartition("/")[2], ()) if f"/{place}".endswith(f"/{name}")]
