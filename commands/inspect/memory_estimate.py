"""What a run will take, from the model's config.json and the settings alone: peak memory by part, and time.

**Memory.** C channels, Q and K widths of all query and of all key heads, I inner width, H heads, L layers, R LoRA rank,
V vocabulary, N tokens of a micro-batch, n tokens of a piece (2,048), b bytes of the compute type, P trained parameters,
W parameters of the projections. Bytes::

    base          W (1/2 + 1/64 + 4/16384) in NF4 (scales in int8, their own in fp32), W / 16 more where the kernels
                  undo the nesting (fused, but for offload), 2 W more in FP8; W in int8; W b unquantised;
                  + embeddings, head and norms in b. Divided over r ranks, the projections take W b (1/r + 2/L): two
                  layers are whole, the one that computes and the next; adapters, gradients and optimizer are 1/r
    adapters      P a                 a bytes of an adapter's weight
    gradients     P a
    optimizer     P s                 s bytes of state a parameter: AdamW in fp32 8, Lion 4
    activations   kept from forward to backward, a token and adapted layer:
      fused, none       b (2 C + 2 Q + 2 K + 2 I + 7 R) + 4 H  input of layer and MLP, q, k, v, attention, gate, up
      fused, selective  b (2 C + 2 Q + 2 K + 4 R) + 4 H        gate and up are computed again, n tokens at a time
      fused, full       b C                                    the whole layer is computed again
      fused, offload    0 (b C in host memory)                 the whole layer is computed again
      eager, none       8 C + b (5 C + 5 Q + 4 I + 7 R)        with fp32 norms, and an input copy for each LoRA module
      eager, full       b C
    logits        n V (2 b + 12) + N C (b + 4) + 2 b C x supervised tokens

The peak is the largest of four moments: at the logits and in the last layer's backward pass everything is kept but no
gradient is there (unless they accumulate); in the first layer's all gradients are there, and one layer is; the
optimizer's step has one buffer of the parameters' size. A layer's backward pass itself wants ``b 2 I C`` for
a dequantised weight, ``3 b C N`` for the residual's gradients, and ``4 b I N`` or (fused selective and offload)
``6 b I n`` for the MLP's.
Against five measured peaks (see EXPERIMENTS.md) it is within 3 %; the eager kernels and fused, full are not measured.

**Time.** Computed tokens a second were measured on one H100 with Mistral-7B in NF4 and LoRA of rank 64; another model
is scaled by FLOP a token (4 W: frozen weights need no gradient), another device by its bf16 rate.
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
PIECE = 2048  #: tokens of a piece: of the MLP where gate and up are made again, and of the logits
RESERVE = 0.7 * GIB  #: of a device's memory: CUDA context, libraries' workspaces, fragmentation
MISTRAL_7B_WEIGHTS = 6_979_321_856  #: parameters of its projections

#: computed tokens/s of Mistral-7B (NF4, LoRA r=64) on one H100, and where the figure is from
RATES: dict[tuple[Kernels, Checkpointing], tuple[float, str]] = {
    ("fused", "none"): (17_804, "measured"),
    ("fused", "selective"): (12_404, "measured"),
    ("fused", "full"): (17_804 * 2 / 3, "from activation_checkpointing none, with a second forward pass"),
    ("fused", "offload"): (8_527, "measured"),
    ("eager", "none"): (5_774 * 4 / 3, "from the same modules with checkpointing, without the second forward pass"),
    ("eager", "full"): (5_774, "measured"),
}
FP8_SPEEDUP = 1.40  #: of fused, none; measured: 24,923 computed tokens/s


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
        memory: GiB of one device (of one core of a TPU).
        tflops: dense bf16 rate in TFLOP/s (fp16 where there is no bf16), with fp32 accumulation.
        source: of the rate.
        count: devices that the rate is for: 8 cores of a v3-8.
        mode: kernels and activation checkpointing whose rate is used for all; None uses those of the run.
    """

    memory: float
    tflops: float
    source: str
    count: int = 1
    mode: tuple[Kernels, Checkpointing] | None = None


