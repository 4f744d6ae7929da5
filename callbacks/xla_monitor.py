"""Compilations and host transfers of XLA, which cost minutes and stalls where nobody looks for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.batch import Batch

READ = "aten::_local_scalar_dense"  #: counted by torch_xla for each .item(), float() or bool() of a tensor


@dataclass(frozen=True)
class Counts:
    """What torch_xla has counted since the process began.

    Attributes:
        compilations: graphs compiled.
        compile_seconds: spent on them.
        transfers: of tensors from the devices to the host.
        on_host: operation -> times that torch_xla had to leave it to the host's CPU.
    """

    compilations: int = 0
    compile_seconds: float = 0.0
    transfers: int = 0
    on_host: dict[str, int] = field(default_factory=dict)

    @classmethod
    def now(cls) -> Counts:
        """Reads ``torch_xla.debug.metrics``."""
        from torch_xla.debug import metrics

        compiled, nanoseconds = (metrics.metric_data("CompileTime") or (0, 0))[:2]
        transfers = (metrics.metric_data("TransferFromDeviceTime") or (0,))[0]
        names = [name for name in metrics.counter_names() if name.startswith("aten::")]
        on_host = {name: metrics.counter_value(name) for name in names}
        return cls(int(compiled), nanoseconds / 1e9, int(transfers), on_host)

    def more_on_host(self, before: Counts) -> list[str]:
        """Operations that the host has computed since."""
        return [name for name, count in self.on_host.items() if count > before.on_host.get(name, 0)]


class XLAMonitor(Callback):
    """Logs ``xla/compilations``, ``xla/compile_seconds`` and ``xla/transfers``, and warns when a step costs one.

    The first steps compile; from the third on a step should neither compile nor read from the devices. Reads by loggers
    and checkpoints lie between steps and do not count as a step's. Name it first among the callbacks, so that theirs
    do not either. Elsewhere than on XLA it does nothing.

    Args:
        warm_up: optimizer steps that may compile; validation and checkpoints may the first time, too.
    """

    def __init__(self, warm_up: int = 3) -> None:
        if warm_up < 1:
            raise ValueError(f"warm_up {warm_up} is less than 1; the first step always compiles")
        self.warm_up = warm_up
        self._active = False
        self._first_step = 0
        self._before = Counts()
        self._shapes: set[tuple[int, ...]] = set()
        self._logged_step = -1
        self._warned: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks where the module will run."""
        self._active = trainer.strategy.root_device.type == "xla"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the first step of this process."""
        self._first_step = trainer.global_step
        self._logged_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Counts what happened before the step."""
        if self._active:
            self._before = Counts.now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts what the step cost, warns, and logs with the other figures."""
        if not self._active:
            return
        now, new_shape = Counts.now(), self._is_new_shape(batch)
        if trainer.global_step - self._first_step > self.warm_up:
            self._warn(trainer, now, new_shape)
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        stepped, self._logged_step = trainer.global_step != self._logged_step, trainer.global_step
        if stepped and interval and trainer.global_step % interval == 0:
            self._log(trainer, now)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the run's sums."""
        if self._active:
            self._log(trainer, Counts.now())

    def _is_new_shape(self, batch: Any) -> bool:
        shape = tuple(batch.input_ids_BT.shape) if isinstance(batch, Batch) else ()
        new = shape not in self._shapes
        self._shapes.add(shape)
        return new

    def _warn(self, trainer: Trainer, now: Counts, new_shape: bool) -> None:
        step = trainer.global_step
        if now.compilations > self._before.compilations:
            seconds = now.compile_seconds - self._before.compile_seconds
            cause = (
                "the batch has another shape than those before: use fixed rows and drop the last, short batch"
                if new_shape
                else "the graph differs from the steps before: a Python number or a branch that changes from step to "
                "step, or a metric computed now and then"
            )
            self._once("compilations", f"XLA compiled a graph again in step {step} ({seconds:.0f} s): {cause}")
        if now.transfers > self._before.transfers:
            named = [name for name in now.more_on_host(self._before) if name != READ]
            cause = (
                f"{', '.join(named)} can't run there and was computed on the host"
                if named
                else "a value was read by .item(), float() or a branch on it: keep it on the device and log it"
            )
            self._once("transfers", f"step {step} waited for a value from the XLA device: {cause}")

    def _once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            rank_zero_warn(f"{message}. Such a step is many times slower; this is said once")

    def _log(self, trainer: Trainer, now: Counts) -> None:
        figures = {
            "xla/compilations": float(now.compilations),
            "xla/compile_seconds": now.compile_seconds,
            "xla/transfers": float(now.transfers),
        }
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
