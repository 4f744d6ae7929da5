import json
from dataclasses import replace

import jsonschema

from datamodules.records import Document
from datamodules.tasks import CorrelationTask
from datamodules.tasks.correlation import MAX_LINE, pick_evenly
from tests.helpers.tasks_data import make_correlation, make_document, make_finding, prompt_findings


def test_the_prompt_of_a_correlation_of_400_findings_is_bounded():
    correlation = make_correlation([f"f_{i}" for i in range(400)])
    task = CorrelationTask(members=8, distractors=4)
    (pair,) = task.pairs(make_document(500, [correlation]))
    answer = json.loads(pair.completion)
    shown = [line["id"] for line in prompt_findings(pair)]
    assert pair.findings == len(shown)
    assert 8 < len(shown) <= 12
    assert len(answer["related_finding_ids"]) == 8
    assert answer["related_finding_ids"][0] == "f_0"
    assert set(answer["related_finding_ids"]) == {key for key in shown if int(key[2:]) < 400}
    assert shown == sorted(shown, key=lambda key: int(key[2:])), "not in the document's order"
    assert len(pair.content) < 12 * 400
    jsonschema.validate(answer, task.answer_schema)


def test_correlations_with_the_same_findings_show_different_ones():
    ids = [f"f_{i}" for i in range(300)]
    correlations = [make_correlation(ids, f"c{n}") for n in range(20)]
    pairs = list(CorrelationTask().pairs(make_document(400, correlations)))
    assert len({tuple(json.loads(pair.completion)["related_finding_ids"]) for pair in pairs}) >= 15


def test_the_exact_text_of_a_pair():
    findings = [make_finding(0, "high", 80.0), make_finding(1, "low", 30.0)]
    correlation = make_correlation(["f_1", "gone", "f_0", "f_1"], risk_score_delta=12.4, severity=None)
    (pair,) = CorrelationTask().pairs(Document("s", "m", 0, findings, [correlation]))
    assert pair.completion == (
        '{"title":"Ports belong together","related_finding_ids":["f_0","f_1"],"risk_score":75.5,"risk_score_delta":12,'
        '"rationale":"They listen, they listen","tags":["correlation"]}'
    )
    assert pair.content == (
        '{"findings":[{"id":"f_0","title":"Open port 0","description":"A port is open","category":"network",'
        '"metadata":{"port":0},"severity":"high","risk_score":80},{"id":"f_1","title":"Open port 1","description":'
        '"A port is open","category":"network","metadata":{"port":1},"severity":"low","risk_score":30}]}'
    )
    assert (pair.severity, pair.category) == ("high", "correlation")


def test_the_insight_has_priority_over_the_description_as_rationale():
    document = make_document(5, [make_correlation(["f_0", "f_1"], insight="Staged intrusion.")])
    (pair,) = CorrelationTask().pairs(document)
    assert json.loads(pair.completion)["rationale"] == "Staged intrusion."


def test_distractors_belong_to_no_correlation_of_the_members():
    correlations = [make_correlation([f"f_{i}" for i in range(n, 60, 10)], f"c{n}") for n in range(6)]
    correlations.append(make_correlation(["f_0", "f_1", "f_6"], "bridge"))
    document = make_document(60, correlations)
    tied: dict[str, set[str]] = {}
    for correlation in correlations:
        for key in correlation.finding_ids:
            tied.setdefault(key, set()).add(correlation.id)
    for pair in CorrelationTask(members=4, distractors=6).pairs(document):
        members = set(json.loads(pair.completion)["related_finding_ids"])
        others = {line["id"] for line in prompt_findings(pair)} - members
        assert others
        assert not any(tied.get(a, set()) & tied[b] for a in others for b in members)


def test_correlations_without_two_findings_are_counted():
    references = [["gone", "lost"], [], ["f_1"], ["f_1", "f_1"], ["f_1", "f_2"]]
    correlations = [make_correlation(ids, f"c{n}") for n, ids in enumerate(references)]
    task = CorrelationTask()
    assert len(list(task.pairs(make_document(5, correlations)))) == 1
    assert task.skipped == {"no finding present": 2, "only one finding present": 2}


def test_an_answer_uses_the_shown_ids():
    paths = ["/usr/lib/" + "x" * 60, "f2", "", "ok", "ok"]
    findings = [replace(make_finding(i), id=path) for i, path in enumerate(paths)]
    document = Document("s", "m", 0, findings, [make_correlation([paths[0], "ok"])])
    (pair,) = CorrelationTask(distractors=0).pairs(document)
    assert json.loads(pair.completion)["related_finding_ids"] == ["f1", "ok"]


def test_long_findings_are_truncated_in_the_prompt():
    findings = [make_finding(i, metadata={"pid": 7, "cmd": "A" * 10_000}) for i in range(2)]
    (pair,) = CorrelationTask().pairs(Document("s", "m", 0, findings, [make_correlation(["f_0", "f_1"])]))
    assert len(pair.content) < 2 * MAX_LINE
    assert [line["metadata"]["pid"] for line in prompt_findings(pair)] == [7, 7]


def test_pick_evenly_returns_the_first_item_and_evenly_spaced_others():
    assert pick_evenly([3, 1, 2], 3, seed=9) == [3, 1, 2]
    for seed in range(200):
        first, *others = pick_evenly(range(101), 6, seed)
        assert first == 0
        gaps = [(b - a) % 100 for a, b in zip(others, [*others[1:], others[0]], strict=True)]
        assert gaps == [20] * 5
    assert {pick_evenly(range(101), 6, seed)[1] for seed in range(100)} == set(range(1, 101))
