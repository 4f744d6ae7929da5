"""Checkpoints of run folders: the newest run, the best or last checkpoint, and errors."""

import os
from pathlib import Path

import pytest
from jsonargparse import Namespace, dict_to_namespace

from commands.run_directory import (  # fmt: skip
    checkpoint_of,
    has_given_version,
    new_run,
    newest_checkpoint,
    resolve_checkpoint,
    run_of,
    run_root,
    runs_below,
)
from datamodules.errors import UserError


def write(root, run, name, age=0):
    file = root / run / "checkpoints" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.utime(file, (1000 - age, 1000 - age))
    return file


def test_the_newest_run_has_the_highest_number_not_the_last_name(tmp_path):
    write(tmp_path, "version_9", "last.ckpt")
    newest = write(tmp_path, "version_10", "last.ckpt", age=500)
    (tmp_path / "version_11").mkdir()  # a run that has no checkpoint yet
    assert newest_checkpoint(tmp_path, "last") == newest
    assert newest_checkpoint(tmp_path / "nowhere", "last") is None


def test_without_a_logger_the_root_is_the_run(tmp_path):
    file = write(tmp_path, ".", "last.ckpt")
    assert newest_checkpoint(tmp_path, "last").samefile(file)


def test_best_is_the_newest_best_file_and_else_the_last_one(tmp_path):
    last = write(tmp_path, "version_0", "last.ckpt")
    assert checkpoint_of(tmp_path / "version_0", "best") == last
    write(tmp_path, "version_0", "best.ckpt", age=9)
    best = write(tmp_path, "version_0", "best-v1.ckpt", age=3)
    assert checkpoint_of(tmp_path / "version_0", "best") == best
    assert checkpoint_of(tmp_path / "version_0", "last") == last
    assert run_of(best) == (tmp_path / "version_0").resolve()


def test_a_checkpoint_is_given_as_file_folder_or_word(tmp_path):
    last, best = (write(tmp_path, "version_0", name) for name in ("last.ckpt", "best.ckpt"))
    assert resolve_checkpoint(None, tmp_path) is None
    assert resolve_checkpoint("last", tmp_path) == last
    assert resolve_checkpoint("best", tmp_path) == best
    assert resolve_checkpoint(str(tmp_path / "version_0"), tmp_path / "elsewhere") == best
    assert resolve_checkpoint(str(last), tmp_path / "elsewhere") == last


@pytest.mark.parametrize(
    ("path", "message"),
    [("last", "no run below"), ("nowhere.ckpt", "no such file"), (".", r"a folder without checkpoints/\*\.ckpt")],
)
def test_a_checkpoint_that_does_not_exist_is_an_error(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"--ckpt_path {path}: {message}.*Fix: "):
        resolve_checkpoint(path, tmp_path)


def test_a_run_that_was_killed_before_its_first_step_is_the_newest_run(tmp_path):
    older = write(tmp_path, "version_0", "last.ckpt")
    (tmp_path / "version_1" / "checkpoints").mkdir(parents=True)  # made before the model is built
    (tmp_path / "version_2").mkdir()  # of an evaluation
    assert runs_below(tmp_path) == [tmp_path / "version_1", tmp_path / "version_0"]
    with pytest.raises(UserError, match=rf"--ckpt_path last: the newest run .*version_1 was stopped before .* {older}"):
        resolve_checkpoint("last", tmp_path)
    assert newest_checkpoint(tmp_path, "last") == older
    assert new_run(tmp_path) == tmp_path / "version_3"


TENSORBOARD = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger"}
REMOTE = {"class_path": "tests.helpers.remote_logger.RemoteLogger", "init_args": {}}


@pytest.mark.parametrize(
    ("logger", "root", "given"),
    [
        ({**TENSORBOARD, "init_args": {"save_dir": "a", "name": "b", "version": None}}, "a/b", False),
        ({**TENSORBOARD, "init_args": {"save_dir": "a", "name": None, "version": None}}, "a", False),
        ({**TENSORBOARD, "init_args": {"save_dir": "a", "name": "b", "version": 4}}, "a/b/version_4", True),
        ({**TENSORBOARD, "init_args": {"save_dir": "a", "name": "b", "version": "c"}}, "a/b/c", True),
        ([REMOTE, {**TENSORBOARD, "init_args": {"save_dir": "a", "name": "b", "version": None}}], "a/b", False),
        (REMOTE, "files", False),
        (None, "files", False),
        (True, "files", False),
    ],
)
def test_the_root_of_runs_is_that_of_the_first_logger_that_writes_files(logger, root, given):
    items = [dict_to_namespace(item) for item in logger] if isinstance(logger, list) else logger
    trainer = Namespace(logger=dict_to_namespace(items) if isinstance(items, dict) else items, default_root_dir=None)
    assert run_root(trainer, Path("files")) == Path(root)
    assert has_given_version(trainer) is given
    trainer.default_root_dir = "d"
    assert run_root(trainer, Path("files")) == Path("d" if root == "files" else root)


def test_without_any_folder_runs_are_below_runs():
    assert run_root(Namespace(logger=False, default_root_dir=None)) == Path("runs")
