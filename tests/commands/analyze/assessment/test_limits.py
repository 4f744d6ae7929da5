"""Known limits of a model, from small run folders."""

import json
from dataclasses import dataclass, field

import pytest

from commands.analyze.assessment.limits import KnownLimits, category_accuracy, known_limits
from commands.analyze.assessment.title_index import TitleIndex
from commands.analyze.assessment.training_titles import FILE, training_titles
from tests.helpers.findings_data import finding, write_shard

SOURCE = "synthetic://?findings=200&seed=3"


@dataclass
class Trained:
    """The parts of a trained model that its limits depend on."""

    run: object
    config: dict = field(default_factory=dict)


def trained(run, *sources):
    return Trained(run, {"data": {"init_args": {"sources": list(sources), "val_fraction": 0.1, "seed": 0}}})


def write_accuracy(run, **categories):
    groups = {name: {"severity_accuracy": good / count, "answers": float(count)} for name, (good, count) in
              categories.items()}  # fmt: skip
    record = {"tasks": {"risk": {"columns": {"tuned": {"groups": {"category": groups}}}}}}
    (run / "evaluation.json").write_text(json.dumps(record))


def record(category, title, model="low"):
    return {"category": category, "title": title, "model_severity": model}


def test_a_run_on_generated_findings_has_a_banner(tmp_path):
    write_accuracy(tmp_path, processes=(9, 10), kernel_params=(1, 6))
    limits = known_limits(trained(tmp_path, SOURCE))
    assert limits.lines == (
        "It was trained only on generated findings (synthetic://), not on findings of real hosts.",
        "It rated 10 of 16 held-out findings with the correct severity. Below 75%: kernel_params (1 of 6).",
    )
    records = [
        record("kernel_params", "rp_filter"), record("processes", "Running process: sshd"),
        record("ebpf_exec_trace", "eBPF support not available at runtime"), record("mounts", "x", model=None),
    ]  # fmt: skip
    report = limits.annotate(records)
    assert records[0]["known_limits"][0] == "category kernel_params: 1 of 6 held-out severities correct"
    assert records[1]["known_limits"] == []
    assert records[2]["known_limits"] == [
        "category ebpf_exec_trace: not in the training data", "title unlike the training data",
    ]  # fmt: skip
    assert records[3]["known_limits"] == []
    assert report["banner"][2] == "Categories of this report that the training data lacks: ebpf_exec_trace (1)."
    assert report["unlike_titles"] >= 1


def test_other_names_of_a_category_count_as_the_category():
    limits = KnownLimits(accuracy={"suid": (1, 2)}, trained_categories=frozenset({"suid"}))
    records = [record("suid_sgid", "x")]
    assert limits.annotate(records)["findings"] == 1
    assert records[0]["known_limits"] == ["category suid: 1 of 2 held-out severities correct"]


def test_a_good_run_on_real_findings_has_no_limits(tmp_path):
    sources = write_shard(tmp_path / "data", [finding(n, title="Port 22 open") for n in range(40)])
    run = tmp_path / "run"
    run.mkdir()
    write_accuracy(run, processes=(10, 10), network=(8, 10))
    limits = known_limits(trained(run, *sources))
    assert limits.lines == ()
    records = [record("network", "Port 4444 open")]
    assert limits.annotate(records) == {}
    assert records[0]["known_limits"] == []


def test_missing_records_are_reported(tmp_path):
    assert "no record of its training data" in known_limits(Trained(None)).lines[0]
    assert known_limits(trained(tmp_path, "s3://bucket/archive.tar.gz")).lines == (
        "The run has no evaluation by category: the accuracy of its severities is unknown.",
        "Its training data can't be read: titles of findings were not compared with them.",
    )


@pytest.mark.parametrize("content", ["", "[]", '{"tasks": {}}', '{"tasks": {"risk": {"columns": {}}}}'])
def test_an_evaluation_without_categories_gives_no_accuracy(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    assert category_accuracy(tmp_path) == {}


def test_the_titles_are_of_the_training_split_and_stored_once(tmp_path, monkeypatch):
    sources = write_shard(tmp_path / "data", [finding(n, title=f"{chr(97 + n % 26)}{n}") for n in range(200)])
    run = tmp_path / "run"
    run.mkdir()
    options = {"sources": sources, "val_fraction": 0.5, "test_fraction": 0.2, "seed": 0}
    first = training_titles(run, options)
    assert 20 < first.findings < 100
    assert set(first.categories) == {"processes", "network"}
    (tmp_path / "data" / "shard.json").unlink()
    assert training_titles(run, options) == first
    (run / FILE).write_text("{broken")
    assert training_titles(run, options) is None


def test_generated_training_titles_are_known_to_the_index(tmp_path):
    titles = training_titles(tmp_path, {"sources": [SOURCE]})
    assert titles.findings == 200
    index = TitleIndex(titles.titles)
    assert all(index.similarity(title) == 1.0 for title in titles.titles)
