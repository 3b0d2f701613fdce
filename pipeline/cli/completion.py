"""What a shell completes after a flag, where that is known at once: presets, students, teachers, levels, keys, files.

One rule: a completion answers within a keystroke, so nothing here imports torch, and what fails completes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from importlib.resources import files
from typing import TYPE_CHECKING, Any, get_args

from dtpipe.manifests.errors import DtpipeError

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem

Complete = Callable[[Any, Any, str], Any]
"""(context, parameter, what is typed) -> click's completion items."""
_PLACES = ("URL", "DIR", "FILE", "PATH", "RUN", "PREDICTOR", "ARM")  # in what help shows for a value
_MOST_NAMES = 60  # more are no help in a terminal; a few letters more make them fewer


def completer(key: str, metavar: str) -> Complete:
    """What click asks for values of the flag that sets a config key."""
    return lambda ctx, _parameter, incomplete: complete_setting(key, metavar, ctx, incomplete)


def complete_setting(key: str, metavar: str, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    """Values of the flag that sets a config key; `metavar` is what help shows for them."""
    names: Iterable[str] = ()
    if key == "distill.student.name":
        names = _students()
    elif key.endswith("teacher.path") or key.endswith(".teacher"):
        names = _teachers()
    elif key == "distill.levels":
        names = _levels(ctx.params.get("distill__datasets") or ctx.args)  # the latter while the flag lacks its value
    elif key.endswith("device"):
        from dtpipe.manifests.schema import DeviceName

        names = get_args(DeviceName)
    elif set(metavar) <= set("abcdefghijklmnopqrstuvwxyz0123456789_|") and "|" in metavar:
        names = metavar.split("|")
    return _items(names, incomplete) + _files(metavar, incomplete)


def complete_config(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Presets, and files of settings."""
    from click.shell_completion import CompletionItem

    from dtpipe.pipeline.cli.settings import preset_names, preset_summary

    presets = [
        CompletionItem(name, help=preset_summary(name)) for name in preset_names() if name.startswith(incomplete)
    ]
    return [*presets, *_files("FILE", incomplete)]


def complete_key(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Config keys, section by section, up to the next dot."""
    from dtpipe.pipeline.cli.settings import SECTIONS, model_keys, section_model

    section, dot, _ = incomplete.partition(".")
    if not dot or section not in SECTIONS:
        return _items((f"{name}." for name in SECTIONS), incomplete)
    known = list(model_keys(section_model(section), section))
    beside = [key for key in known if key.count(".") == incomplete.count(".")]
    return _items(
        (f"{key}." if any(k.startswith(f"{key}.") for k in known) else f"{key}=" for key in beside), incomplete
    )


def _students() -> list[str]:
    """timm's models as they are recorded."""
    document = json.loads((files("dtpipe.distill.student") / "timm_students.json").read_text(encoding="utf-8"))
    return sorted(name for group in document["students"].values() for name in group)


def _teachers() -> list[str]:
    from dtpipe.extract.teachers.files.published import published_teachers

    return sorted(teacher.name for teacher in published_teachers())


def _levels(urls: Iterable[str]) -> list[str]:
    """Levels of the datasets that are named already; none where they cannot be read at once."""
    from dtpipe.manifests.store.paths import is_url
    from dtpipe.manifests.store.store import Store
    from dtpipe.manifests.write.plan import load_plan

    names: list[str] = []
    for url in (url for url in urls if not is_url(url)):
        try:
            names += [level.name for level in load_plan(Store(url)).recipe.levels]
        except DtpipeError:
            continue
    return list(dict.fromkeys(names))


def _items(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    """Names that go on from what is typed; after a comma, what goes on from there."""
    from click.shell_completion import CompletionItem

    before, comma, last = incomplete.rpartition(",")
    fitting = [f"{before}{comma}{name}" for name in names if name.startswith(last)]
    return [CompletionItem(name) for name in fitting[:_MOST_NAMES]]


def _files(metavar: str, incomplete: str) -> list[CompletionItem]:
    """What makes the shell itself go on with files, where a value is a place."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")] if any(word in metavar for word in _PLACES) else []
