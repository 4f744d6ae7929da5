"""The CLI of fit, validate and test: checkpoints, run folders, and errors on one line."""

import functools
import json
import warnings

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from commands.cli import TRAINER_COMMANDS, FinetuneCLI, trainer_command
from commands.config_merge import DEFAULT_CONFIG
from datamodules.errors import UserError
from main import main
from tests.helpers.tiny_command import tiny_fit

CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32-true", "--trainer.callbacks=[]"]


@pytest.fixture
def started(monkeypatch):
    """Replaces the Trainer's methods by ones that record the checkpoint and the CLI's trainer."""
    calls = []
    for name in TRAINER_COMMANDS:
        # the CLI reads the options of a subcommand from the signature
        def record(trainer, *args, _name=name, ckpt_path=None, **kwargs):
            calls.append((_name, trainer, ckpt_path, kwargs))

        monkeypatch.setattr(Trainer, name, functools.wraps(getattr(Trainer, name))(record))
    return calls


def options(tmp_path, model, *more):
    return [
        *CPU, f"--model.init_args.backbone.model_name_or_path={model}",
        f"--trainer.logger.init_args.save_dir={tmp_path}", *more,
    ]  # fmt: skip


def write_checkpoint(tmp_path, version, name="last.ckpt", **content):
    file = tmp_path / "default" / f"version_{version}" / "checkpoints" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file)
    return file


def test_only_three_trainer_methods_are_subcommands():
    assert set(FinetuneCLI.subcommands()) == {"fit", "validate", "test"}


def test_model_and_data_have_the_same_tokenizer(tmp_path, tiny_llama):
    cli = FinetuneCLI(options(tmp_path, tiny_llama), run=False)
    assert cli.datamodule.document_processor.tokenizer == str(tiny_llama)


def test_a_resumed_fit_writes_into_the_run_folder_of_its_checkpoint(tmp_path, tiny_llama, started):
    write_checkpoint(tmp_path, 0)
    file = write_checkpoint(tmp_path, 3)
    FinetuneCLI(["fit", *options(tmp_path, tiny_llama, "--ckpt_path=last")])
    [(name, trainer, checkpoint, kwargs)] = started
    assert (name, checkpoint, kwargs["weights_only"]) == ("fit", str(file), True)
    assert trainer.logger.log_dir == str(tmp_path / "default" / "version_3")


def test_a_checkpoint_of_another_folder_starts_a_new_run(tmp_path, tiny_llama, started):
    file = write_checkpoint(tmp_path / "elsewhere", 3)
    FinetuneCLI(["fit", *options(tmp_path, tiny_llama, f"--ckpt_path={file}")])
    assert started[0][2] == str(file)
    assert started[0][1].logger.log_dir == str(tmp_path / "default" / "version_0")


def test_validate_uses_the_best_checkpoint_of_the_newest_run(tmp_path, tiny_llama, started, capsys):
    write_checkpoint(tmp_path, 1)
    best = write_checkpoint(tmp_path, 1, "best.ckpt")
    FinetuneCLI(["validate", *options(tmp_path, tiny_llama)])
    assert started[0][2] == str(best)
    assert f"validate: the newest run's checkpoint {best}" in capsys.readouterr().out


def test_validate_prints_that_the_newest_run_has_no_checkpoint(tmp_path, tiny_llama, started, capsys):
    file = write_checkpoint(tmp_path, 1)
    newest = tmp_path / "default" / "version_2"
    (newest / "checkpoints").mkdir(parents=True)
    FinetuneCLI(["validate", *options(tmp_path, tiny_llama)])
    assert started[0][2] == str(file)
    text = f"an older run's checkpoint {file}: the newest run {newest} has none"
    assert capsys.readouterr().out.splitlines() == [f"validate: {text}", f"validate: evaluated {text}"]


def test_without_a_run_the_untuned_model_is_evaluated(tmp_path, tiny_llama, started, capsys):
    FinetuneCLI(["test", *options(tmp_path, tiny_llama)])
    assert started[0][2] is None
    assert f"test: the untuned model: no run below {tmp_path / 'default'}" in capsys.readouterr().out


REMOTE = "tests.helpers.remote_logger.RemoteLogger"
FILES = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: FOLDER, name: default}}"
LOGGERS = {
    "no logger": ["--trainer.logger=false"],
    "a logger without a folder": [f"--trainer.logger={REMOTE}"],
    "several loggers": [f"--trainer.logger=[{{class_path: {REMOTE}}}, {FILES}]"],
    "CSV": [f"--trainer.logger={FILES}"],
    "TensorBoard": ["--trainer.logger.init_args.save_dir=FOLDER"],
}


