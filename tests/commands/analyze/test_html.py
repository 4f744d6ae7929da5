"""The HTML page of an analysis: complete, self-contained, and without markup from findings."""

from collections import Counter
from html import unescape
from html.parser import HTMLParser

from commands.analyze.html import to_html
from tests.helpers.analysis_document import analysis_document, report_with
from tests.helpers.compromised_host import CALMING


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.attributes = Counter(), [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_has_every_part_and_a_row_for_each_finding():
    page = Page(to_html(analysis_document(report_with())))
    assert {"Scan analysis", "Triage", "What to do", "Correlations", "Findings"} <= set(page.texts)
    assert page.tags["tr"] == 1 + 3
    assert any("model tiny, constrained to the schema" in text for text in page.texts)
    assert "Records of the report that were not usable: 1, see raw_reference.unusable." in page.texts


def test_the_page_runs_and_loads_nothing_whatever_a_finding_contains():
    title = "<script>x</script> <img src=//evil onerror=x> &amp; \x1b[31m"
    metadata = {"path": title, "command": title, "user": title}
    report = report_with(title=title, category='"><b onload=x>', metadata=metadata)
    report["meta"] |= {"hostname": title, "os_pretty": title}
    report["scanner_errors"] = [title]
    text = to_html(analysis_document(report, answers=CALMING))
    page = Page(text)
    assert not page.tags.keys() & {"script", "img", "link", "a", "iframe", "object"}
    assert not page.attributes & {"src", "href", "onerror", "onload"}
    assert "<script>x</script> <img src=//evil onerror=x> &amp; \\x1b[31m" in page.texts
    assert "default-src 'none'" in unescape(text)


def test_an_action_shows_its_needs_its_danger_and_its_undo():
    action = {
        "title": "Block", "priority": "high", "finding_ids": ["n4"], "description": "", "reference": "nft(8)",
        "command": "sudo x", "needs": ["any", "nftables"], "danger": "You are <locked> out.", "undo": "sudo y",
    }  # fmt: skip
    page = to_html(analysis_document(report_with()) | {"actions": [action]})
    shown = ("<b>danger: You are &lt;locked&gt; out.</b>", "needs: any, nftables", "undo: <code>sudo y</code>")
    assert all(part in page for part in shown)


def test_a_report_without_findings_recommends_no_action():
    empty = {"results": [{"scanner": "ioc", "findings": []}]}
    texts = Page(to_html(analysis_document(empty, ()))).texts
    assert "Nothing above info: no action is needed." in texts
    assert "The scan reports no findings. No action is needed." in texts
    incomplete = Page(to_html(analysis_document(empty | {"scanner_errors": ["ioc: permission denied"]}, ()))).texts
    assert not any("no action is needed" in text.lower() for text in incomplete)
    assert any("A scanner failed" in text and "permission denied" in text for text in incomplete)
    assert "None found." in texts
