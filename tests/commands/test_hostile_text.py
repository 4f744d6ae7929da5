"""Hostile text in the data of a fit, in its file names and in the files of a run stays text in every output."""

import json
import os
import re
from html.parser import HTMLParser

import pytest
import yaml
from markdown import markdown as render_markdown
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from main import main
from tests.helpers.findings_data import finding
from tests.helpers.hostile_text import HOSTILE_TEXTS

#: control characters of a terminal except a line break, and the colours that rich and libraries write
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]")
RUN_OPTIONS = [
    "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.init_args.val_fraction=0.4",
    "--data.init_args.sequence_length=2048", "--model.init_args.backbone.lora.num_top_layers=1",
    "--data.init_args.max_quarantine=0.9",
]  # fmt: skip


class Tags(HTMLParser):
    """Collects the tags of a page with their attributes."""

    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def assert_safe_html(page):
    for tag, attributes in Tags(page).tags:
        assert tag not in ("script", "a", "iframe", "object", "form")
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "img" or attributes["src"].startswith("data:image/png;base64,")


def assert_safe_markdown(text):
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    page = render_markdown(body, extensions=["tables", "fenced_code"])
    assert not {"a", "img", "script"} & {tag for tag, _ in Tags(page).tags}


def hostile_document():
    """JSON of findings whose category, title and metadata are hostile; escapes of Python's json hold the surrogate."""
    findings = [
        finding(10 * index + number, category=text, title=f"{text} {number}", metadata={text: text, "n": number})
        for index, text in enumerate(HOSTILE_TEXTS.values())
        for number in range(4)
    ]
    return json.dumps({"metadata": {}, "data": {"version": "1", "findings": findings, "correlations": []}})


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory, tiny_llama):
    """A fit on hostile findings in files with hostile names: (exit status, run folder, folder)."""
    folder = tmp_path_factory.mktemp("hostile")
    data = folder / "data"
    data.mkdir()
    names = [b"not-utf8-\xff\xfe.json", b"[bold] \x1b[31m.json", b"$x^2$ <b>.json"]
    for name in names:
        (data / os.fsdecode(name)).write_text(hostile_document())
    (data / os.fsdecode(b"broken-\xff-[red].json")).write_bytes(
        b'{"findings": [1, "\xff\xfe", {"severity": "[/bold]"}]}'
    )
    callbacks = [
        {"class_path": "callbacks.RunRecord"}, {"class_path": "callbacks.AdapterCheckpoint"},
        {"class_path": "callbacks.Evaluation",
         "init_args": {"num_samples": 60, "max_new_tokens": 2, "num_printed": 10, "baseline_train_size": 50}},
        {"class_path": "callbacks.ConsoleProgress"},
    ]  # fmt: skip
    args = [
        "fit", *RUN_OPTIONS, f"--model.init_args.backbone.model_name_or_path={tiny_llama}",
        f"--trainer.logger.init_args.save_dir={folder / 'runs'}", f"--trainer.callbacks={json.dumps(callbacks)}",
        f"--data.init_args.sources=['{data}']", f"--data.init_args.cache_dir={folder / 'cache'}",
        f"--data.init_args.quarantine_path={folder / 'quarantine.jsonl'}", "--data.init_args.balance_by=both",
    ]  # fmt: skip
    return args, folder / "runs" / "default" / "version_0", folder


