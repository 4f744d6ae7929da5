"""Estimates of peak memory, by part, and of time, from config.json of the model and the settings of a run.

**Memory.** C channels, Q and K widths of all query and of all key heads, I inner width, H heads, L layers, R LoRA rank,
V vocabulary, N tokens of a micro-batch, n tokens of a chunk (2,048), b bytes of the compute type, P trained parameters,
W parameters of the projections. Bytes::

    base          W (1/2 + 1/64 + 4/16384) in NF4 (scales in int8, their own in fp32), W / 16 more if the kernels undo
                  the nesting (fused, except for offload), 2 W more in FP8; W in int8; W b unquantized; + embeddings,
                  head and norms in b. Sharded over r ranks, the projections take W b (1/r + 2/L): two layers are
                  gathered, the current one and the next; adapters, gradients and optimizer are 1/r
    adapters      P a                 a bytes per weight of an adapter
    gradients     P a
    optimizer     P s                 s bytes of state per parameter: AdamW in fp32 8, Lion 4
    activations   kept from forward to backward, per token and adapted layer:
      fused, none       b (2 C + 2 Q + 2 K + 2 I + 7 R) + 4 H  input of layer and MLP, q, k, v, attention, gate, up
      fused, selective  b (2 C + 2 Q + 2 K + 4 R) + 4 H        gate and up are recomputed, n tokens at a time
      fused, full       b C                                    the whole layer is recomputed
      fused, offload    0 (b C in host memory)                 the whole layer is recomputed
      eager, none       8 C + b (5 C + 5 Q + 4 I + 7 R)        with fp32 norms, and an input copy for each LoRA module
      eager, full       b C
    logits        n V (2 b + 12) + N C (b + 4) + 2 b C x supervised tokens

The peak is the largest of four moments. At the logits and in the backward pass of the last layer, all activations are
kept and no gradient exists (unless gradients accumulate). In the backward pass of the first layer, all gradients exist
and the activations of one layer are left. The optimizer step has one buffer of the size of the parameters. The backward
pass of a layer itself needs ``b 2 I C`` for a dequantized weight, ``3 b C N`` for the gradients of the residual stream,
and ``4 b I N`` or (fused selective and offload) ``6 b I n`` for those of the MLP. The estimate is within 5 % of six
measured peaks (see EXPERIMENTS.md); the eager kernels are not measured.

**Time.** Computed tokens per second were measured on one H100 with Mistral-7B in NF4 and LoRA of rank 64; another model
is scaled by FLOP per token (4 W: frozen weights need no gradient), another device by its bf16 rate.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datamodules.errors import UserError

Kernels = Literal["fused", "eager"]
Checkpointing = Literal["none", "selective", "full", "offload"]
Quantization = Literal["nf4", "int8", "none"]

GIB = 2**30
CHUNK = 2048  #: tokens of a chunk, of the logits and of the MLP if gate and up are recomputed
RESERVE = 0.7 * GIB  #: device memory for the CUDA context, workspaces of libraries, fragmentation
MISTRAL_7B_WEIGHTS = 6_979_321_856  #: parameters of the projections

#: computed tokens/s of Mistral-7B (NF4, LoRA r=64) on one H100, and the source of the figure
RATES: dict[tuple[Kernels, Checkpointing], tuple[float, str]] = {
    ("fused", "none"): (17_804, "measured"),
    ("fused", "selective"): (12_404, "measured"),
    ("fused", "full"): (12_111, "measured"),
    ("fused", "offload"): (8_527, "measured"),
    ("eager", "none"): (5_774 * 4 / 3, "from the same modules with checkpointing, without the second forward pass"),
    ("eager", "full"): (5_774, "measured"),
}
FP8_SPEEDUP = 1.40  #: of (fused, none); measured: 24,923 computed tokens/s


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
        memory: GiB of one device (of one core of a TPU).
        tflops: dense bf16 rate in TFLOP/s (fp16 on devices without bf16), with fp32 accumulation.
        source: of the rate.
        count: smallest number of devices that a run uses: 8 cores of a v3-8.
        mode: kernels and activation checkpointing whose rate is used for every run; None uses those of the run.
    """

    memory: float
    tflops: float
    source: str
    count: int = 1
    mode: tuple[Kernels, Checkpointing] | None = None


