"""One page of HTML that needs nothing but itself: no script, no file, no network."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

from .._optional import optional


class Section(NamedTuple):
    """A figure and what is to be seen in it.

    Attributes:
        name: of the PNG file, and of the section in links.
        title: a few words.
        caption: what the figure shows and how to read it.
        png: the figure.
    """

    name: str
    title: str
    caption: str
    png: bytes


def render(
    title: str,
    summary: str,
    cards: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    options: Sequence[tuple[str, object]],
    notes: Sequence[str] = (),
) -> str:
    """The page. All text is escaped: names of classes and folders are whatever they are.

    Args:
        title: of the page.
        summary: one sentence.
        cards: the few numbers that matter most, by name.
        sections: the figures, in order.
        options: how it was made, by name.
        notes: what is not there, and why.
    """
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = optional("jinja2").Environment(autoescape=True, undefined=optional("jinja2").StrictUndefined)
    shown = []
    for section in sections:
        width, height = struct.unpack(">II", section.png[16:24])  # of a PNG's header: no jump while it loads
        image = base64.b64encode(section.png).decode()
        shown.append({**section._asdict(), "image": image, "width": width, "height": height})
    return environment.from_string(template).render(
        title=title, summary=summary, cards=cards, sections=shown, options=options, notes=notes
    )
