"""``python main.py export``: a run's model as others load it, with a model card and a certificate."""

from __future__ import annotations

import gc
import hashlib
import json
import platform
import shlex
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console

from callbacks.gauge import Gauge
from callbacks.run_record import REPOSITORY, git_state, package_versions
from commands.analyze import pick_device
from commands.cli import one_line
from commands.golden_pairs import golden_pairs
from commands.model_card import model_card
from commands.trained import CERTIFICATE, Trained, open_trained, recipe
from datamodules.errors import UserError
from datamodules.tasks import build_tasks
from datamodules.tasks.prompts import SYSTEM
from datamodules.tokenization import ChatFormat, load_tokenizer
from lightning_modules.backbone import out_of_memory_advice
from lightning_modules.export import GGUF_FILE, Dtype, MergeBase, copy_adapter, load_exported, merged_model
from lightning_modules.gguf_export import modelfile, write_gguf
from lightning_modules.golden import Record, compare, record

if TYPE_CHECKING:
    from datamodules.tasks.prompts import Pair

FAILED = 1  #: exit status of an export that is worse than --max_kl allows
#: what an export consists of; --overwrite removes these, nothing else, and only beside a certificate
WRITTEN = (
    "adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json", "model*.safetensors",
    "model.safetensors.index.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "README.md", GGUF_FILE,
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
        options = parser.parse_args(args[1:])
    except ArgumentError as error:
        raise UserError(f"export: {one_line(error)}; see python main.py export --help") from error
    return export(**options.as_dict())


def export(
    run: str,
    output: str,
    format: Literal["adapter", "merged", "gguf"] = "adapter",
    merge_base: MergeBase = "trained",
    dtype: Dtype = "auto",
    golden: int = 20,
    max_kl: float = 0.02,
    batch_size: int = 16,
    device: str = "auto",
    overwrite: bool = False,
) -> int:
    """Writes a folder that plain PEFT or transformers load, and measures it against the trained model.

    Args:
        run: run folder.
        output: folder to write.
        format: adapter is PEFT's (tens of megabytes, needs the base), merged is one model of 16 bits, gguf the same
            in float16 for llama.cpp and Ollama.
        merge_base: what the adapter is merged on: trained is the base as it was stored in training (an NF4 base is
            dequantised), 16bit the original.
        dtype: of merged weights; auto is bfloat16, or float16 for a float16 base. GGUF is always float16.
        golden: held-out findings of the certificate; 0 measures nothing, and the certificate says so.
        max_kl: greatest mean divergence from the trained model, in nats a token. 0.02 moves at most a tenth of a
            token's probability (Pinsker: sqrt(KL / 2)); rounding to 16 bits costs far less, a wrong base more.
        batch_size: golden answers written at once.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.
        overwrite: replace an earlier export in the folder.

    Raises:
        UserError: an option is out of its range, the run can't be exported, or the folder can't be written.
    """
    if golden < 0 or max_kl < 0 or batch_size < 1:
        raise UserError(f"--golden {golden} --max_kl {max_kl} --batch_size {batch_size}: must be 0 or more (batch 1)")
    trained, target, console = open_trained(run, "--run"), Path(output), Console()
    if trained.run is None:
        raise UserError(f"--run {run}: a run folder has config.yaml; this is an export or a model already")
    tasks = trained.tasks or ("risk",)
    task = "risk" if "risk" in tasks else tasks[0]
    pairs, origin = golden_pairs(trained, task, golden)  # before anything is written: it may refuse
    place = pick_device(device)
    _clear(target, overwrite)
    certificate = _facts(trained, format, None if format == "adapter" else merge_base)
    try:
        _save(target, certificate | {"state": "unfinished"})
        _write_model(trained, target, format, merge_base, dtype, place)
        load_tokenizer(trained.tokenizer).save_pretrained(target)
        measured = _measure(trained, target, task, pairs, batch_size, place, console) if pairs else {}
        certificate |= _verdict(measured, task, origin, max_kl)
        (target / "README.md").write_text(model_card(trained, certificate), encoding="utf-8")
        certificate["files"] = _files(target)
        _save(target, certificate)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror or error}; choose another place") from error
    for line in _closing_words(certificate, target):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return FAILED if certificate["state"] == "failed" else 0


