"""Tests of ConsoleProgress: plain lines, bars, resumed runs and other stages; few reads from the device."""

import io
import re

import pytest
from rich.console import Console

from callbacks import ConsoleProgress, progress, throughput
from tests.helpers.device_reads import CountDeviceReads
from tests.helpers.fake_clock import FakeClock, slow_step
from tests.helpers.tiny_run import TinyData, TinyModule, make_batch, make_trainer, set_global_step


def make(terminal, **options):
    callback = ConsoleProgress(**options)
    callback.console = Console(file=io.StringIO(), force_terminal=terminal, width=160)
    return callback


def fit(tmp_path, callback, **options):
    trainer = make_trainer(tmp_path, [callback], enable_checkpointing=False, **options)
    trainer.fit(TinyModule(), TinyData())
    return trainer, callback.console.file.getvalue()


def test_plain_lines_show_step_loss_speed_learning_rate_and_remaining_time(tmp_path):
    trainer, text = fit(tmp_path, make(False, log_interval_seconds=0.0), accumulate_grad_batches=2)
    lines = [line for line in text.splitlines() if line.startswith("fit ")]
    assert [line.split()[1] for line in lines] == [f"{step}/6" for step in range(1, 7)]
    figures = r"fit \d/6  loss \d\.\d{4}  [\d,]+ tokens/s  [\d,.]+ findings/s  lr \d\.\d\de-\d\d  \d+:\d\d left"
    assert all(re.fullmatch(figures, line) for line in lines)
    assert "lr 2.00e-04" in lines[0] and "lr 3.00e-04" in lines[1]
    assert f"loss {trainer.callback_metrics['train/loss']:.4f}" in lines[-1]
    assert re.search(r"^step 6  val/loss \d\.\d+$", text, re.MULTILINE)
    assert "\x1b" not in text


def test_plain_lines_are_printed_once_per_interval(tmp_path, monkeypatch):
    """With steps of 1 s and an interval of 5 s: the first step, then every fifth, then the last."""
    clock = FakeClock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(TinyModule, "training_step", slow_step(clock, TinyModule.training_step, 1))
    _, text = fit(tmp_path, make(False, log_interval_seconds=5.0), limit_val_batches=0)
    lines = [line for line in text.splitlines() if line.startswith("fit ")]
    assert [line.split()[1] for line in lines] == ["1/12", "6/12", "11/12", "12/12"]
    assert [line.split("  ")[-1] for line in lines] == ["0:11 left", "0:06 left", "0:01 left", "0:00 left"]
    assert all(" 26 tokens/s  4.0 findings/s" in line for line in lines)


def test_a_resumed_run_starts_at_its_step(tmp_path):
    trainer = make_trainer(tmp_path, [make(False)], max_epochs=1)
    trainer.fit(TinyModule(), TinyData())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    callback = make(False, log_interval_seconds=0.0)
    trainer = make_trainer(tmp_path, [callback], max_epochs=2, enable_checkpointing=False)
    trainer.fit(TinyModule(), TinyData(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert re.findall(r"^fit (\S+)", callback.console.file.getvalue(), re.MULTILINE)[0] == "13/24"


def test_bars_on_a_terminal(tmp_path):
    _, text = fit(tmp_path, make(True, refresh_seconds=0.0))
    assert "12/12" in text and "loss" in text and "findings/s" in text and "0:00 left" in text
    assert "\x1b" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_validate_and_test_and_the_sanity_check(tmp_path, terminal, monkeypatch):
    monkeypatch.setattr(TinyModule, "test_step", TinyModule.validation_step, raising=False)
    monkeypatch.setattr(TinyData, "test_dataloader", TinyData.val_dataloader, raising=False)
    for stage in ("validate", "test"):
        callback = make(terminal, refresh_seconds=0.0, log_interval_seconds=0.0)
        trainer = make_trainer(tmp_path, [callback], enable_checkpointing=False)
        getattr(trainer, stage)(TinyModule(), TinyData())
        text = callback.console.file.getvalue()
        assert stage in text and "3/3" in text
    _, text = fit(tmp_path, make(terminal, refresh_seconds=0.0, log_interval_seconds=0.0), num_sanity_val_steps=2)
    assert "sanity check" in text and "2/2" in text


def test_the_device_is_read_once_per_interval(tmp_path):
    callback, batch, module = make(True, refresh_seconds=3600.0), make_batch(0), TinyModule()
    trainer, _ = fit(tmp_path, callback)
    callback.on_train_start(trainer, module)
    callback._fit.total = 100
    with CountDeviceReads() as counter:
        for index in range(10):
            set_global_step(trainer, trainer.global_step + 1)
            callback.on_train_batch_end(trainer, module, None, batch, index)
            if index == 0:
                first = counter.reads
    callback.on_train_end(trainer, module)
    assert first > 0 and counter.reads == first


def test_nothing_is_printed_while_disabled(tmp_path):
    callback = make(False, log_interval_seconds=0.0)
    callback.disable()
    assert fit(tmp_path, callback)[1] == ""
    callback.enable()
    assert fit(tmp_path, callback)[1] != ""


def test_an_exception_stops_the_display(tmp_path):
    callback = make(True)
    trainer = make_trainer(tmp_path, [callback], enable_checkpointing=False)

    def fail(stage, index):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(TinyModule(fail), TinyData())
    assert callback.console._live_stack == []


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (65, "1:05"), (3725, "1:02:05")])
def test_durations_are_formatted(seconds, text):
    assert progress.format_duration(seconds) == text
