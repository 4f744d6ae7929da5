"""The contents of checkpoints and adapter folders: trainable tensors only, megabytes instead of the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from datamodules.errors import UserError, one_line
from lightning_modules.models.backend import Backend

ANOTHER_BACKBONE = "it belongs to another backbone. Fix: use the backbone of its run (config.yaml in the run's folder)"


def trainable_names(module: nn.Module) -> set[str]:
    """Returns the names of the parameters that are trained."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def trainable_only(module: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Removes the frozen tensors of a module from its state_dict."""
    names = trainable_names(module)
    return {name: tensor for name, tensor in state_dict.items() if name in names}


@contextmanager
def checked_loading() -> Iterator[None]:
    """Converts the error for tensors of other shapes into the user's error."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"checkpoint does not fit: {ANOTHER_BACKBONE} ({one_line(error, 300)})") from error


def check_loaded_names(module: nn.Module, result: Any) -> Any:
    """Checks that a state_dict contained every trainable tensor of a module, and no unknown one.

    Args:
        module: the module it was loaded into.
        result: of ``load_state_dict``, with the missing and the unexpected names.

    Returns:
        The result without missing names: those of the frozen base, which Lightning would print.

    Raises:
        UserError: the checkpoint was made with another backbone or other adapters.
    """
    missing = sorted(trainable_names(module) & set(result.missing_keys))
    for names, problem in ((missing, "lacks"), (result.unexpected_keys, "has unknown")):
        if names:
            raise UserError(f"checkpoint {problem} {len(names)} tensors, {names[0]} the first: {ANOTHER_BACKBONE}")
    result.missing_keys.clear()
    return result


def save_adapter(model: Any, path: str | Path, backend: Backend, is_global_zero: bool) -> None:
    """Writes an adapter in PEFT's format, for ``PeftModel.from_pretrained``; without an adapter, the whole model.

    Args:
        model: the PEFT or transformers model.
        path: folder, created if it does not exist.
        backend: of the strategy. Every rank must call the function, since each may hold a shard.
        is_global_zero: whether this rank writes.
    """
    if not hasattr(model, "peft_config"):
        if is_global_zero:
            model.save_pretrained(path)
        return
    names = trainable_names(model)
    state: dict[str, Tensor] = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    state = backend.to_host(state)
    if is_global_zero:  # embeddings are never trained: "auto" would ask the hub for the config of the base
        model.save_pretrained(path, state_dict=state, save_embedding_layers=False)
