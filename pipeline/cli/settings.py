"""From presets, files, `-s` and flags to one validated settings model.

A settings document has one mapping per section (`extract:`, `distill:` ...); nothing past this module reads YAML, flags
or the environment. Precedence: each `-c` over the one before it, then `-s` and flags, which may not name the same key.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dtpipe.manifests.documents import Refusal, parse_yaml, read_utf8
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.store.paths import path_on_disk

_DOCUMENT = Refusal(ConfigError, "give a YAML file of settings, or the name of a preset")
SECTIONS = {
    "extract": "dtpipe.extract.config:ExtractConfig",
    "soft_labels": "dtpipe.pipeline.soft_labels.config:SoftLabelConfig",
    "distill": "dtpipe.distill.config:DistillConfig",
    "interpret": "dtpipe.pipeline.interpret.config:InterpretConfig",
    "train_teacher": "dtpipe.distill.teacher.config:TrainTeacherConfig",
    "eval": "dtpipe.pipeline.config:EvalConfig",
    "export": "dtpipe.pipeline.config:ExportConfig",
    "predict": "dtpipe.pipeline.config:PredictConfig",
    "report": "dtpipe.pipeline.config:ReportConfig",
    "demo": "dtpipe.pipeline.config:DemoConfig",
    "plan": "dtpipe.pipeline.plan.prices:PlanConfig",
}


def section_model(section: str) -> type[BaseModel]:
    """The settings model of one section; importing it needs neither torch nor ray."""
    module, _, name = SECTIONS[section].partition(":")
    model: type[BaseModel] = getattr(importlib.import_module(module), name)
    return model


def submodel(annotation: Any) -> type[BaseModel] | None:
    """The settings model inside an annotation such as `NoiseConfig | None`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for arg in get_args(annotation) if (model := submodel(arg))), None)


def find_field(model: type[BaseModel], key: str) -> FieldInfo | None:
    """The field at a dotted key inside `model`, or None when there is no such key."""
    head, _, rest = key.partition(".")
    field = model.model_fields.get(head)
    if field is None or not rest:
        return field
    inner = submodel(field.annotation)
    if inner is not None:
        return find_field(inner, rest)
    return field if "dict" in str(field.annotation) else None


