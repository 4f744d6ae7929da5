"""A second tree of modules over the tensors of a model.

``nn.Module`` has no public way to copy its structure without its tensors (``copy.deepcopy`` copies both), so that this
module is the only place that sets the private attributes of a module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn


def module_view(
    model: nn.Module,
    *,
    unwrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    replace: Callable[[Tensor], Tensor] | None = None,
) -> nn.Module:
    """Copies the modules of a model but not its parameters and buffers.

    The new modules have hooks and a training mode of their own, and submodules and tensors can be set on them without
    an effect on the model.

    Args:
        model: stays as it is.
        unwrap: returns the module to copy in place of a module, such as the base layer of an adapter's.
        replace: returns the tensor of the view for each parameter and buffer; parameters become frozen ones. None
            shares the model's tensors: the parameters are the same objects.
    """
    source = unwrap(model)
    view = copy.copy(source)
    for name in ("_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"):
        setattr(view, name, copy.copy(getattr(source, name)))
    if replace is not None:
        for name, parameter in source._parameters.items():
            if parameter is not None:
                view._parameters[name] = nn.Parameter(replace(parameter), requires_grad=False)
        for name, buffer in source._buffers.items():
            view._buffers[name] = None if buffer is None else replace(buffer)
    view._modules = {
        name: None if child is None else module_view(child, unwrap=unwrap, replace=replace)
        for name, child in source._modules.items()
    }
    return view
