"""Export of a Llama or Mistral model and its tokenizer to one GGUF file, for llama.cpp and Ollama.

Matrices are stored in float16, or in blocks of 32 integers that the ``gguf`` package quantizes: q8_0 (8 bits and a
float16 scale), q4_1 (4 bits, scale and offset) or q4_0 (4 bits and a scale). For an adapter next to a 4-bit base see
:mod:`lightning_modules.export.gguf_adapter`. With 4 bits, the embeddings and the output matrix are stored in q8_0,
because an error there affects every token. Norms are stored in float32, and the rows of queries and keys in llama.cpp's
rotary order. The tokenizer is written for llama.cpp's own implementation: byte-level BPE with its merges (pre-tokenizer
``smollm``), or a SentencePiece model whose scores are the ranks of its merges.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.errors import UserError

GgufType = Literal["f16", "q8_0", "q4_1", "q4_0"]
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  #: token types of GGUF
BLOCK = 32  #: numbers per block, which share a scale
_LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_MODEL_TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(model: Any, tokenizer: Any, path: Path, name: str, kind: GgufType = "f16") -> None:
    """Writes a model and its tokenizer to a GGUF file.

    Args:
        model: Llama or Mistral model of transformers, without adapter or quantization.
        tokenizer: its fast tokenizer.
        path: file to write.
        name: display name of the model.
        kind: storage type of the matrices.

    Raises:
        UserError: the architecture, the position encoding or the tokenizer is not supported, a weight exceeds the range
            of float16, or a row length is not a multiple of the block size.
    """
    from gguf import GGUFWriter, LlamaFileType

    config = model.config
    _check_config(config)
    vocabulary = tokenizer_fields(tokenizer, config.vocab_size)
    writer = GGUFWriter(path, "llama")
    try:
        writer.add_name(name)
        writer.add_file_type(LlamaFileType[f"MOSTLY_{kind.upper()}"])
        _add_shape(writer, config)
        _add_tokenizer(writer, vocabulary, tokenizer)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        for key, weight in model.state_dict().items():
            if not (tied and key == "lm_head.weight"):
                _add_tensor(writer, key, rotary_rows(key, weight, config), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def tensor_name(key: str) -> str:
    """Returns the GGUF name of a tensor: ``model.layers.7.self_attn.q_proj.weight`` -> ``blk.7.attn_q.weight``.

    Args:
        key: name in the state dict of transformers.

    Raises:
        UserError: Llama and Mistral have no such tensor, for example a bias.
    """
    stem, _, kind = key.rpartition(".")
    if kind == "weight" and stem in _MODEL_TENSORS:
        return f"{_MODEL_TENSORS[stem]}.weight"
    _, _, rest = stem.partition("model.layers.")
    layer, _, part = rest.partition(".")
    if kind != "weight" or part not in _LAYER_TENSORS:
        raise UserError(f"--format gguf: tensor {key} is not supported by llama.cpp's llama. Fix: use --format merged")
    return f"blk.{layer}.{_LAYER_TENSORS[part]}.weight"


def tokenizer_fields(tokenizer: Any, size: int) -> dict[str, Any]:
    """Returns the GGUF fields of a tokenizer: ``model``, ``pre``, ``tokens``, ``types``, and ``merges`` or ``scores``.

    Args:
        tokenizer: fast tokenizer.
        size: rows of the embedding; ids beyond the tokenizer become unused control tokens.

    Raises:
        UserError: the tokenizer is neither a byte-level BPE like SmolLM's nor a SentencePiece BPE.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = state["model"], {token["id"]: token for token in state["added_tokens"]}
    names = {index: token for token, index in model.get("vocab", {}).items()} if model["type"] == "BPE" else {}
    names |= {index: token["content"] for index, token in added.items()}
    tokens = [names.get(index, f"[PAD{index}]") for index in range(size)]
    control = {index for index, token in added.items() if token["special"]} | (set(range(size)) - names.keys())
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    types = [CONTROL if index in control else NORMAL for index in range(size)]
    if _is_smollm(state.get("pre_tokenizer")):
        return {"model": "gpt2", "pre": "smollm", "tokens": tokens, "types": types, "merges": [*map(" ".join, merges)]}
    if not model.get("byte_fallback"):
        raise UserError("--format gguf: the tokenizer is neither SmolLM's nor SentencePiece. Fix: use --format merged")
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    for index, token in enumerate(tokens):
        if index == tokenizer.unk_token_id:
            types[index] = UNKNOWN
        elif len(token) == 6 and token.startswith("<0x") and index not in control:
            types[index] = BYTE
    # SentencePiece merges the pair whose result has the highest score; a piece without a merge is never produced
    scores = [
        -float(rank.get(token, len(merges))) if kind == NORMAL else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]
    return {"model": "llama", "pre": "default", "tokens": tokens, "types": types, "scores": scores}


