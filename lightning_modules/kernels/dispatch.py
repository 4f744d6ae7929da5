"""Selection between a PyTorch reference and its Triton kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def triton_on_cuda(
    module: str, dtypes: Container[torch.dtype] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a reference so that calls with a CUDA tensor run the Triton kernel of the same name.

    The first argument of each call, a tensor passed by position, selects the implementation. The module of kernels is
    imported at the first call with a CUDA tensor, since Triton is not installed on every machine. A call costs one
    attribute look-up and one comparison more than a direct call: a training step makes hundreds of them.

    Args:
        module: full name of the module that has a function with the name and the parameters of the reference.
        dtypes: types of the first argument that the kernel supports; None for all.

    Returns:
        A decorator. The decorated function keeps the reference as ``__wrapped__``, see :func:`reference_of`.
    """

    def decorate(reference: Callable[P, R]) -> Callable[P, R]:
        kernel: Callable[P, R] | None = None

        @functools.wraps(reference)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            nonlocal kernel
            first: Any = args[0]
            if not first.is_cuda or (dtypes is not None and first.dtype not in dtypes):
                return reference(*args, **kwargs)
            if kernel is None:
                kernel = getattr(import_module(module), reference.__name__)
            return kernel(*args, **kwargs)

        return run

    return decorate


def reference_of(function: Callable[P, R]) -> Callable[P, R]:
    """Returns the PyTorch reference of a function that :func:`triton_on_cuda` decorates."""
    reference: Callable[P, R] = function.__wrapped__  # type: ignore[attr-defined]
    return reference
