"""What the configured run makes of a surveyed data set: steps, memory, hours, and what looks wrong."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from commands.inspect import memory_estimate
from commands.inspect.device import find_device
from datamodules.pretrained.locate import resolve
from lightning_modules.losses.objectives import Distillation
from lightning_modules.losses.teacher_cache import TeacherCache
from lightning_modules.losses.teacher_shards import EXAMPLE_BYTES, position_bytes
from lightning_modules.models.backbone import RANDOM, Backbone
from lightning_modules.models.fused_decoder import MODEL_TYPES
from optimizers.lion import HIGHEST_USUAL_LR

if TYPE_CHECKING:
    from datamodules.findings import FindingsDataModule
    from datamodules.statistics.summary import DatasetSummary
    from lightning_modules.causal_lm import CausalLMModule


@dataclass(frozen=True)
class Plan:
    """The part of a run's settings that the estimates need.

    Attributes:
        accelerator: as the config says.
        devices: over all nodes.
        accumulate: micro-batches of a step.
        max_steps: of the run; -1 for no limit.
        optimizer: class name.
        lr: its highest learning rate.
        state_bytes: of optimizer state for a float32 weight.
        divided: whether the base is divided over the devices.
    """

    accelerator: str
    devices: int
    accumulate: int
    max_steps: int
    optimizer: str
    lr: float
    state_bytes: float
    divided: bool = False

    @classmethod
    def of(cls, trainer: Any, make_optimizer: Any) -> Plan:
        """Reads the trainer's part of a config, and tries the optimizer on one small weight."""
        name, lr, state_bytes = _try_optimizer(make_optimizer)
        nodes = int(trainer.get("num_nodes") or 1)
        return cls(
            accelerator=_accelerator(trainer.get("accelerator")),
            devices=_count(trainer.get("devices"), trainer.get("accelerator")) * nodes,
            accumulate=int(trainer.get("accumulate_grad_batches") or 1),
            max_steps=int(trainer.get("max_steps") or -1),
            optimizer=name,
            lr=lr,
            state_bytes=state_bytes,
            divided=str(getattr(trainer.get("strategy"), "class_path", "")).endswith("FSDP2Strategy"),
        )


def _accelerator(value: Any) -> str:
    """Name of the accelerator; of a class that stands for one, what it stands for."""
    if hasattr(value, "class_path"):
        return "tpu" if value.class_path.endswith("PJRTAccelerator") else value.class_path
    return str(value or "auto")


def _count(devices: Any, accelerator: Any) -> int:
    """Devices of one node, as Lightning's Trainer takes them; what only the machine knows is asked of this machine."""
    if isinstance(devices, str) and devices not in ("auto", "-1"):
        return len([part for part in devices.split(",") if part]) if "," in devices else int(devices)
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, int) and devices > 0:
        return devices
    return max(torch.cuda.device_count(), 1) if accelerator in ("gpu", "cuda", "auto", None) else 1


def _try_optimizer(make: Any) -> tuple[str, float, float]:
    """(class name, highest rate, state bytes for a weight) of one step on a matrix of zeros."""
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lion's about its rate, which comes from here too
        optimizer = make([weight])
        lr = max(float(group["lr"]) for group in optimizer.param_groups)
        name = type(optimizer).__name__
        try:
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        except (RuntimeError, ValueError, NotImplementedError):  # an optimizer for GPUs only
            return name, lr, 4.0 if "lion" in name.lower() else 8.0
    state = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor) and value.ndim]
    return name, lr, sum(value.nbytes for value in state) / weight.numel()


def epoch(found: DatasetSummary, data: FindingsDataModule, plan: Plan) -> dict[str, Any]:
    """Rows, batches and optimizer steps of one epoch on each device."""
    packed = found.packed[data.packing]
    batches = packed.rows // (data.batch_size * plan.devices)
    return {
        "rows": packed.rows, "batches": batches, "steps": math.ceil(batches / plan.accumulate),
        "examples": packed.examples, "findings": packed.findings,
        "batch_size": data.batch_size, "accumulate": plan.accumulate, "devices": plan.devices,
        "max_steps": plan.max_steps if plan.max_steps > 0 else None,
    }  # fmt: skip