@pytest.mark.parametrize("logger", LOGGERS.values(), ids=LOGGERS.keys())
def test_a_run_is_found_whatever_logger_wrote_it(tmp_path, tiny_llama, monkeypatch, capsys, logger):
    config = yaml.safe_load(DEFAULT_CONFIG.read_text())
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    monkeypatch.setattr("commands.cli.DEFAULT_CONFIG", tmp_path / "default.yaml")
    (tmp_path / "default.yaml").write_text(yaml.safe_dump(config))
    logger = [option.replace("FOLDER", str(tmp_path)) for option in logger]
    args = [option for option in tiny_fit(tiny_llama, tmp_path) if "trainer.logger" not in option]
    run = tmp_path / "default" / "version_0"
    monkeypatch.chdir(tmp_path)
    assert main([*args, *logger]) == 0
    assert all((run / name).exists() for name in ("config.yaml", "run.json", "checkpoints/last.ckpt"))
    assert main([*args, *logger, "--trainer.max_steps=3", "--ckpt_path=last"]) == 0
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    capsys.readouterr()
    assert main(["validate", *args[1:], "--data.init_args.val_fraction=0.3"]) == 0  # with the logger of the config
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"validate: the newest run's checkpoint {run}/checkpoints/")
    assert printed[-1].startswith(f"validate: evaluated the newest run's checkpoint {run}/checkpoints/")
    assert main([*args, *logger]) == 0  # a second run does not write into the first one
    assert (tmp_path / "default" / "version_1" / "config.yaml").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["default", "default.yaml"]


def test_validate_prints_first_and_last_that_no_run_exists(tmp_path, tiny_llama, capsys):
    args = ["validate", *tiny_fit(tiny_llama, tmp_path, "--data.init_args.val_fraction=0.3")[1:]]
    assert main(args) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"validate: the untuned model: no run below {tmp_path / 'default'}"
    assert printed[-1] == f"validate: evaluated the untuned model: no run below {tmp_path / 'default'}"
    assert main(tiny_fit(tiny_llama, tmp_path, "--ckpt_path=last")) == 2  # the evaluation left no run


def test_a_requeued_slurm_job_resumes_its_own_run(tmp_path, tiny_llama, started, monkeypatch, capsys):
    for version, job, state in ((0, "71", "interrupted"), (1, "72", "interrupted"), (2, "73", "finished")):
        run = write_checkpoint(tmp_path, version).parents[1]
        (run / "run.json").write_text(json.dumps({"slurm_job": job, "state": state}))
    (tmp_path / "hpc_ckpt_1.ckpt").touch()  # of an earlier job in this folder
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")  # Lightning then starts no SLURM environment
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    file = tmp_path / "default" / "version_0" / "checkpoints" / "last.ckpt"
    FinetuneCLI(["fit", *options(tmp_path, tiny_llama)])
    assert started[0][2] == str(file)
    assert started[0][1].default_root_dir == str(tmp_path / "default" / "version_0")
    assert f"fit: SLURM requeued the job; it resumes from {file}" in capsys.readouterr().out
    for job, restarts in (("71", "0"), ("73", "1"), ("74", "1")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        FinetuneCLI(["fit", *options(tmp_path, tiny_llama)])
        assert started[-1][2] is None
        assert started[-1][1].default_root_dir != str(tmp_path)  # where Lightning looks for hpc_ckpt_*.ckpt


def test_the_hyperparameters_of_a_checkpoint_do_not_change_the_config(tmp_path, tiny_llama, started):
    """Fails without the override of ``_parse_ckpt_path``: Lightning would merge them, here an unknown argument."""
    stored = {"_class_path": "lightning_modules.CausalLMModule", "_instantiator": "x", "no_such_argument": 1}
    write_checkpoint(tmp_path, 0, hyper_parameters=stored)
    FinetuneCLI(["fit", *options(tmp_path, tiny_llama, "--ckpt_path=last")])
    file = str(tmp_path / "default/version_0/checkpoints/last.ckpt")
    FinetuneCLI(["fit", *options(tmp_path, tiny_llama, f"--ckpt_path={file}")])
    assert len(started) == 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--trainer.max_stepz=3", "max_stepz"),
        ("--trainer.max_epochs=-5", "max_epochs"),
        ("--model.init_args.optimizer.class_path=optimizers.Lyon", "Lyon"),
        ("--trainer.strategy=no_such_strategy", "no_such_strategy"),
    ],
)
def test_an_invalid_config_is_a_user_error_on_one_line(tmp_path, tiny_llama, option, message):
    with pytest.raises(UserError, match=message) as caught:
        FinetuneCLI(options(tmp_path, tiny_llama, option), run=False)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 600


def test_irrelevant_warnings_are_ignored_and_others_are_not(tmp_path, tiny_llama, started):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_command(["fit", *options(tmp_path, tiny_llama)])
        caught.clear()
        warnings.warn("The 'train_dataloader' does not have many workers", stacklevel=1)
        warnings.warn("A warning about the data", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["A warning about the data"]
