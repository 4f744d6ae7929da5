"""Tests of the HTML report: one self-contained file with the run's results, in which text of findings is escaped."""

import json
from html.parser import HTMLParser

import pytest

from callbacks import RunRecord
from callbacks.reporting.html_report import write_report
from callbacks.reporting.training_curves import read_scalars
from commands import report as command
from datamodules.errors import UserError
from datamodules.tasks.base import Pair, compact_json
from lightning_modules.evaluation.results import TaskResults, read_results, scores_of, write_results
from tests.helpers.tiny_evaluation import make_pair, short_task, task_results
from tests.helpers.tiny_run import TinyData, TinyModule, best_and_last, make_trainer


class Page(HTMLParser):
    """Parses a page into its tags with attributes and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data.strip())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Directory of a finished tiny run with an evaluation that contains a hostile finding."""
    folder = tmp_path_factory.mktemp("runs")
    make_trainer(folder, [RunRecord(), best_and_last()], val_check_interval=4).fit(TinyModule(), TinyData())
    run = folder / "version_0"
    (run / "config.yaml").write_text("data:\n  sources: [s3://me:pw1@host/x]\n  secret_key: pw2\n  tokenizer: bytes\n")
    hostile = '{"title":"<script>alert(1)</script>","x":"\x1b[31m"}'
    pairs = [make_pair(i) for i in range(4)] + [Pair("risk", hostile, make_pair(1).completion, "low", "ioc", 1)]
    write_results(run / "evaluation.json", [task_results(pairs, "<img src=http://evil/x> not JSON")], step=12)
    return run


def test_report_contains_run_curves_tables_images_and_samples(run):
    page = Page(write_report(run).read_text(encoding="utf-8"))
    expected = ["Run", "finished at step 12", "Curves", "risk: 5 held-out questions", "best step 12", "100%"]
    expected += ["held-out loss per token", "Severity accuracy by category", "Samples", "not JSON"]
    assert [text for text in expected if text not in page.text] == []
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert {image["alt"] for image in images} >= {"loss", "confusion", "error_by_category"}
    classes = [attributes.get("class") for tag, attributes in page.tags if tag == "pre"]
    assert "ok" in classes  # the tuned model gives the expected answers
    assert "off" in classes


def test_report_loads_no_resources_and_contains_no_secrets(run):
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "a")]
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script>alert(1)</script>" in page.text  # as text
    assert "\x1b" not in text
    assert "pw1" not in text
    assert "pw2" not in text
    assert "tokenizer: bytes" in page.text


def test_command_writes_the_report_again(run, capsys):
    assert (run / "report.html").is_file()  # written at the end of the fit
    (run / "report.html").unlink()
    assert command.main(["report", "--run", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").is_file()
    with pytest.raises(UserError, match=r"no run\.json"):
        command.main(["report", "--run", str(run / "checkpoints")])
    with pytest.raises(UserError, match="--help"):
        command.main(["report", "--walk", "x"])


def test_a_run_without_evaluation_and_events_has_a_report(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"state": "finished", "step": 3}))
    assert "finished at step 3" in write_report(tmp_path).read_text(encoding="utf-8")


def test_scalars_are_the_logged_values(run):
    scalars = read_scalars(run)
    assert [step for step, _ in scalars["train/loss"]] == list(range(12))
    assert len(scalars["val/loss"]) == 3


def test_scores_are_equal_after_writing_and_reading(tmp_path):
    pairs = [make_pair(i) for i in range(3)]
    results = task_results(pairs, compact_json({"severity": "low"}))
    write_results(tmp_path / "e.json", [results], step=1)
    record = read_results(tmp_path / "e.json")["risk"]
    again = scores_of(record["columns"]["untuned"])
    before = results.columns["untuned"]
    assert str(again.figures) == str(before.figures)  # as text, because NaN != NaN
    assert str(again.groups) == str(before.groups)
    assert again.outcomes == before.outcomes
    other = TaskResults(short_task(), "val", pairs, input_determined={"network"})
    other.load_column(record, "untuned")
    assert str(other.columns["untuned"].figures) == str(before.figures)
    assert read_results(tmp_path / "none.json") == {}


def test_an_error_while_writing_keeps_the_previous_report(run, monkeypatch):
    before = write_report(run).read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("datamodules.files.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert [file.name for file in run.glob("report.html*")] == ["report.html"]
