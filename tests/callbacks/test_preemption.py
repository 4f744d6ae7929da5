"""Tests of Preemption: signals in training and validation, exact resume, handlers, processes and ranks."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment

from callbacks import AdapterCheckpoint, Interrupted, Preemption, RunRecord
from callbacks.preemption import requeue, slurm_job
from tests.helpers.tiny_run import TinyData, TinyModule, best_and_last, make_trainer

SCRIPT = Path(__file__).parents[1] / "helpers/tiny_run.py"


def send(signum, stage, index, times=1):
    """Returns a step function that sends a signal to this process, once, inside a step."""
    left = [times]

    def on_step(here, batch_idx):
        if (here, batch_idx) == (stage, index) and left[0]:
            left[0] = 0
            for _ in range(times):
                os.kill(os.getpid(), signum)

    return on_step


def fit(folder, on_step=lambda stage, index: None, ckpt_path=None, **options):
    preemption = Preemption()
    options = {"accumulate_grad_batches": 3, "val_check_interval": 6, "max_epochs": 2} | options
    checkpoints = options.pop("checkpoints", None) or [best_and_last()]
    trainer = make_trainer(folder, [preemption, *checkpoints], **options)
    module = TinyModule(on_step)
    interrupted = None
    try:
        trainer.fit(module, TinyData(), ckpt_path=ckpt_path, weights_only=True)
    except Interrupted as stop:
        interrupted = stop
    return trainer, module, preemption, interrupted


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    _, module, _, interrupted = fit(tmp_path_factory.mktemp("whole"))
    assert interrupted is None
    return module.state_dict()


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_stops_after_the_accumulation_window(tmp_path, signum):
    trainer, _, preemption, interrupted = fit(tmp_path, send(signum, "train", 3))
    assert preemption.interrupted == interrupted.signal == signum
    assert interrupted.code == 128 + signum
    assert trainer.global_step == 2
    assert trainer.fit_loop.epoch_loop.batch_progress.current.ready == 6
    saved = torch.load(tmp_path / "version_0/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 2


@pytest.mark.parametrize("batch", [0, 2, 4, 5, 10, 11])
def test_resumed_equals_uninterrupted(tmp_path, uninterrupted, batch):
    _, _, _, interrupted = fit(tmp_path, send(signal.SIGTERM, "train", batch))
    assert interrupted
    _, module, preemption, interrupted = fit(tmp_path, ckpt_path="last")
    assert interrupted is None and preemption.interrupted is None
    assert_equal(module.state_dict(), uninterrupted)


def test_stopped_twice_and_resumed_equals_uninterrupted(tmp_path, uninterrupted):
    assert fit(tmp_path, send(signal.SIGTERM, "train", 4))[3]
    assert fit(tmp_path, send(signal.SIGINT, "train", 7), ckpt_path="last")[3]
    _, module, _, _ = fit(tmp_path, ckpt_path="last")
    assert_equal(module.state_dict(), uninterrupted)


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_stopped_in_validation_and_resumed_equals_uninterrupted(tmp_path, uninterrupted, batch):
    trainer, _, _, interrupted = fit(tmp_path, send(signal.SIGTERM, "val", batch))
    assert interrupted and trainer.global_step == 2
    _, module, _, _ = fit(tmp_path, ckpt_path="last")
    assert_equal(module.state_dict(), uninterrupted)


def test_validation_inside_a_window_does_not_stop_it(tmp_path):
    trainer, _, _, interrupted = fit(tmp_path, send(signal.SIGTERM, "val", 0), val_check_interval=4)
    assert interrupted and trainer.global_step == 2


def test_a_signal_in_the_last_validation_stops_before_later_work(tmp_path):
    seen = []

    def on_step(stage, index):
        seen.append((stage, index))
        if len([s for s in seen if s == ("val", 2)]) == 4 and stage == "val":
            os.kill(os.getpid(), signal.SIGTERM)

    trainer, _, preemption, interrupted = fit(tmp_path, on_step)
    assert interrupted and preemption.interrupted == signal.SIGTERM
    assert trainer.global_step == 8


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_an_evaluation_after_training_is_stopped_at_once(tmp_path, signum):
    class Evaluation(Callback):
        def on_train_end(self, trainer, pl_module):
            os.kill(os.getpid(), signum)
            pytest.fail("the evaluation was not stopped")

    trainer = make_trainer(tmp_path, [Preemption(), Evaluation(), best_and_last()])
    with pytest.raises(Interrupted) as stop:
        trainer.fit(TinyModule(), TinyData())
    assert stop.value.signal == signum and trainer.global_step == 12
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_previous_handlers_are_restored(tmp_path):
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(signum) for signum in signals]
    fit(tmp_path / "whole")
    assert [signal.getsignal(signum) for signum in signals] == before
    fit(tmp_path / "stopped", send(signal.SIGTERM, "train", 1))
    assert [signal.getsignal(signum) for signum in signals] == before


def test_a_second_ctrl_c_stops_at_once_and_saves_nothing(tmp_path):
    trainer, _, preemption, interrupted = fit(tmp_path, send(signal.SIGINT, "train", 1, times=2))
    assert interrupted.code == 130 and preemption.interrupted == signal.SIGINT
    assert trainer.global_step == 0
    assert not (tmp_path / "version_0/checkpoints").exists()


def test_a_second_sigterm_has_no_effect(tmp_path):
    trainer, _, _, interrupted = fit(tmp_path, send(signal.SIGTERM, "train", 1, times=3))
    assert interrupted.code == 143 and trainer.global_step == 1


def test_an_existing_sigusr1_handler_is_kept(tmp_path):
    """Under SLURM it is Lightning's handler, which requeues the job."""
    got = []
    before = signal.signal(signal.SIGUSR1, lambda *_: got.append("previous handler"))
    try:
        _, _, _, interrupted = fit(tmp_path, send(signal.SIGUSR1, "train", 1))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert got == ["previous handler"] and interrupted is None


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGUSR2], ids=["default signal", "another signal"])
def test_under_slurm_the_run_is_saved_in_its_folder_and_the_job_is_requeued(tmp_path, monkeypatch, caplog, signum):
    commands = tmp_path / "commands"
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {commands}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.chdir(tmp_path)
    environment = SLURMEnvironment(auto_requeue=True, requeue_signal=signum)
    for name, value in {"world_size": 1, "global_rank": 0, "local_rank": 0, "node_rank": 0}.items():
        monkeypatch.setattr(environment, name, lambda value=value: value)
    monkeypatch.setattr(environment, "validate_settings", lambda *args: None)
    monkeypatch.setattr(SLURMEnvironment, "detect", lambda: False)
    with caplog.at_level("INFO"):
        trainer, _, _, interrupted = fit(tmp_path, send(signum, "train", 1), plugins=[environment])
    assert interrupted.code == 128 + signum and trainer.global_step == 1
    assert commands.read_text() == "requeue 71\n"
    assert not list(tmp_path.rglob("hpc_ckpt*"))
    assert (tmp_path / "version_0/checkpoints/last.ckpt").is_file()
    assert "SLURM: requeued job 71; it resumes this run" in caplog.text


