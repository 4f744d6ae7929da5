"""Tokens, findings and memory of a training run, without waiting for the accelerator in between."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from datamodules.batch import Batch


@dataclass(frozen=True)
class Rates:
    """What was processed in a stretch of time, on one rank.

    Attributes:
        seconds: length of the stretch, pauses left out.
        tokens: computed tokens, padding left out; a shared prefix counts once a row.
        supervised: tokens with a label.
        findings: examples.
        padding: padding positions.
    """

    seconds: float
    tokens: int
    supervised: int
    findings: int
    padding: int

    @property
    def padding_share(self) -> float:
        """Padding positions over all positions."""
        return self.padding / max(1, self.tokens + self.padding)

    def per_second(self, count: float) -> float:
        """A count over the stretch's seconds."""
        return count / max(self.seconds, 1e-9)


class Meter:
    """Counts batches against the host's clock, by what they say of themselves: the device is never asked.

    A GPU works behind the host by at most its queue, a step or two, so a stretch of several steps is timed right.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted, and starts the clock."""
        self._started, self._paused_at, self._paused = time.monotonic(), None, 0.0
        self._positions = self._supervised = self._findings = self._padding = 0

    _paused_at: float | None

    def pause(self) -> None:
        """Stops the clock, for validation."""
        self._paused_at = time.monotonic()

    def resume(self) -> None:
        """Lets the clock go on."""
        if self._paused_at is not None:
            self._paused += time.monotonic() - self._paused_at
            self._paused_at = None

    def count(self, batch: Any) -> None:
        """Adds a batch; anything but a :class:`Batch` has no tokens that could be told."""
        if not isinstance(batch, Batch):
            return
        self._positions += batch.segment_ids_BT.numel()
        self._supervised += batch.supervised
        self._findings += batch.findings
        self._padding += batch.padding

    @property
    def empty(self) -> bool:
        """True if no batch was counted since the restart."""
        return self._positions == 0

    def read(self) -> Rates:
        """Returns the counts so far."""
        end = time.monotonic() if self._paused_at is None else self._paused_at
        seconds = end - self._started - self._paused
        tokens = self._positions - self._padding
        return Rates(seconds, tokens, self._supervised, self._findings, self._padding)


class Throughput(Callback):
    """Logs speed, padding and peak memory every ``log_every_n_steps`` optimizer steps.

    Rates are those of all ranks: rank zero's times the number of ranks, since all have rows of one size. Validation
    time is left out; the time between steps (loading, callbacks, checkpoints) is not.

    Logged: ``throughput/tokens_per_second`` (computed tokens, no padding), ``.../supervised_tokens_per_second``,
    ``.../findings_per_second``, ``.../padding_share``, ``memory/peak_gib`` (what torch allocated on a GPU, or the
    resident set of the process), and ``throughput/mfu`` with ``peak_tflops``.

    Args:
        peak_tflops: dense peak of one device in the compute type, such as 989 for bf16 on an H100 SXM. Model FLOP use
            is then logged, by the convention of :func:`flop_per_token`.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"peak_tflops {peak_tflops} is not positive; an H100 SXM has 989 in bf16")
        self.peak_tflops = peak_tflops
        self._meter = Meter()
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._last_step = trainer.global_step
        self._flop = flop_per_token(pl_module) if self.peak_tflops else (0, 0)
        self._meter.restart()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch, and logs after each ``log_every_n_steps``-th optimizer step."""
        self._meter.count(batch)
        stepped = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if stepped and interval and trainer.global_step % interval == 0:
            self._log(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._meter.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the clock go on."""
        self._meter.resume()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs what is left, so that a run shorter than the interval has figures too."""
        if not self._meter.empty:
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rates = self._meter.read()
        self._meter.restart()
        metrics = {"memory/peak_gib": peak_memory(pl_module.device) / 2**30}
        if rates.tokens:
            metrics |= self._speeds(rates, trainer.world_size)
        # to the loggers directly, as Lightning's own monitors do: self.log would put each number on the device
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})

    def _speeds(self, rates: Rates, ranks: int) -> dict[str, float]:
        metrics = {
            "throughput/tokens_per_second": ranks * rates.per_second(rates.tokens),
            "throughput/supervised_tokens_per_second": ranks * rates.per_second(rates.supervised),
            "throughput/findings_per_second": ranks * rates.per_second(rates.findings),
            "throughput/padding_share": rates.padding_share,
        }
        if self.peak_tflops:
            body, head = self._flop
            flop = body * rates.tokens + head * rates.supervised
            metrics["throughput/mfu"] = rates.per_second(flop) / (self.peak_tflops * 1e12)
        return metrics


def flop_per_token(module: nn.Module) -> tuple[int, int]:
    """Floating-point operations that a training step needs, by the weights of the linear layers.

    A frozen weight costs 4 FLOP a token (2 forward, 2 for the gradient of its input), a trainable one 6 (2 more for its
    own). Attention scores, norms, recomputation and dequantisation count nothing, and a layer below the lowest adapter
    counts as if its input needed a gradient. Sizes come from the layers' shapes: a 4-bit weight packs two in a byte.

    Args:
        module: the model; on a wrapped one, adapters are linear layers of their own.

    Returns:
        FLOP a computed token for all layers but ``lm_head``, and FLOP a supervised token for ``lm_head``.
    """
    body = head = 0
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            flop = (6 if layer.weight.requires_grad else 4) * layer.in_features * layer.out_features
            if "lm_head" in name.split("."):
                head += flop
            else:
                body += flop
    return body, head


def peak_memory(device: torch.device) -> int:
    """Most bytes that were in use so far: allocated by torch on a GPU, resident in the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
