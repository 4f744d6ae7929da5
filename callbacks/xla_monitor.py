"""Monitor of XLA's compilations and host transfers, which slow down a run without an error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.batch import Batch

READ = "aten::_local_scalar_dense"  #: counter of torch_xla for .item(), float() and bool() of a tensor


@dataclass(frozen=True)
class Counts:
    """Counters of torch_xla since the start of the process.

    Attributes:
        compilations: number of compiled graphs.
        compile_seconds: time of the compilations.
        transfers: number of tensors transferred from the devices to the host.
        on_host: operation -> number of times that torch_xla computed it on the host's CPU.
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
        """Returns the operations that the host has computed since ``before``."""
        return [name for name, count in self.on_host.items() if count > before.on_host.get(name, 0)]


class XLAMonitor(Callback):
    """Logs ``xla/compilations``, ``xla/compile_seconds`` and ``xla/transfers``, and warns if a step causes one.

    The first steps compile. From the third on, a step should neither compile nor read from the devices. Reads by
    loggers and checkpoints happen between steps and are not counted as part of a step. Put this callback first in the
    list of callbacks, so that reads by the others are not counted either. On other devices it does nothing.

    Args:
        warm_up: number of optimizer steps that may compile. The first validation and checkpoint may compile, too.
    """

    def __init__(self, warm_up: int = 3) -> None:
        if warm_up < 1:
            raise ValueError(
                f"callbacks.XLAMonitor: warm_up={warm_up}: must be at least 1, because the first step always compiles"
            )
        self.warm_up = warm_up
        self._active = False
        self._first_step = 0
        self._before = Counts()
        self._shapes: set[tuple[int, ...]] = set()
        self._logged_step = -1
        self._warned: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks whether the module runs on XLA."""
        self._active = trainer.strategy.root_device.type == "xla"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the first step of this process."""
        self._first_step = trainer.global_step
        self._logged_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Reads the counters before the step."""
        if self._active:
            self._before = Counts.now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads the counters after the step, warns, and logs them every ``log_every_n_steps`` optimizer steps."""
        if not self._active:
            return
        now, new_shape = Counts.now(), self._is_new_shape(batch)
        if trainer.global_step - self._first_step > self.warm_up:
            self._warn(trainer, now, new_shape)
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        stepped, self._logged_step = trainer.global_step != self._logged_step, trainer.global_step
        if stepped and interval and trainer.global_step % interval == 0:
            # Lightning logs train/loss under the number of steps before this one; the same x-axis is used here
            self._log(trainer, now, step=trainer.global_step - 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the totals of the run."""
        if self._active:
            self._log(trainer, Counts.now(), step=trainer.global_step)

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
                "the batch has a new shape. Fix: use rows of a fixed length and drop the last, short batch"
                if new_shape
                else "the graph differs from that of earlier steps, because of a Python number or a branch that "
                "changes between steps, or a metric that is not computed in every step"
            )
            self._once("compilations", f"XLA compiled a graph again in step {step} ({seconds:.0f} s): {cause}")
        if now.transfers > self._before.transfers:
            operations = [name for name in now.more_on_host(self._before) if name != READ]
            cause = (
                f"the device does not support {', '.join(operations)}, which the host computed"
                if operations
                else "a value was read by .item(), float() or a branch. Fix: keep it on the device and log it"
            )
            self._once("transfers", f"step {step} waited for a value from the XLA device: {cause}")

    def _once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            rank_zero_warn(f"{message}. Such a step is many times slower. This warning is printed once")

    def _log(self, trainer: Trainer, now: Counts, step: int) -> None:
        figures = {
            "xla/compilations": float(now.compilations),
            "xla/compile_seconds": now.compile_seconds,
            "xla/transfers": float(now.transfers),
        }
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
