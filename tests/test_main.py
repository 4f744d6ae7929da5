"""Command line: every config builds, and a user error is one line and exit status 2."""

import functools
import inspect
import shutil
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor

from commands.cli import FinetuneCLI
from main import COMMANDS, main

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
ANY_MACHINE = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.strategy=auto",
    "--trainer.precision=32-true",
    "--trainer.plugins=null",
]


def build(config, *arguments):
    return FinetuneCLI(["--config", str(config), *ANY_MACHINE, *arguments], run=False)


def test_the_documented_configs_exist():
    assert {"default", "gpu", "gpu_multi", "gpu_fsdp", "tpu", "tpu_smoke", "distill"} <= {
        config.stem for config in CONFIGS
    }


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_every_config_builds_on_any_machine(config, tmp_path):
    cli = build(config, f"--trainer.logger.init_args.save_dir={tmp_path}")
    written = yaml.safe_load(config.read_text())
    assert type(cli.model).__name__ == written["model"]["class_path"].split(".")[-1]
    header = config.read_text().split("seed_everything")[0]
    assert all(word in header for word in ("# command ", "# hardware ", "# time ", "# result "))


def test_the_config_with_a_sharded_base_keeps_its_strategy():
    config = next(config for config in CONFIGS if config.stem == "gpu_fsdp")
    any_machine = [option for option in ANY_MACHINE if "strategy" not in option]
    cli = FinetuneCLI(["--config", str(config), *any_machine, "--trainer.logger=false"], run=False)
    assert type(cli.trainer.strategy).__name__ == "FSDP2Strategy"


NULLS = ("lora.num_top_layers", "lora", "adapter")


@pytest.mark.parametrize("name", NULLS)
def test_null_reaches_the_model(name):
    """An argument that is an object itself can be null: jsonargparse would pass None to each of its arguments."""
    model = build(CONFIGS[0].with_name("default.yaml"), f"--model.init_args.backbone.{name}=null").model
    value = model.backbone
    for part in name.split("."):
        value = getattr(value, part)
    assert value is None


def test_a_fit_without_a_logger(monkeypatch, tmp_path, capsys):
    calls = []

    @functools.wraps(Trainer.fit)  # the CLI takes its options from the signature
    def fit(trainer, *args, ckpt_path, **kwargs):
        calls.append((trainer, ckpt_path))

    monkeypatch.setattr(Trainer, "fit", fit)
    (tmp_path / "checkpoints").mkdir()
    (
        tmp_path / "checkpoints/last.ckpt"
    ).touch()  # of an earlier fit: without a logger, the run's folder is default_root_dir
    options = ["--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}", "--ckpt_path=last"]
    assert main(["fit", *ANY_MACHINE, *options]) == 0
    [(trainer, checkpoint)] = calls
    assert trainer.loggers == []
    assert checkpoint == str(tmp_path / "checkpoints/last.ckpt")
    assert not any(
        isinstance(callback, LearningRateMonitor) for callback in trainer.callbacks
    )  # it raises without a logger
    assert len(trainer.callbacks) > 6
    assert "LearningRateMonitor, which writes to a logger, is left out" in capsys.readouterr().out


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_the_optimizer_is_built_from_its_config(config, tmp_path):
    import torch

    cli = build(config, f"--trainer.logger.init_args.save_dir={tmp_path}")
    written = yaml.safe_load(config.read_text())["model"]["init_args"]["optimizer"]
    optimizer = cli.model.optimizer([torch.nn.Parameter(torch.zeros(4, 4))])
    assert type(optimizer).__name__ == written["class_path"].split(".")[-1]
    defaults = inspect.signature(type(optimizer)).parameters
    for name in ("lr", "betas", "weight_decay"):
        expected = written["init_args"].get(name, defaults[name].default)
        value = optimizer.param_groups[0][name]
        assert (list(value) == list(expected)) if name == "betas" else value == pytest.approx(expected)


