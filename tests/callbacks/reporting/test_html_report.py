"""The run report: everything the run left is in one file that loads nothing, and text of findings stays text."""

import json
from html.parser import HTMLParser

import pytest

from callbacks import RunRecord
from callbacks.reporting.html_report import write_report
from callbacks.reporting.training_curves import read_scalars
from commands import report as command
from datamodules.errors import UserError
from datamodules.tasks.base import Pair, compact_json
from lightning_modules.evaluation.evaluate import PredictionResult
from lightning_modules.evaluation.results import TaskResults, read_results, scores_of, write_results
from tests.callbacks.test_evaluation import make_pair, short_task
from tests.helpers.tiny_run import TinyData, TinyModule, best_and_last, make_trainer


class Page(HTMLParser):
    """Tags with attributes, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data.strip())


def exam_of(pairs, wrong):
    exam = TaskResults(short_task(), "val", pairs, input_determined={"network"})
    exam.add("majority class", [PredictionResult(pairs[0].completion)] * len(pairs), baseline=True)
    exam.add("tuned", [PredictionResult(pair.completion, nll=1.0, tokens=4) for pair in pairs])
    exam.add("untuned", [PredictionResult(wrong, False, nll=9.0, tokens=4) for _ in pairs])
    exam.about["tuned"] = {"step": 12, "checkpoint": "best.ckpt"}
    return exam


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished tiny run with an evaluation of hostile findings."""
    folder = tmp_path_factory.mktemp("runs")
    make_trainer(folder, [RunRecord(), best_and_last()], val_check_interval=4).fit(TinyModule(), TinyData())
    run = folder / "version_0"
    (run / "config.yaml").write_text("data:\n  sources: [s3://me:pw1@host/x]\n  secret_key: pw2\n  tokenizer: bytes\n")
    hostile = '{"title":"<script>alert(1)</script>","x":"\x1b[31m"}'
    pairs = [make_pair(i) for i in range(4)] + [Pair("risk", hostile, make_pair(1).completion, "low", "ioc", 1)]
    write_results(run / "evaluation.json", [exam_of(pairs, "<img src=http://evil/x> no JSON")], step=12)
    return run


def test_report_holds_run_curves_tables_pictures_and_samples(run):
    page = Page(write_report(run).read_text(encoding="utf-8"))
    expected = ["What ran", "finished at step 12", "Curves", "risk: 5 held-out questions", "best step 12", "100%"]
    expected += ["held-out loss per token", "Severity accuracy by category", "Samples", "no JSON"]
    assert [text for text in expected if text not in page.text] == []
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert {image["alt"] for image in images} >= {"loss", "confusion", "error_by_category"}
    classes = [attributes.get("class") for tag, attributes in page.tags if tag == "pre"]
    assert "ok" in classes  # the tuned answers are the expected ones
    assert "off" in classes


def test_report_loads_nothing_and_says_no_secret(run):
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


def test_fit_writes_it_and_the_command_writes_it_again(run, capsys):
    (run / "report.html").unlink(missing_ok=True)
    assert command.main(["report", "--run", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").is_file()
    with pytest.raises(UserError, match=r"no run\.json"):
        command.main(["report", "--run", str(run / "checkpoints")])
    with pytest.raises(UserError, match="--help"):
        command.main(["report", "--walk", "x"])


def test_a_run_without_evaluation_or_events_has_a_report_too(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"state": "finished", "step": 3}))
    assert "finished at step 3" in write_report(tmp_path).read_text(encoding="utf-8")


def test_scalars_are_those_that_were_logged(run):
    scalars = read_scalars(run)
    assert [step for step, _ in scalars["train/loss"]] == list(range(12))
    assert len(scalars["val/loss"]) == 3


def test_scores_survive_being_written(tmp_path):
    pairs = [make_pair(i) for i in range(3)]
    exam = exam_of(pairs, compact_json({"severity": "low"}))
    write_results(tmp_path / "e.json", [exam], step=1)
    record = read_results(tmp_path / "e.json")["risk"]
    again = scores_of(record["columns"]["untuned"])
    before = exam.columns["untuned"]
    assert str(again.figures) == str(before.figures)  # NaN is NaN
    assert str(again.groups) == str(before.groups)
    assert again.outcomes == exam.columns["untuned"].outcomes
    other = TaskResults(short_task(), "val", pairs, input_determined={"network"})
    other.remember(record, "untuned")
    assert str(other.columns["untuned"].figures) == str(before.figures)
    assert read_results(tmp_path / "none.json") == {}
