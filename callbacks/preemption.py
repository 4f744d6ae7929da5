"""A signal ends a run where it can be taken up again: after an optimizer step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from callbacks.paths import checkpoint_folder, run_folder

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Interrupted(SystemExit):
    """Ends the process with 128 + the signal's number, as a shell reports it, unless somebody catches it.

    An exit and not ``trainer.should_stop``, which would first validate, and mark the epoch as finished in whatever is
    saved after it, so that a resumed run would skip the rest.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum)


class Preemption(Callback):
    """Saves ``last.ckpt`` and stops after SIGTERM, SIGINT (the first Ctrl-C) or SIGUSR1.

    The signal only sets a flag. After the next optimizer step (so that no accumulated gradient is lost), or after the
    next validation batch, the state is saved beside the other checkpoints and :class:`Interrupted` is raised. A second
    Ctrl-C stops at once, without saving, and so does any signal once training has ended. An interrupted validation is
    not repeated on resume; training goes on exactly.

    Lightning's own SIGTERM handler stops in the middle of an accumulation window and saves nothing, and its broadcast
    from inside a signal handler may deadlock several ranks; this one takes its place from the first step on, until the
    fit is over. Under SLURM with automatic requeueing, SIGUSR1 stays Lightning's.

    Args:
        agree_every_n_steps: with several ranks, optimizer steps between two checks whether any has got a signal, one
            reduction of a number each; a single process looks at its flag after every step.

    Attributes:
        interrupted: the signal that stopped the run, or None.
    """

    def __init__(self, agree_every_n_steps: int = 10) -> None:
        if agree_every_n_steps < 1:
            raise ValueError(f"agree_every_n_steps {agree_every_n_steps} is less than 1")
        self.agree_every_n_steps = agree_every_n_steps
        self.interrupted: signal.Signals | None = None
        self._received: int | None = None
        self._previous: dict[int, Any] = {}
        self._last_step = 0
        self._between_steps = self._training = False
        self._run = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Asks for the run folder, on every rank."""
        self._run = run_folder(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals over, after Lightning has installed its own handlers."""
        self._received, self.interrupted = None, None
        self._last_step, self._between_steps, self._training = trainer.global_step, True, True
        self._install()
        if trainer.received_sigterm:  # while the model was built: there is nothing to save yet
            self.interrupted = signal.SIGTERM
            raise Interrupted(signal.SIGTERM)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops if a signal came and the batch ended with an optimizer step."""
        self._between_steps = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        if self._between_steps and (trainer.world_size == 1 or trainer.global_step % self.agree_every_n_steps == 0):
            self._stop_if_asked(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stops inside a validation that began between two steps; several ranks wait, as their batches may differ."""
        if self._previous and self._between_steps and trainer.world_size == 1:
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops after a signal that came behind the last step; what follows (an evaluation) may be stopped at once."""
        self._stop_if_asked(trainer)
        self._training = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the signals back."""
        self._restore()

    def _install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread only
        for signum in SIGNALS:
            previous = signal.getsignal(signum)
            if signum == getattr(signal, "SIGUSR1", None) and callable(previous):
                continue  # Lightning's, under SLURM with requeueing
            self._previous[signum] = previous
            signal.signal(signum, self._receive)

    def _restore(self) -> None:
        while self._previous:
            signum, handler = self._previous.popitem()
            if signal.getsignal(signum) == self._receive:  # Lightning may have put back what was there before it
                signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if not self._training or (self._received is not None and signum == signal.SIGINT):
            self.interrupted = signal.Signals(signum)
            raise Interrupted(signum)
        if self._received is not None:
            return
        self._received = signum
        text = f"\n{signal.Signals(signum).name}: saving after this optimizer step; Ctrl-C (again) stops at once\n"
        os.write(2, text.encode())  # print may be what the signal interrupted, and can't be entered twice

    def _stop_if_asked(self, trainer: Trainer) -> None:
        asked = self._received is not None
        if not (trainer.strategy.reduce_boolean_decision(asked, all=False) if trainer.world_size > 1 else asked):
            return
        self.interrupted = signal.Signals(self._received or signal.SIGTERM)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = self._save(trainer)
            rank_zero_info(f"Stopped by {self.interrupted.name} after step {trainer.global_step}; saved {path}")
            rank_zero_info("To go on, give the same command again with: --ckpt_path last")
        raise Interrupted(self.interrupted)

    def _save(self, trainer: Trainer) -> Path:
        path = checkpoint_folder(trainer, self._run) / "last.ckpt"
        if trainer.is_global_zero and path.is_symlink():
            path.unlink()  # save_last="link" points at another checkpoint, which must not be overwritten
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_last:
                callback.last_model_path = str(path)  # it then replaces this file, rather than adding last-v1.ckpt
        trainer.save_checkpoint(path, weights_only=False)
        return path
