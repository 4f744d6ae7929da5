"""The model card of an export, filled from run.json, config.yaml and evaluation.json; in the hub's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from commands.model_source import lora_settings

if TYPE_CHECKING:
    from commands.model_source import Trained

SHOWN = (
    "loss", "schema_valid", "severity_accuracy", "severity_macro_f1", "risk_error", "subscore_error",
    "actionable_error", "actionable_ece", "tags_f1", "ids_f1", "faithful",
)  # fmt: skip
LIMITS = """\
- It reads findings of sys-scan-graph's scanner, in English, as compact JSON; other scanners were not tested.
- It judges what the scanner wrote down. It saw no host, no traffic and no file.
- Where training data are synthetic, its scores follow the rules that made them, not incidents that happened.
- Text inside findings may be an attacker's. It is kept as data, but no answer should be carried out unread.
- A severity or score is an estimate: do not close or escalate automatically what nobody looked at."""


def model_card(trained: Trained, certificate: dict[str, Any]) -> str:
    """Writes the card.

    Args:
        trained: of a run folder.
        certificate: what is known of the export, without its files.
    """
    run = _read(trained, "run.json")
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(trained, certificate), sort_keys=False)}---",
        f"# Security analyst for sys-scan-graph ({certificate['format']})",
        f"{_base(trained)}, fine-tuned to answer questions about scanner findings with one JSON object. "
        f"Tasks: {', '.join(certificate['tasks'])}.",
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


def _front_matter(trained: Trained, certificate: dict[str, Any]) -> dict[str, Any]:
    name, adapter = trained.backbone.model_name_or_path, certificate["format"] == "adapter"
    matter: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    if not name.startswith("embedded:") and not Path(name).exists():  # a name on the hub
        matter["base_model"] = name
    return matter | {"pipeline_tag": "text-generation", "tags": ["security", "sys-scan-graph", "lora"]}


def _base(trained: Trained) -> str:
    name = trained.backbone.model_name_or_path
    return Path(name).name if Path(name).is_dir() else name


def _usage(trained: Trained, kind: str) -> str:
    if kind == "adapter":
        load = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"base = AutoModelForCausalLM.from_pretrained({_base(trained)!r})\n"
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


def _data(trained: Trained, run: dict[str, Any]) -> list[tuple[str, Any]]:
    data = trained.config.get("data", {}).get("init_args", {})
    return [
        ("sources", ", ".join(_nameless(str(source)) for source in data.get("sources", []))),
        ("tasks and shares", json.dumps(data.get("tasks") or {"risk": 1.0})),
        ("held out", f"val {data.get('val', 0.02)}, test {data.get('test', 0.02)}, by content"),
        ("balance over severity", data.get("balance")),
        ("fingerprint", run.get("data")),
    ]


def _training(trained: Trained, run: dict[str, Any]) -> list[tuple[str, Any]]:
    model, backbone = trained.config.get("model", {}).get("init_args", {}), trained.backbone
    optimizer, lora = model.get("optimizer") or {}, lora_settings(trained)
    return [
        ("base", f"{_base(trained)}" + (f" at {backbone.revision}" if backbone.revision else "")),
        ("stored as", f"quantization {backbone.quantization}, dtype {backbone.dtype}"),
        ("LoRA", ", ".join(f"{name} {value}" for name, value in lora.items() if value) or "none: every weight trained"),
        ("objective", _class(model.get("objective"))),
        ("optimizer", f"{_class(optimizer)}, lr {(optimizer.get('init_args') or {}).get('lr')}" if optimizer else None),
        ("steps", run.get("step")),
        ("precision", (trained.config.get("trainer") or {}).get("precision")),
        ("devices", ", ".join(run.get("devices") or [])),
        ("started", run.get("started")),
        ("ended", f"{run.get('ended')} ({run.get('state')})" if run.get("ended") else run.get("state")),
        ("code", (run.get("git") or {}).get("commit")),
    ]


def _export(certificate: dict[str, Any]) -> list[tuple[str, Any]]:
    reference, base = certificate["reference"], certificate.get("merge_base")
    on = {"trained": "the base as it was stored in training", "16bit": "the original 16-bit base"}.get(base or "")
    agent = "as sys-scan-graph's agent does it" if certificate.get("load_as") == "agent" else None
    rows = [
        ("merged on", on),
        ("matrices stored as", certificate.get("gguf_type")),
        ("loaded to measure it", agent),
        ("certificate", f"{certificate['state']} (certificate.json)"),
        ("beyond its bounds", "; ".join(certificate.get("failures", []))),
    ]
    if reference["n"]:
        kl = "not a number" if reference["kl_mean"] is None else f"{reference['kl_mean']:.2g} nats a token"
        said = f"{kl}, at most {reference['max_kl']:g} allowed"
        rows.append(("divergence from the trained model", f"{said}, on {reference['n']} held-out findings"))
    return rows


def _results(trained: Trained) -> list[str]:
    tables = []
    record = _read(trained, "evaluation.json")
    for task, exam in (record.get("tasks") or {}).items():
        columns = exam.get("columns", {})
        figures = {name: column.get("figures", {}) for name, column in columns.items()}
        names = [name for name in SHOWN if any(values.get(name) is not None for values in figures.values())]
        head = f"| {task}, {exam.get('n')} held-out ({exam.get('split')}) | " + " | ".join(columns) + " |"
        rows = [
            f"| {name} | " + " | ".join(_figure(columns[column], name) for column in columns) + " |" for name in names
        ]
        tables.append("\n".join([head, "|---|" + "---:|" * len(columns), *rows]))
    if not tables:
        return ["No evaluation was run."]
    note = (
        "Greedy generation; in brackets 95 % intervals. The weights here are those of the best validation, if the run "
        "had one, else of its last step."
    )
    return [*tables, note]


def _figure(column: dict[str, Any], name: str) -> str:
    value, bounds = column.get("figures", {}).get(name), column.get("intervals", {}).get(name)
    if value is None:
        return ""
    interval = f" [{bounds[0]:.3g}, {bounds[1]:.3g}]" if bounds and None not in bounds else ""
    return f"{value:.3g}{interval}"


def _rows(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in rows if value not in (None, ""))


def _class(slot: Any) -> str | None:
    return str(slot["class_path"]).rpartition(".")[2] if isinstance(slot, dict) and "class_path" in slot else None


def _nameless(source: str) -> str:
    """A source without the folders of the machine that it lay on, and without a password."""
    return source if source.startswith("synthetic:") else source.partition("?")[0].rstrip("/").rpartition("/")[2]


def _read(trained: Trained, name: str) -> dict[str, Any]:
    assert trained.run is not None
    try:
        value = json.loads((trained.run / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