def _physical_memory() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (ValueError, OSError, AttributeError):  # not available on every system
        return 0.0


DEVICES: dict[str, Device] = {
    "h100": Device(79.1, 989, "measured"),
    "h200": Device(139.8, 989, "NVIDIA H200 data sheet"),
    "a100-80": Device(79.1, 312, "NVIDIA A100 data sheet"),
    "a100-40": Device(39.4, 312, "NVIDIA A100 data sheet"),
    "l40s": Device(44.4, 362, "NVIDIA L40S data sheet"),
    "4090": Device(23.5, 165, "NVIDIA Ada GPU architecture white paper"),
    "3090": Device(23.6, 71, "NVIDIA GA102 white paper"),
    "t4": Device(14.6, 65, "NVIDIA T4 data sheet, fp16"),
    "v3-8": Device(16.0, 492 / 8, "Cloud TPU v3: 123 TFLOP/s per chip of two cores", count=8),
    "cpu": Device(
        _physical_memory(),
        0.148 * (os.cpu_count() or 1),
        "from 200 tokens/s of SmolLM2-135M in fp32 on 2 cores",
        mode=("eager", "none"),
    ),
}


def device_named(name: str) -> Device:
    """Looks a device up.

    Raises:
        UserError: no device has this name.
    """
    if name.lower() not in DEVICES:
        raise UserError(f"--device {name}: unknown; there are {', '.join(DEVICES)}")
    return DEVICES[name.lower()]


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder with the structure of Llama (gated MLP, grouped queries)."""

    hidden: int
    query: int
    key_value: int
    inner: int
    heads: int
    layers: int
    vocabulary: int
    tied: bool = False

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """Reads a transformers config.

        Raises:
            ValueError: the config describes another kind of model; the message names the missing field.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
        values = [getattr(text, name, None) for name in names]
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, int):
                raise ValueError(f"model type {getattr(text, 'model_type', '?')} has no {name} in its config")
        hidden, inner, heads, layers, vocabulary = (int(value) for value in values if value is not None)
        width = getattr(text, "head_dim", None) or hidden // heads
        shared = getattr(text, "num_key_value_heads", None) or heads
        tied = bool(getattr(text, "tie_word_embeddings", False))
        return cls(hidden, heads * width, shared * width, inner, heads, layers, vocabulary, tied)

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear modules of a layer."""
        c, q, k, i = self.hidden, self.query, self.key_value, self.inner
        return {
            "q_proj": (c, q), "k_proj": (c, k), "v_proj": (c, k), "o_proj": (q, c),
            "gate_proj": (c, i), "up_proj": (c, i), "down_proj": (i, c),
        }  # fmt: skip

    @property
    def weights(self) -> int:
        """Number of parameters of the projections of all layers."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.projections.values())

    @property
    def rest(self) -> int:
        """Number of parameters of embeddings, head and norms."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + (2 * self.layers + 1) * self.hidden


@dataclass(frozen=True)
class Setup:
    """Settings on which the memory of a step depends, in addition to the architecture.

    Attributes:
        kernels: fused or eager.
        activation_checkpointing: activations that are recomputed; the eager kernels support none and full.
        rows: rows of a micro-batch on one device.
        sequence_length: tokens per row.
        quantization: of the frozen projections.
        compute_bytes: b; bytes of an unquantized weight and of an activation.
        rank: of the adapters; 0 trains every weight.
        targets: modules that have an adapter, None for all.
        adapted_layers: number of layers with adapters, None for all; the backward pass stops below them.
        adapter_bytes: bytes of a trained weight.
        state_bytes: bytes of optimizer state per trained weight.
        accumulates: whether gradients are accumulated over micro-batches.
        supervised: share of the tokens that have a label.
        attention: attention implementation of the eager kernels.
        fp8: whether products with the base are in FP8; adds two copies of the base, of one byte per weight.
        ranks: number of ranks that the layers are sharded over (FSDP2); two layers are gathered at a time, embeddings
            and head always.
    """

    kernels: Kernels
    activation_checkpointing: Checkpointing
    rows: int
    sequence_length: int
    quantization: Quantization = "nf4"
    compute_bytes: int = 2
    rank: int = 64
    targets: Sequence[str] | None = None
    adapted_layers: int | None = None
    adapter_bytes: int = 4
    state_bytes: float = 8
    accumulates: bool = False
    supervised: float = 0.3
    attention: str = "sdpa"
    fp8: bool = False
    ranks: int = 1

    @property
    def fused(self) -> bool:
        """Whether the fused kernels run."""
        return self.kernels == "fused"

    @property
    def mode(self) -> tuple[Kernels, Checkpointing]:
        """Kernels and the activation checkpointing that they use, which for eager is none or full."""
        if self.kernels == "eager" and self.activation_checkpointing != "none":
            return "eager", "full"
        return self.kernels, self.activation_checkpointing


@dataclass(frozen=True)
class Memory:
    """Peak memory of one device.

    Attributes:
        parts: bytes of base, adapters, gradients, optimizer, activations and logits, each at its own maximum.
        moments: total bytes at each moment that can be the peak.
    """

    parts: dict[str, float]
    moments: dict[str, float]

    @property
    def peak(self) -> float:
        """Bytes at the largest moment; less than the sum of the parts, which do not exist at the same time."""
        return max(self.moments.values())


def trained_parameters(architecture: Architecture, setup: Setup) -> int:
    """Returns P: the number of parameters of the adapters, or of the model without adapters."""
    if not setup.rank:
        return architecture.weights + architecture.rest
    shapes = [
        shape for name, shape in architecture.projections.items() if setup.targets is None or name in setup.targets
    ]
    return _layers(architecture, setup) * setup.rank * sum(inputs + outputs for inputs, outputs in shapes)


def memory(architecture: Architecture, setup: Setup) -> Memory:
    """Estimates the peak memory of training; the module's docstring has the formulas."""
    a, b, tokens = architecture, setup.compute_bytes, setup.rows * setup.sequence_length
    chunk = min(CHUNK, tokens)
    trained = trained_parameters(a, setup)
    base = _base(a, setup)
    adapters = trained * setup.adapter_bytes / setup.ranks if setup.rank else 0.0
    gradients, optimizer = trained * setup.adapter_bytes / setup.ranks, trained * setup.state_bytes / setup.ranks
    kept = _layers(a, setup) * _kept(a, setup) * tokens + _masks(a, setup)
    logits = chunk * a.vocabulary * (2 * b + 12) + tokens * a.hidden * (b + 4 + 2 * b * setup.supervised)
    wide = 6 * chunk if setup.mode in (("fused", "selective"), ("fused", "offload")) else 4 * tokens
    backward: float = b * (wide * a.inner + 2 * a.inner * a.hidden + 3 * a.hidden * tokens)
    # activations of one layer while it is recomputed
    recomputed = {("fused", "offload"): ("fused", "selective"), ("fused", "full"): ("fused", "none")}.get(setup.mode)
    recomputed = ("eager", "none") if setup.mode == ("eager", "full") else recomputed
    backward += _kept(a, setup, recomputed) * tokens if recomputed else 0.0
    layer = _kept(a, setup) * tokens
    constant = base + adapters + optimizer
    accumulated = gradients if setup.accumulates else 0.0
    return Memory(
        parts={
            "base": base, "adapters": adapters, "gradients": gradients, "optimizer": optimizer,
            "activations": max(kept + backward, 0.0), "logits": logits,
        },
        moments={
            "logits": constant + accumulated + kept + logits,
            "backward pass of the last layer": constant + accumulated + kept + backward,
            "backward pass of the first layer": constant + gradients + layer + _masks(a, setup) + backward,
            "optimizer step": constant + 2 * gradients,
        },
    )  # fmt: skip


