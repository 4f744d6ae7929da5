"""Settings of a resumed run: which of them the configuration sets, and which ones must be the checkpoint's.

========================================  ==============================================================================
the configuration applies                 learning rate, weight decay and all other options of the optimizer; class and
                                          options of the schedule; dropout, types, kernels and recomputation; the
                                          objective; all options of the trainer
must be equal, else the resume is refused class of the optimizer (its state has other tensors); LoRA's alpha and rsLoRA
                                          (the trained weights mean something only with their factor); the adapter from
                                          which the run started (the checkpoint's tensors would replace it)
refused by the tensors                    LoRA's rank, modules and layers; the base's shape
========================================  ==============================================================================

PyTorch's optimizers and schedules load their options together with their state, so the checkpoint's would apply without
a message. The options of the optimizer are set again here. The schedule is built from the configuration, and its steps
are repeated.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info

from datamodules.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch.optim import Optimizer

BACKBONE = "model.init_args.backbone"
#: settings of the backbone that change the function of the trained weights, as paths below ``backbone``
FIXED_SETTINGS = (("lora", "alpha"), ("lora", "use_rslora"), ("adapter",))


class ResumedSettings:
    """Compares the settings of a checkpoint with those of the module, and applies the module's.

    Attributes:
        changed: one text per setting that differs from the checkpoint's: ``optimizer.lr 0.001 -> 1e-05``.
    """

    def __init__(self) -> None:
        self.changed: list[str] = []
        self._is_resumed = False
        self._options: set[str] = set()  # options of the optimizer that differ from the checkpoint's
        self._groups: list[dict[str, Any]] = []

    def remember(self, optimizer: Optimizer) -> None:
        """Keeps the options of an optimizer as the configuration set them, after its schedule was built."""
        self._groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    def compare(
        self, checkpoint: dict[str, Any], stored: Mapping[str, Any], now: Mapping[str, Any], fitting: bool
    ) -> None:
        """Compares settings before a checkpoint is loaded; for a fit, removes the schedule's state from it.

        Args:
            checkpoint: a checkpoint of Lightning.
            stored: constructor arguments of the module that wrote it, as plain data.
            now: constructor arguments of the module that loads it, as plain data.
            fitting: whether a fit resumes from it; an evaluation needs its weights only.

        Raises:
            UserError: the trained weights or the state of the optimizer do not fit.
        """
        check_fixed_settings(stored, now)
        if not fitting:
            return
        if "optimizer_states" not in checkpoint:
            raise UserError(
                "--ckpt_path: the checkpoint holds weights only (ModelCheckpoint.save_weights_only), so a fit can't "
                "resume from it. Fix: give a checkpoint with the optimizer's state, or start a new run with "
                f"{BACKBONE}.adapter set to the run's folder adapter/last"
            )
        checkpoint["lr_schedulers"] = []  # _replay() computes the schedule from the configuration
        before, after = stored.get("optimizer"), now.get("optimizer")
        if before and after:
            _check_optimizer_class(before, after)
            options, present = _arguments(before), _arguments(after)
            self._options = {name for name in present if options.get(name) != present[name]}
        names = ("backbone", "objective", "optimizer", "lr_scheduler")
        known = [name for name in names if name in stored and name in now]
        self.changed = [text for name in known for text in differences(stored[name], now[name], name)]
        self._is_resumed = True
        if self.changed:
            rank_zero_info(f"resume: the configuration replaces settings of the checkpoint: {', '.join(self.changed)}")

    def apply(self, trainer: Trainer) -> None:
        """Applies the configured options after a checkpoint was loaded; does nothing in a fit without a checkpoint."""
        if self._is_resumed:
            schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
            self._replay(trainer.optimizers[0], schedules[0] if schedules else None, trainer.global_step)
        self._is_resumed = False

    def _replay(self, optimizer: Optimizer, schedule: Any, steps: int) -> None:
        """Sets the configured options, and moves the schedule to its step.

        Repeating the steps gives the rates of a run without an interruption for every schedule that depends on the
        number of steps only, to the last bit.

        Args:
            optimizer: with the state of the checkpoint.
            schedule: as the configuration built it, at step 0; None for a constant rate.
            steps: number of optimizer steps that the checkpoint contains.
        """
        names = self._options | ({"lr", "initial_lr"} if schedule is not None else set())
        for group, configured in zip(optimizer.param_groups, self._groups, strict=True):
            group.update({name: value for name, value in configured.items() if name in names})
        if schedule is None:
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.* before .*optimizer.step.*")
            for _ in range(steps):
                schedule.step()


def check_fixed_settings(stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses a checkpoint whose weights have another meaning under the settings of the module.

    Args:
        stored: constructor arguments of the module that wrote the checkpoint, as plain data.
        now: constructor arguments of this module, as plain data.

    Raises:
        UserError: a setting of :data:`FIXED_SETTINGS` differs.
    """
    before, after = stored.get("backbone"), now.get("backbone")
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return
    for path in FIXED_SETTINGS:
        old, new = _value(before, path), _value(after, path)
        if old == new or (path[0] == "lora" and not (before.get("lora") and after.get("lora"))):
            continue
        name = f"{BACKBONE}.{'.'.join(path)}"
        raise UserError(
            f"{name}={_text(new)}: the checkpoint was trained with {_text(old)}, and its weights fit no other value. "
            f"Fix: set it to {_text(old)}, or start a new run without --ckpt_path"
        )


def differences(before: Any, after: Any, name: str) -> Iterator[str]:
    """Yields one text per setting that differs between two trees of plain data.

    Args:
        before: the earlier tree.
        after: the later tree.
        name: path of both; ``init_args`` is left out of the paths.
    """
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*before, *(key for key in after if key not in before)]:
            path = name if key == "init_args" else ".".join(filter(None, (name, str(key))))
            yield from differences(before.get(key), after.get(key), path)
    elif _comparable(before) != _comparable(after):
        yield f"{name} {_text(before)} -> {_text(after)}"


def _check_optimizer_class(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    old, new = before["class_path"], after["class_path"]
    if old.rpartition(".")[2] != new.rpartition(".")[2]:
        raise UserError(
            f"model.init_args.optimizer={new}: the checkpoint holds the state of {old}, which another class can't use. "
            f"Fix: set it to {old}, or start a new run from the trained weights with {BACKBONE}.adapter set to the "
            "run's folder adapter/last"
        )


def _arguments(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _comparable(value) for name, value in (tree.get("init_args") or {}).items()}


def _comparable(value: Any) -> Any:
    return [_comparable(item) for item in value] if isinstance(value, (list, tuple)) else value


def _value(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = tree
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
