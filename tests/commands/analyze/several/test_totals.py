"""Progress over all reports, and the sums that are printed at the end."""

from pathlib import Path

from commands.analyze.console import trust_lines
from commands.analyze.several.totals import ReportsProgress, Totals, skipped_text
from tests.helpers.analysis_document import analysis_document
from tests.helpers.trained_run import REPORT


def document(by_model, by_rule, unusable=(), lowered=0, **skipped):
    answers = {"risk": {"asked": 9, "by_model": by_model, "by_rule": by_rule}}
    return {
        "enriched_findings": [{}] * 3, "correlations": [{}], "actions": [{}, {}],
        "enrichment_results": {"model_report": {"answers": answers, "lowered": {"count": lowered}}},
        "raw_reference": {"unusable": list(unusable), "skipped": {"by_severity": skipped}},
    }  # fmt: skip


def test_sums_over_reports():
    totals = Totals(trust_lines, done_before=4)
    totals.add(document(2, {"no valid answer": 1}, high=1, low=2))
    totals.add(document(1, {"no valid answer": 2}, [{}, {}], 2, low=3))
    totals.set_aside = [{"report": f"r{n}", "name": "", "reason": "empty"} for n in range(12)]
    assert totals.lines(Path("out"), 2.0, 5, 7) == [
        "2 reports, 6 findings, 2 correlations, 4 actions in 2 s (1 reports/s, 3 findings/s, 5 answers reused): out",
        "  done before  4 reports, by an earlier run of this command",
        "  risk         3 by the model; by rule: 3 no valid answer",
        "  LOWERED      The model rates 2 findings of 1 report far lower than the scanner; the results list them first",
        "  not usable   2 records of the reports; see raw_reference.unusable",
        "  skipped      6 findings (1 high, 5 low) by --limit",
        "  ignored      7 files whose name does not end with .json",
        "  set aside    12 reports that can't be read:",
        *(f"    r{n}: empty" for n in range(10)),
        "    and 2 more; the output's set_aside.json has all",
    ]


def test_nothing_else_is_printed_without_a_reason():
    totals = Totals(trust_lines, done_before=1)
    totals.add(document(3, {}))
    assert totals.lines(Path("x"), 1.5, 0, 0) == [
        "1 report, 3 findings, 1 correlations, 2 actions in 2 s (0.67 reports/s, 2 findings/s): x",
        "  done before  1 reports, by an earlier run of this command",
        "  risk         3 by the model",
    ]
    assert skipped_text({"high": 1}) == "1 finding (1 high)"


def test_a_single_report_is_shown_with_its_severities_and_what_is_skipped():
    totals, only = Totals(trust_lines), analysis_document(REPORT, limit=2)
    totals.add(only)
    lines = totals.lines(Path("x.json"), 1.0, 0, 0)
    assert lines[0].startswith("1 report, 2 findings, ")
    assert lines[-len(trust_lines(only)) :] == trust_lines(only)
    assert not any(line.startswith("  not usable") or "by --limit" in line for line in lines)
    totals.add(only)
    assert not set(trust_lines(only)) & set(totals.lines(Path("x.json"), 1.0, 0, 0))


def test_progress_counts_bytes_and_the_stages_of_a_report():
    shown = []
    progress = ReportsProgress(shown.append, 400)
    progress.skip(100)
    progress.start(200)
    for _ in range(4):  # one more than expected does not exceed the report's share
        with progress.stage("risk", 3) as show:
            show(0.5)
    progress.finish()
    progress.start(100)
    progress.finish()
    assert [round(share * 300) for share in shown] == [33, 100, 167, 200, 200, 300]
