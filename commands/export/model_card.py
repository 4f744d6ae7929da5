"""Writes the model card of an export from run.json, config.yaml and evaluation.json, in the format of the HF hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from commands.model_source import lora_settings
from datamodules.output_text import markdown
from datamodules.redaction import redact, redact_text

if TYPE_CHECKING:
    from commands.model_source import TrainedModel

FIGURES = (  # in the table of results
    "loss", "schema_valid", "severity_accuracy", "severity_macro_f1", "risk_error", "subscore_error",
    "actionable_error", "actionable_ece", "tags_f1", "ids_f1", "faithful",
)  # fmt: skip
CELL, VALUE = 80, 2000  #: characters of a cell of a table and of a value, after which they are cut
LIMITS = """\
- It reads findings of sys-scan-graph's scanner, in English, as compact JSON; other scanners were not tested.
- It assesses only the text of the scanner's findings, not the host, its traffic or its files.
- If the training data are synthetic, the scores follow the rules that generated them, not incidents that happened.
- Text inside findings may be written by an attacker. It is treated as data, but read every answer before you act on it.
- A severity or score is an estimate: do not close or escalate a finding automatically without a person's review."""


def model_card(trained: TrainedModel, certificate: dict[str, Any]) -> str:
    """Returns the text of the model card.

    Args:
        trained: model of a run folder.
        certificate: the certificate; its list of files is not needed.
    """
    run = _read(trained, "run.json")
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(trained, certificate), sort_keys=False)}---",
        f"# Security analyst for sys-scan-graph ({certificate['format']})",
        f"{markdown(_base(trained))}, fine-tuned to answer questions about scanner findings with one JSON object. "
        f"Tasks: {markdown(', '.join(certificate['tasks']))}.",
        "## Use",
        _usage(trained, certificate["format"]),
        "## Data",
        _rows(_data(trained, run)),
        "## Training",
        _rows(_training(trained, run)),
        "## Results",
        *_results(trained),
        "## This export",
        _rows(_export(certificate)),
        "## Limits",
        LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(trained: TrainedModel, certificate: dict[str, Any]) -> dict[str, Any]:
    name, adapter = trained.backbone.model_name_or_path, certificate["format"] == "adapter"
    matter: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    if not name.startswith("embedded:") and not Path(name).exists():  # a name of the hub
        matter["base_model"] = name
    return matter | {"pipeline_tag": "text-generation", "tags": ["security", "sys-scan-graph", "lora"]}


def _base(trained: TrainedModel) -> str:
    name = trained.backbone.model_name_or_path
    return Path(name).name if Path(name).is_dir() else name


def _usage(trained: TrainedModel, kind: str) -> str:
    if kind == "adapter":
        load = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"base = AutoModelForCausalLM.from_pretrained({_base(trained)!a})\n"
            "model = PeftModel.from_pretrained(base, FOLDER)\ntokenizer = AutoTokenizer.from_pretrained(FOLDER)"
        )
    elif kind == "gguf":
        return "```\nollama create sys-scan-analyst    # in this folder\nllama-cli -m model.gguf --jinja\n```"
    else:
        load = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            "model = AutoModelForCausalLM.from_pretrained(FOLDER)\ntokenizer = AutoTokenizer.from_pretrained(FOLDER)"
        )
    command = "python main.py analyze --model FOLDER --report report.json --output enriched.json"
    return f"```python\n{load}\n```\n\nA whole report, with the project's own code:\n\n```\n{command}\n```"


def _data(trained: TrainedModel, run: dict[str, Any]) -> list[tuple[str, Any]]:
    data = trained.config.get("data", {}).get("init_args", {})
    return [
        ("sources", ", ".join(_source_name(str(source)) for source in data.get("sources", []))),
        ("tasks and shares", json.dumps(data.get("task_weights") or {"risk": 1.0})),
        ("held out", f"val {data.get('val_fraction', 0.02)}, test {data.get('test_fraction', 0.02)}, by content"),
        ("balance over severity", data.get("severity_balance")),
        ("fingerprint", run.get("data")),
    ]


