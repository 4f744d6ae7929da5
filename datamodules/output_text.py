"""Escapes text for each kind of output: the console, Markdown, HTML and the labels of plots.

A name, a category or an answer may hold anything: markup of rich, escape sequences of a terminal, formulas of
matplotlib, links, tags, or half of a surrogate pair, which UTF-8 cannot encode. Text from data, from files of a run and
from exceptions passes through one of these functions before it is shown, and is then only text.
"""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

#: characters with a meaning inside a line of Markdown; an underscore between two letters or digits has none
_MARKDOWN = re.compile(r"[\\`*\[\]|<>~&$]|(?<![^\W_])_|_(?![^\W_])")
_LINK_STARTS = re.compile(r"(?i)://|www\.|@")
_LABEL_LENGTH = 60  #: characters of a label of a plot
ZERO_WIDTH_SPACE = "\u200b"


def printable(value: Any, length: int | None = None, newlines: bool = False) -> str:
    r"""Returns text in which each character that is not printable is an escape sequence such as ``\x1b``.

    Control characters, characters that change the direction of text, and lone surrogates are not printable.

    Args:
        value: its ``str`` is used.
        length: number of characters after which the text is cut; None does not cut it.
        newlines: whether to keep line breaks.
    """
    text = str(value)
    if length is not None and len(text) > length:
        text = text[: length - 1] + "…"
    return "".join(
        char if char.isprintable() or (newlines and char == "\n") else char.encode("unicode_escape").decode()
        for char in text
    )


def console_text(value: Any, length: int | None = None, newlines: bool = False, style: str = "") -> Text:
    """Returns text for rich, which interprets neither its markup nor control characters in it.

    Args:
        value: its ``str`` is used.
        length: number of characters after which the text is cut; None does not cut it.
        newlines: whether to keep line breaks.
        style: rich's style of the text.
    """
    from rich.text import Text

    return Text(printable(value, length, newlines), style)


def markdown(value: Any, length: int | None = None) -> str:
    """Returns text on one line for Markdown: no formatting, no HTML, no table cell, and no automatic link.

    Args:
        value: its ``str`` is used; each run of whitespace becomes a space.
        length: number of characters after which the text is cut; None does not cut it.
    """
    # as entities: python-markdown, which TensorBoard uses, knows no backslash before "<" and "|"
    line = _MARKDOWN.sub(lambda match: f"&#{ord(match[0])};", printable(" ".join(str(value).split()), length))
    # a viewer makes a link of a URL, of "www." and of a mail address, unless a character splits its beginning
    return _LINK_STARTS.sub(lambda match: f"{match[0][0]}{ZERO_WIDTH_SPACE}{match[0][1:]}", line)


def html(value: Any, length: int | None = None) -> str:
    """Returns text for HTML, with line breaks; valid in attributes with quotes too.

    Args:
        value: its ``str`` is used.
        length: number of characters after which the text is cut; None does not cut it.
    """
    return escape(printable(value, length, newlines=True))


def plot_label(value: Any, length: int = _LABEL_LENGTH) -> str:
    """Returns text for a label of matplotlib, without a formula.

    Args:
        value: its ``str`` is used.
        length: number of characters after which the text is cut.
    """
    return printable(value, length).replace("$", r"\$")
