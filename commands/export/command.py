"""``python main.py export``: writes a run's model in a standard format, with a model card and a certificate."""

from __future__ import annotations

import gc
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console

from callbacks.task_progress import TaskProgress
from commands import program
from commands.device import pick_device
from commands.export import certificate as certificates
from commands.export.model_card import model_card
from commands.export.reference_pairs import reference_pairs
from commands.model_source import CERTIFICATE, TrainedModel, open_trained_model
from commands.options import check_minimum, parse_function_options
from datamodules.errors import UserError
from datamodules.tasks import build_tasks
from datamodules.tasks.base import SYSTEM
from datamodules.tokenization.chat_format import ChatFormat, load_tokenizer
from lightning_modules.evaluation.model_comparison import Record, compare, record
from lightning_modules.export.gguf import GgufType, write_gguf
from lightning_modules.export.gguf_adapter import write_gguf_adapter
from lightning_modules.export.merge import (
    GGUF_ADAPTER,
    GGUF_FILE,
    Dtype,
    LoadAs,
    MergeBase,
    copy_adapter,
    load_exported,
    merged_model,
)
from lightning_modules.export.modelfile import modelfile
from lightning_modules.models.backbone import out_of_memory_advice

if TYPE_CHECKING:
    from datamodules.tasks.base import Pair

FAILED = 1  #: exit status of an export that exceeds a bound
#: default of --max_kl for 4-bit weights; the measured divergence of 4-bit exports is in EXPERIMENTS.md
MAX_KL = {"q4_1": 0.1, "q4_0": 0.1}
#: default of --max_kl for other weights. A divergence of 0.02 changes the probability of a token by at most a tenth
#: (Pinsker's inequality: sqrt(KL / 2)). Rounding to 16 or 8 bits causes far less divergence, a wrong base more.
MAX_KL_DEFAULT = 0.02
#: files of an export; --overwrite removes these and nothing else, and only if there is a certificate
WRITTEN = (
    "adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json", "model*.safetensors",
    "model.safetensors.index.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "README.md", GGUF_FILE, GGUF_ADAPTER,
    "Modelfile", CERTIFICATE,
)  # fmt: skip


def main(args: list[str]) -> int:
    """Runs ``export`` with its options.

    Args:
        args: the command's name and its options.

    Returns:
        The exit status: 0, or 1 if the export differs too much from the trained model.

    Raises:
        UserError: an option is unknown, missing or out of its range, or the run can't be exported.
    """
    flags = {"overwrite": "replace an earlier export in the folder"}
    return export(**parse_function_options(args, export, flags))


def export(
    run: str,
    output: str,
    format: Literal["adapter", "merged", "gguf"] = "adapter",
    merge_base: MergeBase = "trained",
    dtype: Dtype = "auto",
    gguf_type: GgufType = "f16",
    load_as: LoadAs = "trained",
    num_reference: int = 50,
    max_kl: float | None = None,
    max_drop: float = 0.05,
    batch_size: int = 25,
    device: str = "auto",
    overwrite: bool = False,
) -> int:
    """Writes a folder that PEFT, transformers or llama.cpp load, and compares it with the trained model.

    Args:
        run: run folder.
        output: folder to write.
        format: adapter is PEFT's (tens of megabytes, needs the base), merged is one model in 16 bits, gguf is one file
            for llama.cpp and Ollama, with a Modelfile.
        merge_base: base that the adapter is merged into: trained is the base as it was stored in training (an NF4 base
            is dequantised), 16bit is the original.
        dtype: dtype of merged weights; auto is bfloat16, or float16 for a float16 base.
        gguf_type: storage of matrices in a GGUF file: f16, q8_0 (8.5 bits per weight), q4_1 (5 bits) or q4_0 (4.5
            bits); with 4 bits the adapter is a separate file next to the base.
        load_as: how an adapter is loaded for the comparison: trained is the base as in training; agent loads it as
            sys-scan-graph's agent does, with an NF4 base with double quantisation, float16 products and the base's
            tokenizer.
        num_reference: number of held-out findings for the comparison; with 0 nothing is measured, and the certificate
            has the state "not measured".
        max_kl: largest mean divergence from the trained model, in nats per token; null is 0.02, and 0.1 for 4 bits.
        max_drop: largest decrease of the share of valid answers, and of the share of correct severities.
        batch_size: reference answers generated at the same time.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        overwrite: replace an earlier export in the folder.

    Raises:
        UserError: an option is out of its range, the run can't be exported, or the folder can't be written.
    """
    kind = gguf_type if format == "gguf" else format
    bounds = certificates.Bounds(MAX_KL.get(kind, MAX_KL_DEFAULT) if max_kl is None else max_kl, max_drop)
    check_minimum(
        {"num_reference": num_reference, "max_kl": bounds.max_kl, "max_drop": max_drop, "batch_size": batch_size},
        {"num_reference": 0, "max_kl": 0, "max_drop": 0, "batch_size": 1},
    )
    if load_as == "agent" and format != "adapter":
        raise UserError(f"--load_as agent: the agent loads adapters, not --format {format}. Fix: omit one of them.")
    trained, target, console = open_trained_model(run, "--run"), Path(output), Console()
    if trained.run is None:
        raise UserError(f"--run {run}: this is an export or a model, not a run. Fix: give a folder with config.yaml.")
    tasks = trained.tasks or ("risk",)
    task = "risk" if "risk" in tasks else tasks[0]
    # before anything is written, because it may raise an error
    pairs, origin = reference_pairs(trained, task, num_reference)
    target_device = pick_device(device)
    _prepare_folder(target, overwrite)
    settings = {
        "format": format,
        "merge_base": None if format == "adapter" else merge_base,
        "gguf_type": gguf_type if format == "gguf" else None,
        "load_as": load_as if format == "adapter" else None,
    }
    certificate = certificates.describe(trained, settings)
    try:
        certificates.save(target, certificate | {"state": "unfinished"})
        _write_model(trained, target, settings, dtype, target_device)
        load_tokenizer(trained.tokenizer).save_pretrained(target)
        measured = _measure(trained, target, task, pairs, batch_size, target_device, load_as, console) if pairs else {}
        certificate |= certificates.measured_part(measured, {"task": task, "origin": origin}, bounds)
        (target / "README.md").write_text(model_card(trained, certificate), encoding="utf-8")
        certificate["files"] = certificates.file_entries(target)
        certificates.save(target, certificate)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror or error}. Fix: choose another folder.") from error
    for line in format_summary(certificate, target):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return FAILED if certificate["state"] == "failed" else 0