def model_config(backbone: Backbone) -> tuple[Any, str]:
    """Reads the model's config.json: (config, "") or (None, why there is none)."""
    from transformers import AutoConfig

    name = backbone.model_name_or_path.removeprefix(RANDOM)
    location = resolve(name, weights=False)
    if Path(location).is_dir() and not (Path(location) / "config.json").is_file():
        return None, f"{name} has no config.json"
    try:
        return AutoConfig.from_pretrained(location, revision=backbone.revision or "main", trust_remote_code=False), ""
    except (OSError, ValueError) as error:
        return None, f"{name}'s config.json can't be read ({' '.join(str(error).split())[:120]})"


def setup_of(
    backbone: Backbone, config: Any, data: FindingsDataModule, plan: Plan, supervised: float
) -> memory_estimate.Setup:
    """Translates a backbone and its data into what memory depends on."""
    lora, dtype = backbone.lora, str(backbone.dtype)
    if dtype == "auto":
        dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    adapter_bytes = {"float32": 4, "bfloat16": 2}[lora.dtype] if lora else 4 if backbone.adapter else size
    rank, targets = _adapter(backbone)
    return memory_estimate.Setup(
        kernels=kernels_of(backbone, config, plan.accelerator, size, plan.divided),
        activation_checkpointing=backbone.activation_checkpointing,
        rows=data.batch_size,
        sequence_length=data.sequence_length,
        quantization=backbone.quantization,
        compute_bytes=size,
        rank=rank,
        targets=targets,
        adapted_layers=lora.num_top_layers if lora else None,
        adapter_bytes=adapter_bytes,
        state_bytes=plan.state_bytes * adapter_bytes / 4,
        accumulates=plan.accumulate > 1,
        supervised=supervised,
        attention=backbone.attn_implementation,
        fp8=backbone.fp8,
        ranks=plan.devices if plan.divided else 1,
    )


def _adapter(backbone: Backbone) -> tuple[int, tuple[str, ...] | None]:
    if backbone.lora is not None:
        return backbone.lora.rank, None if isinstance(backbone.lora.target_modules, str) else tuple(
            backbone.lora.target_modules
        )
    file = Path(backbone.adapter or "") / "adapter_config.json"
    if backbone.adapter and file.is_file():
        saved = json.loads(file.read_text(encoding="utf-8"))
        targets = saved.get("target_modules")
        return int(saved["r"]), tuple(targets) if isinstance(targets, list) else None
    return 0, None


def kernels_of(
    backbone: Backbone, config: Any, accelerator: str, dtype_bytes: int, divided: bool = False
) -> memory_estimate.Kernels:
    """Foresees what :func:`lightning_modules.models.fused_decoder.build_decoder` will choose, without a model."""
    lora = backbone.lora
    fused = (
        backbone.kernels != "eager"
        and not divided
        and accelerator != "tpu"
        and (dtype_bytes == 2 or accelerator == "cpu")
        and backbone.quantization != "int8"
        and config.model_type in MODEL_TYPES
        and getattr(config, "hidden_act", "silu") == "silu"
        and not (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False))
        and (lora is not None or backbone.adapter is not None)
        and not (lora is not None and (lora.use_dora or lora.dropout))
    )
    return "fused" if fused else "eager"


def cache_size(model: CausalLMModule, found: DatasetSummary, data: FindingsDataModule) -> dict[str, Any] | None:
    """Bytes that a cached teacher takes on disk; None without a teacher, or where the vocabulary is not known."""
    objective, packed = model.objective, found.packed[data.packing]
    config, _ = model_config(model.backbone)
    if not isinstance(objective, Distillation) or config is None or not packed.findings:
        return None
    cache = objective.cache or TeacherCache("")
    temperatures = {objective.temperature, *cache.temperatures}
    token = position_bytes(cache.top_k, len(temperatures), config.get_text_config().vocab_size)
    size = packed.supervised * token + packed.examples * EXAMPLE_BYTES
    return {
        "top_k": cache.top_k, "dir": cache.dir or None, "bytes_token": token,
        "bytes_finding": size / packed.findings, "epoch_gib": size / memory_estimate.GIB,
    }  # fmt: skip


