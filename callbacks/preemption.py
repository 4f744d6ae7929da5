"""Stop of a run by a signal: after an optimizer step, with a checkpoint from which the run can be resumed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from callbacks.paths import checkpoint_directory, run_directory
from datamodules.errors import one_line

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


OPTIONAL_SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, name))


class Interrupted(SystemExit):
    """Ends the process with status 128 + the number of the signal, as a shell reports it, unless it is caught.

    It is used instead of ``trainer.should_stop``, which validates first and marks the epoch as finished in every later
    checkpoint, so that a resumed run would skip the rest of the epoch.

    Args:
        signum: number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum)


class Preemption(Callback):
    """Saves ``last.ckpt`` and stops after SIGTERM, SIGINT (the first Ctrl-C) or SIGUSR1.

    The signal handler only sets a flag. After the next optimizer step (so that no accumulated gradient is lost), or
    after the next validation batch, the state is saved next to the other checkpoints and :class:`Interrupted` is
    raised. A second Ctrl-C stops at once, without saving, and so does any signal after the end of training. An
    interrupted validation is not repeated on resume; training continues exactly.

    Lightning's own SIGTERM handler stops in the middle of an accumulation window and saves nothing, and its broadcast
    inside a signal handler may deadlock several ranks. This handler replaces it from the first step until the end of
    the fit. Under SLURM with automatic requeueing, Lightning's handler of the requeue signal is replaced, too: it
    writes ``hpc_ckpt_1.ckpt`` into the working directory, and any later job there would resume from it. Here the job is
    requeued after ``last.ckpt`` was saved, and the command line resumes the run of a requeued job from that file.

    Args:
        agree_every_n_steps: with several ranks, optimizer steps between two checks whether any rank received a signal.
            A check is one reduction of a number. A single process checks its flag after every step.

    Attributes:
        interrupted: signal that stopped the run, or None.
    """

    def __init__(self, agree_every_n_steps: int = 10) -> None:
        if agree_every_n_steps < 1:
            raise ValueError(f"callbacks.Preemption: agree_every_n_steps={agree_every_n_steps}: must be at least 1")
        self.agree_every_n_steps = agree_every_n_steps
        self.interrupted: signal.Signals | None = None
        self._received: int | None = None
        self._previous: dict[int, Any] = {}
        self._requeue_signal: int | None = None
        self._last_step = 0
        self._between_steps = self._training = False
        self._run = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolves the run directory; called on all ranks."""
        self._run = run_directory(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs the signal handlers after Lightning has installed its own."""
        self._received, self.interrupted = None, None
        self._last_step, self._between_steps, self._training = trainer.global_step, True, True
        self._install()
        if trainer.received_sigterm:  # received while the model was built: there is nothing to save yet
            self.interrupted = signal.SIGTERM
            raise Interrupted(signal.SIGTERM)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops if a signal was received and the batch ended with an optimizer step."""
        self._between_steps = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        if self._between_steps and (trainer.world_size == 1 or trainer.global_step % self.agree_every_n_steps == 0):
            self._stop_if_requested(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stops inside a validation that began between two steps.

        Several ranks wait until the next step, because their numbers of batches may differ.
        """
        if self._previous and self._between_steps and trainer.world_size == 1:
            self._stop_if_requested(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops if a signal was received after the last step; later work (an evaluation) may be stopped at once."""
        self._stop_if_requested(trainer)
        self._training = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restores the previous signal handlers."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restores the previous signal handlers."""
        self._restore()

    def _install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread only
        for signum in dict.fromkeys((*SIGNALS, *OPTIONAL_SIGNALS)):
            previous = signal.getsignal(signum)
            if signum in OPTIONAL_SIGNALS and not _is_lightnings(previous):
                if signum != getattr(signal, "SIGUSR1", None) or callable(previous):
                    continue  # the user's own, or a signal that no one uses
            elif signum in OPTIONAL_SIGNALS:
                self._requeue_signal = signum
            self._previous[signum] = previous
            signal.signal(signum, self._receive)

    def _restore(self) -> None:
        while self._previous:
            signum, handler = self._previous.popitem()
            if signal.getsignal(signum) == self._receive:  # Lightning may have restored its previous handler
                signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if not self._training or (self._received is not None and signum == signal.SIGINT):
            self.interrupted = signal.Signals(signum)
            raise Interrupted(signum)
        if self._received is not None:
            return
        self._received = signum
        text = f"\n{signal.Signals(signum).name}: saving after this optimizer step; Ctrl-C (again) stops at once\n"
        os.write(2, text.encode())  # not print: the signal may have interrupted a print, which is not reentrant

    def _stop_if_requested(self, trainer: Trainer) -> None:
        requested = self._received is not None
        if trainer.world_size > 1:
            requested = trainer.strategy.reduce_boolean_decision(requested, all=False)
        if not requested:
            return
        self.interrupted = signal.Signals(self._received or signal.SIGTERM)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = self._save(trainer)
            rank_zero_info(f"Stopped by {self.interrupted.name} after step {trainer.global_step}; saved {path}")
            if self._received is not None and self._received == self._requeue_signal:
                if trainer.is_global_zero:
                    requeue()
            else:
                rank_zero_info("To resume, rerun the same command with --ckpt_path last")
        raise Interrupted(self.interrupted)

    def _save(self, trainer: Trainer) -> Path:
        path = checkpoint_directory(trainer, self._run) / "last.ckpt"
        if trainer.is_global_zero and path.is_symlink():
            path.unlink()  # save_last="link" links to another checkpoint, which must not be overwritten
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_last:
                callback.last_model_path = str(path)  # it then replaces this file instead of adding last-v1.ckpt
        trainer.save_checkpoint(path, weights_only=False)
        return path


def requeue() -> None:
    """Asks SLURM to start this job again; it then resumes its run."""
    job, program = slurm_job(), shutil.which("scontrol")
    if job is None or program is None:
        rank_zero_warn("SLURM: the job was not requeued: scontrol or SLURM_JOB_ID is missing. Fix: submit it again")
        return
    result = subprocess.run([program, "requeue", job], capture_output=True, text=True)  # noqa: S603
    if result.returncode:
        rank_zero_warn(f"SLURM: scontrol requeue {job} failed: {one_line(result.stderr)}. Fix: submit the job again")
    else:
        rank_zero_info(f"SLURM: requeued job {job}; it resumes this run")


def slurm_job() -> str | None:
    """Returns the SLURM job of this process, for an array with the task's number; None outside of SLURM."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


def _is_lightnings(handler: Any) -> bool:
    return callable(handler) and type(handler).__module__.startswith("lightning.")
