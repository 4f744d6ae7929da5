"""Options and processes of ``cache-teacher``."""

import json
import sys

import pytest

from commands.cache_teacher import command
from tests.helpers.teacher_cache_run import contents, write_cache

#: a program that writes its arguments and rank to a file, and whose second process fails
PROGRAM = """
import json, os, pathlib, sys
rank, ranks = os.environ["SYS_SCAN_CACHE_RANK"], os.environ["SYS_SCAN_CACHE_RANKS"]
pathlib.Path(__file__).with_name(f"{rank}.json").write_text(json.dumps([ranks, sys.argv[1:]]))
sys.exit(3 if rank == "1" else 0)
"""

MISTAKES = {
    "has no teacher to cache": ["--model.init_args.objective.init_args.alpha=0"],
    "the vocabulary has 259 tokens": ["--model.init_args.objective.init_args.cache.top_k=259"],
    "--devices 0: too small": ["--devices=0"],
    "--shard_examples": ["--shard_examples=many"],
    "was made for something else: top_k was 8": ["--model.init_args.objective.init_args.cache.top_k=9"],
    "a run without an end": ["--trainer.max_steps=-1", "--trainer.max_epochs=-1"],
}


@pytest.fixture(scope="module")
def cached(tmp_path_factory, tiny_llama):
    folder = tmp_path_factory.mktemp("teacher") / "cache"
    assert write_cache(folder, tiny_llama) == 0
    return folder


@pytest.mark.parametrize(("message", "options"), MISTAKES.items(), ids=MISTAKES)
def test_a_user_error_is_one_line(cached, tiny_llama, capsys, message, options):
    assert write_cache(cached, tiny_llama, *options) == 2
    assert message in next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))


def test_every_device_has_a_process_and_the_first_failure_is_the_exit_status(tmp_path, monkeypatch):
    program = tmp_path / "main.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(command, "MAIN", program)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    args = ["cache-teacher", "--devices=3", "--config", "x.yaml"]
    assert command.main(args) == 3
    started = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert started == [["3", args]] * 3


def test_more_devices_than_gpus_is_an_error(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(sys, "executable", "must-not-be-started")
    with pytest.raises(command.UserError, match="--devices 2: there are 1 GPUs"):
        command.main(["cache-teacher", "--devices=2"])


@pytest.mark.slow
def test_two_devices_write_the_same_bytes_as_one(cached, tmp_path, tiny_llama):
    folder = tmp_path / "cache"
    assert write_cache(folder, tiny_llama, "--devices=2") == 0
    assert contents(folder) == contents(cached)
