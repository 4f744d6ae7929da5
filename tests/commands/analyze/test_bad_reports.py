"""Reports of hosts with something bad, with a model that calls everything harmless: no output plays the danger down."""

import json
import re
from html import unescape
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from commands.analyze.command import dumps
from commands.analyze.console import trust_lines
from commands.analyze.html import to_html
from commands.analyze.markdown import to_markdown
from commands.analyze.several.totals import Totals
from tests.helpers.analysis_document import analysis_document
from tests.helpers.compromised_host import CALMING, COMPROMISED, WORST, agreeing

#: id of the worst finding by the scanner, and the number of findings that a model lowers by calling them info
REPORTS = {
    "malicious1": ("ioc2", 3),
    "host_scan": (
        "/home/joseph-mazzini/Desktop/jetbrains-toolbox-2.8.1.52155/bin/jetbrains-toolbox:361364", 14,
    ),
    "sample1": ("s1", 1),
    "compromised": (WORST, 4),
}  # fmt: skip
#: sentences that play danger down, in the words of this project's texts and of the scripted model
CALMING_SENTENCES = re.compile(
    r"no (urgent |further )?action (is )?(needed|required)|no urgent|nothing (is )?urgent|nothing above info|"
    r"nothing needs|no findings|routine hardening|keep this state|as the baseline|harmless|benign|"
    r"can (wait|be ignored)|0 of \d+|low or info|everything .{0,20}expected|the finding is informational|below medium",
    re.IGNORECASE,
)


def load(name, request):
    if name == "compromised":
        return json.loads(json.dumps(COMPROMISED))
    return json.loads((request.getfixturevalue("shared_data") / "reports" / f"{name}.json").read_text())


def outputs(document):
    """Returns the text of each output by format; HTML without its markup."""
    page, totals = to_html(document), Totals(trust_lines)
    totals.add(document)
    return {
        "json": dumps(document),
        "markdown": to_markdown(document),
        "html": unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)),
        "console": "\n".join(totals.lines(Path("out"), 1.0, 0, 0)),
    }


def title_of(report, name):
    return next(f["title"] for result in report["results"] for f in result["findings"] if f["id"] == name)


@pytest.mark.parametrize("trust", ["higher", "scanner", "model"])
@pytest.mark.parametrize("name", REPORTS)
def test_no_output_plays_the_danger_down(name, trust, request):
    document = analysis_document(load(name, request), (), CALMING, trust=trust)
    counts = document["enrichment_results"]["model_report"]["answers"]
    assert counts["summary"]["by_rule"] == {"plays the danger down": 1}
    for form, text in outputs(document).items():
        match = CALMING_SENTENCES.search(text)
        assert match is None, (form, match[0])


@pytest.mark.parametrize("name", REPORTS)
def test_the_worst_finding_is_first_in_every_output(name, request):
    report, (worst, _) = load(name, request), REPORTS[name]
    document = analysis_document(report, (), CALMING)
    assert document["enriched_findings"][0]["id"] == worst
    assert document["reductions"]["top_findings"][0]["id"] == worst
    assert document["actions"][0]["finding_ids"] == [worst]
    assert document["enrichment_results"]["model_report"]["lowered"]["findings"][0]["id"] == worst
    others = {f["title"] for f in document["enriched_findings"]} - {title_of(report, worst)}
    for form, text in outputs(document).items():
        text = text.replace("\\", "")
        first = text.index(title_of(report, worst))
        assert all(first < text.index(title) for title in others if title in text), form


@pytest.mark.parametrize("name", REPORTS)
def test_lowered_findings_are_in_a_box_before_the_summary(name, request):
    document = analysis_document(load(name, request), (), CALMING)
    lowered = document["enrichment_results"]["model_report"]["lowered"]
    assert lowered["count"] == len(lowered["findings"]) == REPORTS[name][1]
    texts, summary = outputs(document), document["summaries"]["executive_summary"][:25]
    box = f"The model rates {lowered['count']} finding"
    assert texts["markdown"].index(box) < texts["markdown"].replace("\\", "").index(summary)
    assert texts["html"].index(box) < texts["html"].index(summary)
    assert box in texts["console"]
    severity = lowered["findings"][0]["scanner_severity"]
    assert f"scanner {severity}, model info" in texts["console"]
    assert f"scanner {severity}, model info" in texts["markdown"]
    assert f"scanner {severity}, model info" in texts["html"]


@pytest.mark.parametrize("name", REPORTS)
def test_with_a_model_that_agrees_there_is_no_box(name, request):
    report = load(name, request)
    document = analysis_document(report, (), agreeing(report))
    assert document["enrichment_results"]["model_report"]["answers"]["risk"]["by_rule"] == {}
    assert document["enrichment_results"]["model_report"]["lowered"] == {"count": 0, "findings": []}
    for text in outputs(document).values():
        assert "lower than the scanner" not in text
        assert "LOWERED" not in text


@pytest.mark.parametrize("trust", ["higher", "model"])
@pytest.mark.parametrize("name", REPORTS)
def test_the_documents_validate_against_the_ground_truth_schema(name, trust, request, shared_data):
    schema = json.loads((shared_data / "ground_truth_schema.json").read_text())
    Draft202012Validator(schema).validate(analysis_document(load(name, request), (), CALMING, trust=trust))


def test_findings_of_one_intrusion_are_correlated():
    document = analysis_document(COMPROMISED, (), CALMING)
    first = document["correlations"][0]
    assert first["title"] == ("Intrusion signs: preloaded library, SUID shell, shell port, untrusted program")
    assert first["severity"] == "critical"
    assert set(first["related_finding_ids"]) == {
        WORST, "/var/tmp/.cache/bash", "tcp-31337", "/var/tmp/.cache/kworkerd:2713",
    }  # fmt: skip
    assert (
        "Intrusion signs: preloaded library, SUID shell, shell port, untrusted program"
        in document["summaries"]["executive_summary"]
    )


def test_evidence_and_the_host_are_shown():
    texts = outputs(analysis_document(COMPROMISED, (), CALMING))
    for form in ("markdown", "html"):
        text = texts[form].replace("\\", "").replace("*", "")
        for value in ("web-7", "Debian GNU/Linux 12", "6.1.0-21-amd64", "2026-03-02T02:58:40Z", "/lib/.x/libsel.so",
                      "/var/tmp/.cache/bash", "www-data", "2713", "31337"):  # fmt: skip
            assert value in text, (form, value)


def test_a_skipped_critical_finding_is_reported_and_prevents_calm():
    report = json.loads(json.dumps(COMPROMISED))
    document = analysis_document(report, (), CALMING, limit=10)  # kernel parameters and modules only
    assert (
        "Analyse the skipped findings: the scanner rates one of them critical"
        in (document["summaries"]["executive_summary"])
    )
    for form, text in outputs(document).items():
        assert CALMING_SENTENCES.search(text) is None, form
        if form != "json":
            assert "26 of 36 findings were not analysed (--limit 10)" in text.replace("\\", "")
