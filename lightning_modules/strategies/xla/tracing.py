"""Traces a training step into the graph that the TPU's compiler would get, without weights and without a TPU.

The trainer runs the module's own step on the strategy's own mesh, over tensors that have a shape and a layout but no
content. The graph is written out instead of being executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from datamodules.batch import Batch
from lightning_modules.strategies.xla.accelerator import PJRTAccelerator
from lightning_modules.strategies.xla.backend import XLABackend
from lightning_modules.strategies.xla.compat import annotate_sharding
from lightning_modules.strategies.xla.precision import TruePrecision
from lightning_modules.strategies.xla.sharding import Sharding, Spec, weight_spec
from lightning_modules.strategies.xla.spmd import XLASPMDStrategy
from lightning_modules.token_sums import RunningSums


class _Traced(BaseException):
    """Ends the run once the graph is known. It is not an Exception, so no handler treats it as a failure."""


class _PlaceholderSharding(Sharding):
    """Places tensors without content."""

    def place(self, model: nn.Module, device: torch.device) -> None:
        placed: dict[int, nn.Parameter] = {}  # tied weights stay tied
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.device.type != "xla":
                    if id(parameter) not in placed:
                        placed[id(parameter)] = nn.Parameter(self.placeholder(parameter), parameter.requires_grad)
                    module._parameters[name] = placed[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "xla":
                    module._buffers[name] = self.placeholder(buffer)

    def placeholder(self, like: Tensor) -> Tensor:
        """Returns a tensor without content, with the shape and type of another and the layout of a weight."""
        from torch_xla.core.xla_builder import create_placeholder_tensor

        tensor: Tensor = create_placeholder_tensor(tuple(like.shape), like.dtype)
        self.annotate(tensor, weight_spec(tensor.shape, self.fsdp))
        return tensor

    def annotate(self, tensor: Tensor, spec: Spec) -> None:
        """Adds the layout to the graph; there is no content to move."""
        annotate_sharding(tensor, self.mesh.get_op_sharding(spec))


class _TracingBackend(XLABackend):
    def build_device(self, device: torch.device) -> torch.device:
        return torch.device("meta")


class TracingStrategy(XLASPMDStrategy):
    """Writes the graph of the last micro-batch and the optimizer step, which determine the memory of a step.

    Args:
        data_parallel_size: see :class:`lightning_modules.strategies.XLASPMDStrategy`.

    Attributes:
        graph: StableHLO as text; empty until the step has been traced.
    """

    def __init__(self, data_parallel_size: int = 1) -> None:
        super().__init__(data_parallel_size=data_parallel_size)
        self.graph = ""

    @property
    def backend(self) -> XLABackend:
        """The backend of a run, with weights that are only shapes."""
        assert self.sharding is not None
        return _TracingBackend(self.sharding, self.root_device)

    def _make_sharding(self, devices: int) -> Sharding:
        return _PlaceholderSharding(self.data_parallel_size, devices)

    def sync(self) -> None:
        """Does nothing: no device runs the graph."""

    def _shard_states(self) -> None:
        assert isinstance(self.sharding, _PlaceholderSharding)
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.ndim:
                        state[name] = self.sharding.placeholder(value)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Replaces gradients and sums of earlier micro-batches by placeholders; a run would have computed them."""
        assert isinstance(self.sharding, _PlaceholderSharding) and self.model is not None
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad = self.sharding.placeholder(parameter.grad)
        sums = getattr(self.lightning_module, "step_sums", None)
        if isinstance(sums, RunningSums):
            sums.values = {name: self.sharding.placeholder(value) for name, value in sums.values.items()}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Steps, writes the graph and ends the run."""
        import torch_xla.core.xla_model as xm

        super().optimizer_step(*args, **kwargs)
        assert self.model is not None and self.lightning_module is not None
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        outputs = [*trained, *(parameter.grad for parameter in trained if parameter.grad is not None)]
        for optimizer in self.optimizers:
            outputs += [value for state in optimizer.state.values() for value in state.values()]
        outputs += getattr(self.lightning_module, "step_metrics", {}).values()
        graph = xm.get_stablehlo(
            [value for value in outputs if isinstance(value, Tensor) and value.device.type == "xla"]
        )
        self.graph = shard_arguments(graph)
        results = self.lightning_module.trainer._results
        if results is not None:
            results.clear()  # the trainer would read the logged values
        raise _Traced


class _SameRows(IterableDataset[Batch]):
    """Yields the same rows forever; only their shape matters."""

    def __init__(self, rows: int, tokens: int) -> None:
        ids_BT, positions_BT, labels_BT, segments_BT = torch.zeros(4, rows, tokens, dtype=torch.int64).unbind()
        self.batch = Batch(ids_BT, positions_BT, labels_BT, segments_BT, supervised=rows * tokens)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.batch


def trace_step(
    module: LightningModule, rows: int, tokens: int, devices: int, *, data_parallel_size: int, **trainer: Any
) -> str:
    """Runs a module up to its first optimizer step over tensors without content.

    The process can't train afterwards: its XLA devices are virtual.

    Args:
        module: the module, whose weights are not loaded.
        rows: number of rows of a batch, over all devices.
        tokens: length of a row.
        devices: number of devices of the mesh.
        data_parallel_size: see :class:`lightning_modules.strategies.XLASPMDStrategy`.
        **trainer: options of Lightning's trainer that change a step.

    Returns:
        StableHLO of the step.
    """
    strategy = TracingStrategy(data_parallel_size)
    runner = Trainer(
        accelerator=PJRTAccelerator("cpu", devices), strategy=strategy, devices=1, plugins=[TruePrecision()],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **trainer,
    )  # fmt: skip
    try:
        runner.fit(module, DataLoader(_SameRows(rows, tokens), batch_size=None))
    except _Traced:
        return strategy.graph
    raise AssertionError("the run ended without an optimizer step")


def shard_arguments(graph: str) -> str:
    """Adds to the arguments of a graph the layouts that the graph annotates them with, as in a run.

    Args:
        graph: StableHLO as text, whose first function annotates its arguments with calls of ``@Sharding``.
    """
    main = graph.partition("func.func private")[0]  # after it come the bodies of loops, which have other arguments
    layouts = dict(re.findall(r'custom_call @Sharding\(%(arg\d+)\)[^\n]*?mhlo\.sharding = ("[^"]*")', main))
    head, body = graph.split("{\n", 2)[:2], graph.split("{\n", 2)[2]
    signature = re.sub(
        r"%(arg\d+): (tensor<[^>]*>)(?! \{)",
        lambda m: f"%{m[1]}: {m[2]}" + (f" {{mhlo.sharding = {layouts[m[1]]}}}" if m[1] in layouts else ""),
        head[1],
    )
    return "{\n".join([head[0], signature, body])
