"""Description of a model: which base it has, how the base is stored, and which weights are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from datamodules.errors import UserError, one_line
from datamodules.pretrained.locate import loading_error, resolve
from lightning_modules.models.attention_masks import AttnImplementation, register_attention

Quantization = Literal["nf4", "int8", "none"]
ActivationCheckpointing = Literal["none", "selective", "full", "offload"]
RANDOM = "random:"  #: prefix of a model name: random weights in the architecture of a folder's config.json
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters next to frozen weights, built by PEFT (Hu et al., arXiv 2106.09685)."""

    rank: int = 16
    """Inner width r of the update B A."""
    alpha: float = 32
    """The update is scaled by alpha / rank (with use_rslora by alpha / sqrt(rank))."""
    dropout: float = 0.0
    """Fraction of the adapter's inputs that are dropped in training."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = PROJECTIONS
    """Names of the linear layers that get an adapter; all-linear is every linear layer except the head."""
    num_top_layers: int | None = None
    """Number of layers, counted from the top, that get adapters; the backward pass stops below them. None for all."""
    use_dora: bool = False
    """Trains the magnitude of each column separately from its direction (DoRA, arXiv 2402.09353)."""
    use_rslora: bool = False
    """Scales by alpha / sqrt(rank), so that large ranks learn as fast as small ones (rsLoRA, arXiv 2312.03732)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the adapter's weights; products use the type of the base. A step of Lion, 5e-5, is lost on a bfloat16
    weight of 0.02: 3.9 % more held-out loss on SmolLM2-135M, none with the optimizer's ``master_weights``."""


