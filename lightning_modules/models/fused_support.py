"""Conditions under which the fused kernels compute a model.

The conditions depend on :class:`ModelTraits` only, which are read from a model that is built, or from its config and
the settings of a backbone. So ``inspect`` reports the same choice, without a model, that training makes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_modules.models.backbone import PROJECTIONS, Backbone

#: supported architectures -> options of their configs that add a bias to projections
BIAS_OPTIONS: dict[str, tuple[str, ...]] = {"llama": ("attention_bias", "mlp_bias"), "mistral": ()}
MODEL_TYPES = tuple(BIAS_OPTIONS)
HEAD_DIMS = (16, 32, 64, 128)  #: widths of a head that the attention kernels support
CAPABILITY = (8, 0)  #: compute capability that the attention kernels need: Ampere


@dataclass(frozen=True)
class ModelTraits:
    """Properties of a model on which the support by the fused kernels depends.

    Attributes:
        model_type: architecture, as transformers names it.
        activation: activation function of the MLP.
        head_dim: channels of an attention head.
        dtype_bytes: size of an unquantized weight, and of an activation.
        bias: whether a projection of a decoder layer has a bias.
        int8: whether the projections are quantized to int8.
        trains_embeddings: whether the embeddings are trained, as in full fine-tuning.
        several_adapters: whether more than one adapter is active.
        lora_variant: whether an adapter is not plain LoRA: DoRA, another variant of LoRA, or another method.
        lora_dropout: whether an adapter has a dropout probability above 0.
        lora_bias: whether an adapter has a bias of its own.
    """

    model_type: str
    activation: str
    head_dim: int
    dtype_bytes: int
    bias: bool = False
    int8: bool = False
    trains_embeddings: bool = False
    several_adapters: bool = False
    lora_variant: bool = False
    lora_dropout: bool = False
    lora_bias: bool = False

    @classmethod
    def of_model(cls, model: Any) -> ModelTraits:
        """Reads the traits of a causal LM, with or without PEFT's wrapper."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        embeddings = base.get_input_embeddings()
        layers = [m for name, m in base.get_decoder().named_modules() if name.rpartition(".")[2] in PROJECTIONS]
        linear = [m.get_base_layer() if hasattr(m, "get_base_layer") else m for m in layers]
        adapted = [m for m in layers if hasattr(m, "get_base_layer")]
        lora = [m for m in adapted if hasattr(m, "lora_A")]
        active = [(m, name) for m in lora for name in m.active_adapters if name in m.lora_A]
        return cls(
            **_config_traits(base.config.get_text_config()),
            dtype_bytes=next(embeddings.parameters()).dtype.itemsize,
            bias=any(getattr(m, "bias", None) is not None for m in linear),
            int8=any(getattr(getattr(m, "weight", None), "dtype", None) == torch.int8 for m in linear),
            trains_embeddings=any(parameter.requires_grad for parameter in embeddings.parameters()),
            several_adapters=any(len(m.active_adapters) > 1 for m in adapted),
            lora_variant=len(lora) < len(adapted)
            or any(m.use_dora.get(name) or m.lora_variant.get(name) for m, name in active),
            lora_dropout=any(getattr(m.lora_dropout[name], "p", 0.0) > 0 for m, name in active),
            lora_bias=any(m.lora_bias.get(name) for m, name in active),
        )

    @classmethod
    def of_backbone(cls, config: Any, backbone: Backbone, dtype_bytes: int | None = None) -> ModelTraits:
        """Predicts the traits of the model that a backbone builds for training.

        Args:
            config: transformers config of the model.
            backbone: settings; a saved adapter is read if it is a local folder.
            dtype_bytes: size of an unquantized weight; None reads it from the settings and the config.
        """
        text, lora = config.get_text_config(), backbone.lora
        traits = _config_traits(text)
        saved = read_adapter_config(backbone.adapter)
        dropout = saved.get("lora_dropout", 0.0) if lora is None else lora.dropout
        use_dora = saved.get("use_dora", False) if backbone.adapter or lora is None else lora.use_dora
        return cls(
            **traits,
            dtype_bytes=dtype_bytes or weight_bytes(config, backbone),
            bias=any(getattr(text, option, False) for option in BIAS_OPTIONS.get(traits["model_type"], ())),
            int8=backbone.quantization == "int8",
            trains_embeddings=_trains_embeddings(backbone, saved),
            lora_variant=bool(use_dora) or saved.get("peft_type", "LORA") != "LORA",
            lora_dropout=dropout > 0,
            lora_bias=bool(saved.get("lora_bias")),
        )


