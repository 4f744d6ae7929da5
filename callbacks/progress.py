"""Progress display on the console: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from callbacks.throughput import Rates, ThroughputMeter

WINDOW_SECONDS = 10.0  #: time over which the displayed speeds are averaged


class _Stage:
    """State of a stage (fit, validate, ...) and its remaining time; computed on the host only.

    Args:
        name: shown before the figures.
        total: number of steps or batches, infinite if unknown.
        done: number of steps or batches that an earlier run completed.
    """

    def __init__(self, name: str, total: float, done: int = 0) -> None:
        self.name = name
        self.total = int(total) if math.isfinite(total) and total > 0 else None
        self.done = self.first = done
        self.started = time.monotonic()

    @property
    def left(self) -> str:
        """Remaining time at the average speed so far, such as ``1:05 left``; empty if unknown."""
        if self.total is None or self.done <= self.first:
            return ""
        seconds_per_step = (time.monotonic() - self.started) / (self.done - self.first)
        return f"{format_duration(max(0, self.total - self.done) * seconds_per_step)} left"


class _Bars:
    """A rich progress bar per stage; stages may be nested."""

    def __init__(self, console: Console, interval_seconds: float) -> None:
        self.interval_seconds = interval_seconds
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"), console=console, refresh_per_second=4,
        )  # fmt: skip
        self._tasks: dict[_Stage, TaskID] = {}

    def open(self, stage: _Stage) -> None:
        self._bars.start()
        self._tasks[stage] = self._bars.add_task(stage.name, total=stage.total, completed=stage.done, text="")

    def advance(self, stage: _Stage) -> None:
        self._bars.update(self._tasks[stage], completed=stage.done)

    def show(self, stage: _Stage, text: str) -> None:
        self._bars.update(self._tasks[stage], completed=stage.done, text=text)

    def close(self, stage: _Stage, keep: bool) -> None:
        task = self._tasks.pop(stage)
        if not keep:
            self._bars.remove_task(task)
        if not self._tasks:
            self._bars.refresh()
            self._bars.stop()


class _Lines:
    """Plain lines, one every few seconds."""

    def __init__(self, console: Console, interval_seconds: float) -> None:
        self.interval_seconds = interval_seconds
        self._console = console

    def open(self, stage: _Stage) -> None:
        pass

    def advance(self, stage: _Stage) -> None:
        pass

    def show(self, stage: _Stage, text: str) -> None:
        total = f"/{stage.total}" if stage.total else ""
        self._console.print(f"{stage.name} {stage.done}{total}  {text}", highlight=False, soft_wrap=True, markup=False)
        self._console.file.flush()

    def close(self, stage: _Stage, keep: bool) -> None:
        pass


class ConsoleProgress(ProgressBar):
    """Shows step, loss, tokens/s, findings/s, learning rate and remaining time of a fit, and batches of other stages.

    On a terminal it shows a bar; otherwise (CI, nohup, a pipe) it prints a plain line every ``log_interval_seconds``.
    The loss is read from the device only when it is shown. The module logs its loss without ``prog_bar=True``, because
    Lightning reads such a metric from the device at every batch.

    Args:
        refresh_seconds: seconds between two updates on a terminal.
        log_interval_seconds: seconds between two plain lines.
        plain: True prints lines on a terminal, too; False shows bars everywhere; None shows bars on a terminal only.
        loss: name of the logged metric that is shown as loss.
    """

    def __init__(
        self,
        refresh_seconds: float = 1.0,
        log_interval_seconds: float = 10.0,
        plain: bool | None = None,
        loss: str = "train/loss",
    ) -> None:
        super().__init__()
        self.refresh_seconds, self.log_interval_seconds, self.plain, self.loss = (
            refresh_seconds,
            log_interval_seconds,
            plain,
            loss,
        )
        self.console = Console()
        self._enabled = True
        self._display: _Bars | _Lines | None = None
        self._meter = ThroughputMeter()
        self._rates: Rates | None = None
        self._fit: _Stage | None = None
        self._other: _Stage | None = None
        self._shown_at = -math.inf

    def disable(self) -> None:
        """Disables the display; Lightning calls it on all ranks but zero."""
        self._enabled = False

    def enable(self) -> None:
        """Enables the display."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the bar."""
        self.console.print(*args, **kwargs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the bar of the fit, which counts optimizer steps."""
        self._meter.restart()
        self._fit = self._open("fit", trainer.estimated_stepping_batches, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch; reads loss and speed if the interval has passed."""
        if self._fit is None:
            return
        self._meter.count(batch)
        stepped, self._fit.done = trainer.global_step != self._fit.done, trainer.global_step
        if stepped:
            self._advance(self._fit, lambda: self._figures(trainer), last=self._fit.done == self._fit.total)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens a bar that counts validation batches."""
        self._meter.pause()
        name, batches = "validate", trainer.num_val_batches
        if trainer.sanity_checking:
            name, batches = "sanity check", trainer.num_sanity_val_batches
        self._other = self._open(name, _sum(batches))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the bar, and prints the metrics inside a fit; in ``validate`` Lightning prints them as a table."""
        self._close_other()
        self._meter.resume()
        if self._fit is not None and self._enabled and not trainer.sanity_checking:
            metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            figures = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self.console.print(f"step {trainer.global_step}  {figures}", highlight=False, soft_wrap=True, markup=False)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens a bar that counts test batches."""
        self._other = self._open("test", _sum(trainer.num_test_batches))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens a bar that counts prediction batches."""
        self._other = self._open("predict", _sum(trainer.num_predict_batches))

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Counts a batch."""
        if self._other is not None:
            self._other.done += 1
            stage = self._other
            self._advance(stage, lambda: stage.left, last=stage.done == stage.total)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the display; the finished bar stays on the console."""
        self._close_all()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the bar."""
        self._close_other()

    on_predict_end = on_test_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stops the display."""
        self._close_all()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stops the display."""
        self._close_all()

    def _open(self, name: str, total: float, done: int = 0) -> _Stage | None:
        if not self._enabled:
            return None
        if self._display is None:
            plain = not self.console.is_terminal if self.plain is None else self.plain
            self._display = (
                _Lines(self.console, self.log_interval_seconds) if plain else _Bars(self.console, self.refresh_seconds)
            )
        stage = _Stage(name, total, done)
        self._display.open(stage)
        self._shown_at = -math.inf if name == "fit" else time.monotonic()  # the first step is shown immediately
        return stage

    def _advance(self, stage: _Stage, text: Any, last: bool) -> None:
        assert self._display is not None
        now = time.monotonic()
        if last or now - self._shown_at >= self._display.interval_seconds:
            self._shown_at = now
            self._display.show(stage, text())
        else:
            self._display.advance(stage)

    def _figures(self, trainer: Trainer) -> str:
        """Returns the text of a fit; reads the loss from the device."""
        assert self._fit is not None
        rates = self._meter.read()
        if rates.seconds >= WINDOW_SECONDS:
            self._rates = rates
            self._meter.restart()
        shown, loss, parts = self._rates or rates, trainer.callback_metrics.get(self.loss), []
        if loss is not None:
            parts.append(f"loss {float(loss):.4f}")
        if shown.tokens:
            parts.append(f"{trainer.world_size * shown.per_second(shown.tokens):,.0f} tokens/s")
            parts.append(f"{trainer.world_size * shown.per_second(shown.findings):,.1f} findings/s")
        if trainer.optimizers:
            parts.append(f"lr {float(trainer.optimizers[0].param_groups[0]['lr']):.2e}")
        return "  ".join([*parts, self._fit.left])

    def _close_other(self) -> None:
        if self._other is not None and self._display is not None:
            self._display.close(self._other, keep=self._fit is None)
            self._other = None

    def _close_all(self) -> None:
        self._close_other()
        if self._fit is not None and self._display is not None:
            self._display.close(self._fit, keep=True)
        self._fit = self._display = self._rates = None


def format_duration(seconds: float) -> str:
    """Formats a duration as ``m:ss`` or ``h:mm:ss``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _sum(batches: Any) -> float:
    """Returns the number of batches of all loaders; Lightning has one number or a list."""
    return float(sum(batches) if isinstance(batches, list) else batches)
