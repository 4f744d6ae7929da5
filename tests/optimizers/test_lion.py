"""Lion against the paper's program in NumPy, with master weights, on resuming, and in a CUDA graph."""

import warnings
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from optimizers import Lion

SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 3, 4), (129, 1), (0, 3)]
IMPLEMENTATIONS = pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])


def program_1(weight, gradients, lr, beta1, beta2, decay):
    """Runs the paper's Program 1 on NumPy float64 arrays; ``lr`` is a function of the step."""
    momentum = np.zeros_like(weight)
    for step, gradient in enumerate(gradients):
        update = np.sign(beta1 * momentum + (1 - beta1) * gradient)
        weight = weight - lr(step) * (update + decay * weight)
        momentum = beta2 * momentum + (1 - beta2) * gradient
    return weight


def gradients_of(shapes, steps, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes] for _ in range(steps)]


def run(optimizer, params, gradients):
    for gradients_of_step in gradients:
        for param, gradient in zip(params, gradients_of_step, strict=True):
            param.grad = gradient.to(param.dtype)
        optimizer.step()


def make(shapes=SHAPES, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


@IMPLEMENTATIONS
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_follows_the_paper_in_float64_over_50_steps(foreach, tensor_lr):
    params, gradients = make(), gradients_of(SHAPES, 50)
    before = [param.detach().numpy().copy() for param in params]
    first = {"params": params[:5], "lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.3}
    second = {"params": params[5:], "lr": 3e-3, "betas": (0.95, 0.98), "weight_decay": 0.0}
    for group in (first, second):
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64) if tensor_lr else group["lr"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = Lion([first, second], foreach=foreach)
    run(optimizer, params, gradients)
    for i, param in enumerate(params):
        group = first if i < 5 else second
        rate = float(group["lr"])
        expected = program_1(
            before[i], [g[i].numpy() for g in gradients], lambda _, r=rate: r, *group["betas"], group["weight_decay"]
        )
        np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-12, atol=1e-12)
        assert param.shape == SHAPES[i]


@IMPLEMENTATIONS
def test_follows_a_changing_rate(foreach):
    params, gradients = make([(3, 5)]), gradients_of([(3, 5)], 20)
    before = params[0].detach().numpy().copy()
    optimizer = Lion(params, lr=1e-4, foreach=foreach)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for gradient in gradients:
        run(optimizer, params, [gradient])
        scheduler.step()
    expected = program_1(before, [g[0].numpy() for g in gradients], lambda s: 1e-4 / (s + 1), 0.9, 0.99, 0.1)
    np.testing.assert_allclose(params[0].detach().numpy(), expected, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master", [False, True])
def test_single_and_foreach_agree_bit_for_bit(dtype, master):
    results = []
    for foreach in (False, True):
        params = make(dtype=dtype)
        run(Lion(params, master_weights=master, foreach=foreach), params, gradients_of(SHAPES, 10))
        assert all(param.dtype == dtype for param in params)
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@IMPLEMENTATIONS
def test_two_runs_are_equal(foreach):
    results = []
    for _ in range(2):
        params = make(dtype=torch.float32)
        run(Lion(params, foreach=foreach), params, gradients_of(SHAPES, 5))
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_parameter_without_gradient_is_unchanged():
    params = make([(3,), (4,)], torch.float32)
    before = params[1].detach().clone()
    params[0].grad = torch.ones(3)
    optimizer = Lion(params, lr=1e-4)
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state or not optimizer.state[params[1]]


@IMPLEMENTATIONS
def test_master_weights_keep_steps_that_bf16_loses(foreach):
    """Takes 400 steps of 1e-5 from 1.0, whose neighbours in bf16 are at least 0.0039 away."""
    ends = {}
    for master in (False, True):
        param = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
        optimizer = Lion([param], lr=1e-5, weight_decay=0.0, master_weights=master, foreach=foreach)
        run(optimizer, [param], [[torch.ones(5)]] * 400)
        ends[master] = param.detach().float()
    assert torch.equal(ends[False], torch.ones(5))
    assert torch.equal(ends[True], torch.full((5,), 1 - 400e-5).bfloat16().float())


@IMPLEMENTATIONS
def test_master_weights_follow_the_paper(foreach):
    params = make(dtype=torch.bfloat16)
    before = [param.detach().double().numpy() for param in params]
    gradients = [[g.bfloat16() for g in step] for step in gradients_of(SHAPES, 50)]
    optimizer = Lion(params, lr=1e-4, master_weights=True, foreach=foreach)
    run(optimizer, params, gradients)
    for i, param in enumerate(params):
        expected = program_1(before[i], [g[i].double().numpy() for g in gradients], lambda _: 1e-4, 0.9, 0.99, 0.1)
        np.testing.assert_allclose(optimizer.state[param]["master"].numpy(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(param, optimizer.state[param]["master"].bfloat16())


@IMPLEMENTATIONS
@pytest.mark.parametrize(("dtype", "master"), [(torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_resumed_equals_uninterrupted(tmp_path, foreach, dtype, master):
    gradients = gradients_of(SHAPES, 12)
    whole = make(dtype=dtype)
    run(Lion(whole, master_weights=master, foreach=foreach), whole, gradients)

    first = make(dtype=dtype)
    optimizer = Lion(first, master_weights=master, foreach=foreach)
    run(optimizer, first, gradients[:5])
    torch.save({"weights": [p.detach() for p in first], "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = [nn.Parameter(weight) for weight in saved["weights"]]
    optimizer = Lion(second, master_weights=master, foreach=foreach)
    optimizer.load_state_dict(saved["optimizer"])
    run(optimizer, second, gradients[5:])
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


def test_all_state_is_in_state_and_param_groups():
    params = make([(3, 5), (4,)], torch.bfloat16)
    optimizer = Lion(params, master_weights=True)
    run(optimizer, params, gradients_of([(3, 5), (4,)], 1))
    state = optimizer.state_dict()
    assert {key for values in state["state"].values() for key in values} == {"master", "momentum"}
    assert set(state["param_groups"][0]) >= {"lr", "betas", "weight_decay", "master_weights", "foreach"}


def test_a_closure_is_evaluated_with_gradients_and_its_loss_is_returned():
    param = nn.Parameter(torch.tensor([2.0]))
    optimizer = Lion([param], lr=1e-4, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert param.item() == pytest.approx(2.0 - 1e-4, abs=1e-7)


class CountReads(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host, each of which would wait for an accelerator."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@IMPLEMENTATIONS
def test_a_step_copies_no_value_to_the_host(foreach):
    """With a float rate; on the CPU, foreach reads a tensor rate in its fallback (a GPU's kernels do not)."""
    params = make([(3, 5), (4,)], torch.bfloat16)
    optimizer = Lion(params, lr=1e-4, master_weights=True, foreach=foreach)
    run(optimizer, params, gradients_of([(3, 5), (4,)], 1))
    with CountReads() as counter:
        optimizer.step()
        assert counter.reads == 0
        torch.ones(1).sum().item()
        assert counter.reads == 1


@pytest.mark.gpu
@pytest.mark.parametrize("master", [False, True])
def test_a_step_on_a_gpu_does_not_synchronise_and_can_be_captured(master):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    gradients = gradients_of(SHAPES, 6)
    expected = make(dtype=torch.bfloat16)
    run(Lion(expected, lr=1e-4, master_weights=master), expected, gradients)

    params = [nn.Parameter(param.detach().cuda()) for param in make(dtype=torch.bfloat16)]
    optimizer = Lion(params, lr=torch.tensor(1e-4, device="cuda"), master_weights=master)
    on_device = [[g.bfloat16().cuda() for g in step] for step in gradients]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # a graph's state must exist before it is captured
        run(optimizer, params, on_device[:1])
        torch.cuda.set_sync_debug_mode("error")
        run(optimizer, params, on_device[1:2])
        torch.cuda.set_sync_debug_mode("default")
        for param in params:
            param.grad = param.grad.clone()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in on_device[2:]:  # capturing runs nothing
        for param, gradient in zip(params, step, strict=True):
            param.grad.copy_(gradient)
        graph.replay()
    for param, reference in zip(params, expected, strict=True):
        torch.testing.assert_close(param.cpu(), reference, rtol=0, atol=2**-7)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lr": -1e-4}, "lr -0.0001 is negative"),
        ({"lr": float("nan")}, "lr nan"),
        ({"lr": torch.ones(2)}, "lr has shape"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (-0.1, 0.9)}, "betas"),
        ({"weight_decay": -0.1}, "weight_decay -0.1"),
    ],
)
def test_bad_arguments_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        Lion(make([(3,)]), **option)


def test_bad_parameters_are_refused():
    with pytest.raises(ValueError, match="complex64"):
        Lion([nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        Lion(embedding.parameters()).step()


def test_one_warning_for_a_rate_of_adamw():
    params = make([(3,), (4,)])
    with pytest.warns(UserWarning, match=r"lr 0\.001 looks like a rate for AdamW") as caught:
        Lion([{"params": params[:1], "lr": 1e-3}, {"params": params[1:], "lr": 6e-4}])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Lion(params)
        Lion(params, lr=5e-4)


@pytest.mark.parametrize(
    ("class_path", "arguments"),
    [
        ("optimizers.Lion", {"lr": 1e-4, "betas": [0.95, 0.98], "weight_decay": 0.1}),
        ("torch.optim.AdamW", {"lr": 1e-3, "weight_decay": 0.01}),
        ("bitsandbytes.optim.AdamW8bit", {"lr": 1e-3, "betas": [0.9, 0.95]}),
        ("bitsandbytes.optim.Lion8bit", {"lr": 1e-4, "betas": [0.9, 0.99]}),
    ],
)
def test_optimizers_are_built_from_a_class_path(class_path, arguments):
    """At 4,096 elements and above bitsandbytes quantises its state."""
    if class_path.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=Callable[[Iterable], Optimizer])
    config = parser.parse_object({"optimizer": {"class_path": class_path, "init_args": arguments}})
    weight = nn.Parameter(torch.ones(64, 128))
    optimizer = parser.instantiate(config).optimizer([weight])
    assert type(optimizer).__name__ == class_path.rsplit(".", 1)[-1]
    assert optimizer.param_groups[0]["lr"] == arguments["lr"]
    assert list(optimizer.param_groups[0]["betas"]) == arguments.get("betas", [0.9, 0.999])
    weight.grad = torch.linspace(-1, 1, weight.numel()).reshape(weight.shape) + 1e-3
    optimizer.step()
    moved = 1 - weight.detach()
    assert torch.isfinite(moved).all()
    assert (moved[-1] > 0).all()
    assert (moved[0] < 1e-4).all() and not torch.equal(moved[0], moved[-1])
    if "8bit" in class_path:
        assert any(v.dtype == torch.uint8 for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor))
