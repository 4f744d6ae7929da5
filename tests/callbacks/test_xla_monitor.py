"""Tests of XLAMonitor with simulated counters of torch_xla, which is not installed in every environment."""

import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch

from callbacks import XLAMonitor, xla_monitor
from callbacks.xla_monitor import READ, Counts
from tests.helpers.tiny_run import TinyData, TinyModule, make_batch, make_trainer


class FakeLogger:
    def __init__(self):
        self.logged = []

    def log_metrics(self, metrics, step):
        self.logged.append((step, metrics))


class Steps:
    """Runs the callback's hooks for one batch after another, each of them an optimizer step.

    Attributes:
        counts: counters that torch_xla would report.
        messages: warnings of all steps.
    """

    def __init__(self, monkeypatch, callback, log_every_n_steps=2):
        self.callback, self.counts, self.messages = callback, Counts(), []
        self.trainer = SimpleNamespace(
            strategy=SimpleNamespace(root_device=SimpleNamespace(type="xla")), global_step=0,
            log_every_n_steps=log_every_n_steps, loggers=[FakeLogger()], callback_metrics={},
        )  # fmt: skip
        monkeypatch.setattr(Counts, "now", classmethod(lambda cls: self.counts))
        monkeypatch.setattr(xla_monitor, "rank_zero_warn", self.messages.append)
        callback.setup(self.trainer, None, "fit")
        callback.on_train_start(self.trainer, None)

    def run(self, batch=None, **changes):
        """Runs a step that changes the counters."""
        batch = make_batch(0) if batch is None else batch
        self.callback.on_train_batch_start(self.trainer, None, batch, 0)
        self.counts = Counts(**vars(self.counts) | changes)
        self.trainer.global_step += 1
        self.callback.on_train_batch_end(self.trainer, None, None, batch, 0)


@pytest.fixture
def steps(monkeypatch):
    return Steps(monkeypatch, XLAMonitor(warm_up=1))


def test_the_first_steps_may_compile(steps):
    steps.run(compilations=3, compile_seconds=40.0)
    assert steps.messages == []


def test_a_later_compilation_is_reported_once_with_its_time(steps):
    steps.run()
    steps.run(compilations=1, compile_seconds=12.0)
    steps.run(compilations=2, compile_seconds=24.0)
    (message,) = steps.messages
    assert "compiled a graph again in step 2 (12 s): the graph differs" in message


def test_a_new_shape_is_reported_as_the_cause_of_a_compilation(steps):
    steps.run()
    short = make_batch(0)
    steps.run(batch=type(short)(**vars(short) | {"input_ids_BT": short.input_ids_BT[:1]}), compilations=1)
    (message,) = steps.messages
    assert "the batch has a new shape. Fix: use rows of a fixed length" in message


def test_a_read_of_a_value_is_reported(steps):
    steps.run()
    steps.run(transfers=1, on_host={READ: 1})
    (message,) = steps.messages
    assert "step 2 waited for a value from the XLA device: a value was read by .item()" in message


def test_an_unsupported_operation_is_named(steps):
    steps.run(on_host={"aten::nonzero": 1, "aten::sort": 4})
    steps.run(transfers=1, on_host={READ: 1, "aten::nonzero": 2, "aten::sort": 4})
    (message,) = steps.messages
    assert "does not support aten::nonzero, which the host computed" in message


def test_transfers_between_steps_are_not_counted(steps):
    steps.run()
    steps.counts = Counts(transfers=5)  # by a logger
    steps.run()
    assert steps.messages == []


def test_counters_are_logged_every_interval_and_at_the_end(steps):
    steps.run(compilations=2, compile_seconds=3.5, transfers=1)
    for _ in range(4):
        steps.run()
    steps.callback.on_train_end(steps.trainer, None)
    figures = {"xla/compilations": 2.0, "xla/compile_seconds": 3.5, "xla/transfers": 1.0}
    assert steps.trainer.loggers[0].logged == [(1, figures), (3, figures), (5, figures)]
    assert steps.trainer.callback_metrics == {name: torch.tensor(value) for name, value in figures.items()}


def test_counters_are_read_from_torch_xla(monkeypatch):
    counters = {"aten::nonzero": 2, "xla::add": 7, READ: 1}
    metrics = ModuleType("torch_xla.debug.metrics")
    metrics.metric_data = {"CompileTime": (3, 4.5e9, ()), "TransferFromDeviceTime": None}.get
    metrics.counter_names = lambda: list(counters)
    metrics.counter_value = counters.get
    debug = ModuleType("torch_xla.debug")
    debug.metrics = metrics
    for name, module in (("torch_xla", ModuleType("torch_xla")), ("torch_xla.debug", debug)):
        monkeypatch.setitem(sys.modules, name, module)
    assert Counts.now() == Counts(3, 4.5, 0, {"aten::nonzero": 2, READ: 1})


def test_on_other_devices_nothing_is_logged(tmp_path):
    trainer = make_trainer(tmp_path, [XLAMonitor()], enable_checkpointing=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*XLA.*")
        trainer.fit(TinyModule(), TinyData())
    assert not [name for name in trainer.callback_metrics if name.startswith("xla/")]


def test_an_invalid_argument_is_an_error():
    with pytest.raises(ValueError, match="warm_up=0: must be at least 1"):
        XLAMonitor(warm_up=0)
