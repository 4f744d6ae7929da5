"""Selection between references and Triton kernels, without a GPU."""

import inspect
import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lightning_modules.kernels import cross_entropy_kl, pointwise, prefix_attention
from lightning_modules.kernels.dispatch import reference_of, triton_on_cuda

CUDA = SimpleNamespace(is_cuda=True, dtype=torch.float32)
CPU = SimpleNamespace(is_cuda=False, dtype=torch.float32)
PAIRS = [
    (pointwise, "rms_norm"), (pointwise, "rms_norm_backward"), (pointwise, "swiglu"), (pointwise, "swiglu_backward"),
    (pointwise, "rotate_"), (pointwise, "quantize_rows"), (cross_entropy_kl, "cross_entropy_kl"),
    (prefix_attention, "attend"), (prefix_attention, "attend_backward"),
]  # fmt: skip


@pytest.fixture
def kernels(monkeypatch):
    """A module of kernels whose only function returns its arguments."""
    module = ModuleType("fake_kernels")
    module.scale = lambda tensor, factor=1: ("kernel", tensor, factor)
    monkeypatch.setitem(sys.modules, "fake_kernels", module)
    return module


def decorated(**options):
    @triton_on_cuda("fake_kernels", **options)
    def scale(tensor, factor=1):
        """Multiplies."""
        return "reference", tensor, factor

    return scale


def test_cuda_tensors_run_the_kernel_and_others_the_reference(kernels):
    scale = decorated()
    assert scale(CUDA, 3) == ("kernel", CUDA, 3)
    assert scale(CUDA, factor=4) == ("kernel", CUDA, 4)
    assert scale(CPU, factor=5) == ("reference", CPU, 5)


def test_unsupported_types_run_the_reference(kernels):
    scale = decorated(dtypes=(torch.float16,))
    assert scale(CUDA) == ("reference", CUDA, 1)
    assert scale(SimpleNamespace(is_cuda=True, dtype=torch.float16))[0] == "kernel"


def test_kernels_are_imported_at_the_first_cuda_call_and_once(kernels, monkeypatch):
    names = []
    monkeypatch.setattr(
        "lightning_modules.kernels.dispatch.import_module", lambda name: names.append(name) or sys.modules[name]
    )
    scale = decorated()
    scale(CPU)
    assert names == []
    scale(CUDA)
    scale(CUDA)
    assert names == ["fake_kernels"]


def test_the_decorated_function_keeps_name_signature_and_reference():
    scale = decorated()
    assert scale.__name__ == "scale" and scale.__doc__ == "Multiplies."
    assert list(inspect.signature(scale).parameters) == ["tensor", "factor"]
    assert reference_of(scale)(CUDA) == ("reference", CUDA, 1)


@pytest.mark.parametrize(("module", "name"), PAIRS)
def test_reference_and_kernel_have_the_same_parameters(module, name):
    pytest.importorskip("triton")
    kernel = getattr(import_module(f"{module.__name__}_triton"), name)

    def parameters(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters(getattr(module, name)) == parameters(kernel)
