"""Any file in COCO's JSON format, with its images anywhere below a root: what most labelling tools export."""

from __future__ import annotations

from dtpipe.extract.sources.layouts.base import Layout
from dtpipe.extract.sources.layouts.coco_json import open_coco, parse_coco
from dtpipe.extract.sources.layouts.files import Tree, is_elsewhere
from dtpipe.extract.sources.layouts.listed import ListedSource
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import Instances


def open_coco_json(root: str, split: str | None) -> ListedSource:
    """Raises: ConfigError without a file; InputError as `parse_coco` and `open_coco`."""
    if not split:
        raise ConfigError(f"{root}: name the file with the labels, as in coco-json:{root}@annotations/instances.json")
    tree = Tree(root)
    where = split if is_elsewhere(split) else f"{tree.root}/{split}"
    return open_coco(tree, tree.images(), parse_coco(tree.read_named(split), where))


LAYOUT = Layout(
    "coco-json",
    "coco-json:ROOT@FILE.json: objects of a file in COCO's format, which names images anywhere below ROOT.",
    Instances,
    open_coco_json,
    split_is_file=True,
)
