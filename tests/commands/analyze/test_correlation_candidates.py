"""Groups found by rule, on hand-made reports."""

from commands.analyze.correlation_candidates import candidates
from datamodules.records import Finding


def make(name, category="network", severity="high", risk=50.0, title=None, **metadata):
    return Finding(name, title or name, "", category, severity, risk, risk, metadata)


def found(findings, **limits):
    return {(group.rule, group.positions) for group in candidates(findings, **limits)}


def test_equal_values_of_identities_tie_findings():
    findings = [make("a", pid="77"), make("b", pid=77), make("c", ppid=77), make("d", pid=7, user="root", state="R")]
    findings += [make("e", user="root", state="R", port="0"), make("f", port=0)]
    assert found(findings) == {("shared_value", (0, 1, 2))}


def test_harmless_findings_alone_are_no_group():
    assert found([make("a", severity="info", pid=5), make("b", severity="info", pid=5)]) == set()
    assert found([make("a", severity="info", pid=5), make("b", severity="low", pid=5)]) == {("shared_value", (0, 1))}


def test_equal_titles_above_info_in_one_category():
    findings = [make("a", title="SUID"), make("b", title="SUID"), make("c", title="SUID", severity="info")]
    findings += [make("d", "suid", title="SUID")]
    assert found(findings) == {("shared_title", (0, 1))}


def test_categories_that_strengthen_each_other_by_any_name():
    findings = [make("a", "ioc", risk=90.0), make("b", "filesystem"), make("c", "mac", severity="info")]
    assert found(findings) == {("combination", (0, 1))}


def test_groups_are_bounded_and_ordered_by_risk():
    findings = [make(f"f{i}", "dns", risk=float(i), pid=2 + i // 3) for i in range(30)]
    groups = candidates(findings, members=2, most=4)
    assert [group.positions for group in groups] == [(29, 28), (26, 25), (23, 22), (20, 19)]
    correlation = groups[0].correlation("c", findings)
    assert (correlation.finding_ids, correlation.risk_score, correlation.severity) == (["f29", "f28"], 29, "high")


def test_one_set_of_findings_is_one_group():
    assert len(candidates([make("a", pid=9, path="/x"), make("b", pid=9, path="/x")])) == 1


def test_values_of_any_type_do_not_break_it():
    odd = [make("a", pid=[1], path={"x": 1}, command=None, port=True), make("b", pid=[1], path={"x": 1}, port=True)]
    assert found(odd) == set()