def model_keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Every dotted key of a model, sections of settings before their fields."""
    for name, field in model.model_fields.items():
        inner = submodel(field.annotation)
        yield f"{prefix}.{name}"
        if inner is not None:
            yield from model_keys(inner, f"{prefix}.{name}")


def _unknown(keys: Sequence[str], where: str) -> ConfigError:
    """What to say of keys that no settings model has: their new names, or what the first of them may have meant."""
    moved = [f"{key} is now {new}" for key in keys if (new := _in_run(key))]
    if moved:
        return ConfigError(f"{where}: {', '.join(moved)}; write {'it' if len(moved) == 1 else 'them'} so")
    key = keys[0]
    section = key.split(".")[0]
    sections = [section] if section in SECTIONS else list(SECTIONS)
    known = [name for section in sections for name in model_keys(section_model(section), section)]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    near += [name for name in known if name.endswith("." + key.rsplit(".", 1)[-1]) and name not in near][
        : 3 - len(near)
    ]
    advice = f"did you mean {' or '.join(near)}?" if near else f"sections are {', '.join(SECTIONS)}"
    return ConfigError(f"{where}: unknown key {key!r}; {advice}")


def _in_run(key: str) -> str | None:
    """The key by which `section.name` goes since settings have a half `run`, if it does."""
    section, _, rest = key.partition(".")
    new = f"{section}.run.{rest}"
    return new if _field_at(new) else None


def _field_at(key: str) -> FieldInfo | None:
    section, _, rest = key.partition(".")
    return find_field(section_model(section), rest) if section in SECTIONS and rest else None


def check_key(key: str, where: str) -> FieldInfo:
    """The field that a full key such as `extract.noise.timesteps` names.

    Raises: ConfigError naming the near matches.
    """
    field = _field_at(key)
    if field is None:
        raise _unknown([key], where)
    return field


def parse_value(text: str, field: FieldInfo, where: str) -> Any:
    """A value from the command line: YAML, plain text where the field holds text, and `5,20` where it holds a tuple."""
    kinds = _alternatives(field.annotation)
    if str in kinds and text != "null":  # `~` is the home folder here
        return text
    many = any(get_origin(kind) is tuple for kind in kinds)
    if many and "," in text and not text.lstrip().startswith("["):
        text = f"[{text}]"
    value = parse_yaml(text, where, Refusal(ConfigError, "quote it, or write lists as [a, b]"))
    only_many = many and all(get_origin(kind) is tuple or kind is NoneType for kind in kinds)
    return [value] if only_many and not isinstance(value, list | None) else value


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type that an annotation is."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def preset_names() -> list[str]:
    """Names of the presets that ship with the package, `table6` before `table10`."""
    folder = files("dtpipe.pipeline") / "presets"
    names = (entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return sorted(
        names, key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
    )


def preset_summary(name: str) -> str:
    """What a preset is: the first line of its header."""
    return _preset_text(name).partition("\n")[0].lstrip("# ")


def _preset_text(name: str) -> str:
    return (files("dtpipe.pipeline") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")


def _read_document(name: str) -> str:
    path, is_preset = path_on_disk(name) or Path(name), name in preset_names()
    if os.path.lexists(path) and not (is_preset and path.is_dir()):
        return read_utf8(path, _DOCUMENT, f"-c {name}")
    if is_preset:
        return _preset_text(name)
    near = difflib.get_close_matches(name, preset_names(), n=3)
    advice = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(f"-c {name}: no such file, and no such preset; {advice}`dtpipe list presets` names them all")


def load_document(name: str) -> dict[str, Any]:
    """One settings document, from a file or a preset; every key in it is checked.

    Raises: ConfigError when it is missing, is no YAML mapping, or holds an unknown key.
    """
    document = parse_yaml(_read_document(name), f"-c {name}", _DOCUMENT)
    if document is None:
        return {}
    if not isinstance(document, dict) or not all(isinstance(value, dict | None) for value in document.values()):
        raise ConfigError(f"-c {name}: not a mapping of sections; write e.g. `extract:` with its keys below it")
    if unknown := [key for key in [*document, *_dotted(document)] if key not in SECTIONS and _field_at(key) is None]:
        raise _unknown(unknown, f"-c {name}")
    return document


def _dotted(value: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for name, inner in value.items():
        key = f"{prefix}{name}"
        if isinstance(inner, Mapping):
            yield from _dotted(inner, f"{key}.")
        elif prefix:
            yield key


def merge_documents(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`: mappings merge by key, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = (
            merge_documents(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
        )
    return merged


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


def parse_sets(sets: Iterable[str]) -> dict[str, Any]:
    """`-s key=value` options as {key: value}; the last of equal keys wins."""
    parsed = {}
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"-s {text}: no value; write -s key=value, e.g. -s extract.noise.timesteps=[50]")
        field = check_key(key.strip(), f"-s {text}")
        parsed[key.strip()] = parse_value(value, field, f"-s {key.strip()}")
    return parsed


def gather(configs: Sequence[str], sets: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The merged settings document of all sections, not validated yet.

    Raises: ConfigError when `-s` and a flag both set a key.
    """
    twice = sorted(set(sets) & set(flags))
    if twice:
        raise ConfigError(f"{twice[0]} is given both with -s and as a flag; keep one of them")
    document: dict[str, Any] = {}
    for name in configs:
        document = merge_documents(document, load_document(name))
    for key, value in {**sets, **flags}.items():
        document = merge_documents(document, _nest(key, value))
    return document


