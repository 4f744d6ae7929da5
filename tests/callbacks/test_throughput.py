"""Tests of Throughput: counts, logged rates, pauses, FLOP and peak memory; no reads from the device."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from callbacks import Throughput, throughput
from callbacks.throughput import ThroughputMeter, flop_per_token, peak_memory
from tests.helpers.device_reads import CountDeviceReads
from tests.helpers.fake_clock import FakeClock, slow_step
from tests.helpers.tiny_run import (
    FINDINGS,
    PADDED,
    ROW,
    SUPERVISED,
    TinyData,
    TinyModule,
    make_batch,
    make_trainer,
    set_global_step,
)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(throughput, "time", FakeClock())
    return throughput.time


def test_meter_counts_tokens_and_findings_of_batches(clock):
    meter = ThroughputMeter()
    for index in range(4):
        meter.count(make_batch(index))
    clock.now += 2
    rates = meter.read()
    assert (rates.tokens, rates.padding) == (4 * 2 * (ROW - PADDED), 4 * 2 * PADDED)
    assert (rates.supervised, rates.findings, rates.seconds) == (4 * 2 * SUPERVISED, 4 * 2 * FINDINGS, 2)
    assert rates.per_second(rates.findings) == 8
    assert rates.padding_share == PADDED / ROW
    meter.restart()
    assert meter.empty and meter.read().tokens == 0


def test_meter_excludes_pauses(clock):
    meter = ThroughputMeter()
    clock.now += 1
    meter.pause()
    clock.now += 10
    assert meter.read().seconds == 1
    meter.resume()
    clock.now += 2
    meter.resume()  # without a pause it has no effect
    assert meter.read().seconds == 3


def test_meter_ignores_other_types_of_batches():
    meter = ThroughputMeter()
    meter.count(torch.ones(3))
    assert meter.empty


def test_meter_never_reads_the_device():
    meter = ThroughputMeter()
    batch = make_batch(0)
    with CountDeviceReads() as counter:
        for _ in range(5):
            meter.count(batch)
        meter.read()
    assert counter.reads == 0


def logged(tmp_path, callback, **options):
    trainer = make_trainer(tmp_path, [callback], enable_checkpointing=False, **options)
    trainer.logger = CSVLogger(tmp_path, name="csv")
    values = []
    original = trainer.logger.log_metrics
    trainer.logger.log_metrics = lambda metrics, step=None: (values.append((step, metrics)), original(metrics, step))
    trainer.fit(TinyModule(), TinyData())
    return trainer, [(step, m) for step, m in values if any(name.startswith("throughput/") for name in m)]


def test_logs_every_interval_and_the_remainder(tmp_path, clock, monkeypatch):
    """12 batches with an accumulation of 2 are 6 steps: an interval of 4 steps (8 batches), then the last 4 batches."""
    monkeypatch.setattr(TinyModule, "training_step", slow_step(clock, TinyModule.training_step, 0.5))
    trainer, windows = logged(tmp_path, Throughput(), accumulate_grad_batches=2, log_every_n_steps=4)
    assert [step for step, _ in windows] == [3, 6]
    for _, metrics in windows:
        assert metrics["throughput/tokens_per_second"] == 2 * 2 * (ROW - PADDED)
        assert metrics["throughput/supervised_tokens_per_second"] == 2 * 2 * SUPERVISED
        assert metrics["throughput/findings_per_second"] == 2 * 2 * FINDINGS
        assert metrics["throughput/padding_share"] == PADDED / ROW
        assert 0.01 < metrics["memory/peak_gib"] < 1000
        assert "throughput/mfu" not in metrics
    assert trainer.callback_metrics["throughput/findings_per_second"] == 2 * 2 * FINDINGS


def test_validation_time_is_excluded(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(TinyModule, "training_step", slow_step(clock, TinyModule.training_step, 0.5))
    monkeypatch.setattr(TinyModule, "validation_step", slow_step(clock, TinyModule.validation_step, 60))
    _, windows = logged(tmp_path, Throughput(), val_check_interval=3, log_every_n_steps=12)
    assert windows[0][1]["throughput/findings_per_second"] == 2 * 2 * FINDINGS


def test_the_device_is_not_read_between_logs(tmp_path):
    callback, batch = Throughput(), make_batch(0)
    trainer = make_trainer(tmp_path, [callback], enable_checkpointing=False, log_every_n_steps=1000)
    module = TinyModule()
    callback.on_train_start(trainer, module)
    with CountDeviceReads() as counter:
        for index in range(10):
            set_global_step(trainer, index + 1)
            callback.on_train_batch_end(trainer, module, None, batch, index)
    assert counter.reads == 0


def test_model_flop_utilization(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(TinyModule, "training_step", slow_step(clock, TinyModule.training_step, 1))
    _, windows = logged(tmp_path, Throughput(peak_tflops=1e-9), log_every_n_steps=12)
    # the only linear layer of the tiny model is its trainable lm_head of 8 x 11, which only supervised tokens use
    assert windows[0][1]["throughput/mfu"] == pytest.approx(6 * 8 * 11 * 2 * SUPERVISED / 1e3)
    with pytest.raises(ValueError, match="peak_tflops=0: must be positive"):
        Throughput(peak_tflops=0)


def test_flop_by_layer():
    model = nn.ModuleDict(
        {"embed": nn.Embedding(100, 8), "q_proj": nn.Linear(8, 16), "lora_A": nn.Linear(8, 2, bias=False)}
    )
    model["lm_head"] = nn.Linear(8, 100)
    for name in ("q_proj", "lm_head"):
        model[name].requires_grad_(False)
    assert flop_per_token(model) == (4 * 8 * 16 + 6 * 8 * 2, 4 * 8 * 100)


def test_flop_of_packed_weights():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 128, bias=False, quant_type="nf4").to("cpu")
    assert layer.weight.numel() < 64 * 128
    assert flop_per_token(layer) == (4 * 64 * 128, 0)


def test_peak_memory_of_the_process_grows():
    before = peak_memory(torch.device("cpu"))
    hold = torch.ones(before // 4 + 2**24)
    assert peak_memory(torch.device("cpu")) > before + 2**25
    assert hold.numel()