def _check_config(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    window = getattr(config, "sliding_window", None)
    supported = config.model_type in ("llama", "mistral") and rope.get("rope_type", "default") == "default"
    if not supported or (window is not None and window < config.max_position_embeddings):
        raise UserError(
            f"--format gguf: model type {config.model_type} with rope {rope.get('rope_type', 'default')} and sliding "
            f"window {window} is not supported. Fix: use --format merged and llama.cpp's own converter"
        )


def _add_shape(writer: Any, config: Any) -> None:
    width = _head_width(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: Any, fields: dict[str, Any], tokenizer: Any) -> None:
    writer.add_tokenizer_model(fields["model"])
    writer.add_tokenizer_pre(fields["pre"])
    writer.add_token_list(fields["tokens"])
    writer.add_token_types(fields["types"])
    if "merges" in fields:
        writer.add_token_merges(fields["merges"])
    else:
        writer.add_token_scores(fields["scores"])
    writer.add_add_space_prefix(False)  # text of a chat follows a control token
    for name, add in (
        ("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id),
        ("unk_token_id", writer.add_unk_token_id), ("pad_token_id", writer.add_pad_token_id),
    ):  # fmt: skip
        if getattr(tokenizer, name) is not None:
            add(getattr(tokenizer, name))
    # as the tokenizer does; llama.cpp drops the second BOS if the chat template writes one, too
    writer.add_add_bos_token(tokenizer.bos_token_id in tokenizer("x")["input_ids"])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _add_tensor(writer: Any, key: str, weight: Tensor, kind: GgufType) -> None:
    """Adds a tensor: a vector in float32, a matrix in the storage type ``kind``."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    name = tensor_name(key)
    if weight.ndim == 1:
        writer.add_tensor(name, weight.numpy())
    elif kind == "f16":
        half = weight.to(torch.float16)
        if not torch.isfinite(half).all():
            raise UserError(f"--format gguf: {key} has values beyond the range of float16. Fix: use --format merged")
        writer.add_tensor(name, half.numpy())
    else:
        if weight.shape[1] % BLOCK:
            raise UserError(
                f"--gguf_type {kind}: rows of {key} have {weight.shape[1]} numbers, not a multiple of {BLOCK}. "
                "Fix: use --gguf_type f16"
            )
        storage = GGMLQuantizationType["Q8_0" if name in ("token_embd.weight", "output.weight") else kind.upper()]
        writer.add_tensor(name, quantize(weight.numpy(), storage), raw_dtype=storage)


def rotary_rows(key: str, weight: Tensor, config: Any) -> Tensor:
    """Returns a tensor in float32 on the CPU, with the rows of queries and keys reordered to llama.cpp's rotary pairs.

    Args:
        key: name in the state dict of transformers.
        weight: the tensor; rows of queries and keys are those of all heads, one head after the other.
        config: of the model; it has the numbers of heads.
    """
    weight = weight.detach().cpu().float()
    if ".q_proj." not in key and ".k_proj." not in key:
        return weight
    heads = config.num_attention_heads if ".q_proj." in key else config.num_key_value_heads
    rows, columns = weight.shape
    # transformers stores the two halves of a head one after the other; llama.cpp stores pairs (0, 1), (2, 3), ...
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _is_smollm(pre_tokenizer: Any) -> bool:
    """Whether the pre-tokenizer is GGUF's ``smollm``: individual digits, then bytes."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [])
    return (
        [step["type"] for step in steps] == ["Digits", "ByteLevel"]
        and steps[0]["individual_digits"]
        and not steps[1]["add_prefix_space"]
    )
