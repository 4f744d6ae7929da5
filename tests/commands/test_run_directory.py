"""Checkpoints of run folders: the newest run, the best or last checkpoint, and errors."""

import os

import pytest

from commands.run_directory import checkpoint_of, newest_checkpoint, resolve_checkpoint, run_of
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
