"""The Markdown text of an analysis: complete, and without formatting from findings."""

import pytest

from commands.analyze.markdown import by_rank, code, plain, to_markdown, visible
from tests.helpers.analysis_document import analysis_document, report_with
from tests.helpers.compromised_host import CALMING


def test_text_of_a_finding_is_neither_markup_nor_a_link():
    title = "<script>x</script> | [a](http://evil) \x1b[31m`b`"
    report = report_with(title=title, metadata={"path": title, "command": title, "user": title})
    report["meta"] |= {"hostname": title, "os_pretty": title}
    report["scanner_errors"] = [title]
    text = to_markdown(analysis_document(report, answers=CALMING))
    assert all(heading in text for heading in ("# Scan analysis", "## Triage", "## What to do", "## Findings"))
    assert "<script>" not in text
    assert "](http" not in text
    assert "\x1b" not in text
    rows = [line for line in text.splitlines() if line.startswith("| critical")]
    assert len(rows) == 1
    assert rows[0].replace("\\|", "").count("|") == 11


def test_an_action_shows_its_needs_its_danger_and_its_undo():
    action = {
        "title": "Block", "priority": "high", "finding_ids": ["n4"], "description": "", "reference": "nft(8)",
        "command": "sudo x", "needs": ["any", "nftables"], "danger": "You can lock yourself out.", "undo": "sudo y",
    }  # fmt: skip
    text = to_markdown(analysis_document(report_with()) | {"actions": [action]})
    shown = ("**danger: You can lock yourself out.**", "needs: any, nftables", "undo: ` sudo y `")
    assert all(line in text for line in shown)


def test_findings_are_ordered_by_severity_and_risk():
    document = analysis_document(report_with())
    assert [finding["id"] for finding in by_rank(document)] == ["ioc2", "ioc1", "n4"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a\n b", "a b"), ("x\x07y", "x\\x07y"), ("abcdef", "abcd…"), (7, "7"), ("é\u202e", "é\\u202e")],
)
def test_visible_text_is_one_short_line_without_control_characters(text, expected):
    assert visible(text, 5 if text == "abcdef" else 300) == expected


def test_plain_text_has_no_special_character_unescaped():
    assert plain("*a* [b](http://c)") == "\\*a\\* \\[b\\]\\(http:\u200b//c\\)"


@pytest.mark.parametrize(("text", "fence"), [("ls", "`"), ("echo `id`", "``"), ("a ``` b", "````")])
def test_the_fence_of_code_is_longer_than_backticks_in_it(text, fence):
    assert code(text) == f"{fence} {text} {fence}"