def _layers(architecture: Architecture, setup: Setup) -> int:
    return architecture.layers if setup.adapted_layers is None else min(setup.adapted_layers, architecture.layers)


def _base(a: Architecture, setup: Setup) -> float:
    nf4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)
    bytes_per_weight = {"none": float(setup.compute_bytes), "int8": 1.0, "nf4": nf4}[setup.quantization]
    if setup.quantization == "nf4" and setup.fused and setup.activation_checkpointing != "offload":
        bytes_per_weight += 4 / 64
    if setup.fp8:
        bytes_per_weight += 2
    stored = a.weights if setup.ranks == 1 else a.weights / setup.ranks + 2 * a.weights / a.layers
    return stored * bytes_per_weight + a.rest * setup.compute_bytes


def _kept(a: Architecture, setup: Setup, mode: tuple[str, str] | None = None) -> float:
    """Returns the bytes that are kept for the backward pass, per token and layer."""
    c, q, k, i, r, b = a.hidden, a.query, a.key_value, a.inner, setup.rank, setup.compute_bytes
    return {
        ("fused", "none"): b * (2 * c + 2 * q + 2 * k + 2 * i + 7 * r) + 4 * a.heads,
        ("fused", "selective"): b * (2 * c + 2 * q + 2 * k + 4 * r) + 4 * a.heads,
        ("fused", "full"): b * c,
        ("fused", "offload"): 0.0,
        ("eager", "none"): 8 * c + b * (5 * c + 5 * q + 4 * i + 7 * r),
        ("eager", "full"): b * c,
    }[mode or setup.mode]


