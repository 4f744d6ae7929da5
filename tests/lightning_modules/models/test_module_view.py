"""Views of a model: new modules over the same, or over replaced, tensors."""

import torch
from torch import nn

from lightning_modules.models.module_view import module_view
from tests.helpers.fused_models import adapted


def model():
    inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    outer = nn.ModuleDict({"inner": inner, "head": nn.Linear(4, 2, bias=False)})
    outer.register_module("nothing", None)
    outer.inner[0].register_parameter("unused", None)
    return outer


def test_tensors_are_shared_and_modules_are_not():
    original = model()
    view = module_view(original)
    assert all(a is b for a, b in zip(view.parameters(), original.parameters(), strict=True))
    assert all(a is b for a, b in zip(view.buffers(), original.buffers(), strict=True))
    assert list(view.state_dict()) == list(original.state_dict())
    assert not {id(m) for m in view.modules()} & {id(m) for m in original.modules()}


def test_mode_hooks_and_submodules_of_a_view_do_not_change_the_model():
    original, calls = model(), []
    view = module_view(original)
    view.eval()
    view.inner[0].register_forward_hook(lambda *_: calls.append("view"))
    view.head = nn.Identity()
    assert original.training and original.inner[2].training
    original.inner[0](torch.ones(1, 3))
    assert calls == []
    assert isinstance(original.head, nn.Linear)
    view.inner[0](torch.ones(1, 3))
    assert calls == ["view"]
    view.inner[1].weight = nn.Parameter(torch.zeros(4))
    assert torch.equal(original.inner[1].weight, torch.ones(4))


def test_replaced_tensors_are_frozen_and_the_model_keeps_its_own():
    original = model()
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    view = module_view(original, replace=lambda tensor: tensor.detach().clone() + 1)
    for name, tensor in view.state_dict().items():
        assert torch.equal(tensor, before[name] + 1)
    assert not any(parameter.requires_grad for parameter in view.parameters())
    assert all(parameter.requires_grad for parameter in original.parameters())
    assert all(torch.equal(original.state_dict()[name], tensor) for name, tensor in before.items())


def test_unwrapped_modules_replace_their_wrappers():
    wrapped = adapted("llama")
    base = wrapped.get_base_model()

    def unwrap(module):
        return module.get_base_layer() if hasattr(module, "get_base_layer") else module

    view = module_view(base, unwrap=unwrap)
    assert not [name for name, _ in view.named_parameters() if "lora" in name]
    ids = torch.randint(0, 97, (1, 9))
    with torch.no_grad(), wrapped.disable_adapter():
        expected = base(ids).logits
    with torch.no_grad():
        assert torch.equal(view(ids).logits, expected)
        assert not torch.allclose(base(ids).logits, expected)
