"""The CLI of fit, validate and test: checkpoints, run folders, and errors on one line."""

import functools
import warnings

import pytest
import torch
from lightning.pytorch import Trainer

from commands.cli import TRAINER_COMMANDS, FinetuneCLI, trainer_command
from datamodules.errors import UserError

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


def test_without_a_run_the_untuned_model_is_evaluated(tmp_path, tiny_llama, started, capsys):
    FinetuneCLI(["test", *options(tmp_path, tiny_llama)])
    assert started[0][2] is None
    assert f"test: the untuned model: no run below {tmp_path / 'default'}" in capsys.readouterr().out


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