def _physical_memory() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (ValueError, OSError, AttributeError):  # not on every system
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
    "v3-8": Device(16.0, 492 / 8, "Cloud TPU v3: 123 TFLOP/s a chip of two cores", count=8),
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
        UserError: there is none of this name.
    """
    if name.lower() not in DEVICES:
        raise UserError(f"--device {name}: unknown; there are {', '.join(DEVICES)}")
    return DEVICES[name.lower()]


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder of Llama's kind (gated MLP, grouped queries)."""

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
            ValueError: the config describes another kind of model; the message says which field is missing.
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
        """(inputs, outputs) of a layer's linear modules."""
        c, q, k, i = self.hidden, self.query, self.key_value, self.inner
        return {
            "q_proj": (c, q), "k_proj": (c, k), "v_proj": (c, k), "o_proj": (q, c),
            "gate_proj": (c, i), "up_proj": (c, i), "down_proj": (i, c),
        }  # fmt: skip

    @property
    def weights(self) -> int:
        """Parameters of all layers' projections."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.projections.values())

    @property
    def rest(self) -> int:
        """Parameters of embeddings, head and norms."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + (2 * self.layers + 1) * self.hidden


@dataclass(frozen=True)
class Setup:
    """What a step's memory depends on, beside the architecture.

    Attributes:
        kernels: fused or eager.
        activation_checkpointing: what is kept for the backward pass; the eager kernels know none and full.
        rows: rows of a micro-batch on one device.
        sequence_length: tokens a row.
        quantization: of the frozen projections.
        compute_bytes: b; of the weights that are not quantised and of the activations.
        rank: of the adapters; 0 trains every weight.
        targets: modules that have an adapter, None for all.
        adapted_layers: how many layers have adapters, None for all; the backward pass stops below them.
        adapter_bytes: of a trained weight.
        state_bytes: optimizer state for one trained weight.
        accumulates: gradients wait for further micro-batches.
        supervised: share of the tokens that carry a label.
        attention: implementation of transformers, for kernels of transformers.
        fp8: the base's products are in FP8, for which it is there twice more, a byte a weight.
        ranks: that the layers are divided over (FSDP2); two of them are whole at a time, embeddings and head always.
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
        """Kernels and the activation checkpointing that they really do."""
        if self.kernels == "eager" and self.activation_checkpointing != "none":
            return "eager", "full"
        return self.kernels, self.activation_checkpointing


@dataclass(frozen=True)
class Memory:
    """Peak memory of one device.

    Attributes:
        parts: bytes of base, adapters, gradients, optimizer, activations and logits, each at its own largest.
        moments: bytes in all at each moment that could be the peak.
    """

    parts: dict[str, float]
    moments: dict[str, float]

    @property
    def peak(self) -> float:
        """Bytes at the worst moment; not the parts' sum, since they are not all there at once."""
        return max(self.moments.values())


def trained_parameters(architecture: Architecture, setup: Setup) -> int:
    """P: parameters of the adapters, or all where there are none."""
    if not setup.rank:
        return architecture.weights + architecture.rest
    shapes = [
        shape for name, shape in architecture.projections.items() if setup.targets is None or name in setup.targets
    ]
    return _layers(architecture, setup) * setup.rank * sum(inputs + outputs for inputs, outputs in shapes)


