"""Groups of findings on small reports whose groups are known."""

from commands.analyze.correlation_candidates import find_candidates
from datamodules.records import Finding


def make(name, category="network", severity="high", risk=50.0, title=None, **metadata):
    return Finding(name, title or name, "", category, severity, risk, risk, metadata)


def rules_and_positions(findings, **limits):
    return {(group.rule, group.positions) for group in find_candidates(findings, **limits)}


def test_findings_with_equal_identifying_values_are_a_group():
    findings = [make("a", pid="77"), make("b", pid=77), make("c", ppid=77), make("d", pid=7, user="root", state="R")]
    findings += [make("e", user="root", state="R", port="0"), make("f", port=0)]
    assert rules_and_positions(findings) == {("shared_value", (0, 1, 2))}


def test_findings_of_severity_info_alone_are_no_group():
    assert rules_and_positions([make("a", severity="info", pid=5), make("b", severity="info", pid=5)]) == set()
    assert rules_and_positions([make("a", severity="info", pid=5), make("b", severity="low", pid=5)]) == {
        ("shared_value", (0, 1))
    }


def test_findings_with_equal_titles_above_info_are_a_group_per_category():
    findings = [make("a", title="SUID"), make("b", title="SUID"), make("c", title="SUID", severity="info")]
    findings += [make("d", "suid", title="SUID")]
    assert rules_and_positions(findings) == {("shared_title", (0, 1))}


def test_aliases_of_combined_categories_are_a_group():
    findings = [make("a", "ioc", risk=90.0), make("b", "filesystem"), make("c", "mac", severity="info")]
    assert rules_and_positions(findings) == {("combination", (0, 1))}


def test_the_number_and_size_of_groups_is_limited_to_the_riskiest():
    findings = [make(f"f{i}", "dns", risk=float(i), pid=2 + i // 3) for i in range(30)]
    groups = find_candidates(findings, max_members=2, max_groups=4)
    assert [group.positions for group in groups] == [(29, 28), (26, 25), (23, 22), (20, 19)]
    correlation = groups[0].correlation("c", findings)
    assert (correlation.finding_ids, correlation.risk_score, correlation.severity) == (["f29", "f28"], 29, "high")


def test_two_rules_with_the_same_findings_give_one_group():
    assert len(find_candidates([make("a", pid=9, path="/x"), make("b", pid=9, path="/x")])) == 1


def test_metadata_of_other_types_is_ignored():
    odd = [make("a", pid=[1], path={"x": 1}, command=None, port=True), make("b", pid=[1], path={"x": 1}, port=True)]
    assert rules_and_positions(odd) == set()
