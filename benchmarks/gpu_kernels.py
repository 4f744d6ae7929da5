"""Times the GPU kernels next to the alternatives of libraries, at the shapes of a 7B model, in one run on one GPU.

    python benchmarks/gpu_kernels.py [--tokens 16384]

Attention over packed rows with a shared prefix next to compiled FlexAttention with the same mask; pointwise kernels
next to ``torch.compile`` of their references; FP8 products, with the quantization of their input, next to bf16
products; a step of Lion for the adapters of a 7B model next to fused AdamW (two rules: only the time is comparable).
Prints milliseconds (median), the ratio, and the difference of the results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_modules.kernels import pointwise, pointwise_triton, prefix_attention
from lightning_modules.kernels.attention_plan import build_attention_plan
from lightning_modules.kernels.dispatch import reference_of
from lightning_modules.kernels.fp8 import Fp8Weight
from optimizers import Lion

HEADS, SHARED, WIDTH, CHANNELS, INNER = 32, 8, 128, 4096, 14336  # Mistral-7B


def random(*shape: int) -> Tensor:
    """Returns random bf16 numbers on the GPU."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def row(tokens: int, prefix: int, example: int) -> Tensor:
    """Returns segment ids [1, T] of a prefix and examples of varied length."""
    ids, position, segment = torch.full((1, tokens), -1), prefix, 1
    ids[:, :prefix] = 0
    generator = torch.Generator().manual_seed(0)
    while position < tokens:
        length = int(torch.randint(example // 2, example * 3 // 2, (1,), generator=generator))
        ids[:, position : position + length] = segment
        position, segment = position + length, segment + 1
    return ids


def compare(name: str, project: Callable[[], Any], library: Callable[[], Any]) -> None:
    """Prints a row of the table."""
    results = (function() for function in (project, library))
    pairs = zip(*((x if isinstance(x, tuple) else (x,)) for x in results), strict=True)
    error = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
    first, second = (do_bench(function, warmup=50, rep=200, return_mode="median") for function in (project, library))
    print(f"| {name} | {first:.3f} | {second:.3f} | {second / first:.2f} | {error:.1e} |", flush=True)


def attention(tokens: int) -> None:
    """Times the forward and backward pass of one layer, with and without a prefix."""
    flex = torch.compile(flex_attention, dynamic=False)
    for prefix, example in ((165, 220), (0, 545)):
        ids = row(tokens, prefix, example)
        plan, segments = build_attention_plan(ids, HEADS // SHARED).to("cuda"), ids[0].cuda()

        def allowed(b: Any, h: Any, q: Tensor, k: Tensor, segments: Tensor = segments) -> Tensor:
            to_prefix = (segments[k] == 0) & (segments[q] > 0)
            return (q >= k) & ((segments[q] == segments[k]) | to_prefix)

        mask = create_block_mask(allowed, None, None, tokens, tokens, device="cuda")
        y = random(tokens, (HEADS + 2 * SHARED) * WIDTH)
        inputs = y.unflatten(-1, (-1, WIDTH)).split([HEADS, SHARED, SHARED], 1)
        grad, grads = random(tokens, HEADS, WIDTH), torch.empty_like(y)
        views = grads.unflatten(-1, (-1, WIDTH)).split([HEADS, SHARED, SHARED], 1)
        scale = WIDTH**-0.5
        out, lse = prefix_attention.attend(*inputs, plan, scale)
        leaves = [x.detach().transpose(0, 1)[None].contiguous().requires_grad_() for x in inputs]
        flexed = flex(*leaves, block_mask=mask, enable_gqa=True)
        grad_flex = grad.transpose(0, 1)[None].contiguous()

        def backward(saved: Any = (inputs, out, lse, plan, views)) -> Any:
            inputs, out, lse, plan, views = saved
            prefix_attention.attend_backward(grad, inputs, out, lse, plan, scale, views)
            return tuple(views)

        def flex_backward(flexed: Tensor = flexed, leaves: list[Tensor] = leaves, grad: Tensor = grad_flex) -> Any:
            gradients = torch.autograd.grad(flexed, leaves, grad, retain_graph=True)
            return tuple(x[0].transpose(0, 1) for x in gradients)

        name = f"attention, {tokens} tokens, " + (f"prefix {prefix}" if prefix else "packed")
        compare(
            f"{name}, forward",
            lambda: prefix_attention.attend(*inputs, plan, scale)[0],
            lambda: flex(*leaves, block_mask=mask, enable_gqa=True)[0].transpose(0, 1),
        )
        compare(f"{name}, backward", backward, flex_backward)


def pointwise_parts(tokens: int) -> None:
    """Times norms, SwiGLU, rotary positions and the quantization of rows."""
    x, grad, residual, weight = (
        random(tokens, CHANNELS),
        random(tokens, CHANNELS),
        random(tokens, CHANNELS),
        random(CHANNELS),
    )
    gate_up, grad_hidden = random(tokens, 2 * INNER), random(tokens, INNER)
    y, angles = random(tokens, (HEADS + 2 * SHARED) * WIDTH), torch.rand(tokens, WIDTH, device="cuda")
    cases: dict[str, tuple[Any, ...]] = {
        "rms_norm": (x, weight, 1e-5),
        "rms_norm_backward": (x, weight, 1e-5, grad, residual),
        "swiglu": (gate_up,),
        "swiglu_backward": (gate_up, grad_hidden),
        "rotate_": (y, angles.cos(), angles.sin(), HEADS + SHARED),
        "quantize_rows": (gate_up,),
    }
    for name, arguments in cases.items():
        compiled = torch.compile(reference_of(getattr(pointwise, name)), dynamic=False)
        kernel = getattr(pointwise_triton, name)
        fresh = (lambda a: (a[0].clone(), *a[1:])) if name.endswith("_") else (lambda a: a)
        compare(name, lambda: kernel(*fresh(arguments)), lambda: compiled(*fresh(arguments)))


def products(tokens: int) -> None:
    """Times x W^T in FP8 and in bf16."""
    for outputs, inputs in ((6144, CHANNELS), (CHANNELS, CHANNELS), (2 * INNER, CHANNELS), (CHANNELS, INNER)):
        x, weight = random(tokens, inputs), random(outputs, inputs) * 0.02
        fp8 = Fp8Weight.of(weight)
        compare(f"FP8 product {tokens} x {inputs} x {outputs}", lambda: fp8.forward(x), lambda: x @ weight.T)


def lion() -> None:
    """Times a step over the LoRA matrices (r=64, float32) of all seven projections of 32 layers."""
    kv = SHARED * WIDTH
    sizes = [(CHANNELS, CHANNELS), (kv, CHANNELS), (kv, CHANNELS), (CHANNELS, CHANNELS)]
    sizes += [(INNER, CHANNELS), (INNER, CHANNELS), (CHANNELS, INNER)]
    milliseconds = []
    for make in (partial(Lion, lr=1e-5, weight_decay=0.01), partial(torch.optim.AdamW, lr=1e-5, fused=True)):
        shapes = [shape for outputs, inputs in sizes for shape in ((64, inputs), (outputs, 64))] * 32
        parameters = [torch.nn.Parameter(torch.randn(shape, device="cuda") * 0.02) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer = make(parameters)
        optimizer.step()
        milliseconds.append(do_bench(optimizer.step, warmup=50, rep=300, return_mode="median"))
    first, second = milliseconds
    print(f"| Lion's step, 168 million parameters (AdamW) | {first:.3f} | {second:.3f} | {second / first:.2f} | |")


def main() -> None:
    """Parses the command line and runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    tokens = parser.parse_args().tokens
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("| | this project, ms | library, ms | ratio | difference |\n|---|---|---|---|---|")
    attention(tokens)
    pointwise_parts(tokens)
    products(tokens)
    lion()


if __name__ == "__main__":
    main()
