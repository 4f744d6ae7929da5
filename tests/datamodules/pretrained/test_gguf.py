"""Conversion of GGUF files: weights, config and tokenizer of a small model written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from datamodules.pretrained.gguf import _interleaved_to_halves, convert, hugging_face_name


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix in llama.cpp's order: the rows j of both halves of a head are a pair."""
    rows = weight.shape[0] // heads
    order = [head * rows + half * rows // 2 + j for head in range(heads) for j in range(rows // 2) for half in (0, 1)]
    return weight[order]


def write_gguf(model: LlamaForCausalLM, path: Path) -> dict[str, np.ndarray]:
    """Writes a GGUF file with matrices in Q8_0; returns the expected weights."""
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
        quantized = gguf.quants.quantize(weight, q8)
        writer.add_tensor(f"{stored}.weight", quantized, raw_dtype=q8)
        expected[name] = tensor.numpy()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("tied", [False, True])
def test_a_converted_file_equals_the_model_that_wrote_it(tied, tmp_path):
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
    convert(tmp_path / "model.gguf", folder)

    converted = load_file(folder / "model.safetensors")
    assert converted.keys() == expected.keys()
    for name, weight in expected.items():
        assert converted[name].dtype == np.float32
        # Q8_0 rounds to 1/127 of the largest of 32 weights: much less than the distance of two random rows
        np.testing.assert_allclose(converted[name], weight, atol=np.abs(weight).max() / 200, err_msg=name)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.config.rms_norm_eps == 1e-5
    assert loaded.config.rope_parameters["rope_theta"] == 10000.0
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("ab11<|im_end|>")["input_ids"] == [5, 6, 6, 2]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


def test_other_architectures_are_rejected(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="qwen2"):
        convert(tmp_path / "other.gguf", tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blk.7.attn_q.weight", "model.layers.7.self_attn.q_proj.weight"),
        ("blk.12.ffn_down.weight", "model.layers.12.mlp.down_proj.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ],
)
def test_names_of_tensors(name, expected):
    assert hugging_face_name(name) == expected


@pytest.mark.parametrize(("heads", "head_size", "columns"), [(1, 2, 1), (3, 4, 5), (2, 6, 3)])
def test_rotary_pairs_become_halves(heads, head_size, columns):
    weight = np.arange(heads * head_size * columns, dtype=np.float32).reshape(heads * head_size, columns)
    np.testing.assert_array_equal(_interleaved_to_halves(llama_cpp_order(weight, heads), heads), weight)


def test_the_order_of_a_head_of_four():
    np.testing.assert_array_equal(_interleaved_to_halves(np.arange(4.0)[:, None], 1)[:, 0], [0, 2, 1, 3])
