"""Estimates of a configured run on a scanned data set: steps, memory, hours, and warnings."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from commands.inspect import memory_estimate
from commands.inspect.device import find_device
from datamodules.errors import one_line
from datamodules.pretrained.locate import resolve
from lightning_modules.losses.objectives import Distillation
from lightning_modules.losses.teacher_cache import TeacherCache
from lightning_modules.losses.teacher_shards import EXAMPLE_BYTES, position_bytes
from lightning_modules.models.backbone import RANDOM, Backbone
from lightning_modules.models.fused_support import ModelTraits, read_adapter_config, unsupported_reason, weight_bytes
from optimizers.lion import HIGHEST_USUAL_LR

if TYPE_CHECKING:
    from datamodules.findings import FindingsDataModule
    from datamodules.statistics.summary import DatasetSummary
    from lightning_modules.causal_lm import CausalLMModule


@dataclass(frozen=True)
class Plan:
    """Settings of a run that the estimates need.

    Attributes:
        accelerator: name, as in the config.
        devices: number over all nodes.
        accumulate: micro-batches per optimizer step.
        max_steps: of the run; -1 for no limit.
        optimizer: class name.
        lr: its highest learning rate.
        state_bytes: bytes of optimizer state per float32 weight.
        divided: whether the base is sharded over the devices.
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
        """Reads the ``trainer`` section of a config, and runs a step of the optimizer on one small weight."""
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
    """Returns the name of the accelerator, also if it is configured as a class."""
    if hasattr(value, "class_path"):
        return "tpu" if value.class_path.endswith("PJRTAccelerator") else value.class_path
    return str(value or "auto")


def _count(devices: Any, accelerator: Any) -> int:
    """Returns the number of devices per node, as the Trainer reads it; automatic counts are those of this machine."""
    if isinstance(devices, str) and devices not in ("auto", "-1"):
        return len([part for part in devices.split(",") if part]) if "," in devices else int(devices)
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, int) and devices > 0:
        return devices
    return max(torch.cuda.device_count(), 1) if accelerator in ("gpu", "cuda", "auto", None) else 1


def _try_optimizer(make: Any) -> tuple[str, float, float]:
    """Returns (class name, highest learning rate, state bytes per weight), from one step on a matrix of zeros."""
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lion warns of a high rate, and so does find_warnings
        optimizer = make([weight])
        lr = max(float(group["lr"]) for group in optimizer.param_groups)
        name = type(optimizer).__name__
        try:
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        except (RuntimeError, ValueError, NotImplementedError):  # the optimizer needs a GPU
            return name, lr, 4.0 if "lion" in name.lower() else 8.0
    state = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor) and value.ndim]
    return name, lr, sum(value.nbytes for value in state) / weight.numel()


def epoch(summary: DatasetSummary, data: FindingsDataModule, plan: Plan) -> dict[str, Any]:
    """Counts the rows, batches and optimizer steps of one epoch on each device."""
    packed = summary.packed[data.packing]
    batches = packed.rows // (data.batch_size * plan.devices)
    return {
        "rows": packed.rows, "batches": batches, "steps": math.ceil(batches / plan.accumulate),
        "examples": packed.examples, "findings": packed.findings,
        "batch_size": data.batch_size, "accumulate": plan.accumulate, "devices": plan.devices,
        "max_steps": plan.max_steps if plan.max_steps > 0 else None,
    }  # fmt: skip


def model_config(backbone: Backbone) -> tuple[Any, str]:
    """Reads config.json of the model: (config, "") or (None, the reason why it can't be read)."""
    from transformers import AutoConfig

    name = backbone.model_name_or_path.removeprefix(RANDOM)
    location = resolve(name, weights=False)
    if Path(location).is_dir() and not (Path(location) / "config.json").is_file():
        return None, f"{name} has no config.json"
    try:
        return AutoConfig.from_pretrained(location, revision=backbone.revision or "main", trust_remote_code=False), ""
    except (OSError, ValueError) as error:
        return None, f"{name}'s config.json can't be read ({one_line(error, 120)})"


def setup_of(
    backbone: Backbone, config: Any, data: FindingsDataModule, plan: Plan, supervised: float
) -> memory_estimate.Setup:
    """Converts the settings of backbone, data and trainer to those of the memory estimate."""
    lora, size = backbone.lora, weight_bytes(config, backbone)
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
    if saved := read_adapter_config(backbone.adapter):
        targets = saved.get("target_modules")
        return int(saved["r"]), tuple(targets) if isinstance(targets, list) else None
    return 0, None


def kernels_of(
    backbone: Backbone, config: Any, accelerator: str, dtype_bytes: int, divided: bool = False
) -> memory_estimate.Kernels:
    """Predicts the choice of :func:`lightning_modules.models.fused_decoder.build_decoder`, without a model.

    Args:
        backbone: settings of the model.
        config: transformers config of the model.
        accelerator: as in :class:`Plan`; any but cpu and tpu counts as a CUDA GPU.
        dtype_bytes: of an unquantized weight.
        divided: whether the base is sharded over devices.
    """
    if backbone.kernels == "eager":
        return "eager"
    device_type = {"cpu": "cpu", "tpu": "xla"}.get(accelerator, "cuda")
    traits = ModelTraits.of_backbone(config, backbone, dtype_bytes)
    reason = unsupported_reason(traits, device_type, "the base is sharded" if divided else None)
    return "eager" if reason else "fused"