def memory_and_time(
    backbone: Backbone, found: DatasetSummary, data: FindingsDataModule, plan: Plan, device: str | None
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, str]:
    """Estimates from the model's config alone.

    Returns:
        Memory, time (where a device is named), and why there is no estimate (or "").
    """
    if plan.accelerator == "tpu":
        return None, None, "a TPU's cores share the weights; `--compile v3-8` has its compiler say what they need"
    named = find_device(device) if device else None
    config, reason = model_config(backbone)
    if config is None:
        return None, None, reason
    packed = found.packed[data.packing]
    try:
        architecture = memory_estimate.Architecture.of(config)
    except ValueError as error:
        return None, None, str(error)
    supervised = packed.supervised / max(packed.rows * data.sequence_length, 1)
    setup = setup_of(backbone, config, data, plan, supervised)
    needed = memory_estimate.memory(architecture, setup)
    basis = (
        "formulas within 2 % of Mistral-7B's peaks on an H100" if setup.fused else "formulas, never held against any"
    )
    memory = {
        "kernels": setup.mode[0], "activation_checkpointing": setup.mode[1],
        "trained_parameters": memory_estimate.trained_parameters(architecture, setup),
        "parts_gib": {part: value / memory_estimate.GIB for part, value in needed.parts.items()},
        "moments_gib": {moment: value / memory_estimate.GIB for moment, value in needed.moments.items()},
        "peak_gib": needed.peak / memory_estimate.GIB,
        "basis": basis,
    }  # fmt: skip
    if named is None:
        return memory, None, ""
    computed = packed.rows * data.sequence_length
    run = plan.max_steps * plan.accumulate * data.batch_size * plan.devices * data.sequence_length
    hours = [
        memory_estimate.seconds(architecture, setup, named, tokens=tokens, devices=plan.devices) / 3600
        for tokens in (computed, run)
    ]
    time = {
        "name": device, "memory_gib": named.memory,
        "fits": needed.peak + memory_estimate.RESERVE <= named.memory * memory_estimate.GIB,
        "hours_epoch": hours[0], "hours_run": hours[1] if plan.max_steps > 0 else None,
        "basis": memory_estimate.provenance(architecture, setup, named),
    }  # fmt: skip
    return memory, time, ""


def find_warnings(
    found: DatasetSummary,
    data: FindingsDataModule,
    plan: Plan,
    memory: dict[str, Any] | None,
    time: dict[str, Any] | None,
) -> list[str]:
    """What a run would stumble over, or would not say."""
    told = []
    if "lion" in plan.optimizer.lower() and plan.lr > HIGHEST_USUAL_LR:
        told.append(
            f"{plan.optimizer} with lr {plan.lr:g} looks like a rate for AdamW: Lion moves every weight by lr; divide "
            "it by 3 to 10 and multiply weight_decay by as much"
        )
    for task, dropped in found.overflow.items():
        if not found.trained[task]:
            told.append(
                f"every training example of task {task} is longer than a row of {data.sequence_length} tokens and is "
                "dropped: raise data.init_args.sequence_length"
            )
        elif dropped > 0.05 * (dropped + found.examples[task]):
            share = dropped / (dropped + found.examples[task])
            told.append(f"{share:.0%} of task {task} are longer than {data.sequence_length} tokens and are dropped")
    for task in data.tasks:
        if not found.trained[task] and not found.overflow[task]:
            told.append(f"task {task} has no training example in these sources")
    lost, records = found.quarantine.total(), found.counts["records"]
    if lost > data.max_quarantine * records:
        told.append(
            f"{lost} of {records} records can't be used, more than data.init_args.max_quarantine "
            f"{data.max_quarantine}: fit would stop"
        )
    if not found.packed[data.packing].rows:
        told.append(
            f"the training examples fill less than the {data.batch_size * plan.devices} rows of a batch on every device"
        )
    if found.counts["unsupervised"]:
        told.append(f"{found.counts['unsupervised']} examples carry no label")
    if memory and time and not time["fits"]:
        told.append(
            f"the expected peak of {memory['peak_gib']:.1f} GiB exceeds {time['name']}'s {time['memory_gib']:.1f} GiB "
            f"(0.7 GiB of it are the runtime's): lower data.init_args.sequence_length or batch_size, or keep "
            "less for the "
            "backward pass"
        )
    return told
