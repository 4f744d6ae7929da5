"""The default backend, the settings that are refused, and positions with labels."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from datamodules.batch import IGNORE_INDEX
from datamodules.errors import UserError
from lightning_modules.models.backend import (
    DEFAULT_BACKEND,
    backend_of,
    check_precision,
    check_sharding,
    gather_positions,
    is_sharded,
    supervised_positions,
    supports_backend,
)  # fmt: skip
from lightning_modules.strategies import FSDP2Strategy
from tests.helpers.lm_training import batch, examples, row


def test_supervised_positions():
    data = batch([row([examples()[0]], 24), row([examples()[1]], 24)])
    expected = (data.labels_BT.flatten() != IGNORE_INDEX).nonzero().flatten()
    assert torch.equal(supervised_positions(data), expected)
    data.supervised = 0  # a loader that did not count
    assert torch.equal(supervised_positions(data), expected)
    padded = supervised_positions(data, multiple=8)
    assert len(padded) % 8 == 0
    assert torch.equal(padded[: len(expected)], expected)
    assert (data.labels_BT.flatten()[padded[len(expected) :]] == IGNORE_INDEX).all()


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy])
@pytest.mark.parametrize(
    ("quantization", "fix"),
    [("nf4", r"issue 20855.*strategy ddp.*quantization none"), ("none", r"strategies\.FSDP2Strategy.*ddp")],
)
def test_a_strategy_that_shards_is_refused_with_the_fix(kind, quantization, fix):
    strategy = object.__new__(kind)  # its constructor needs GPUs
    with pytest.raises(UserError, match=rf"trainer.strategy {kind.__name__}.*{fix}"):
        check_sharding(strategy, quantization)
    check_sharding(SingleDeviceStrategy("cpu"), quantization)


def test_the_backend_of_a_strategy():
    class Strategy:
        backend = object()

    assert backend_of(None) is DEFAULT_BACKEND
    assert backend_of(SimpleNamespace(strategy=object())) is DEFAULT_BACKEND
    assert backend_of(SimpleNamespace(strategy=SingleDeviceStrategy("cpu"))) is DEFAULT_BACKEND
    assert backend_of(SimpleNamespace(strategy=Strategy())) is Strategy.backend


def test_support_of_a_backend_is_checked_without_creating_it():
    """FSDP2Strategy has its backend only after its processes have started."""
    assert supports_backend(FSDP2Strategy())
    check_sharding(FSDP2Strategy(), "none")
    assert not supports_backend(SingleDeviceStrategy("cpu"))


def test_a_plugin_that_quantises_is_refused():
    from lightning.pytorch.plugins import BitsandbytesPrecision

    plugin = object.__new__(BitsandbytesPrecision)  # its constructor needs a GPU
    with pytest.raises(UserError, match=r"BitsandbytesPrecision.*Fix: remove the plugin .*nf4"):
        check_precision(plugin, "bfloat16")
    with pytest.raises(UserError, match=r"trainer\.precision=16-true"):
        check_precision(HalfPrecision("16-true"), "auto")


def test_the_default_backend_splits_joins_and_checkpoints():
    tensor = torch.arange(14.0).view(7, 2).requires_grad_()
    pieces = DEFAULT_BACKEND.split(tensor, 3)
    assert [len(piece) for piece in pieces] == [3, 3, 1]
    assert torch.equal(DEFAULT_BACKEND.join(pieces), tensor)
    calls = []

    def square(value):
        calls.append(len(value))
        return value.square()

    DEFAULT_BACKEND.checkpoint(square, tensor).sum().backward()
    assert calls == [7, 7]  # recomputed in the backward pass
    torch.testing.assert_close(tensor.grad, 2 * tensor.detach())


def test_norm_shards_and_host_copies_of_whole_tensors():
    tensors = [torch.tensor([3.0]), torch.tensor([0.0, 4.0])]
    assert DEFAULT_BACKEND.total_norm(tensors) == 5
    DEFAULT_BACKEND.local_shards(tensors)[0].mul_(2)
    assert tensors[0] == 6
    assert torch.equal(DEFAULT_BACKEND.to_host({"a": tensors[1]})["a"], tensors[1])
    assert not is_sharded(tensors[0])


def test_gather_positions():
    tensor = torch.arange(10).view(5, 2)
    assert torch.equal(gather_positions(tensor, torch.tensor([4, 0])), tensor[[4, 0]])
    assert gather_positions(tensor, None) is tensor