def test_without_scontrol_the_user_is_asked_to_submit_the_job_again(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match=r"the job was not requeued: .* Fix: submit it again"):
        requeue()


def test_the_target_of_a_linked_last_checkpoint_is_not_overwritten(tmp_path):
    def checkpoints():
        return [ModelCheckpoint(filename="step{step}", every_n_train_steps=1, save_top_k=-1, save_last="link")]

    fit(tmp_path, send(signal.SIGTERM, "train", 4), checkpoints=checkpoints(), limit_val_batches=0)
    folder = tmp_path / "version_0/checkpoints"
    assert not (folder / "last.ckpt").is_symlink()
    steps = {file.name: torch.load(file, weights_only=True)["global_step"] for file in folder.glob("*.ckpt")}
    assert steps == {"stepstep=1.ckpt": 1, "last.ckpt": 2}


def test_the_resumed_run_writes_the_same_files(tmp_path):
    fit(tmp_path, send(signal.SIGTERM, "train", 1))
    fit(tmp_path, ckpt_path="last")
    names = {file.name for file in (tmp_path / "version_0/checkpoints").iterdir()}
    assert names == {"best.ckpt", "last.ckpt"}


def test_the_adapter_is_that_of_the_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, [AdapterCheckpoint(), Preemption(), best_and_last()])
    with pytest.raises(Interrupted):
        trainer.fit(TinyModule(send(signal.SIGTERM, "train", 4)), TinyData())
    adapter = torch.load(tmp_path / "version_0/adapter/last/adapter.pt", weights_only=True)
    saved = torch.load(tmp_path / "version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert_equal({f"model.{name}": value for name, value in adapter.items()}, saved)


def test_outside_the_main_thread_no_handler_is_installed(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    result = []
    thread = threading.Thread(target=lambda: result.append(fit(tmp_path, max_epochs=1)))
    thread.start()
    thread.join()
    assert result[0][0].global_step == 4 and signal.getsignal(signal.SIGTERM) == before


def test_without_checkpointing_the_run_directory_is_used(tmp_path):
    trainer = make_trainer(tmp_path, [Preemption()], enable_checkpointing=False)
    with pytest.raises(Interrupted):
        trainer.fit(TinyModule(send(signal.SIGTERM, "train", 4)), TinyData())
    assert (tmp_path / "version_0/checkpoints/last.ckpt").is_file()


def test_an_invalid_argument_is_an_error():
    with pytest.raises(ValueError, match="agree_every_n_steps=0: must be at least 1"):
        Preemption(agree_every_n_steps=0)


def start_and_send(folder, signum, *options):
    """Runs the script in a separate process and sends it a signal in its second batch."""
    command = [sys.executable, str(SCRIPT), str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line == "batch 1\n":
            break
    process.send_signal(signum)
    output, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors
    return process.returncode, output, errors


def read_record(folder):
    return json.loads((folder / "version_0/run.json").read_text())


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_separate_process_is_stopped_and_resumed(tmp_path, signum):
    status, output, errors = start_and_send(tmp_path, signum)
    assert status == 128 + signum
    assert "--ckpt_path last" in errors
    assert "--ckpt_path" in output and "adapter/last" in output
    record = read_record(tmp_path)
    assert record["state"] == "interrupted" and record["step"] == 1

    trainer = make_trainer(tmp_path, [RunRecord(), Preemption(), best_and_last()], accumulate_grad_batches=3)
    trainer.fit(TinyModule(), TinyData(), ckpt_path="last", weights_only=True)
    record = read_record(tmp_path)
    assert record["state"] == "finished" and record["step"] == 4
    assert [run["state"] for run in record["previous"]] == ["interrupted"]


@pytest.mark.slow
def test_all_ranks_stop_at_the_same_step(tmp_path):
    """Only rank zero receives the signal."""
    status, _, errors = start_and_send(tmp_path, signal.SIGTERM, "--devices", "2")
    assert status == 143, errors
    saved = torch.load(tmp_path / "version_0/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 1
    assert read_record(tmp_path)["state"] == "interrupted"


def test_the_job_of_an_array_has_the_number_of_its_task(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert slurm_job() is None
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert slurm_job() == "8"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert slurm_job() == "5_2"