def unsupported_reason(traits: ModelTraits, device_type: str = "cpu", backend_reason: str | None = None) -> str | None:
    """Returns why the fused kernels can't compute a model on a kind of device, or None if they can.

    Args:
        traits: of the model.
        device_type: ``cuda``, ``cpu``, or another type of torch device.
        backend_reason: why the strategy of the trainer excludes the fused kernels, such as a sharded base; None if it
            does not.
    """
    types, widths = ", ".join(MODEL_TYPES), ", ".join(map(str, HEAD_DIMS))
    cuda, bits = device_type == "cuda", 8 * traits.dtype_bytes
    conditions = [
        (backend_reason is not None, backend_reason),
        (device_type not in ("cuda", "cpu"), f"the device is {device_type}"),
        (traits.model_type not in MODEL_TYPES, f"the architecture is {traits.model_type}, not one of {types}"),
        (traits.activation != "silu", f"the activation of the MLP is {traits.activation}, not silu"),
        (traits.trains_embeddings, "the embeddings are trained"),
        (traits.bias, "a projection has a bias"),
        (traits.int8, "the base is quantized to int8"),
        (traits.several_adapters, "more than one adapter is active"),
        (traits.lora_variant, "the adapter is DoRA, or otherwise not plain LoRA"),
        (traits.lora_dropout, "the adapter has LoRA dropout > 0"),
        (traits.lora_bias, "the adapter has a LoRA bias"),
        (cuda and bits != 16, f"the attention kernels need 16-bit weights, not {bits}-bit ones"),
        (
            cuda and traits.head_dim not in HEAD_DIMS,
            f"the attention kernels need heads of {widths} channels, not {traits.head_dim}",
        ),
    ]
    return next((reason for applies, reason in conditions if applies), None)


def gpu_unsupported_reason(device: torch.device) -> str | None:
    """Returns why the fused kernels can't run on a GPU of this machine, or None if they can; None for a CPU."""
    if device.type != "cuda":
        return None
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"the attention kernels need an Ampere GPU or newer, not {torch.cuda.get_device_name(device)}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "the kernels need triton, which is not installed with this build of torch"
    return None


def weight_bytes(config: Any, backbone: Backbone) -> int:
    """Returns the bytes of an unquantized weight: of the configured type, or for ``auto`` of the stored one."""
    name = str(backbone.dtype)
    if name == "auto":
        name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype.itemsize


def read_adapter_config(folder: str | None) -> dict[str, Any]:
    """Reads PEFT's ``adapter_config.json``; returns an empty dict if there is no such local file."""
    file = Path(folder or "") / "adapter_config.json"
    if not folder or not file.is_file():
        return {}
    saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return saved


def _config_traits(text_config: Any) -> dict[str, Any]:
    if text_config.model_type not in MODEL_TYPES:  # other configs need not have the fields
        return {"model_type": text_config.model_type, "activation": "", "head_dim": 0}
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return {"model_type": text_config.model_type, "activation": text_config.hidden_act, "head_dim": head_dim}


def _trains_embeddings(backbone: Backbone, saved: dict[str, Any]) -> bool:
    if backbone.adapter is None:
        # a quantized base is frozen with or without an adapter
        return backbone.lora is None and backbone.quantization == "none"
    targets = saved.get("target_modules") or ()
    modules = [*(saved.get("modules_to_save") or ()), *(targets if isinstance(targets, list) else ())]
    return any(name.rpartition(".")[2] == "embed_tokens" for name in modules)
