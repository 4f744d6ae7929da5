"""Throughput and peak memory of a training run, measured without synchronizing with the accelerator."""

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
    """Counts of one rank over an interval of time.

    Attributes:
        seconds: length of the interval without pauses.
        tokens: computed tokens without padding; a shared prefix counts once per row.
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
        """Padding positions divided by all positions."""
        return self.padding / max(1, self.tokens + self.padding)

    def per_second(self, count: float) -> float:
        """Returns a count divided by the seconds of the interval."""
        return count / max(self.seconds, 1e-9)


class ThroughputMeter:
    """Counts the tokens and findings of batches over time, without reading from the device.

    The counts are attributes of the batch, and the time is the host's. A GPU lags the host by at most its queue, one or
    two steps, so the time of several steps is correct.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Resets the counts and the clock."""
        self._started, self._paused = time.monotonic(), 0.0
        self._paused_at: float | None = None
        self._positions = self._supervised = self._findings = self._padding = 0

    def pause(self) -> None:
        """Stops the clock, for validation."""
        self._paused_at = time.monotonic()

    def resume(self) -> None:
        """Resumes the clock."""
        if self._paused_at is not None:
            self._paused += time.monotonic() - self._paused_at
            self._paused_at = None

    def count(self, batch: Any) -> None:
        """Adds a batch; ignores other types than :class:`Batch`, which have no counts."""
        if not isinstance(batch, Batch):
            return
        self._positions += batch.segment_ids_BT.numel()
        self._supervised += batch.supervised
        self._findings += batch.findings
        self._padding += batch.padding

    @property
    def empty(self) -> bool:
        """Whether no batch was counted since the restart."""
        return self._positions == 0

    def read(self) -> Rates:
        """Returns the counts so far."""
        end = time.monotonic() if self._paused_at is None else self._paused_at
        seconds = end - self._started - self._paused
        tokens = self._positions - self._padding
        return Rates(seconds, tokens, self._supervised, self._findings, self._padding)


class Throughput(Callback):
    """Logs speed, padding and peak memory every ``log_every_n_steps`` optimizer steps.

    Rates are those of all ranks: the rate of rank zero times the number of ranks, because all ranks have rows of the
    same size. Validation time is excluded; the time between steps (loading, callbacks, checkpoints) is included.

    Logged: ``throughput/tokens_per_second`` (computed tokens, no padding), ``.../supervised_tokens_per_second``,
    ``.../findings_per_second``, ``.../padding_share``, ``memory/peak_gib`` (memory allocated by torch on a GPU,
    otherwise the resident set of the process), and ``throughput/mfu`` with ``peak_tflops``.

    Args:
        peak_tflops: dense peak of one device in the compute dtype, in TFLOP/s, such as 989 for bf16 on an H100 SXM.
            The model FLOP utilization is then logged, by the convention of :func:`flop_per_token`.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(
                f"callbacks.Throughput: peak_tflops={peak_tflops}: must be positive, such as 989 (bf16, H100 SXM)"
            )
        self.peak_tflops = peak_tflops
        self._meter = ThroughputMeter()
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
            # Lightning logs train/loss under the number of steps before this one; the same x-axis is used here
            self._log(trainer, pl_module, step=trainer.global_step - 1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._meter.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resumes the clock."""
        self._meter.resume()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the remaining counts, so that a run shorter than the interval has figures, too."""
        if not self._meter.empty:
            self._log(trainer, pl_module, step=trainer.global_step)

    def _log(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        rates = self._meter.read()
        self._meter.restart()
        metrics = {"memory/peak_gib": peak_memory(pl_module.device) / 2**30}
        if rates.tokens:
            metrics |= self._speeds(rates, trainer.world_size)
        # to the loggers directly, as Lightning's own monitors do: self.log would copy each number to the device
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
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
    """Counts the floating-point operations of a training step per token, from the weights of the linear layers.

    A frozen weight costs 4 FLOP per token (2 in the forward pass, 2 for the gradient of its input), a trainable one 6
    (2 more for its own gradient). Attention scores, norms, recomputation and dequantization are not counted, and a
    layer below the lowest adapter counts as if its input needed a gradient. Sizes are taken from the shapes of the
    layers, because a 4-bit weight packs two numbers in a byte.

    Args:
        module: the model. In a PEFT model the adapters are separate linear layers.

    Returns:
        FLOP per computed token for all layers but ``lm_head``, and FLOP per supervised token for ``lm_head``.
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
    """Returns the peak memory in bytes: allocated by torch on a GPU, otherwise resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
