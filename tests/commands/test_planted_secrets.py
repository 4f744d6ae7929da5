"""Secrets that are planted in every input of a fit are in none of its outputs."""

import json
import logging
import shutil
import subprocess
import sys

import fsspec
import pytest
import yaml

from commands.config_merge import DEFAULT_CONFIG
from commands.config_safety import secret_variable
from datamodules import redaction
from datamodules.redaction import MASK
from main import main
from tests.helpers.findings_data import document, finding

URL_SECRET, KEY_SECRET, HEADER_SECRET, ENVIRONMENT_SECRET, REMOTE_SECRET = (
    f"{name}-0123456789" for name in ("urlpw", "keypw", "headerpw", "envpw", "gitpw")
)
SECRETS = (URL_SECRET, KEY_SECRET, HEADER_SECRET, ENVIRONMENT_SECRET, REMOTE_SECRET)
SOURCE = f"memory://alice:{URL_SECRET}@bucket/findings.json"
HEADERS = {"headers": {"Authorization": f"Bearer {HEADER_SECRET}"}}
OPTIONS = {"secret": KEY_SECRET, "anon": False, "client_kwargs": HEADERS}
OPTION = "data.init_args.storage_options"


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A source with a password, options with secrets, a git remote with a token, and a secret in the environment."""
    monkeypatch.setattr(redaction, "_known", set())
    findings = [finding(number) for number in range(80)]
    with fsspec.open(SOURCE, "wb", **OPTIONS) as file:
        file.write(document(findings))
    repository = tmp_path / "checkout"
    repository.mkdir()
    remote = f"https://user:{REMOTE_SECRET}@git.example/x.git"
    for command in (["init", "-q"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    monkeypatch.setattr("callbacks.run_record.REPOSITORY", repository)
    monkeypatch.setenv("SERVICE_API_TOKEN", ENVIRONMENT_SECRET)
    yield tmp_path
    fsspec.filesystem("memory", **OPTIONS).store.clear()


def arguments(command, model, folder, *more):
    callbacks = [
        {"class_path": "callbacks.RunRecord"}, {"class_path": "callbacks.AdapterCheckpoint"},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}},
        {"class_path": "callbacks.Evaluation", "init_args": {"num_samples": 2, "max_new_tokens": 2}},
    ]  # fmt: skip
    return [
        command, f"--model.init_args.backbone.model_name_or_path={model}",
        "--model.init_args.backbone.lora.num_top_layers=1", f"--trainer.logger.init_args.save_dir={folder}",
        "--trainer.max_steps=2", f"--trainer.callbacks={json.dumps(callbacks)}", *more,
    ]  # fmt: skip


def with_secrets(model, folder, *more):
    return arguments(
        "fit", model, folder, f"--data.init_args.sources=['{SOURCE}']", f"--{OPTION}={json.dumps(OPTIONS)}",
        f"--data.init_args.quarantine_path={folder / 'quarantine.jsonl'}",
        f"--data.init_args.cache_dir={folder / 'cache'}",
        "--data.init_args.sequence_length=2048", "--data.init_args.val_fraction=0.2", *more,
    )  # fmt: skip


def run(args, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", *args])
    return main(args)


def assert_no_secret(folder, *texts):
    files = [file for file in folder.rglob("*") if file.is_file() and ".git" not in file.parts]
    assert files
    found = [
        (str(file), secret) for file in files for secret in SECRETS
        if secret.encode() in file.read_bytes() or secret in file.name
    ]  # fmt: skip
    assert found == []
    assert [secret for secret in SECRETS for text in texts if secret in text] == []
    return files


def test_no_output_of_a_fit_its_report_or_its_export_has_a_secret(tiny_llama, planted, monkeypatch, capfd, caplog):
    with caplog.at_level(logging.DEBUG):
        assert run(with_secrets(tiny_llama, planted / "runs"), monkeypatch) == 0
        folder = planted / "runs" / "default" / "version_0"
        assert main(["report", "--run", str(folder)]) == 0
        export = ["--num_reference", "0", "--output"]
        assert main(["export", "--run", str(folder), *export, str(planted / "adapter")]) == 0
    files = {file.name for file in assert_no_secret(planted, *capfd.readouterr(), caplog.text)}
    assert {"config.yaml", "run.json", "report.html", "evaluation.json", "certificate.json", "README.md",
            "last.ckpt", "hparams.yaml"} <= files  # fmt: skip
    config = yaml.safe_load((folder / "config.yaml").read_text())
    masked = {"secret": MASK, "anon": False, "client_kwargs": {"headers": {"Authorization": MASK}}}
    assert config["data"]["init_args"]["storage_options"] == masked
    assert config["data"]["init_args"]["sources"] == [f"memory://{MASK}@bucket/findings.json"]
    assert f"{MASK}@bucket" in json.loads((folder / "run.json").read_text())["command"]


def test_a_run_resumes_with_secrets_of_the_environment(tiny_llama, planted, monkeypatch, capfd):
    assert run(with_secrets(tiny_llama, planted / "runs"), monkeypatch) == 0
    folder = planted / "runs" / "default" / "version_0"
    redaction._known.clear()
    resume = ["fit", "--config", str(folder / "config.yaml"), "--ckpt_path", "last", "--trainer.max_steps=3",
              f"--data.init_args.quarantine_path={planted / 'quarantine.jsonl'}",
              f"--data.init_args.cache_dir={planted / 'cache'}"]  # fmt: skip
    values = {
        "data.init_args.sources.0": SOURCE, f"{OPTION}.secret": KEY_SECRET,
        f"{OPTION}.client_kwargs.headers.Authorization": f"Bearer {HEADER_SECRET}",
    }  # fmt: skip
    for place, value in values.items():
        capfd.readouterr()
        assert run(resume, monkeypatch) == 2
        error = capfd.readouterr().err
        assert f"{place}=" in error
        assert f"set the environment variable {secret_variable(place)}" in error
        monkeypatch.setenv(secret_variable(place), value)
    assert run(resume, monkeypatch) == 0
    assert json.loads((folder / "run.json").read_text())["step"] == 3
    assert_no_secret(planted / "runs", *capfd.readouterr())


def test_a_secret_may_be_given_again_on_the_command_line(tmp_path, capfd, monkeypatch):
    config = tmp_path / "other.yaml"
    init_args = {"sources": ["memory://none.json"], "tokenizer": "x", "storage_options": {"secret": MASK}}
    data = {"class_path": "datamodules.FindingsDataModule", "init_args": init_args}
    base = yaml.safe_load(DEFAULT_CONFIG.read_text())
    config.write_text(yaml.safe_dump(base | {"data": data}))
    args = ["fit", "--config", str(config), f"--{OPTION}.secret={KEY_SECRET}", "--print_config"]
    with pytest.raises(SystemExit):
        run(args, monkeypatch)
    assert_no_secret(tmp_path, *(output := capfd.readouterr()))
    assert yaml.safe_load(output.out)["data"]["init_args"]["storage_options"] == {"secret": MASK}


def test_error_messages_have_no_secret(tiny_llama, planted, monkeypatch, capfd):
    shutil.rmtree(planted / "checkout")
    missing = SOURCE.replace("findings.json", "absent.json")
    cases = [
        [f"--data.init_args.sources=['{missing}']"],
        [f"--data.init_args.sources=['unknown://alice:{URL_SECRET}@host/x']"],
        [f"--data.init_args.storage_option.secret={KEY_SECRET}"],
        [f"--trainer.max_steps=[{KEY_SECRET}]"],
    ]
    for more in cases:
        assert run(with_secrets(tiny_llama, planted / "runs", *more), monkeypatch) == 2
        output = capfd.readouterr()
        assert "error: " in output.err
        assert [secret for secret in SECRETS if secret in output.err + output.out] == [], more
