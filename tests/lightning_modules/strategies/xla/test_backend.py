"""The parts of the XLA backend that need no XLA device."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from datamodules.errors import UserError
from lightning_modules import Backbone, CompletionCrossEntropy, LoRA
from lightning_modules.models.backend import DEFAULT_BACKEND
from lightning_modules.models.decoder import Predictions
from lightning_modules.strategies import XLABackend
from lightning_modules.strategies.xla import backend as module


def backend(devices):
    return XLABackend(SimpleNamespace(devices=devices), torch.device("cpu"))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_chunks_are_split_within_each_devices_rows_and_joined_again(size):
    tensor = torch.arange(4 * 6 * 2).view(24, 2)  # 4 devices with 6 positions each
    pieces = backend(4).split(tensor, size)
    assert torch.equal(backend(4).join(pieces), tensor)
    first = torch.stack([tensor[device * 6 : device * 6 + min(size, 6)] for device in range(4)]).flatten(0, 1)
    assert torch.equal(pieces[0], first)


@pytest.mark.parametrize("frozen", [True, False])
def test_an_objective_has_the_same_loss_and_gradients_over_these_chunks(frozen):
    head, hidden = torch.nn.Linear(8, 11).double(), torch.randn(24, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (24,)).masked_fill_(torch.rand(24) < 0.3, -100)
    results = []
    sharded = backend(4)
    for chosen in (DEFAULT_BACKEND, sharded):
        sharded.checkpoint = DEFAULT_BACKEND.checkpoint  # XLA's own checkpoint needs its devices
        sums = CompletionCrossEntropy(chunk_size=4)(Predictions(hidden, head, frozen, chosen), labels)
        results.append((*sums.values(), *torch.autograd.grad(sums["loss"], hidden)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_quantised_weights_are_refused():
    backend(8).check("none", teacher=True)
    with pytest.raises(UserError, match="bitsandbytes does not run on a TPU"):
        backend(8).check("nf4")


def test_weights_are_built_on_the_host_and_all_positions_reach_the_head():
    assert backend(8).build_device(torch.device("xla", 0)) == torch.device("cpu")
    assert backend(8).positions(None) is None


def test_tensors_on_the_host_are_collected_unchanged():
    data = {"a": torch.arange(3), "b": [torch.ones(2), "text"], "c": 1}
    collected = backend(4).collect(data)
    assert torch.equal(collected["a"], data["a"])
    assert torch.equal(collected["b"][0], data["b"][0])
    assert collected["b"][1:] == ["text"] and collected["c"] == 1
    assert backend(4).to_host({"a": data["a"]}).keys() == {"a"}


def test_tensors_are_gathered_in_groups_of_limited_size(monkeypatch):
    monkeypatch.setattr(module, "GROUP_BYTES", 100)
    tensors = [torch.zeros(size, dtype=torch.uint8) for size in (60, 40, 1, 250, 10)]
    groups = list(module._groups(tensors))
    assert [[len(tensor) for tensor in group] for group in groups] == [[60, 40], [1], [250], [10]]
    assert list(module._groups([])) == []


def test_the_copy_for_generation_is_frozen_and_has_the_same_outputs(tiny_mistral):
    model = Backbone(str(tiny_mistral), lora=LoRA(rank=2)).build().eval()
    copied = backend(4).generation_model(model)
    ids = torch.randint(5, 200, (2, 7))
    with torch.no_grad():
        assert torch.equal(copied(ids).logits, model(ids).logits)
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert copied.state_dict().keys() == model.state_dict().keys()


def test_checkpointed_layers_get_the_backends_function_and_an_input_with_a_gradient(tiny_mistral, monkeypatch):
    model = Backbone(str(tiny_mistral), lora=LoRA(rank=2), activation_checkpointing="full").build().train()
    ids, calls = torch.randint(5, 200, (1, 6)), []
    model(ids).logits.sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    own = backend(4)

    def checkpoint_layer(weights, function, hidden, *args, **kwargs):
        assert hidden.requires_grad, "the reentrant checkpoint would give no gradient"
        calls.append(len(weights))
        return function(hidden, *args, **kwargs)

    monkeypatch.setattr(own, "_checkpoint_layer", checkpoint_layer)
    own.use_own_checkpoints(model)
    model(ids).logits.sum().backward()
    layers = model.get_base_model().model.layers
    assert calls == [len(list(layer.parameters())) for layer in layers]
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)


def test_a_model_without_checkpointing_keeps_its_functions():
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))
    backend(4).use_own_checkpoints(model)
    assert not any(child._forward_hooks for child in model)
