"""Converts a Llama model in a GGUF file to a Hugging Face folder (safetensors, config, tokenizer, chat template).

``transformers`` reads GGUF too, but it marks the model as quantized and then can't save it, and it drops the digit
splitting of the tokenizer. This conversion gives the same weights, bit for bit (a slow test compares them).
File format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np

_CONTROL = 3  #: token type of control tokens in GGUF

#: GGUF's names of a layer's tensors -> Hugging Face's names
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert(gguf: Path, folder: Path) -> None:
    """Writes the files that ``from_pretrained`` of models and tokenizers reads, with weights in float32.

    They are float32, because a Q4_1 weight (a 4-bit integer times a float16 scale plus a float16 offset) can't be
    represented exactly in a 16-bit format.

    Args:
        gguf: file of a Llama model with a byte-level BPE tokenizer.
        folder: folder for the files; it must exist.

    Raises:
        ValueError: the file has another architecture or tokenizer.
    """
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf)

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    kinds = (field("general.architecture"), field("tokenizer.ggml.model"), field("tokenizer.ggml.pre"))
    if kinds != ("llama", "gpt2", "smollm"):
        raise ValueError(
            f"{gguf}: architecture, tokenizer and pre-tokenizer are {kinds}; only ('llama', 'gpt2', 'smollm') is "
            "supported"
        )
    state = read_weights(
        reader, heads=field("llama.attention.head_count"), kv_heads=field("llama.attention.head_count_kv")
    )
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    _config(field, tied="lm_head.weight" not in state).save_pretrained(folder)
    _generation_config(field).save_pretrained(folder)
    _tokenizer(field).save_pretrained(folder)


def read_weights(reader: Any, heads: int, kv_heads: int) -> dict[str, np.ndarray]:
    """Returns all weights in float32 by their Hugging Face names; a tied output matrix is absent, as in the file."""
    import numpy as np
    from gguf.quants import dequantize

    state = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        _, _, part = tensor.name.removesuffix(".weight").rpartition(".")
        if part in ("attn_q", "attn_k"):
            weight = _interleaved_to_halves(weight, heads if part == "attn_q" else kv_heads)
        state[hugging_face_name(tensor.name)] = np.ascontiguousarray(weight, dtype=np.float32)
    return state


def hugging_face_name(name: str) -> str:
    """Returns, for ``blk.7.attn_q.weight``, ``model.layers.7.self_attn.q_proj.weight``."""
    stem = name.removesuffix(".weight")
    if stem in _OTHER_NAMES:
        return f"{_OTHER_NAMES[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_BLOCK_NAMES[part]}.weight"


def _interleaved_to_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head from llama.cpp's rotary pairs (0, 1), (2, 3), ... to Hugging Face's two halves.

    Args:
        weight: query or key matrix, [heads * head size, hidden size].
        heads: number of heads in its rows.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(field: Callable[[str], Any], *, tied: bool) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=round(field("llama.attention.layer_norm_rms_epsilon"), 9),  # a float32 1e-5 in the file
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings=tied,
        **_token_ids(field),
    )


def _generation_config(field: Callable[[str], Any]) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(**_token_ids(field))


def _token_ids(field: Callable[[str], Any]) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: field(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}


def _tokenizer(field: Callable[[str], Any]) -> Any:
    """Builds a byte-level BPE tokenizer that splits numbers into digits, as GGUF's ``pre = smollm`` requires."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=field("tokenizer.chat_template"),
        model_max_length=field("llama.context_length"),
        clean_up_tokenization_spaces=False,
        **{role: tokens[field(f"tokenizer.ggml.{key}_token_id")] for role, key in roles.items()},
    )