def test_a_fit_on_hostile_findings_ends_and_its_outputs_are_text(hostile_run, capfd):
    args, run, folder = hostile_run
    assert main(args) == 0
    output = "".join(capfd.readouterr())
    assert "[/bold]" in output  # a row of the table of categories
    assert not CONTROL.search(output)
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    lines = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any("broken-" in line["member"] for line in lines)
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert "[/bold]" in evaluation["tasks"]["risk"]["columns"]["tuned"]["groups"]["category"]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "[/bold]" in page
    assert_safe_html(page)
    events = EventAccumulator(str(run), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    samples = [tag for tag in events.Tags()["tensors"] if tag.endswith("/samples/text_summary")]
    assert samples
    for tag in samples:
        assert_safe_markdown(events.Tensors(tag)[-1].tensor_proto.string_val[0].decode())
    assert any(tag.endswith("error_by_category") for tag in events.Tags()["images"])


def test_inspect_and_export_of_hostile_findings(hostile_run, capfd, tmp_path):
    args, run, _ = hostile_run
    if not (run / "run.json").is_file():
        assert main(args) == 0
    config = [word for word in args[1:] if "trainer.callbacks" not in word]
    capfd.readouterr()
    assert main(["inspect", *config]) == 0
    output = capfd.readouterr().out
    assert "[/bold]" in output
    assert not CONTROL.search(output)
    assert main(["export", "--run", str(run), "--output", str(tmp_path / "adapter"), "--num_reference", "0"]) == 0
    assert not CONTROL.search("".join(capfd.readouterr()))


def column(heading_text):
    """A column of an evaluation whose every text is hostile."""
    figures = {"severity_accuracy": 0.5, "answers": 2.0}
    outcome = {"text": heading_text, "complete": True, "nll": 1.0, "tokens": 3, "prompt_tokens_cut": 0,
               "forced_severity": heading_text}  # fmt: skip
    return {
        "figures": figures, "intervals": {}, "confusion": None, "reliability": [],
        "groups": {"category": {heading_text: figures, "other": figures}, "severity": {}}, "outcomes": [outcome],
        "about": {"step": heading_text, "checkpoint": heading_text}, "seconds": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS)
def test_a_tampered_run_is_text_in_its_report_and_model_card(hostile_run, tmp_path, text, capfd, tiny_llama):
    args, run, _ = hostile_run
    if not (run / "run.json").is_file():
        assert main(args) == 0
    forged = tmp_path / "version_0"
    forged.mkdir()
    (forged / "adapter").symlink_to(run / "adapter")
    record = {
        "split": text, "n": text, "digest": text, "baselines": [text], "input_determined_categories": [text],
        "columns": {text: column(text), "x": column(text)},
        "questions": [{"content": text, "expected": json.dumps({text: text}), "severity": text, "category": text}],
    }  # fmt: skip
    (forged / "evaluation.json").write_text(json.dumps({"tasks": {text: record, "risk": record}}))
    facts = ("state", "step", "started", "ended", "command", "data", "python", "platform")
    (forged / "run.json").write_text(
        json.dumps(dict.fromkeys(facts, text) | {"git": {"commit": text}, "devices": [text], "packages": {text: text}})
    )
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["init_args"] |= {"sources": [text], "severity_balance": text}
    config["trainer"]["precision"] = text
    (forged / "config.yaml").write_text(json.dumps(config))
    assert main(["report", "--run", str(forged)]) == 0
    assert_safe_html((forged / "report.html").read_text(encoding="utf-8"))
    assert main(["export", "--run", str(forged), "--output", str(tmp_path / "out"), "--num_reference", "0"]) == 0
    assert_safe_markdown((tmp_path / "out" / "README.md").read_text(encoding="utf-8"))
    json.loads((tmp_path / "out" / "certificate.json").read_text(encoding="utf-8"))
    assert not CONTROL.search("".join(capfd.readouterr()))


@pytest.mark.parametrize(
    "tasks", [{"risk": {"columns": {"a": {}}}}, {"risk": []}, {"risk": {"columns": []}}, {"risk": None}, [1]]
)
def test_a_damaged_evaluation_is_named_in_the_report(tmp_path, tasks):
    (tmp_path / "evaluation.json").write_text(json.dumps({"tasks": tasks}))
    (tmp_path / "run.json").write_text('{"packages": [], "devices": 3}')
    assert main(["report", "--run", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "run.json: damaged" in page
    assert_safe_html(page)


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS)
def test_an_error_message_is_one_line_of_text(text, capfd):
    assert main([text]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert not CONTROL.search(error)