@dataclass(frozen=True)
class Backbone:
    """A causal language model that is trained, or that is a teacher.

    The types of weights and products are set here. ``trainer.precision`` must be 32-true, which converts nothing.
    """

    model_name_or_path: str
    """Local folder, name on the Hugging Face hub, embedded:smollm2-135m-instruct, or random:FOLDER (the architecture of
    the folder's config.json with seeded random weights, for benchmarks)."""
    quantization: Quantization = "none"
    """How the frozen linear layers are stored: nf4 (4 bits, double quantisation), int8, or none."""
    dtype: Literal["bfloat16", "float32", "float16", "auto"] = "auto"
    """Type of all other weights and of the products; auto is the type of the checkpoint."""
    attn_implementation: AttnImplementation = "sdpa"
    """Attention implementation: flex_attention skips empty blocks of packed rows, on GPUs; blockwise never computes a
    T x T matrix of scores, for long rows on TPUs; pallas is torch_xla's flash attention, on TPUs, without a shared
    prefix."""
    lora: LoRA | None = None
    """Adapters to train; null trains every weight of an unquantised model."""
    kernels: Literal["auto", "fused", "eager"] = "auto"
    """Forward and backward pass in training: fused uses this project's fused blocks, for Llama and Mistral; eager uses
    the modules of transformers and PEFT, for every architecture; auto uses fused where it is supported."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """Activations that are recomputed in the backward pass instead of being kept: none; selective (the inner products
    of the MLP); full (each layer, from its input); offload (as full, and the inputs of the layers are kept in host
    memory). selective and offload need fused kernels."""
    fp8: bool = False
    """Computes products with the frozen base in FP8, with fused kernels (Ada, Hopper and newer): 1.4 times as fast on
    an H100, 2 bytes more per weight, 1.4 % more held-out loss after 300 steps of SmolLM2-135M. Off by default."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    adapter: str | None = None
    """Folder (or hub name) of a PEFT adapter to start from, or of the teacher."""

    def build(self, device: torch.device | str | None = None) -> Any:
        """Loads the weights and adds the adapter with PEFT.

        Args:
            device: device of the weights; the CPU if None.

        Returns:
            A PeftModel, or without ``lora`` and ``adapter`` the transformers model itself, frozen if quantised.

        Raises:
            UserError: no such model or adapter, no access, or a setting that this machine or model does not support.
        """
        target = torch.device(device) if device is not None else torch.device("cpu")
        with out_of_memory_advice():
            model = self._load(target)
            if self.activation_checkpointing != "none":  # the fused blocks have their own and ignore this
                enable_activation_checkpointing(model)
            if self.quantization != "none":
                model.requires_grad_(False)
            return self.wrap(model)

    def wrap(self, model: Any) -> Any:
        """Adds the adapter to a base that is already loaded; see :meth:`build`."""
        if self.adapter is not None:
            return self._with_adapter(model)
        return model if self.lora is None else self._with_lora(model, self.lora)

    @property
    def location(self) -> str:
        """The argument of ``from_pretrained``: a local folder or a hub name."""
        return (
            self.model_name_or_path.removeprefix(RANDOM)
            if self.model_name_or_path.startswith(RANDOM)
            else resolve(self.model_name_or_path)
        )

    def shares_weights_with(self, other: Backbone) -> bool:
        """Checks whether both describe the same stored base, independent of their adapters."""
        first, second = ((b.model_name_or_path, b.revision, b.quantization, b.dtype) for b in (self, other))
        return first == second

    def _load(self, device: torch.device) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        if self.quantization != "none":
            _check_bitsandbytes(self.quantization, device)
        register_attention(self.attn_implementation)
        location = self.location
        options: dict[str, Any] = {"trust_remote_code": False}
        if self.revision is not None:
            options["revision"] = self.revision
        try:
            config = AutoConfig.from_pretrained(location, **options)
            dtype = self._dtype(config)
            if self.model_name_or_path.startswith(RANDOM) or device.type == "meta":  # shapes only: nothing is loaded
                from lightning_modules.models.random_init import random_model

                return random_model(
                    config,
                    quantization=self.quantization,
                    dtype=dtype,
                    device=device,
                    attention=self.attn_implementation,
                )
            return AutoModelForCausalLM.from_pretrained(
                location,
                dtype=dtype,
                quantization_config=_quantization_config(self.quantization, dtype),
                device_map={"": device},  # pinned: "auto" would put some layers of a rank on the GPU of another rank
                attn_implementation=self.attn_implementation,
                use_safetensors=True,  # no pickles
                **options,
            )
        except (OSError, ValueError, ImportError) as error:
            if isinstance(error, OSError) or "trust_remote_code" in str(error):
                raise loading_error("model", self.model_name_or_path, error) from error
            settings = f"quantization {self.quantization}, dtype {self.dtype}, attention {self.attn_implementation}"
            message = f"model {self.model_name_or_path} can't be built with {settings}: {one_line(error)}"
            raise UserError(message) from error

    def _dtype(self, config: Any) -> torch.dtype:
        if self.dtype != "auto":
            return _torch_dtype(self.dtype)
        stored = getattr(config, "dtype", None) or "float32"
        return _torch_dtype(str(stored).removeprefix("torch."))

    def _with_lora(self, model: Any, lora: LoRA) -> Any:
        from peft import LoraConfig, get_peft_model

        if lora.use_dora and self.quantization == "int8":
            raise UserError(
                "backbone.lora.use_dora=true: not supported with backbone.quantization=int8. Fix: set quantization to "
                "nf4 or none"
            )
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=_target_modules(model, lora),
            layers_to_transform=_top_layers(model, lora.num_top_layers),
            use_dora=lora.use_dora,
            use_rslora=lora.use_rslora,
        )
        try:
            wrapped = get_peft_model(model, config)
        except ValueError as error:
            raise UserError(
                _adapter_message(f"backbone.lora.target_modules {_text(lora.target_modules)}", model, error)
            ) from error
        return self._finish(wrapped, lora.dtype)

    def _with_adapter(self, model: Any) -> Any:
        from peft import PeftConfig, PeftModel

        adapter = str(self.adapter)
        try:
            config = PeftConfig.from_pretrained(adapter)
        except (OSError, ValueError) as error:
            message = f"backbone.adapter {adapter}: no PEFT adapter there ({one_line(error)}); give a folder with one"
            raise UserError(message) from error
        if self.lora is not None:
            _check_same_shape(self.lora, config, adapter)
            config.lora_dropout = self.lora.dropout
        try:
            wrapped = PeftModel.from_pretrained(model, adapter, config=config, is_trainable=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(_adapter_message(f"backbone.adapter {adapter}", model, error)) from error
        return self._finish(wrapped, self.lora.dtype if self.lora is not None else "float32")

    def _finish(self, wrapped: Any, dtype: str) -> Any:
        """Sets the adapter's type, and the name under which plain PEFT finds the base."""
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(_torch_dtype(dtype))
        for config in wrapped.peft_config.values():
            config.base_model_name_or_path = self.location
            config.revision = self.revision
        return wrapped


@contextmanager
def out_of_memory_advice(rows: str = "data.init_args.sequence_length or batch_size") -> Iterator[None]:
    """Converts an accelerator's out-of-memory error into a UserError that names the settings to change.

    Args:
        rows: the settings to lower, with their values if they are known.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory on the accelerator: lower {rows} (and raise trainer.accumulate_grad_batches as much), or "
            "set model.init_args.backbone.activation_checkpointing full, or backbone.quantization nf4 "
            f"({str(error).split('. ')[0]})"
        ) from error


def enable_activation_checkpointing(model: Any) -> None:
    """Has transformers recompute the activations of each layer in the backward pass."""
    # the method's name is activation_checkpointing_enable in the newest transformers, which deprecate the old one
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})


def _check_bitsandbytes(quantization: str, device: torch.device) -> None:
    message = f"backbone.quantization {quantization}: %s; set backbone.quantization none (and dtype bfloat16)"
    if device.type == "xla":
        raise UserError(message % "bitsandbytes does not run on a TPU")
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(message % f"bitsandbytes can't be used, pip install -e '.[gpu]' ({one_line(error)})") from error


def _quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    if quantization == "none":
        return None
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _target_modules(model: Any, lora: LoRA) -> list[str] | str:
    """Returns PEFT's ``target_modules``. PEFT takes no number of layers with all-linear, so names replace it then."""
    if lora.target_modules != "all-linear":
        return list(lora.target_modules)
    if lora.num_top_layers is None:
        return "all-linear"
    linear = {name for name, module in model.get_decoder().named_modules() if isinstance(module, nn.Linear)}
    return sorted({name.rpartition(".")[2] for name in linear})


def _top_layers(model: Any, layers: int | None) -> list[int] | None:
    if layers is None:
        return None
    count = model.config.get_text_config().num_hidden_layers
    if not 1 <= layers <= count:
        raise UserError(
            f"backbone.lora.num_top_layers {layers}: the model has {count} layers; set 1 to {count}, or null for all"
        )
    return list(range(count - layers, count))


def _check_same_shape(lora: LoRA, config: Any, adapter: str) -> None:
    for name, configured, stored in (("rank", lora.rank, config.r), ("alpha", lora.alpha, config.lora_alpha)):
        if configured != stored:
            raise UserError(
                f"backbone.lora.{name} {configured}, but the adapter {adapter} has {stored}. Fix: set it to {stored}, "
                "or backbone.lora to null"
            )


def _adapter_message(setting: str, model: Any, error: Exception) -> str:
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return f"{setting} does not fit the model; its linear layers are {', '.join(sorted(names))} ({one_line(error)})"


def _torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _text(targets: tuple[str, ...] | str) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets)
