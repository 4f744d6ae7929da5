"""Hostile text stays text on the console, in Markdown, in HTML and in plots."""

import io
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from markdown import markdown as render_markdown
from rich.console import Console
from rich.table import Table

from callbacks.reporting.figures import error_by_category, new_figure
from datamodules.output_text import console_text, html, markdown, plot_label, printable
from tests.helpers.hostile_text import HOSTILE_TEXTS

TEXTS = pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS)


@TEXTS
def test_printable_text_has_no_control_character(text):
    shown = printable(text)
    assert shown.isprintable()
    shown.encode("utf-8")
    assert printable(shown) == shown
    assert len(printable(text, 10)) <= 10 * len("\\U0010ffff")


def test_printable_keeps_ordinary_text():
    assert printable("Größe 10 µm, 安全 ✓") == "Größe 10 µm, 安全 ✓"
    assert printable("a\nb", newlines=True) == "a\nb"
    assert printable("a\nb\x1b") == "a\\nb\\x1b"
    assert printable("abcdef", 4) == "abc…"


@TEXTS
def test_the_console_shows_text_as_it_is(text):
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=10_000)
    table = Table("heading")
    table.add_row(console_text(text))
    console.print(table)
    console.print(console_text(text))
    output = console.file.getvalue()
    assert output.count(printable(text)) == 2
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", output)


class Tags(HTMLParser):
    """Collects the tags and the text of HTML."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


@TEXTS
def test_markdown_has_no_element_of_the_text(text):
    line = markdown(text)
    assert "\n" not in line
    assert not re.search(r"://|www\.|@(?!\u200b)", line)
    page = Tags(render_markdown(f"before {line} after", extensions=["tables"]))
    assert page.tags == ["p"]
    shown = page.text.replace("\u200b", "")
    assert shown == f"before {printable(' '.join(text.split()))} after"


@TEXTS
def test_a_cell_of_a_markdown_table_stays_one_cell(text):
    table = f"| a | b |\n|---|---|\n| {markdown(text)} | second |"
    page = Tags(render_markdown(table, extensions=["tables"]))
    assert page.tags.count("td") == 2
    assert set(page.tags) == {"table", "thead", "tbody", "tr", "th", "td"}


@TEXTS
def test_html_has_no_element_of_the_text(text):
    page = Tags(f'<p title="{html(text)}">{html(text)}</p>')
    assert page.tags == ["p"]
    assert unescape(page.text) == page.text or "&" in text
    assert page.text == printable(text, newlines=True)


@TEXTS
def test_plots_show_text_as_it_is(text):
    figure, axes = new_figure()
    label = axes.set_title(plot_label(text))
    figure.canvas.draw()  # raises an error for an invalid formula
    assert label._preprocess_math(label.get_text()) == (printable(text, 60), False)


def test_a_plot_of_hostile_categories_is_drawn():
    figures = {"answers": 2.0, "severity_accuracy": 0.5, "risk_error": 3.0}
    categories = dict.fromkeys(list(HOSTILE_TEXTS.values())[:20], figures)
    error_by_category(categories).canvas.draw()
