"""The report as text: every part of the JSON report, and an example without control characters."""

import io

import numpy as np
from rich.console import Console

from commands.inspect.report import Sample
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