def memory(architecture: Architecture, setup: Setup) -> Memory:
    """Estimates the peak memory of training; the module's docstring has the formulas."""
    a, b, tokens = architecture, setup.compute_bytes, setup.rows * setup.sequence_length
    piece = min(PIECE, tokens)
    trained = trained_parameters(a, setup)
    base = _base(a, setup)
    adapters = trained * setup.adapter_bytes / setup.ranks if setup.rank else 0.0
    gradients, optimizer = trained * setup.adapter_bytes / setup.ranks, trained * setup.state_bytes / setup.ranks
    kept = _layers(a, setup) * _kept(a, setup) * tokens + _masks(a, setup)
    logits = piece * a.vocabulary * (2 * b + 12) + tokens * a.hidden * (b + 4 + 2 * b * setup.supervised)
    wide = 6 * piece if setup.mode in (("fused", "selective"), ("fused", "offload")) else 4 * tokens
    backward: float = b * (wide * a.inner + 2 * a.inner * a.hidden + 3 * a.hidden * tokens)
    # what a layer keeps while it is computed again
    again = {("fused", "offload"): ("fused", "selective"), ("fused", "full"): ("fused", "none")}.get(setup.mode)
    again = ("eager", "none") if setup.mode == ("eager", "full") else again
    backward += _kept(a, setup, again) * tokens if again else 0.0
    layer = _kept(a, setup) * tokens
    always = base + adapters + optimizer
    waiting = gradients if setup.accumulates else 0.0
    return Memory(
        parts={
            "base": base, "adapters": adapters, "gradients": gradients, "optimizer": optimizer,
            "activations": max(kept + backward, 0.0), "logits": logits,
        },
        moments={
            "logits": always + waiting + kept + logits,
            "backward pass of the last layer": always + waiting + kept + backward,
            "backward pass of the first layer": always + gradients + layer + _masks(a, setup) + backward,
            "optimizer step": always + 2 * gradients,
        },
    )  # fmt: skip


def _layers(architecture: Architecture, setup: Setup) -> int:
    return architecture.layers if setup.adapted_layers is None else min(setup.adapted_layers, architecture.layers)


def _base(a: Architecture, setup: Setup) -> float:
    each = {"none": float(setup.compute_bytes), "int8": 1.0, "nf4": 1 / 2 + 1 / 64 + 4 / (64 * 256)}[setup.quantization]
    if setup.quantization == "nf4" and setup.fused and setup.activation_checkpointing != "offload":
        each += 4 / 64
    if setup.fp8:
        each += 2
    here = a.weights if setup.ranks == 1 else a.weights / setup.ranks + 2 * a.weights / a.layers
    return here * each + a.rest * setup.compute_bytes


def _kept(a: Architecture, setup: Setup, mode: tuple[str, str] | None = None) -> float:
    """Bytes that a token and layer keep for the backward pass."""
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
    """Dense masks [B, T, T] of transformers' attention, and the weights that its eager one keeps."""
    if setup.fused or setup.attention == "flex_attention":
        return 0.0
    cells = setup.rows * setup.sequence_length**2
    if setup.attention != "eager":
        return float(cells * setup.compute_bytes)
    layers = 1 if setup.mode == ("eager", "full") else _layers(a, setup)
    return float(cells * setup.compute_bytes * (1 + 2 * layers * a.heads))


def seconds(architecture: Architecture, setup: Setup, device: Device, *, tokens: float, devices: int = 1) -> float:
    """Estimates how long training on so many computed tokens (padding too) takes.

    Args:
        architecture: of the model.
        setup: its kernels and activation checkpointing choose the measured rate.
        device: scales it.
        tokens: of all devices together.
        devices: how many.
    """
    share = _layers(architecture, setup) / architecture.layers
    work = architecture.weights * ((1 + share) / 2 if setup.rank else 1.5)  # a forward pass, and backward as far down
    rate = (
        RATES[device.mode or setup.mode][0]
        * (MISTRAL_7B_WEIGHTS / work)
        * (device.tflops / DEVICES["h100"].tflops)
        * (FP8_SPEEDUP if setup.fp8 else 1)
    )
    return tokens / (rate * max(devices, device.count))


def provenance(architecture: Architecture, setup: Setup, device: Device) -> str:
    """Says whether :func:`seconds` is measured, and if not where it comes from."""
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
    return "estimated: " + "; ".join(parts or ["not this quantization"])
