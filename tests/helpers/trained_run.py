"""Run folders like those of ``fit``, with a tiny model and without training, and the commands that read them."""

import json

import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from datamodules.records import Finding
from datamodules.tasks import TASKS, RiskTask
from main import main

REPORT = {
    "meta": {"hostname": "host", "json_schema_version": "2"},
    "results": [
        {"scanner": "ioc", "findings": [
            {"id": "ioc1", "title": "Deleted binary executing", "severity": "high", "risk_score": "70",
             "metadata": {"deleted": "true", "path": "/tmp/evil", "pid": "77"}},
            {"id": "ioc2", "title": "Suspicious LD_PRELOAD", "severity": "critical", "risk_score": "90",
             "metadata": {"env": "LD_PRELOAD", "value": "/tmp/inject.so", "pid": "77"}},
        ]},
        {"scanner": "empty", "findings": []},
        {"scanner": "network", "findings": [
            {"id": "n4", "title": "TCP 4444 listening", "severity": "medium", "risk_score": "50",
             "metadata": {"state": "LISTEN", "port": "4444"}},
        ]},
    ],
}  # fmt: skip


def make_run(folder, base, tokenizer, *, tasks=TASKS, sources=("synthetic://?findings=60&seed=7",), seed=1, **backbone):
    """Writes config.yaml, run.json and adapter/best; returns the folder."""
    settings = {
        "model_name_or_path": str(base), "quantization": "none", "dtype": "float32", "attn_implementation": "sdpa",
        "lora": {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "kernels": "auto", "activation_checkpointing": "none", "revision": None,
        "adapter": None,
    } | backbone  # fmt: skip
    data = {
        "sources": list(sources),
        "task_weights": dict.fromkeys(tasks, 1.0),
        "val_fraction": 0.2,
        "test_fraction": 0.2,
        "sequence_length": 4096,
    }
    config = {
        "model": {"class_path": "lightning_modules.CausalLMModule", "init_args": {"backbone": settings}},
        "data": {"class_path": "datamodules.FindingsDataModule", "init_args": data},
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps({"state": "finished", "step": 3, "metrics": {"val/loss": 1.5}}))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder / "adapter" / "best", save_embedding_layers=False)
    tokenizer.save_pretrained(folder / "adapter" / "best")
    return folder


def write_evaluation(folder, severities=("low", "high", "info", "critical")):
    """Writes evaluation.json as ``fit`` does, with one question for each severity; returns the folder."""
    task, questions = RiskTask(), []
    for number, severity in enumerate(severities):
        finding = Finding(f"id{number}", f"Port {4440 + number}", "A port is open.", "network", severity, 50.0, 50.0)
        pair = next(iter(task.pairs(type("D", (), {"findings": [finding]})())))
        questions.append({"content": pair.content, "expected": pair.completion})
    column = {"figures": {"schema_valid": 0.99, "severity_accuracy": 0.9}, "intervals": {"schema_valid": [0.95, 1.0]}}
    record = {"split": "val", "n": len(questions), "columns": {"tuned": column}, "questions": questions}
    (folder / "evaluation.json").write_text(json.dumps({"step": 3, "tasks": {"risk": record}}))
    return folder


def analyze(run, report, output, *options):
    """Runs ``analyze`` on a report (a file, or its content); returns the exit status and the document."""
    if isinstance(report, dict):
        file = output.with_name("report.json")
        file.write_text(json.dumps(report))
        report = file
    status = main(["analyze", "--model", str(run), "--report", str(report), "--output", str(output), *options])
    return status, json.loads(output.read_text()) if output.exists() else None


def export(run, output, *options):
    """Runs ``export``; returns the exit status and the certificate."""
    status = main(["export", "--run", str(run), "--output", str(output), *options])
    file = output / "certificate.json"
    return status, json.loads(file.read_text()) if file.exists() else None


def short(*options):
    """Returns options of ``analyze`` for short answers: unconstrained, at most 8 tokens (bytes)."""
    return ("--constrained", "false", "--max_new_tokens", "8", *options)


def single_report(folder):
    """Writes the test report to a file of a folder; returns the file."""
    (folder / "single.json").write_text(json.dumps(REPORT))
    return folder / "single.json"


def analyze_all(run, output, *reports, options=()):
    """Runs ``analyze`` on several reports; returns the exit status."""
    few = short("--actions", "1", "--correlations", "0", *options)
    given = ["--model", str(run), "--report", *map(str, reports), "--output", str(output)]
    return main(["analyze", *given, *few])


def no_model_is_loaded(*_):
    """Replaces the loader of the model where none may be loaded."""
    raise AssertionError("the model was loaded")