def test_without_a_command_all_commands_are_listed(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


MODEL_PARALLEL = "lightning.pytorch.strategies.ModelParallelStrategy"
USER_ERRORS = {
    "an unknown command": (["fitt"], "fitt: no such command"),
    "an absent config": (["fit", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
    "a broken key": (["fit", "--trainer.max_stepz=3"], "max_stepz"),
    "an unknown class": (["fit", "--model.init_args.optimizer.class_path=optimizers.Lyon"], "optimizers.Lyon"),
    "an absent source": (["fit", "--data.init_args.sources=['nowhere/*.json']"], "nowhere"),
    "an absent checkpoint": (["fit", "--ckpt_path=nowhere.ckpt"], "nowhere.ckpt: no such file"),
    "sharded 4-bit weights": (
        ["fit", "--model.init_args.backbone.quantization=nf4", f"--trainer.strategy.class_path={MODEL_PARALLEL}"],
        "it can't shard bitsandbytes' weights (Lightning's issue 20855); set trainer.strategy ddp",
    ),
    "Lightning's own sharding": (
        ["fit", f"--trainer.strategy={MODEL_PARALLEL}"],
        "set it to lightning_modules.strategies.FSDP2Strategy",
    ),
    "no run to resume": (["fit", "--ckpt_path=last"], "--ckpt_path last: no run below"),
}


@pytest.mark.parametrize(("args", "message"), USER_ERRORS.values(), ids=USER_ERRORS.keys())
def test_a_user_error_is_one_line_and_exit_status_2(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]


def tiny(model, folder, *arguments):
    """Arguments that fit a tiny model on a few findings."""
    return [
        "fit", f"--model.init_args.backbone.model_name_or_path={model}",
        "--model.init_args.backbone.lora.num_top_layers=1",
        f"--trainer.logger.init_args.save_dir={folder}", "--trainer.max_steps=2", "--trainer.callbacks=[]",
        "--data.init_args.sources=['synthetic://?findings=300&seed=1']",
        "--data.init_args.val_fraction=0", "--data.init_args.test_fraction=0",
        *arguments,
    ]  # fmt: skip


def test_an_error_of_data_or_model_is_one_line_too(tiny_llama, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "report.json").write_text('{"results": [{"scanner": "ioc", "findings": [{"id": "a", "title": "b"}]}]}')
    bare = shutil.copytree(tiny_llama, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    cases = {
        "empty": tiny(tiny_llama, tmp_path, f"--data.init_args.sources=['{tmp_path / 'empty'}']"),
        "analyze": tiny(tiny_llama, tmp_path, f"--data.init_args.sources=['{tmp_path / 'report.json'}']"),
        "sequence_length": tiny(tiny_llama, tmp_path, "--data.init_args.sequence_length=64"),
        "safetensors": tiny(bare, tmp_path),
        "nothing-here": tiny(tmp_path / "nothing-here", tmp_path),
    }
    for word, args in cases.items():
        assert main(args) == 2, word
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, word
        assert word in errors[0]


def test_fit_resumes_in_its_own_folder_and_validate_finds_the_run(tiny_llama, tmp_path, capsys):
    callback = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {save_last: true}}"
    checkpoint = f"--trainer.callbacks=[{callback}]"
    run = tmp_path / "default" / "version_0"
    assert main(tiny(tiny_llama, tmp_path, checkpoint)) == 0
    assert (run / "config.yaml").is_file()
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert main(tiny(tiny_llama, tmp_path, checkpoint, "--trainer.max_steps=4", "--ckpt_path=last")) == 0
    assert not (tmp_path / "default" / "version_1").exists()
    import torch

    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert all("lora" in name for name in saved["state_dict"])  # the frozen base is not saved
    args = tiny(tiny_llama, tmp_path, "--data.init_args.val_fraction=0.2")
    args = ["validate", *(a for a in args[1:] if "max_steps" not in a)]
    assert main(args) == 0
    assert "the newest run's checkpoint" in capsys.readouterr().out
