"""The run folder of a fit: new and failed starts, resumed runs, and records of earlier starts."""

import json
import shutil

import pytest
import torch
import yaml

from commands.cli import FinetuneCLI
from main import main
from tests.helpers.tiny_command import error_line, tiny_fit


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def fitted(tiny_llama, tmp_path):
    """Runs a fit of two steps; returns the folder of runs."""
    assert main(tiny_fit(tiny_llama, tmp_path)) == 0
    return tmp_path / "default"


def test_a_resumed_run_keeps_the_config_of_its_earlier_start(fitted, tiny_llama, tmp_path):
    first = (fitted / "version_0" / "config.yaml").read_text()
    assert main(tiny_fit(tiny_llama, tmp_path, "--ckpt_path=last", steps=3)) == 0
    assert names(fitted) == ["version_0"]
    assert (fitted / "version_0" / "config-1.yaml").read_text() == first
    now = yaml.safe_load((fitted / "version_0" / "config.yaml").read_text())
    assert now["trainer"]["max_steps"] == 3
    assert now["ckpt_path"] is None and now["trainer"]["default_root_dir"] is None  # the config starts a new run
    record = json.loads((fitted / "version_0" / "run.json").read_text())
    assert [start["step"] for start in record["previous"]] == [2] and record["step"] == 3


def test_an_evaluation_does_not_change_the_config_of_the_run(fitted, tiny_llama, tmp_path, capsys):
    before = (fitted / "version_0" / "config.yaml").read_bytes()
    args = ["validate", *tiny_fit(tiny_llama, tmp_path, "--data.init_args.val_fraction=0.3")[1:]]
    assert main(args) == 0
    assert (fitted / "version_0" / "config.yaml").read_bytes() == before
    assert names(fitted) == ["version_0"]


def test_last_is_refused_if_the_newest_run_has_no_checkpoint(fitted, tiny_llama, tmp_path, capsys):
    before = {path: path.read_bytes() for path in fitted.rglob("*") if path.is_file()}
    killed = fitted / "version_1"
    killed.mkdir()
    (killed / "config.yaml").write_text("seed_everything: 0\n")
    assert main(tiny_fit(tiny_llama, tmp_path, "--ckpt_path=last", steps=3)) == 2
    assert error_line(capsys) == (
        f"error: --ckpt_path last: the newest run {killed} was stopped before its first checkpoint. Fix: leave the "
        f"option out to start a new run, or continue an older run with --ckpt_path "
        f"{fitted}/version_0/checkpoints/last.ckpt"
    )
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("moved", [False, True], ids=["same folder", "moved folder"])
def test_resumes_leave_one_last_checkpoint_and_it_is_the_newest(fitted, tiny_llama, tmp_path, moved):
    folder = tmp_path
    for steps in (3, 4):
        if moved:
            folder = tmp_path / str(steps)
            folder.mkdir()
            fitted = shutil.move(fitted, folder / "default")
        checkpoints = fitted / "version_0" / "checkpoints"
        assert main(tiny_fit(tiny_llama, folder, "--ckpt_path=last", steps=steps)) == 0
        assert [name for name in names(checkpoints) if name.startswith("last")] == ["last.ckpt"]
        assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == steps


def test_a_resume_from_another_file_of_the_run_replaces_last(fitted, tiny_llama, tmp_path):
    checkpoints = fitted / "version_0" / "checkpoints"
    shutil.copy(checkpoints / "last.ckpt", checkpoints / "kept.ckpt")
    state = torch.load(checkpoints / "kept.ckpt", weights_only=True)
    for callback in state["callbacks"].values():
        callback.update({"last_model_path": ""} if "last_model_path" in callback else {})
    torch.save(state, checkpoints / "kept.ckpt")
    assert main(tiny_fit(tiny_llama, tmp_path, f"--ckpt_path={checkpoints / 'kept.ckpt'}", steps=3)) == 0
    assert [name for name in names(checkpoints) if name.startswith("last")] == ["last.ckpt"]
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 3


