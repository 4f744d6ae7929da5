"""Tests of RunRecord: run.json of finished, failed and resumed runs, the summary, git and device names."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from callbacks import AdapterCheckpoint, RunRecord
from callbacks.run_record import device_names, format_summary, git_state
from tests.helpers.tiny_run import TinyData, TinyModule, best_and_last, make_trainer


def fit(folder, module=None, callbacks=(), **options):
    trainer = make_trainer(folder, [RunRecord(), AdapterCheckpoint(), *callbacks], **options)
    trainer.fit(module or TinyModule(), TinyData(), ckpt_path=options.pop("ckpt_path", None))
    return json.loads((folder / "version_0/run.json").read_text())


def test_a_finished_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "fit", "--data.sources", "s3://me:secret@host/a b.tar"])
    monkeypatch.setattr(TinyData, "counts", {"records": 12, "duplicates": 2}, raising=False)
    record = fit(tmp_path, callbacks=[best_and_last()])
    assert record["state"] == "finished" and record["step"] == 12 and record["previous"] == []
    assert "fit" in record["command"] and "secret" not in record["command"] and "***@host/a b" in record["command"]
    assert record["config"] == "config.yaml" and record["data"] == "12-3"
    assert record["packages"]["torch"] == torch.__version__
    assert record["started"] <= record["ended"]
    assert set(record["metrics"]) >= {"train/loss", "val/loss"}
    assert record["counts"] == {"records": 12, "duplicates": 2}
    assert record["devices"] and record["python"] and record["platform"]
    summary = capsys.readouterr().out
    run = tmp_path / "version_0"
    assert f"finished at step 12: {run}" in summary
    assert f"adapter   {run}/adapter/best" in summary
    assert f"validate --config {run}/config.yaml --ckpt_path {run}" in summary
    assert f"analyze --model {run} --report" in summary
    assert f"export --run {run} --output" in summary
    assert "  resume  " not in summary


def test_the_state_is_running_during_the_fit(tmp_path):
    seen = []
    file = tmp_path / "version_0/run.json"
    fit(tmp_path, TinyModule(lambda stage, index: seen.append(json.loads(file.read_text())["state"])))
    assert set(seen) == {"running"}
    assert {path.name for path in file.parent.iterdir() if "json" in path.name} == {"run.json"}


def test_a_failed_run_records_its_error_and_the_next_run_keeps_the_record(tmp_path, capsys):
    def fail(stage, index):
        if index == 3:
            raise RuntimeError("broken at three")

    with pytest.raises(RuntimeError, match="broken at three"):
        fit(tmp_path, TinyModule(fail))
    record = json.loads((tmp_path / "version_0/run.json").read_text())
    assert record["state"] == "failed" and record["step"] == 3
    assert record["error"] == "RuntimeError: broken at three"
    assert "failed" not in capsys.readouterr().out
    record = fit(tmp_path)
    assert record["state"] == "finished" and [run["state"] for run in record["previous"]] == ["failed"]
    record = fit(tmp_path)
    assert [run["state"] for run in record["previous"]] == ["failed", "finished"]
    assert all("previous" not in run for run in record["previous"])


def test_a_run_resumed_after_its_last_step_records_the_step(tmp_path, capsys):
    fit(tmp_path, callbacks=[best_and_last()])
    (last,) = tmp_path.rglob("last.ckpt")
    make_trainer(tmp_path, [RunRecord()]).fit(TinyModule(), TinyData(), ckpt_path=last)
    record = json.loads((tmp_path / "version_0/run.json").read_text())
    assert record["state"] == "finished" and record["step"] == 12
    assert capsys.readouterr().out.count("finished at step 12") == 2


def test_a_damaged_earlier_record_is_ignored(tmp_path):
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0/run.json").write_text("{")
    assert fit(tmp_path)["previous"] == []


def test_validate_and_a_trial_run_write_no_record(tmp_path):
    make_trainer(tmp_path, [RunRecord()]).validate(TinyModule(), TinyData())
    trainer = make_trainer(tmp_path, [RunRecord()], fast_dev_run=True, default_root_dir=tmp_path)
    trainer.fit(TinyModule(), TinyData())
    assert not list(tmp_path.rglob("run.json*"))


def test_the_summary_of_an_interrupted_run_has_the_command_that_resumes_it(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").touch()
    summary = format_summary(tmp_path, tmp_path / "checkpoints", "config.yaml", {"state": "interrupted", "step": 7})
    assert summary.startswith(f"interrupted at step 7: {tmp_path}\n")
    assert (
        f"  resume    python main.py fit --config {tmp_path}/config.yaml --ckpt_path {tmp_path}/checkpoints/last.ckpt"
        in summary
    )
    assert "adapter  " not in summary


def test_git_state(tmp_path):
    git = shutil.which("git")
    if git is None:
        pytest.skip("needs git")
    assert git_state(tmp_path) is None

    def run(*command):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run([git, *identity, *command], cwd=tmp_path, check=True, capture_output=True)

    run("init")
    (tmp_path / "file").write_text("one")
    run("add", "file")
    run("commit", "-m", "one")
    state = git_state(tmp_path)
    assert len(state["commit"]) >= 40 and state["dirty"] is False
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path) == {"commit": state["commit"], "dirty": True}


def test_device_names():
    assert "cores" in device_names(torch.device("cpu"), 1)[0]
    assert device_names(torch.device("meta"), 2) == ["meta", "meta"]
