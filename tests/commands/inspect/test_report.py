"""The report as text: every part of the JSON report, and an example without control characters."""

import io

import numpy as np
from rich.console import Console

from commands.inspect.report import Sample, print_report
from datamodules.tokenization.chat_format import Example


def test_an_example_is_printed_with_its_mask_and_without_control_characters(mistral_tokenizer):
    ids = {part: mistral_tokenizer.encode(part, add_special_tokens=False) for part in ("abc\x1b[31m", "do ", "yes")}
    prompt = [1, 3, *ids["do "], *ids["abc\x1b[31m"], 4]
    sample = Sample.of(
        Example("t", 2 + len(ids["do "]), np.array(prompt), np.array([*ids["yes"], 2]), 1, 1, "low", "", 1),
        mistral_tokenizer,
    )
    assert sum(sample.lengths.values()) == len(prompt) + len(ids["yes"]) + 1
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    console.print(sample.render())
    printed = console.file.getvalue()
    assert "abc\\x1b[31m" in printed
    assert "\x1b[1;32m" in printed  # labels are bold green
    assert sample.joins["end"][-1] == (2, "</s>")
    assert [token for _, token in sample.joins["start"][:2]] == ["<s>", "[INST]"]
    assert (4, "[/INST]") in sample.joins["prompt | completion"]


def full_report(**changes):
    """Returns a report as ``inspect_run`` builds it, with distinct numbers."""
    lengths = {"min": 1, "median": 2, "max": 3}
    packed = {
        "rows": 17, "efficiency": 0.91, "padding": 0.09, "supervised": 0.3, "prefix_saved": 1234,
        "prefix_saved_share": 0.25,
    }  # fmt: skip
    return {
        "sources": ["a.json", "b\x1b[31m.json"], "seconds": 1.5, "warnings": ["a high rate"],
        "records": {
            "complete": False, "documents": 2, "findings": 1200, "rationales": 321, "correlations": 7,
            "skipped": {"no id": 4},
        },
        "repaired": 3, "repairs": {"risk_score": 3}, "quarantined": 0, "quarantine": {}, "duplicates": 5,
        "conflicts": 6, "merged": 2, "overflow": {"risk": 8, "triage": 0}, "unsupervised_examples": 0,
        "near_duplicates": {
            "near": 9, "looked_at": 100, "threshold": 0.8, "leaked": {"val": 1}, "complete": False,
        },
        "splits": {"train": {"findings": 1100, "correlations": 6, "examples": 1000}},
        "examples": {"risk": 1000}, "severities": {"risk": {"high": 250}}, "categories": {"risk": {"ioc": 500}},
        "lengths": {"risk": {"prompt": lengths, "total": lengths}},
        "packing": {"sequence_length": 4096, "mode": "packed", "modes": {"packed": packed}},
        "epoch": {
            "examples": 1000, "rows": 17, "steps": 5, "max_steps": 104, "batch_size": 4, "accumulate": 2, "devices": 1,
        },
        "memory": {
            "peak_gib": 12.5, "parts_gib": {"base": 4.25}, "moments_gib": {"logits": 10.0, "optimizer step": 12.5},
            "basis": "estimated", "kernels": "fused", "activation_checkpointing": "selective",
        },
        "device": {"name": "h100", "hours_epoch": 2.0, "hours_run": 0.5, "basis": "measured"},
        "no_estimate": None,
        "teacher_cache": {"dir": "runs/t", "bytes_finding": 4096, "top_k": 32, "bytes_token": 130, "epoch_gib": 1.5},
    } | changes  # fmt: skip


def printed_report(**changes):
    console = Console(file=io.StringIO(), width=300)
    print_report(full_report(**changes), None, console)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_every_part_of_the_report_is_printed():
    lines = printed_report()
    for line in (
        "sources a.json, b\\x1b[31m.json (a part: --limit)", "findings 1,200", "repaired 3 (risk_score 3)",
        "without an example 4 (no id 4)", "too long 8 (risk 8)", "train 1,100 6 1,000",
        "conflicts 6 examples (same input, another answer), 2 merged",
        "risk 1,000 high 25.0% ioc 50.0%", "packed * 17 91.00% 9.00% 30.0% 1,234 (25.0%)",
        "steps 5 per epoch (max_steps 104): 4 rows x 2 micro-batches x 1 devices",
        "peak memory 12.50 GiB per device, at the optimizer step (estimated)",
        "memory by part base 4.25 GiB, each at its maximum; fused kernels, activation_checkpointing selective",
        "cached teacher 4,096 bytes per finding (top_k 32, 130 per supervised token), 1.50 GiB per epoch "
        "in runs/t",
        "time on h100 2.0 h per epoch, 30.0 min for the run (measured)", "WARNING: a high rate", "read in 1.5 s",
    ):  # fmt: skip
        assert line in lines
    assert any("9 of 100 distinct findings" in line and "1 of val; the rest not compared" in line for line in lines)


def test_parts_without_an_estimate_are_explained():
    lines = printed_report(memory=None, device=None, teacher_cache=None, no_estimate="no config.json")
    assert "peak memory no estimate: no config.json" in lines
    assert not any(line.startswith(("time", "cached teacher")) for line in lines)
    assert "time give a device: --device h100" in printed_report(device=None)


def test_a_long_text_of_an_example_is_shortened(mistral_tokenizer):
    prompt = mistral_tokenizer.encode("x" * 5000, add_special_tokens=False)
    example = Example("t", 0, np.array(prompt), np.array([2]), 1, 1, "low", "", 1)
    console = Console(file=io.StringIO(), width=10_000)
    console.print(Sample.of(example, mistral_tokenizer).render())
    printed = console.file.getvalue()
    assert "x" * 749 in printed
    assert "characters ...]" in printed
    assert printed.count("x") < 2000