def test_csv_metrics_of_an_earlier_start_are_kept(tiny_llama, tmp_path):
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    options = [*logger, "--trainer.logger.init_args.name=csv"]
    args = [argument for argument in tiny_fit(tiny_llama, tmp_path) if "trainer.logger" not in argument]
    assert main([*args, *options]) == 0
    first = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    assert main([*args, *options, "--ckpt_path=last", "--trainer.max_steps=4"]) == 0
    assert (tmp_path / "csv" / "version_0" / "metrics-1.csv").read_text() == first
    assert names(tmp_path / "csv") == ["version_0"]


FAILURES = {
    "in setup": "--data.init_args.sequence_length=64",
    "in the data": "--data.init_args.sources=['synthetic://?findings=1&seed=1']",
}


@pytest.mark.parametrize("option", FAILURES.values(), ids=FAILURES.keys())
def test_a_start_that_fails_before_its_first_step_leaves_no_folder(tiny_llama, tmp_path, option, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(tiny_fit(tiny_llama, tmp_path, option, "--data.init_args.batch_size=64")) == 2
    assert error_line(capsys)
    assert names(tmp_path / "default") == []
    assert names(tmp_path) in ([], ["default"])


def test_a_failed_resume_changes_nothing_of_the_run(fitted, tiny_llama, tmp_path, capsys):
    before = {path: path.read_bytes() for path in fitted.rglob("*") if path.suffix in (".yaml", ".json", ".ckpt")}
    args = tiny_fit(tiny_llama, tmp_path, "--ckpt_path=last", "--model.init_args.backbone.lora.rank=8", steps=3)
    assert main(args) == 2
    assert {path: path.read_bytes() for path in before} == before


def test_a_trial_run_writes_nothing(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(tiny_fit(tiny_llama, tmp_path, "--trainer.fast_dev_run=true")) == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_two_starts_at_the_same_time_do_not_share_a_folder(fitted, tiny_llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("commands.cli.new_run", lambda root: root / "version_1")
    instantiate = FinetuneCLI.instantiate_classes

    def other_fit_is_faster(cli):
        instantiate(cli)
        (fitted / "version_1").mkdir()

    monkeypatch.setattr(FinetuneCLI, "instantiate_classes", other_fit_is_faster)
    assert main(tiny_fit(tiny_llama, tmp_path)) == 2
    assert f"another fit that started at the same time has the run folder {fitted}/version_1" in error_line(capsys)
    assert (fitted / "version_1").is_dir()  # it belongs to the other fit


def test_the_settings_that_run_are_recorded_and_printed(fitted, tiny_llama, tmp_path, capsys, caplog):
    with caplog.at_level("INFO"):
        rate = "--model.init_args.optimizer.init_args.lr=1e-5"
        assert main(tiny_fit(tiny_llama, tmp_path, "--ckpt_path=last", rate, steps=4)) == 0
    run = fitted / "version_0"
    record = json.loads((run / "run.json").read_text())
    assert record["changed_since_checkpoint"] == ["optimizer.lr 0.001 -> 1e-05"]
    assert record["resumed_from"] == str(run / "checkpoints" / "last.ckpt")
    assert (
        "resume: the configuration replaces settings of the checkpoint: optimizer.lr 0.001 -> 1e-05" in caplog.messages
    )
    assert "resume: trainer.max_steps 2 -> 4; config-1.yaml has the earlier configuration" in caplog.messages
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 1e-5
    assert (
        yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-5
    )


def test_another_optimizer_is_refused_in_one_line(fitted, tiny_llama, tmp_path, capsys):
    lion = "--model.init_args.optimizer=optimizers.Lion"
    assert main(tiny_fit(tiny_llama, tmp_path, "--ckpt_path=last", lion, steps=4)) == 2
    assert "the checkpoint holds the state of torch.optim.AdamW" in error_line(capsys)