def _write_model(
    trained: Trained, target: Path, kind: str, base: MergeBase, dtype: Dtype, device: torch.device
) -> None:
    if kind == "adapter":
        copy_adapter(trained.folder, target)
        return
    with out_of_memory_advice("--device to cpu"):
        model = merged_model(trained.backbone, base, "float16" if kind == "gguf" else dtype, device)
    if kind == "gguf":
        write_gguf(model, load_tokenizer(trained.tokenizer), target / GGUF_FILE, "sys-scan-analyst")
        (target / "Modelfile").write_text(modelfile(SYSTEM), encoding="utf-8")
    else:
        model.save_pretrained(target)  # with its generation config, if it has one
    del model
    _free()


def _measure(
    trained: Trained, target: Path, task_name: str, pairs: list[Pair], batch_size: int, device: torch.device,
    console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Measures the trained model, then the exported one from the disk; never both in memory."""
    templates = (trained.config.get("data", {}).get("init_args") or {}).get("agent_templates")
    task = build_tasks([task_name], agent_templates=templates)[task_name]

    def measured(heading: str, tokenizer: str, build: Callable[[], Any]) -> Record:
        chat = ChatFormat(load_tokenizer(tokenizer))
        with Gauge(f"{heading}: {len(pairs)} golden findings", console) as gauge, out_of_memory_advice("--batch_size"):
            result = record(build(), chat, task, pairs, batch_size=batch_size, progress=gauge)
        _free()
        return result

    before = measured("trained", trained.tokenizer, lambda: trained.backbone.build(device))
    after = measured("exported", str(target), lambda: load_exported(target, trained.backbone, device))
    return compare(before, after) | {"device": str(device), "n": len(pairs), "digest": _digest(pairs)}


def _verdict(measured: dict[str, Any], task: str, origin: str, max_kl: float) -> dict[str, Any]:
    if not measured:
        return {"state": "not measured", "golden": {"n": 0, "why": "--golden 0"}}
    passed = measured["kl_mean"] is not None and measured["kl_mean"] <= max_kl
    golden = {"task": task, "origin": origin, "max_kl": max_kl, **measured}
    return {"state": "passed" if passed else "failed", "golden": golden}


def _facts(trained: Trained, kind: str, merge_base: str | None) -> dict[str, Any]:
    assert trained.run is not None
    return {
        "format": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": recipe(trained.backbone),
        "tasks": list(trained.tasks or ()),
        **({"merge_base": merge_base} if merge_base else {}),
        "config_sha256": _sha256(trained.run / "config.yaml"),
        "weights_digest": trained.digest(),
        "git": git_state(REPOSITORY),
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


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


def _files(target: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in target.iterdir() if path.is_file() and path.name != CERTIFICATE)
    return {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(pairs: list[Pair]) -> str:
    return hashlib.sha256(json.dumps([[pair.content, pair.completion] for pair in pairs]).encode()).hexdigest()


def _save(target: Path, certificate: dict[str, Any]) -> None:
    unfinished = target / f"{CERTIFICATE}.unfinished"
    unfinished.write_text(json.dumps(certificate, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(target / CERTIFICATE)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _closing_words(certificate: dict[str, Any], target: Path) -> list[str]:
    golden, size = certificate["golden"], sum(file["bytes"] for file in certificate["files"].values())
    lines = [f"{certificate['format']} of {size / 1e6:,.1f} MB: {target}"]
    if certificate["state"] == "not measured":
        lines.append("  certificate  not measured (--golden 0)")
    else:
        verdict = "passed" if certificate["state"] == "passed" else "FAILED"
        kl = "not a number" if golden["kl_mean"] is None else f"{golden['kl_mean']:.2g} nats a token"
        lines.append(
            f"  certificate  {verdict}: divergence {kl} (at most {golden['max_kl']:g}), "
            f"{golden['same_answers']:.0%} of {golden['n']} answers the same"
        )
        lines += [
            f"  {name:<12} trained {value:.3g}, exported {golden['exported'].get(name, float('nan')):.3g}"
            for name, value in golden["trained"].items()
        ]
    if certificate["format"] == "gguf":
        return [*lines, f"  ollama       cd {shlex.quote(str(target))} && ollama create sys-scan-analyst"]
    command = f"python main.py analyze --model {shlex.quote(str(target))} --report REPORT.json --output ENRICHED.json"
    return [*lines, f"  analyze      {command}"]
