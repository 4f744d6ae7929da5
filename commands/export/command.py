"""``python main.py export``: a run's model as others load it, with a model card and a certificate."""

from __future__ import annotations

import gc
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console

from callbacks.task_progress import TaskProgress
from commands.analyze.command import pick_device, underscored
from commands.cli import one_line
from commands.export import certificate as certificates
from commands.export.model_card import model_card
from commands.export.reference_pairs import reference_pairs
from commands.model_source import CERTIFICATE, Trained, open_trained
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

FAILED = 1  #: exit status of an export that is worse than its bounds allow
#: --max_kl of each kind of weights. A divergence of 0.02 moves at most a tenth of a token's probability (Pinsker:
#: sqrt(KL / 2)); rounding to 16 or 8 bits costs far less, a wrong base more. 4 bits cost what EXPERIMENTS.md says.
MAX_KL = {"q4_1": 0.1, "q4_0": 0.1}
MAX_KL_ELSE = 0.02
#: what an export consists of; --overwrite removes these, nothing else, and only beside a certificate
WRITTEN = (
    "adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json", "model*.safetensors",
    "model.safetensors.index.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "README.md", GGUF_FILE, GGUF_ADAPTER,
    "Modelfile", CERTIFICATE,
)  # fmt: skip


def main(args: list[str]) -> int:
    """Runs ``export`` with its options; ``args`` begins with the command's name.

    Returns:
        0, or 1 where the export lies too far from the trained model.

    Raises:
        UserError: an option is unknown, missing or out of its range, or the run can't be exported.
    """
    parser = ArgumentParser(prog="main.py export", exit_on_error=False, description=__doc__)
    parser.add_function_arguments(export, skip={"overwrite"})
    parser.add_argument(
        "--overwrite", type=bool, nargs="?", const=True, default=False, help="replace an earlier export in the folder"
    )
    try:
        options = parser.parse_args([underscored(argument) for argument in args[1:]])
    except ArgumentError as error:
        raise UserError(f"export: {one_line(error)}; see python main.py export --help") from error
    return export(**options.as_dict())


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
    """Writes a folder that plain PEFT or transformers load, and measures it against the trained model.

    Args:
        run: run folder.
        output: folder to write.
        format: adapter is PEFT's (tens of megabytes, needs the base), merged is one model of 16 bits, gguf one file
            for llama.cpp and Ollama, with a Modelfile.
        merge_base: what the adapter is merged on: trained is the base as it was stored in training (an NF4 base is
            dequantised), 16bit the original.
        dtype: of merged weights; auto is bfloat16, or float16 for a float16 base.
        gguf_type: how a GGUF file stores matrices: f16, q8_0 (8.5 bits a weight), q4_1 (5 bits) or q4_0 (4.5 bits);
            with 4 bits the adapter lies beside the base, in a file of its own.
        load_as: how an adapter is loaded to measure it: trained is the base as in training; agent is the way of
            sys-scan-graph's agent, an NF4 base with double quantisation, float16 products and the base's tokenizer.
        num_reference: held-out findings of the certificate; 0 measures nothing, and the certificate says so.
        max_kl: greatest mean divergence from the trained model, in nats a token; null is 0.02, and 0.1 for 4 bits.
        max_drop: how much smaller than the trained model's the share of valid answers, or of right severities, may be.
        batch_size: reference answers written at once.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.
        overwrite: replace an earlier export in the folder.

    Raises:
        UserError: an option is out of its range, the run can't be exported, or the folder can't be written.
    """
    kind = gguf_type if format == "gguf" else format
    bounds = certificates.Bounds(MAX_KL.get(kind, MAX_KL_ELSE) if max_kl is None else max_kl, max_drop)
    if num_reference < 0 or bounds.max_kl < 0 or max_drop < 0 or batch_size < 1:
        given = (
            f"--num_reference {num_reference} --max_kl {bounds.max_kl} --max_drop {max_drop} --batch_size {batch_size}"
        )
        raise UserError(f"{given}: must be 0 or more (batch_size 1)")
    if load_as == "agent" and format != "adapter":
        raise UserError(f"--load_as agent --format {format}: the agent loads adapters; leave one of them out")
    trained, target, console = open_trained(run, "--run"), Path(output), Console()
    if trained.run is None:
        raise UserError(f"--run {run}: a run folder has config.yaml; this is an export or a model already")
    tasks = trained.tasks or ("risk",)
    task = "risk" if "risk" in tasks else tasks[0]
    pairs, origin = reference_pairs(trained, task, num_reference)  # before anything is written: it may refuse
    place = pick_device(device)
    _clear(target, overwrite)
    settings = {
        "format": format,
        "merge_base": None if format == "adapter" else merge_base,
        "gguf_type": gguf_type if format == "gguf" else None,
        "load_as": load_as if format == "adapter" else None,
    }
    certificate = certificates.facts(trained, settings)
    try:
        certificates.save(target, certificate | {"state": "unfinished"})
        _write_model(trained, target, settings, dtype, place)
        load_tokenizer(trained.tokenizer).save_pretrained(target)
        measured = _measure(trained, target, task, pairs, batch_size, place, load_as, console) if pairs else {}
        certificate |= certificates.verdict(measured, {"task": task, "origin": origin}, bounds)
        (target / "README.md").write_text(model_card(trained, certificate), encoding="utf-8")
        certificate["files"] = certificates.files(target)
        certificates.save(target, certificate)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror or error}; choose another place") from error
    for line in _format_summary(certificate, target):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return FAILED if certificate["state"] == "failed" else 0


