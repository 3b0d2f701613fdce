"""How a command gets its settings: shared options, and flags that are aliases of single config keys.

A flag's help, default and type come from the field that it sets, so each sentence stands in one place.
"""

from __future__ import annotations

import inspect
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import click
from pydantic.fields import FieldInfo

from dtpipe.manifests.errors import StoppedError
from dtpipe.pipeline.cli.completion import complete_config, complete_key, completer
from dtpipe.pipeline.cli.console import Console
from dtpipe.pipeline.cli.settings import check_key, gather, parse_sets, parse_value, validate

Document = dict[str, Any]
DEFAULT_METAVAR = "VALUE"


@dataclass(frozen=True)
class Flag:
    """A flag or, without leading dashes, a positional argument; it sets the config key `key`."""

    name: str
    key: str
    metavar: str | None = None
    repeatable: bool = False
    aliases: tuple[str, ...] = ()
    """Other names of the flag."""

    @property
    def parameter(self) -> str:
        """The name under which click hands the value over: unique, and no Python identifier needed."""
        return self.key.replace(".", "__")

    @property
    def positional(self) -> bool:
        """True when the value is given without a flag."""
        return not self.name.startswith("-")


@dataclass(frozen=True)
class Call:
    """One use of a command: its settings document and the shared options."""

    document: Document
    dry_run: bool
    console: Console
    names: Mapping[str, str]
    """Config key to how the command line spells it."""

    def settings(self, section: str) -> Any:
        """The validated settings of one section. Raises: ConfigError in one sentence."""
        return validate(self.document, section, self.names)

    def has(self, section: str) -> bool:
        """True when a file, `-s` or a flag gave anything to this section."""
        return bool(self.document.get(section))


_SPOKEN: ContextVar[str | None] = ContextVar("_SPOKEN", default=None)


def command_line() -> str:
    """The command as typed, or the call of a function that stands for it; for the records beside outputs."""
    return _SPOKEN.get() or shlex.join(["dtpipe", *sys.argv[1:]])


@contextmanager
def called_as(text: str) -> Iterator[None]:
    """What `command_line` is inside, where no command was typed."""
    token = _SPOKEN.set(text)
    try:
        yield
    finally:
        _SPOKEN.reset(token)


def _is_bool(field: FieldInfo) -> bool:
    return field.annotation is bool


def _is_many(field: FieldInfo) -> bool:
    return "tuple[str" in str(field.annotation) or "list[str" in str(field.annotation)


def _help(field: FieldInfo, key: str, section: str) -> str:
    text = field.description or key
    if field.is_required() and key.startswith(f"{section}."):
        return f"{text} [required]"
    if field.is_required() or field.default is None or field.default == ():
        return text
    default = field.default
    if isinstance(default, bool):
        return text if not default else f"{text} [default: yes]"
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f"{text} [default: {shown}]"


def _add_flag(function: Callable[..., Any], flag: Flag, section: str) -> Callable[..., Any]:
    field = check_key(flag.key, flag.name)
    if flag.positional:
        many = _is_many(field) or flag.repeatable
        own: dict[str, Any] = {
            "nargs": -1 if many else 1,
            "required": False,
            "shell_complete": completer(flag.key, flag.metavar or DEFAULT_METAVAR),
        }
        return click.argument(flag.parameter, metavar=flag.metavar, **own)(function)
    text = _help(field, flag.key, section)
    if _is_bool(field):
        names = f"{flag.name}/--no-{flag.name[2:]}" if field.default else flag.name
        return click.option(names, flag.parameter, is_flag=True, default=None, help=text)(function)
    metavar = flag.metavar or DEFAULT_METAVAR
    spelled = (flag.name, *flag.aliases, flag.parameter)
    own = {
        "metavar": metavar,
        "multiple": flag.repeatable,
        "shell_complete": completer(flag.key, flag.metavar or DEFAULT_METAVAR),
    }
    return click.option(*spelled, help=text, **own)(function)


def _flag_values(flags: Sequence[Flag], given: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for flag in flags:
        value = given[flag.parameter]
        if value is None or value == ():
            continue
        field = check_key(flag.key, flag.name)
        if isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, str):
            value = parse_value(value, field, flag.name)
        values[flag.key] = value
    return values


def settings_command(
    name: str,
    flags: Sequence[Flag],
    example: str,
    dry_run: bool = True,
    switches: Mapping[str, str] | None = None,
    whole: str = "what is written is whole; run the same command to go on",
) -> Callable[[Callable[..., None]], click.Command]:
    """Decorator: a click command that resolves its settings and calls the function with a `Call`.

    The function's docstring is the help; `example` is one or more command lines shown below it. switches: flags of one
    use that are no settings (`--fresh`), with their help; they arrive as keyword arguments. The first flag's section is
    the command's own: its required keys are marked. `whole`: what Ctrl-C leaves behind, in a clause.
    """
    switches = switches or {}

    def wrap(function: Callable[..., None]) -> click.Command:
        names = {flag.key: flag.metavar or flag.name if flag.positional else flag.name for flag in flags}

        def run(config: tuple[str, ...], set_: tuple[str, ...], as_json: bool, dry: bool = False, **given: Any) -> None:
            document = gather(config, parse_sets(set_), _flag_values(flags, given))
            chosen = {switch: given[switch] for switch in given if f"--{switch.replace('_', '-')}" in switches}
            with interruptible(whole):
                function(Call(document, dry, Console(as_json), names), **chosen)

        callback = _shared_options(run, dry_run)
        for switch, text in reversed(list(switches.items())):
            callback = click.option(switch, is_flag=True, help=text)(callback)
        for flag in reversed(flags):
            callback = _add_flag(callback, flag, flags[0].key.split(".")[0])
        callback.__doc__ = function.__doc__
        body = "\n".join(f"  {line}" for line in example.strip().splitlines())
        return click.command(name, help=f"{inspect.cleandoc(function.__doc__ or '')}\n\n\b\nExample:\n{body}")(callback)

    return wrap


@contextmanager
def interruptible(whole: str) -> Iterator[None]:
    """Ctrl-C inside is answered with what is `whole`, a clause.

    Raises: StoppedError with the exit code that shells give it.
    """
    try:
        yield
    except KeyboardInterrupt as err:
        stopped = StoppedError(f"stopped by {signal.SIGINT.name}; {whole}")
        stopped.exit_code = 128 + signal.SIGINT
        raise stopped from err


def _shared_options(function: Callable[..., Any], dry_run: bool) -> Callable[..., Any]:
    function = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(function)
    if dry_run:
        text = "Say what it would cost, and stop."
        function = click.option("-n", "--dry-run", "dry", is_flag=True, help=text)(function)
    text = "Set any config key; VALUE is YAML. Repeatable."
    own: dict[str, Any] = {"multiple": True, "metavar": "KEY=VALUE", "shell_complete": complete_key}
    function = click.option("-s", "--set", "set_", help=text, **own)(function)
    text = "YAML file of settings, or the name of a preset. Repeatable; later wins."
    own = {"multiple": True, "metavar": "FILE|PRESET", "shell_complete": complete_config}
    return click.option("-c", "--config", "config", help=text, **own)(function)
