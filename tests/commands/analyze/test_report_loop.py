"""``analyze`` with several reports: one model, all kinds of results, resumable after an interrupt and a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands.analyze import command
from lightning_modules.generation import response_cache
from tests.helpers.analysis_document import check_document
from tests.helpers.trained_run import REPORT, analyze_all, make_run, no_model_is_loaded, short, single_report


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama, chatml_tokenizer):
    return make_run(tmp_path_factory.mktemp("runs") / "version_0", tiny_llama, chatml_tokenizer)


def fleet(folder, count=4):
    """Writes reports of hosts whose findings differ; returns the folder."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        report = json.loads(json.dumps(REPORT))
        report["meta"]["hostname"] = f"host{number}"
        report["results"][2]["findings"][0]["title"] = f"TCP {4000 + number} listening"
        (folder / f"host{number}.json").write_text(json.dumps(report))
    return folder


def results_of(folder):
    return {path.name: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}


@pytest.fixture
def asked(monkeypatch):
    """Counts the questions that the model answers; ``stop`` is the number after which Ctrl-C is pressed."""

    class Asked(list):
        stop = None

    asked, answer = Asked(), response_cache.generate_requests

    def counted(model, chat, questions, *, on_answer, **options):
        def answered(index, written):
            asked.append(questions[index].task.name)
            if len(asked) == asked.stop:
                raise KeyboardInterrupt
            on_answer(index, written)

        return answer(model, chat, questions, on_answer=answered, **options)

    monkeypatch.setattr(response_cache, "generate_requests", counted)
    return asked


def test_several_reports_share_one_model_and_equal_answers(run, tmp_path, monkeypatch, asked, capsys):
    loads, build = [], command.build_generator
    monkeypatch.setattr(command, "build_generator", lambda *args: loads.append(1) or build(*args))
    few = ("--batch_size", "6")
    assert analyze_all(run, tmp_path / "out", fleet(tmp_path / "scans"), single_report(tmp_path), options=few) == 0
    documents = results_of(tmp_path / "out" / "scans")
    assert [document["raw_reference"]["file"] for document in documents.values()] == [
        f"scans/host{n}.json" for n in range(4)
    ]
    for document in documents.values():
        check_document(document)
    assert loads == [1]
    assert asked.count("risk") == 2 + 4 + 1  # two findings are the same on all hosts
    output = capsys.readouterr().out
    assert "5 reports, 15 findings" in output
    assert "answers reused" in output


def test_small_reports_share_batches(run, tmp_path, monkeypatch):
    batches, answer = [], response_cache.generate_requests

    def counted(model, chat, questions, **options):
        batches.append([question.task.name for question in questions])
        return answer(model, chat, questions, **options)

    monkeypatch.setattr(response_cache, "generate_requests", counted)
    assert analyze_all(run, tmp_path / "out", fleet(tmp_path / "scans"), options=("--batch_size", "6")) == 0
    # groups of two reports with three findings each; two findings of the second group were answered before
    assert [batch.count("risk") for batch in batches if "risk" in batch] == [4, 2]
    assert [batch.count("summary") for batch in batches if "summary" in batch] == [2, 2]


def test_the_result_of_a_report_is_the_same_alone_and_among_others(run, tmp_path):
    scans = fleet(tmp_path / "scans", 2)
    assert analyze_all(run, tmp_path / "out", scans) == 0
    assert analyze_all(run, tmp_path / "one.json", scans / "host1.json") == 0
    assert results_of(tmp_path / "out")["host1.json"] == json.loads((tmp_path / "one.json").read_text())


def test_after_ctrl_c_the_same_command_continues_with_the_reports_that_are_not_done(run, tmp_path, asked, capsys):
    scans = fleet(tmp_path / "scans")
    assert analyze_all(run, tmp_path / "whole", scans) == 0
    total, asked.stop = len(asked), len(asked) + 9
    few = ("--batch_size", "3")  # one report in each group
    assert analyze_all(run, tmp_path / "out", scans, options=few) == 130
    done = results_of(tmp_path / "out")
    assert 0 < len(done) < 4
    assert f"{len(done)} of 4 reports are done" in capsys.readouterr().out
    asked.stop = None
    assert analyze_all(run, tmp_path / "out", scans) == 0
    assert f"done before  {len(done)} reports" in capsys.readouterr().out
    assert results_of(tmp_path / "out") == results_of(tmp_path / "whole")
    assert len(asked) < 2 * total + 9


def test_a_command_whose_reports_are_done_loads_no_model(run, tmp_path, monkeypatch, asked):
    scans = fleet(tmp_path / "scans", 2)
    assert analyze_all(run, tmp_path / "out", scans) == 0
    count = len(asked)
    with monkeypatch.context() as patch:
        patch.setattr(command, "build_generator", no_model_is_loaded)
        assert analyze_all(run, tmp_path / "out", scans) == 0
    report = json.loads((scans / "host1.json").read_text())
    report["results"][0]["findings"].pop()
    (scans / "host1.json").write_text(json.dumps(report))
    assert analyze_all(run, tmp_path / "out", scans) == 0  # only the changed report is analysed
    assert len(results_of(tmp_path / "out")["host1.json"]["enriched_findings"]) == 2
    changed = len(asked) - count
    assert analyze_all(run, tmp_path / "out", scans, options=("--limit", "1")) == 0  # other settings: all reports
    assert {len(d["enriched_findings"]) for d in results_of(tmp_path / "out").values()} == {1}
    assert 0 < changed < count


def test_after_a_kill_the_same_command_completes_the_results(run, tmp_path):
    scans, out = fleet(tmp_path / "scans", 30), tmp_path / "out"
    options = ["--model", run, "--report", scans, "--output", out, *short("--actions", "1", "--correlations", "0")]
    program = [sys.executable, "main.py", "analyze", *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        program, cwd=Path(__file__).parents[3], env=environment, stdout=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 240
        while len(list(out.glob("*.json"))) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    done = results_of(out)  # each file that exists is whole
    assert 3 <= len(done) < 30
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert analyze_all(run, out, scans) == 0
    assert len(results_of(out)) == 30
    assert {path: path.stat().st_mtime_ns for path in before} == before  # none of them was analysed again
    assert not list(out.rglob("*.tmp"))


def test_reports_that_cannot_be_read_are_set_aside_and_counted(run, tmp_path, capsys):
    scans = fleet(tmp_path / "scans", 1)
    (scans / "broken.json").write_text('{"results": [')
    os.symlink("/dev/zero", scans / "endless.json")  # noqa: PTH211
    assert analyze_all(run, tmp_path / "out", scans, tmp_path / "missing.json") == 1
    aside = {Path(item["report"]).name: item["reason"] for item in results_of(tmp_path / "out")["set_aside.json"]}
    assert aside.pop("broken.json").startswith("not readable as JSON")
    assert aside == {"endless.json": "a device, not a regular file", "missing.json": "No such file or folder"}
    output = capsys.readouterr().out
    assert "set aside    3 reports" in output
    assert "endless.json: a device, not a regular file" in output
    assert analyze_all(run, tmp_path / "none", scans / "broken.json", scans / "endless.json") == 2
    assert "none of the 2 reports can be read" in capsys.readouterr().err


def test_json_lines_hold_one_document_per_report(run, tmp_path):
    assert analyze_all(run, tmp_path / "all.jsonl", fleet(tmp_path / "scans", 3)) == 0
    documents = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [document["raw_reference"]["file"] for document in documents] == ["host0.json", "host1.json", "host2.json"]
    for document in documents:
        check_document(document)
    assert sorted(path.name for path in tmp_path.glob("all.*")) == ["all.jsonl"]
