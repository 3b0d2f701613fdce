"""A part of the page: its title and its HTML, from a template of its own; what is left out is said in a sentence."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from dtpipe.manifests.errors import DtpipeError
from dtpipe.pipeline.cli.console import Note

if TYPE_CHECKING:
    from markupsafe import Markup
    from numpy.typing import NDArray

LeaveOut = Callable[[str, DtpipeError], None]
"""Takes a part that the page goes without, and why."""


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    title: str
    html: Markup


@dataclass
class Notes:
    """What the page says at its foot; each sentence is also told at once."""

    tell: Note
    sentences: list[str] = field(default_factory=list)

    def say(self, sentence: str) -> None:
        """Tell a sentence, and keep it for the page."""
        self.sentences.append(sentence)
        self.tell(sentence)

    def leave_out(self, what: str, err: DtpipeError) -> None:
        """A `LeaveOut`."""
        self.say(f"{what} left out: {err}")


def render(template: str, **context: Any) -> Markup:
    """A template of this package; every value is escaped, figures come in as `Markup`."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    folder = files("dtpipe.pipeline.report") / "templates"
    loader = FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, loader=loader, trim_blocks=True)
    return Markup(environment.get_template(template).render(**context))


def data_uri(image: NDArray[Any]) -> str:
    """An image as a PNG data URI. Shapes: (H, W, 3) uint8."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