def validate(
    document: Mapping[str, Any],
    section: str,
    names: Mapping[str, str] | None = None,
    model: type[BaseModel] | None = None,
) -> Any:
    """One section of `document` as its settings model, or as one that has some of its fields; others are left out.

    names: full key to how the command line spells it, for advice. Raises: ConfigError in one sentence.
    """
    values = document.get(section) or {}
    values = values if model is None else _fields_of(model, values)
    model = model or section_model(section)
    try:
        return model.model_validate(values)
    except ValidationError as err:
        raise ConfigError(explain(err, model, section, names or {})) from err


def _fields_of(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a model has fields for."""
    kept = {name: value for name, value in values.items() if name in model.model_fields}
    inner = {name: submodel(model.model_fields[name].annotation) for name in kept}
    return {
        name: _fields_of(part, value) if (part := inner[name]) and isinstance(value, Mapping) else value
        for name, value in kept.items()
    }


def explain(err: ValidationError, model: type[BaseModel], section: str, names: Mapping[str, str]) -> str:
    """A pydantic error as one sentence: key, value seen, what is allowed; missing keys name their flag."""
    problems: dict[str, list[str]] = {}
    missing = []
    for problem in err.errors(include_url=False):
        key = _known_prefix(model, problem["loc"], section)
        if problem["type"] == "missing" and isinstance(place := problem["loc"][-1], int):  # of a pair, say
            problems[key] = [_too_few(problem["input"], place + 1)]
        elif problem["type"] == "missing":
            missing += [_spelled(required, names) for required in _required(model, key)]
        elif not (
            key in problems and problem["type"] == "too_short"
        ):  # an item was wrong; pydantic also counts it as absent
            problems.setdefault(key, []).append(_problem_text(problem))
    parts = [f"{', '.join(missing)} must be given"] if missing else []
    for key, texts in problems.items():
        named = key == section or texts[0].startswith(f"{key}.")  # a check of several fields names them itself
        apart = "" if named or texts[0].startswith((" ", ":")) else ": "
        parts.append(("" if named else key) + apart + " or ".join(dict.fromkeys(texts)))
    return "; ".join(parts[:4])


def _too_few(value: Any, num: int) -> str:
    """What to say of a value in the place of `num`."""
    first = value[0] if isinstance(value, list | tuple) and value else value
    return f" is {value!r}: it takes {num} values" + ("" if first in ([], ()) else f", as in {[first] * num}")


def _required(model: type[BaseModel], key: str) -> list[str]:
    """The keys to give where `key` is missing: its own, or the required ones of its settings model."""
    field = find_field(model, key.partition(".")[2])
    inner = submodel(field.annotation) if field else None
    if inner is None:
        return [key]
    return [f"{key}.{name}" for name, field in inner.model_fields.items() if field.is_required()]


def _spelled(key: str, names: Mapping[str, str]) -> str:
    """A key as the command line gives it."""
    return f"{names[key]} ({key})" if key in names else key


_PLAIN = {  # what pydantic says of these names its own parsing
    "int_parsing": "it must be a whole number",
    "int_type": "it must be a whole number",
    "int_from_float": "it must be a whole number",
    "float_parsing": "it must be a number",
    "float_type": "it must be a number",
    "bool_parsing": "it must be true or false",
    "bool_type": "it must be true or false",
    "tuple_type": "it must be a list, as in [1,2]",
    "list_type": "it must be a list, as in [1,2]",
    "string_type": "it must be a text",
}


def _problem_text(problem: ErrorDetails) -> str:
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return text
    seen = "" if isinstance(problem["input"], dict) else f" is {problem['input']!r}"
    text = _PLAIN.get(problem["type"], text)
    return f"{seen}: {text[0].lower()}{text[1:]}"


def _known_prefix(model: type[BaseModel], loc: tuple[int | str, ...], section: str) -> str:
    parts: list[str] = []
    for part in map(str, loc):
        if find_field(model, ".".join([*parts, part])) is None:
            break
        parts.append(part)
    return ".".join([section, *parts])


def dump(config: BaseModel, section: str) -> str:
    """A resolved section as YAML that `-c` reads back."""
    text: str = yaml.safe_dump({section: config.model_dump(mode="json")}, sort_keys=False, allow_unicode=True)
    return text