def _masks(a: Architecture, setup: Setup) -> float:
    """Returns the bytes of the dense masks [B, T, T], and of the attention weights that eager attention keeps."""
    if setup.fused or setup.attention == "flex_attention":
        return 0.0
    cells = setup.rows * setup.sequence_length**2
    if setup.attention != "eager":
        return float(cells * setup.compute_bytes)
    layers = 1 if setup.mode == ("eager", "full") else _layers(a, setup)
    return float(cells * setup.compute_bytes * (1 + 2 * layers * a.heads))


def seconds(architecture: Architecture, setup: Setup, device: Device, *, tokens: float, devices: int = 1) -> float:
    """Estimates the seconds that training on a number of computed tokens (with padding) takes.

    Args:
        architecture: of the model.
        setup: its kernels and activation checkpointing select the measured rate.
        device: its rate scales the measured one.
        tokens: total over all devices.
        devices: number of devices.
    """
    share = _layers(architecture, setup) / architecture.layers
    # a forward pass, and a backward pass down to the lowest adapter
    work = architecture.weights * ((1 + share) / 2 if setup.rank else 1.5)
    rate = (
        RATES[device.mode or setup.mode][0]
        * (MISTRAL_7B_WEIGHTS / work)
        * (device.tflops / DEVICES["h100"].tflops)
        * (FP8_SPEEDUP if setup.fp8 else 1)
    )
    return tokens / (rate * max(devices, device.count))


def provenance(architecture: Architecture, setup: Setup, device: Device) -> str:
    """Returns "measured" if the rate of :func:`seconds` was measured with these settings, otherwise its derivation."""
    basis = "measured" if device.mode else RATES[setup.mode][1]
    measured = (
        device.source == "measured" and architecture.weights == MISTRAL_7B_WEIGHTS and setup.quantization == "nf4"
    )
    if basis == "measured" and measured:
        return "measured"
    parts = [] if basis == "measured" else [basis]
    if architecture.weights != MISTRAL_7B_WEIGHTS:
        parts.append("scaled from Mistral-7B by parameters")
    if device.source != "measured":
        parts.append(f"by the device's rate ({device.source})")
    return "estimated: " + "; ".join(parts or ["measured with another quantization"])
