"""Any file in COCO's JSON format, with its images anywhere below a root: what most labelling tools export."""

from __future__ import annotations

from dtpipe.extract.sources.layouts.base import Layout
from dtpipe.extract.sources.layouts.coco_json import open_coco, parse_coco
from dtpipe.extract.sources.layouts.files import Tree, is_elsewhere
from dtpipe.extract.sources.layouts.listed import ListedSource
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import Instances

_SHOWN = 3  # files in a sentence


def open_coco_json(root: str, split: str | None) -> ListedSource:
    """Raises: ConfigError without a file, naming those there are; InputError as `parse_coco` and `open_coco`."""
    tree = Tree(root)
    if not split or not (is_elsewhere(split) or tree.has_file(split)):
        raise ConfigError(f"{root}: {_which_file(tree, split)}")
    where = split if is_elsewhere(split) else f"{tree.root}/{split}"
    return open_coco(tree, tree.images(), parse_coco(tree.read_named(split), where))


def _which_file(tree: Tree, split: str | None) -> str:
    """What is wrong with the name of a file below a root, and what to write: the files there whose names fit best."""
    files = [name for name in tree.files() if name.endswith(".json")]
    fitting = [name for name in files if split and name.rpartition("/")[2] == split.rpartition("/")[2]] or files
    wrong = "" if not split else f"{split} is a folder; " if tree.has(split) else f"there is no {split}; "
    if not fitting:
        return f"{wrong}no JSON file lies there; name the file with the labels by its whole path or URL after @"
    return f"{wrong}name the file with the labels after @, as in coco-json:{tree.root}@{' or @'.join(fitting[:_SHOWN])}"


LAYOUT = Layout(
    "coco-json",
    "coco-json:ROOT@FILE.json: objects of a file in COCO's format, which names images anywhere below ROOT.",
    Instances,
    open_coco_json,
    split_is_file=True,
)