def cache_size(model: CausalLMModule, summary: DatasetSummary, data: FindingsDataModule) -> dict[str, Any] | None:
    """Estimates the size of a cached teacher on disk; None without a teacher, or if the vocabulary is unknown."""
    objective, packed = model.objective, summary.packed[data.packing]
    config, _ = model_config(model.backbone)
    if not isinstance(objective, Distillation) or config is None or not packed.findings:
        return None
    cache = objective.cache or TeacherCache("")
    temperatures = {objective.temperature, *cache.temperatures}
    token_bytes = position_bytes(cache.top_k, len(temperatures), config.get_text_config().vocab_size)
    size = packed.supervised * token_bytes + packed.examples * EXAMPLE_BYTES
    return {
        "top_k": cache.top_k, "dir": cache.dir or None, "bytes_token": token_bytes,
        "bytes_finding": size / packed.findings, "epoch_gib": size / memory_estimate.GIB,
    }  # fmt: skip


def memory_and_time(
    backbone: Backbone, summary: DatasetSummary, data: FindingsDataModule, plan: Plan, device: str | None
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, str]:
    """Estimates memory and time from the config of the model.

    Returns:
        Memory, time (None without a device), and the reason for a missing estimate (or "").
    """
    if plan.accelerator == "tpu":
        return (
            None,
            None,
            "the cores of a TPU share the weights. Fix: use `--compile v3-8`, whose compiler reports their memory",
        )
    target = find_device(device) if device else None
    config, reason = model_config(backbone)
    if config is None:
        return None, None, reason
    packed = summary.packed[data.packing]
    try:
        architecture = memory_estimate.Architecture.of(config)
    except ValueError as error:
        return None, None, str(error)
    supervised = packed.supervised / max(packed.rows * data.sequence_length, 1)
    setup = setup_of(backbone, config, data, plan, supervised)
    estimate = memory_estimate.memory(architecture, setup)
    basis = (
        "formulas within 5 % of Mistral-7B's peaks on an H100"
        if setup.fused
        else "formulas that were not compared with a measurement"
    )
    memory = {
        "kernels": setup.mode[0], "activation_checkpointing": setup.mode[1],
        "trained_parameters": memory_estimate.trained_parameters(architecture, setup),
        "parts_gib": {part: value / memory_estimate.GIB for part, value in estimate.parts.items()},
        "moments_gib": {moment: value / memory_estimate.GIB for moment, value in estimate.moments.items()},
        "peak_gib": estimate.peak / memory_estimate.GIB,
        "basis": basis,
    }  # fmt: skip
    if target is None:
        return memory, None, ""
    computed = packed.rows * data.sequence_length
    run = plan.max_steps * plan.accumulate * data.batch_size * plan.devices * data.sequence_length
    hours = [
        memory_estimate.seconds(architecture, setup, target, tokens=tokens, devices=plan.devices) / 3600
        for tokens in (computed, run)
    ]
    time = {
        "name": device, "memory_gib": target.memory,
        "fits": estimate.peak + memory_estimate.RESERVE <= target.memory * memory_estimate.GIB,
        "hours_epoch": hours[0], "hours_run": hours[1] if plan.max_steps > 0 else None,
        "basis": memory_estimate.provenance(architecture, setup, target),
    }  # fmt: skip
    return memory, time, ""


def find_warnings(
    summary: DatasetSummary,
    data: FindingsDataModule,
    plan: Plan,
    memory: dict[str, Any] | None,
    time: dict[str, Any] | None,
) -> list[str]:
    """Lists problems of a run that would stop it, or that it would not report."""
    messages = []
    if "lion" in plan.optimizer.lower() and plan.lr > HIGHEST_USUAL_LR:
        messages.append(
            f"{plan.optimizer} with lr {plan.lr:g}: looks like a rate for AdamW. Lion moves every weight by lr. Fix: "
            "divide lr by 3 to 10 and multiply weight_decay by the same factor"
        )
    for task, dropped in summary.overflow.items():
        if not summary.trained[task]:
            messages.append(
                f"every training example of task {task} is longer than a row of {data.sequence_length} tokens and is "
                "dropped: raise data.init_args.sequence_length"
            )
        elif dropped > 0.05 * (dropped + summary.examples[task]):
            share = dropped / (dropped + summary.examples[task])
            messages.append(f"{share:.0%} of task {task} are longer than {data.sequence_length} tokens and are dropped")
    for task in data.tasks:
        if not summary.trained[task] and not summary.overflow[task]:
            messages.append(f"task {task} has no training example in these sources")
    lost, records = summary.quarantine.total(), summary.counts["records"]
    if lost > data.max_quarantine * records:
        messages.append(
            f"{lost} of {records} records can't be used, more than data.init_args.max_quarantine "
            f"{data.max_quarantine}: fit would stop"
        )
    if not summary.packed[data.packing].rows:
        messages.append(
            f"the training examples fill fewer than the {data.batch_size * plan.devices} rows of a batch on all devices"
        )
    if summary.counts["unsupervised"]:
        messages.append(f"{summary.counts['unsupervised']} examples have no label")
    if memory and time and not time["fits"]:
        messages.append(
            f"the expected peak of {memory['peak_gib']:.1f} GiB exceeds {time['name']}'s {time['memory_gib']:.1f} GiB "
            "(0.7 GiB of it are the runtime's). Fix: lower data.init_args.sequence_length or batch_size, or set "
            "activation_checkpointing to keep less for the backward pass"
        )
    return messages
