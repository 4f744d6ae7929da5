"""Toy tokenizers of the Mistral and ChatML families, whose ids a test can write down.

They have no merges, so the ids of any text are known (:func:`mistral_ids`, :func:`chatml_ids`). Each has the control
tokens, the pre-tokenizer and the chat template of its family.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast as FastTokenizer

MISTRAL_CONTROL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")  #: ids 0..4; byte b is 5 + b, a space is 261
CHATML_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  #: ids 0..2; byte b is 3 + b
MISTRAL_SPACE = len(MISTRAL_CONTROL) + 256

# Mistral v0.3: the system text opens the last user turn; roles must alternate.
MISTRAL_TEMPLATE = """\
{%- if messages[0].role == "system" %}{%- set system = messages[0].content + "\n\n" %}{%- set turns = messages[1:] %}
{%- else %}{%- set system = "" %}{%- set turns = messages %}{%- endif %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if (turn.role == "user") != (loop.index0 % 2 == 0) %}{{- raise_exception("roles must alternate") }}{%- endif %}
    {%- if turn.role == "user" %}
        {{- "[INST] " + (system if loop.index0 >= turns | length - 2 else "") + turn.content + "[/INST]" }}
    {%- else %}{{- " " + turn.content | trim + eos_token }}{%- endif %}
{%- endfor %}"""
CHATML_TEMPLATE = """\
{%- for turn in messages %}{{- "<|im_start|>" + turn.role + "\n" + turn.content + "<|im_end|>\n" }}{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\n" }}{%- endif %}"""


def mistral_ids(text: str) -> list[int]:
    """Ids of a text in the toy Mistral tokenizer, without a dummy space before it."""
    return [MISTRAL_SPACE if byte == ord(" ") else len(MISTRAL_CONTROL) + byte for byte in text.encode()]


def chatml_ids(text: str) -> list[int]:
    """Ids of a text in the toy ChatML tokenizer."""
    return [len(CHATML_CONTROL) + byte for byte in text.encode()]


def build_mistral_tokenizer() -> FastTokenizer:
    """SentencePiece-like: a dummy space before the text, spaces as U+2581, every other character as its bytes."""
    pieces = [*MISTRAL_CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in MISTRAL_CONTROL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return FastTokenizer(tokenizer_object=tokenizer, chat_template=MISTRAL_TEMPLATE, model_max_length=4096, **roles)


def build_chatml_tokenizer() -> FastTokenizer:
    """GPT-2-like bytes, with SmolLM2's roles: ``<|im_start|>`` is also BOS, ``<|im_end|>`` EOS and padding."""
    alphabet = _byte_alphabet()
    vocabulary = {piece: index for index, piece in enumerate([*CHATML_CONTROL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CHATML_CONTROL])
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    roles["pad_token"] = "<|im_end|>"
    return FastTokenizer(tokenizer_object=tokenizer, chat_template=CHATML_TEMPLATE, model_max_length=4096, **roles)


def _byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte: itself if Latin-1 prints it, else the next unused one from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unused = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(unused)) for byte in range(256)]
