"""Folders on a web server: the links on their pages, and what addresses are called.

One rule: a name is a link's path, percent-decoded, so that keys are those of the folder that is served.
"""

from __future__ import annotations

import os
from html.parser import HTMLParser
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

from dtpipe.manifests.errors import InputError
from dtpipe.manifests.store.reading import PatientFiles

MAX_PAGE_BYTES = 2**26  # of a folder's page


def is_web(url: str) -> bool:
    """True for an address of a web server."""
    return url.startswith(("http://", "https://"))


def plain_path(url: str) -> str:
    """A URL as the path that it names: on the web decoded, and without what follows `?` or `#`."""
    return _decoded(urlsplit(url).path) if is_web(url) else url


def find_links(files: PatientFiles, url: str) -> list[tuple[str, str]]:
    """(POSIX path inside, address) of all files that the pages of a folder link to.

    Raises: InputError for a page without end; what `files` raise.
    """
    root = url.rstrip("/") + "/"
    found: dict[str, str] = {}
    pages, seen = [root], {root}
    while pages:
        page = pages.pop()
        for link in _links(page, _text(files, page)):
            if not link.endswith("/"):
                found[_decoded(link)[len(_decoded(root)) :]] = link
            elif link not in seen:
                seen.add(link)
                pages.append(link)
    return list(found.items())


def _text(files: PatientFiles, page: str) -> str:
    data = files.first_bytes(page, MAX_PAGE_BYTES + 1)
    if len(data) > MAX_PAGE_BYTES:
        raise InputError(f"{page}: a page of over {MAX_PAGE_BYTES} bytes; copy the folder here and give its path")
    return data.decode("utf-8", "replace")


class _Anchors(HTMLParser):
    """Collects where anchors point to."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """As the base class calls it."""
        self.targets += [target for name, target in attrs if tag == "a" and name == "href" and target]


def _links(page: str, text: str) -> list[str]:
    """Addresses below a page that it links to, without those that only sort it."""
    anchors = _Anchors()
    anchors.feed(text)
    links = [urljoin(page, target) for target in anchors.targets if "?" not in target and "#" not in target]
    return [link for link in links if _decoded(link).startswith(_decoded(page)) and _decoded(link) != _decoded(page)]


def _decoded(link: str) -> str:
    return os.fsdecode(unquote_to_bytes(link))