def _write_model(
    trained: TrainedModel, target: Path, settings: dict[str, Any], dtype: Dtype, device: torch.device
) -> None:
    if settings["format"] == "adapter":
        copy_adapter(trained.folder, target)
        return
    gguf, backbone = settings["gguf_type"], trained.backbone
    # rounding to 4 bits would remove the adapter's small changes, so that it is stored in a separate file
    separate = gguf in ("q4_1", "q4_0") and backbone.adapter is not None
    if separate:
        backbone = replace(backbone, adapter=None)
    with out_of_memory_advice("--device to cpu"):
        # blocks of 4 or 8 bits are computed from float32: rounding to 16 bits first would add a second error
        merged_dtype: Dtype = dtype if gguf is None else "float16" if gguf == "f16" else "float32"
        model = merged_model(backbone, settings["merge_base"], merged_dtype, device)
    if gguf is not None:
        tokenizer = load_tokenizer(trained.tokenizer)
        write_gguf(model, tokenizer, target / GGUF_FILE, "sys-scan-analyst", gguf)
        if separate:
            write_gguf_adapter(trained.folder, target / GGUF_ADAPTER, model.config)
        text = modelfile(tokenizer, SYSTEM, model.config.max_position_embeddings, adapter=separate)
        (target / "Modelfile").write_text(text, encoding="utf-8")
    else:
        model.save_pretrained(target)  # with its generation config, if it has one
    del model
    _free_memory()


def _measure(
    trained: TrainedModel, target: Path, task_name: str, pairs: list[Pair], batch_size: int, device: torch.device,
    load_as: LoadAs, console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Measures the trained model, then the exported one as stored; only one of them is in memory at a time."""
    task = build_tasks([task_name], rationale=trained.rationale)[task_name]

    def measured(heading: str, tokenizer: str, build: Callable[[], Any]) -> Record:
        chat = ChatFormat(load_tokenizer(tokenizer))
        with (
            TaskProgress(f"{heading}: {len(pairs)} reference findings", console) as progress,
            out_of_memory_advice("--batch_size"),
        ):
            result = record(build(), chat, task, pairs, batch_size=batch_size, progress=progress)
        _free_memory()
        return result

    before = measured("trained", trained.tokenizer, lambda: trained.backbone.build(device))
    tokenizer = trained.backbone.model_name_or_path if load_as == "agent" else str(target)
    after = measured("exported", tokenizer, lambda: load_exported(target, trained.backbone, device, load_as))
    counts = {"device": str(device), "n": len(pairs), "digest": certificates.pairs_digest(pairs)}
    return compare(before, after) | counts


def _prepare_folder(target: Path, overwrite: bool) -> None:
    """Creates the folder; of an existing folder only the files of an earlier export are removed."""
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {target}: this is a file. Fix: name a folder.")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise UserError(f"--output {target}: not empty. Fix: add --overwrite or choose another folder.")
        if not (target / CERTIFICATE).is_file():
            raise UserError(f"--output {target}: no earlier export (no {CERTIFICATE}). Fix: choose another folder.")
        for path in {path for pattern in WRITTEN for path in target.glob(pattern)}:
            path.unlink()
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {target}: {error.strerror or error}. Fix: choose another folder.") from error


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def format_summary(certificate: dict[str, Any], target: Path) -> list[str]:
    """Returns the lines that ``export`` prints at its end.

    Args:
        certificate: with its list of files.
        target: folder of the export.
    """
    size = sum(file["bytes"] for file in certificate["files"].values())
    kind = " ".join(filter(None, (certificate["format"], certificate.get("gguf_type"))))
    lines = [f"{kind} of {size / 1e6:,.1f} MB: {target}", *certificates.format_summary(certificate)]
    if certificate["format"] == "gguf":
        return [*lines, f"  ollama       cd {shlex.quote(str(target))} && ollama create sys-scan-analyst"]
    command = f"{program()} analyze --model {shlex.quote(str(target))} --report REPORT.json --output ENRICHED.json"
    return [*lines, f"  analyze      {command}"]
