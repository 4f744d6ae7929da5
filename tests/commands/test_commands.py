"""The table of subcommands, the exit status, the version, and the program started from any folder."""

import importlib
import logging
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import commands
import main as main_module
from commands.config_merge import CONFIGS, load_config
from datamodules.errors import UserError

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "lightning", "transformers", "peft", "numpy", "jsonargparse")


def run_script(folder, name, *args):
    """Runs the console script in a process of its own, as pip's wrapper does; returns the finished process."""
    script = folder / name
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom commands import main\nsys.exit(main())\n")
    return subprocess.run([sys.executable, str(script), *args], cwd=folder, capture_output=True, text=True)


def test_main_is_the_function_of_the_package():
    assert main_module.main is commands.main


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_subcommand_exists(name):
    command = commands.COMMANDS[name]
    assert callable(getattr(importlib.import_module(command.module), command.function))


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
def test_the_help_lists_every_subcommand(args, capsys):
    assert commands.main(args) == 0
    printed = capsys.readouterr().out
    for name, command in commands.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", printed, re.MULTILINE)


def test_the_version_has_the_installed_packages(capsys):
    assert commands.main(["--version"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"sys-scan-finetune {commands.__version__}"
    assert second == (
        f"python {sys.version.split()[0]}, torch {version('torch')}, lightning {version('lightning')}, "
        f"transformers {version('transformers')}, peft {version('peft')}"
    )


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(commands, "PACKAGES", ("torch", "no-such-package"))
    assert commands.version_text().endswith(f"torch {version('torch')}, no-such-package not installed")


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_no_heavy_package(option):
    code = f"import main, sys; main.main([{option!r}]); print('IMPORTED', *(set({HEAVY}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["IMPORTED"]


def test_an_unknown_subcommand_is_a_user_error(capsys):
    assert commands.main(["fitt"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error == [f"error: fitt: no such command. Fix: give one of {', '.join(commands.COMMANDS)}."]


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (1, 1), (130, 130)])
def test_the_exit_status_is_the_subcommands(monkeypatch, result, status):
    monkeypatch.setitem(commands.COMMANDS, "some", commands.Command("commands.report", "main", "text"))
    monkeypatch.setattr("commands.report.main", lambda args: result)
    assert commands.main(["some"]) == status


def test_a_user_error_is_printed_and_other_errors_are_not_hidden(monkeypatch, capsys):
    def fail(args):
        raise UserError(f"{args[1]}: wrong") if args[1:] else KeyError("a bug")

    monkeypatch.setattr("commands.report.main", fail)
    assert commands.main(["report", "--run"]) == 2
    assert capsys.readouterr().err == "error: --run: wrong\n"
    with pytest.raises(KeyError, match="a bug"):
        commands.main(["report"])


def test_the_console_script_shows_its_own_name_in_the_help(tmp_path):
    done = run_script(tmp_path, "sys-scan-finetune", "--help")
    assert done.stdout.startswith("usage: sys-scan-finetune COMMAND")
    done = run_script(tmp_path, "sys-scan-finetune", "synthesize", "--help")
    assert done.stdout.startswith("usage: sys-scan-finetune synthesize")
    assert run_script(tmp_path, "main.py", "--help").stdout.startswith("usage: python main.py COMMAND")


def test_a_config_of_the_package_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/gpu.yaml") == load_config(str(CONFIGS / "gpu.yaml"))
    with pytest.raises(UserError, match=r"configs/nowhere\.yaml: no such file\. Fix: .*configs/gpu\.yaml"):
        load_config("configs/nowhere.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "gpu.yaml").write_text("seed_everything: 7\n")  # the user's own has priority
    assert load_config("configs/gpu.yaml") == {"seed_everything": 7}


@pytest.mark.parametrize("config", [[], ["--config", "configs/gpu.yaml"]], ids=["default", "gpu"])
def test_fit_finds_its_config_from_another_folder(tmp_path, config):
    done = run_script(tmp_path, "sys-scan-finetune", "fit", *config, "--trainer.max_steps=7", "--print_config")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "max_steps: 7" in done.stdout
    name = "mistral" if config else "embedded:smollm2"
    assert re.search(rf"model_name_or_path: .*{name}", done.stdout, re.IGNORECASE)


def test_libraries_can_not_import_the_package_kernels(monkeypatch):
    monkeypatch.delenv("USE_HUB_KERNELS", raising=False)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    commands.disable_hub_kernels()
    with pytest.raises(ImportError):
        importlib.import_module("kernels")
    from transformers.utils.import_utils import is_kernels_available

    is_kernels_available.cache_clear()
    assert not is_kernels_available()
    assert not logger.isEnabledFor(logging.WARNING)