def _write_model(trained: Trained, target: Path, settings: dict[str, Any], dtype: Dtype, device: torch.device) -> None:
    if settings["format"] == "adapter":
        copy_adapter(trained.folder, target)
        return
    gguf, backbone = settings["gguf_type"], trained.backbone
    apart = gguf in ("q4_1", "q4_0") and backbone.adapter is not None  # 4 bits would round the adapter away
    if apart:
        backbone = replace(backbone, adapter=None)
    with out_of_memory_advice("--device to cpu"):
        # blocks of 4 or 8 bits are made from float32: to round to 16 bits before would be a second error
        kept: Dtype = dtype if gguf is None else "float16" if gguf == "f16" else "float32"
        model = merged_model(backbone, settings["merge_base"], kept, device)
    if gguf is not None:
        tokenizer = load_tokenizer(trained.tokenizer)
        write_gguf(model, tokenizer, target / GGUF_FILE, "sys-scan-analyst", gguf)
        if apart:
            write_gguf_adapter(trained.folder, target / GGUF_ADAPTER, model.config)
        recipe = modelfile(tokenizer, SYSTEM, model.config.max_position_embeddings, adapter=apart)
        (target / "Modelfile").write_text(recipe, encoding="utf-8")
    else:
        model.save_pretrained(target)  # with its generation config, if it has one
    del model
    _free()


def _measure(
    trained: Trained, target: Path, task_name: str, pairs: list[Pair], batch_size: int, device: torch.device,
    load_as: LoadAs, console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Measures the trained model, then the exported one from the disk; never both in memory."""
    templates = (trained.config.get("data", {}).get("init_args") or {}).get("agent_templates")
    task = build_tasks([task_name], agent_templates=templates)[task_name]

    def measured(heading: str, tokenizer: str, build: Callable[[], Any]) -> Record:
        chat = ChatFormat(load_tokenizer(tokenizer))
        with (
            TaskProgress(f"{heading}: {len(pairs)} reference findings", console) as gauge,
            out_of_memory_advice("--batch_size"),
        ):
            result = record(build(), chat, task, pairs, batch_size=batch_size, progress=gauge)
        _free()
        return result

    before = measured("trained", trained.tokenizer, lambda: trained.backbone.build(device))
    tokenizer = trained.backbone.model_name_or_path if load_as == "agent" else str(target)
    after = measured("exported", tokenizer, lambda: load_exported(target, trained.backbone, device, load_as))
    return compare(before, after) | {"device": str(device), "n": len(pairs), "digest": certificates.digest(pairs)}


def _clear(target: Path, overwrite: bool) -> None:
    """Makes room; of a folder only an earlier export's own files are ever removed."""
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {target} is a file: name a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise UserError(f"--output {target} is not empty: add --overwrite or choose another folder")
        if not (target / CERTIFICATE).is_file():
            raise UserError(f"--output {target} holds no earlier export ({CERTIFICATE}): choose another folder")
        for path in {path for pattern in WRITTEN for path in target.glob(pattern)}:
            path.unlink()
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {target}: {error.strerror or error}; choose another place") from error


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _format_summary(certificate: dict[str, Any], target: Path) -> list[str]:
    size = sum(file["bytes"] for file in certificate["files"].values())
    kind = " ".join(filter(None, (certificate["format"], certificate.get("gguf_type"))))
    lines = [f"{kind} of {size / 1e6:,.1f} MB: {target}", *certificates.format_summary(certificate)]
    if certificate["format"] == "gguf":
        return [*lines, f"  ollama       cd {shlex.quote(str(target))} && ollama create sys-scan-analyst"]
    command = f"python main.py analyze --model {shlex.quote(str(target))} --report REPORT.json --output ENRICHED.json"
    return [*lines, f"  analyze      {command}"]
