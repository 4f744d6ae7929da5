"""Settings that Lightning would refuse after the first steps are one line before the first step."""

import json
import shutil

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

from commands.start_checks import one_line_errors
from datamodules.errors import UserError
from main import main
from tests.helpers.tiny_command import error_line, tiny_fit


class UsersMetric(Callback):
    """A callback that may log any metric."""


def monitor(metric, kind="ModelCheckpoint"):
    return f"{{class_path: lightning.pytorch.callbacks.{kind}, init_args: {{monitor: {metric}}}}}"


REFUSED = {
    "a typing error in a checkpoint's metric": (
        [monitor("val_loss")], [], "trainer.callbacks: ModelCheckpoint.monitor=val_loss: the run logs no such metric. "
        "Fix: use one of train/loss, train/token_accuracy, train/grad_norm, lr, val/loss, val/token_accuracy, step, "
        "epoch"
    ),
    "a missing metric of early stopping": (
        [monitor("val/kl", "EarlyStopping")], [], "EarlyStopping.monitor=val/kl: the run logs no such metric"
    ),
    "early stopping without validation": (
        [monitor("val/loss", "EarlyStopping")], [], "EarlyStopping.monitor=val/loss: the run has no validation"
    ),
    "weight averaging": (
        ["{class_path: lightning.pytorch.callbacks.StochasticWeightAveraging, init_args: {swa_lrs: 0.1}}"], [],
        "trainer.callbacks=StochasticWeightAveraging: it copies the whole model"
    ),
    "a share of an epoch between validations": (
        [], ["--trainer.val_check_interval=0.5", "--trainer.check_val_every_n_epoch=1"],
        "trainer.val_check_interval=0.5: a share of an epoch"
    ),
    "a share of an epoch for training": (
        [], ["--trainer.limit_train_batches=0.25"], "trainer.limit_train_batches=0.25: a share of an epoch"
    ),
    "a precision that would convert the weights": (
        [], ["--trainer.precision=bf16-mixed"],
        "trainer.precision=bf16-mixed: the types of weights and products are those of model.init_args.backbone.dtype"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("callbacks", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_setting_that_fails_later_is_refused_at_once(tiny_llama, tmp_path, callbacks, options, message, capsys):
    absent = "--data.init_args.sources=['nowhere/*.json']"  # refused before the data is opened
    assert main(tiny_fit(tiny_llama, tmp_path, absent, *options, callbacks=callbacks)) == 2
    assert message in error_line(capsys)
    assert not (tmp_path / "default").exists()


def test_a_metric_of_the_users_own_callback_may_be_monitored(tiny_llama, tmp_path):
    own = f"{{class_path: {__name__}.UsersMetric}}"
    assert main(tiny_fit(tiny_llama, tmp_path, callbacks=[own, monitor("users/metric")])) == 0


@pytest.mark.parametrize("metric", ["train/loss", "val/loss", "step"])
def test_a_logged_metric_may_be_monitored(tiny_llama, tmp_path, metric):
    options = ["--data.init_args.val_fraction=0.3", "--trainer.val_check_interval=1"]
    assert main(tiny_fit(tiny_llama, tmp_path, *options, callbacks=[monitor(metric)])) == 0
    assert list((tmp_path / "default" / "version_0" / "checkpoints").glob("*.ckpt"))


def test_the_number_of_slurm_tasks_is_one_line(tiny_llama, tmp_path, capsys, monkeypatch):
    values = {"JOB_ID": "7", "NTASKS": "2", "NTASKS_PER_NODE": "2", "JOB_NAME": "fit", "PROCID": "0", "LOCALID": "0",
              "NODEID": "0", "NODELIST": "localhost"}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert main(tiny_fit(tiny_llama, tmp_path, "--trainer.strategy=ddp")) == 2
    assert "devices=1" in error_line(capsys)


def test_other_errors_of_lightning_are_one_line_and_errors_of_the_program_are_not_hidden():
    with pytest.raises(UserError, match=r"^trainer: two lines$"), one_line_errors():
        raise MisconfigurationException("two\nlines")
    with pytest.raises(ValueError, match="a bug"), one_line_errors():
        raise ValueError("a bug")


@pytest.mark.parametrize("command", ["fit", "inspect"])
def test_a_template_token_without_a_row_in_the_embedding_is_one_line(tiny_llama, tmp_path, capsys, command):
    small = shutil.copytree(tiny_llama, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 2}))
    args = tiny_fit(small, tmp_path / "runs")
    assert main([command, *args[1:]]) == 2
    line = error_line(capsys)
    assert "the prompts use token" in line and "the model's embedding has 2 rows. Fix: use the tokenizer" in line
