"""The model card: filled from the run's files, without folders of this machine."""

from html import unescape

import pytest
import yaml

from commands.export.model_card import model_card
from commands.model_source import open_trained_model
from datamodules.output_text import ZERO_WIDTH_SPACE
from tests.helpers.trained_run import make_run, write_evaluation

CERTIFICATE = {
    "format": "adapter", "tasks": ["risk"], "state": "failed", "failures": ["too far"],
    "reference": {"n": 4, "kl_mean": 0.03, "max_kl": 0.02},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama, chatml_tokenizer):
    return make_run(tmp_path_factory.mktemp("runs") / "version_0", tiny_llama, chatml_tokenizer)


def card_of(run, **changes):
    return model_card(open_trained_model(str(run), "--run"), CERTIFICATE | changes)


def test_the_card_has_data_training_and_limits_of_the_run(run):
    card = card_of(run)
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    assert "- LoRA: rank 4, alpha 8.0" in card
    shown = unescape(card).replace(ZERO_WIDTH_SPACE, "")  # the characters that a viewer shows
    assert "- sources: synthetic://?findings=60&seed=7" in shown
    assert '- tasks and shares: {"correlation": 1.0, "remediation": 1.0, "risk": 1.0' in card
    assert "- held out: val 0.2, test 0.2, by content" in card
    assert "- steps: 3" in card
    assert "- products and weights: float32" in card and "- LoRA weights: float32" in card
    assert "## Limits" in card
    assert str(run) not in card
    assert str(run.parent) not in card


def test_the_card_has_the_results_of_the_evaluation(run):
    assert "No evaluation was run." in card_of(run)
    write_evaluation(run)
    assert "| schema_valid | 0.99 [0.95, 1] |" in card_of(run)
    assert "| severity_accuracy | 0.9 |" in card_of(run)
    (run / "evaluation.json").unlink()


def test_the_card_has_the_certificate(run):
    card = card_of(run)
    assert "- certificate: failed (certificate.json)" in card
    assert "- failures: too far" in card
    assert (
        "- divergence from the trained model: 0.03 nats per token, at most 0.02 allowed, on 4 held-out findings" in card
    )
    assert "divergence" not in card_of(run, reference={"n": 0})


@pytest.mark.parametrize(
    ("format", "library", "command"),
    [
        ("adapter", "peft", "PeftModel.from_pretrained(base, FOLDER)"),
        ("merged", "transformers", "AutoModelForCausalLM.from_pretrained(FOLDER)"),
        ("gguf", "transformers", "ollama create"),
    ],
)
def test_the_usage_fits_the_format(run, format, library, command):
    card = card_of(run, format=format)
    assert yaml.safe_load(card.split("---")[1])["library_name"] == library
    assert command in card.partition("## Use")[2].partition("## Data")[0]


def test_a_source_is_named_without_password_and_folder(tmp_path, tiny_llama, chatml_tokenizer):
    source = "https://user:secret@host/private/findings.tar.gz?token=secret"
    card = card_of(make_run(tmp_path / "version_0", tiny_llama, chatml_tokenizer, sources=(source,)))
    assert "- sources: findings.tar.gz" in card
    assert "secret" not in card