def _training(trained: TrainedModel, run: dict[str, Any]) -> list[tuple[str, Any]]:
    model, backbone = trained.config.get("model", {}).get("init_args", {}), trained.backbone
    optimizer, lora = model.get("optimizer") or {}, lora_settings(trained)
    return [
        ("base", f"{_base(trained)}" + (f" at {backbone.revision}" if backbone.revision else "")),
        ("stored as", f"quantization {backbone.quantization}, dtype {backbone.dtype}"),
        ("LoRA", ", ".join(f"{name} {value}" for name, value in lora.items() if value) or "none: every weight trained"),
        ("objective", _class(model.get("objective"))),
        ("optimizer", f"{_class(optimizer)}, lr {(optimizer.get('init_args') or {}).get('lr')}" if optimizer else None),
        ("steps", run.get("step")),
        ("products and weights", backbone.dtype),
        ("LoRA weights", lora.get("dtype")),
        ("devices", ", ".join(run.get("devices") or [])),
        ("started", run.get("started")),
        ("ended", f"{run.get('ended')} ({run.get('state')})" if run.get("ended") else run.get("state")),
        ("code", (run.get("git") or {}).get("commit")),
    ]


def _export(certificate: dict[str, Any]) -> list[tuple[str, Any]]:
    reference, base = certificate["reference"], certificate.get("merge_base")
    bases = {"trained": "the base as it was stored in training", "16bit": "the original 16-bit base"}
    agent = "as sys-scan-graph's agent loads it" if certificate.get("load_as") == "agent" else None
    rows = [
        ("merged on", bases.get(base or "")),
        ("matrices stored as", certificate.get("gguf_type")),
        ("loaded to measure it", agent),
        ("certificate", f"{certificate['state']} (certificate.json)"),
        ("failures", "; ".join(certificate.get("failures", []))),
    ]
    if reference["n"]:
        kl = "not a number" if reference["kl_mean"] is None else f"{reference['kl_mean']:.2g} nats per token"
        divergence = f"{kl}, at most {reference['max_kl']:g} allowed, on {reference['n']} held-out findings"
        rows.append(("divergence from the trained model", divergence))
    return rows


def _results(trained: TrainedModel) -> list[str]:
    tables = []
    record = _read(trained, "evaluation.json")
    for task, results in (record.get("tasks") or {}).items():
        columns = results.get("columns", {})
        figures = {name: column.get("figures", {}) for name, column in columns.items()}
        names = [name for name in FIGURES if any(values.get(name) is not None for values in figures.values())]
        title = markdown(f"{task}, {results.get('n')} held-out ({results.get('split')})", CELL)
        head = f"| {title} | " + " | ".join(markdown(name, CELL) for name in columns) + " |"
        rows = [
            f"| {name} | " + " | ".join(_figure(columns[column], name) for column in columns) + " |" for name in names
        ]
        tables.append("\n".join([head, "|---|" + "---:|" * len(columns), *rows]))
    if not tables:
        return ["No evaluation was run."]
    note = (
        "Greedy generation, with 95 % intervals in brackets. The weights are those of the best validation if the run "
        "had a validation, else those of its last step."
    )
    return [*tables, note]


def _figure(column: dict[str, Any], name: str) -> str:
    value, bounds = column.get("figures", {}).get(name), column.get("intervals", {}).get(name)
    if value is None:
        return ""
    interval = f" [{bounds[0]:.3g}, {bounds[1]:.3g}]" if bounds and None not in bounds else ""
    return f"{value:.3g}{interval}"


def _rows(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(f"- {name}: {markdown(value, VALUE)}" for name, value in rows if value not in (None, ""))


def _class(slot: Any) -> str | None:
    return str(slot["class_path"]).rpartition(".")[2] if isinstance(slot, dict) and "class_path" in slot else None


def _source_name(source: str) -> str:
    """Returns a source without folders of the machine and without a password."""
    source = redact_text(source)
    return source if source.startswith("synthetic:") else source.partition("?")[0].rstrip("/").rpartition("/")[2]


def _read(trained: TrainedModel, name: str) -> dict[str, Any]:
    assert trained.run is not None
    try:
        value = json.loads((trained.run / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return redact(value) if isinstance(value, dict) else {}
