"""Ollama's Modelfile for a GGUF file: chat template in Go's template language, greedy decoding, no penalties."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from datamodules.errors import UserError
from datamodules.tokenization.chat_template import parse_layout

if TYPE_CHECKING:
    from datamodules.tokenization.chat_template import Piece

CONTEXT = 8192  #: tokens of prompt and answer; the longest content has 8,192 characters, about 3,000 tokens


def modelfile(tokenizer: Any, system: str, positions: int, adapter: bool = False) -> str:
    """Returns the text of a Modelfile for a ``model.gguf`` in the same directory.

    Ollama samples by default and penalizes repeated tokens, which breaks JSON. Both are disabled, because the model was
    evaluated with greedy decoding.

    Args:
        tokenizer: tokenizer with the chat template.
        system: text of the system turn.
        positions: largest number of positions of the model.
        adapter: whether there is an ``adapter.gguf`` in the same directory.

    Raises:
        UserError: the chat template contains text that Go's template language can't quote.
    """
    parameters = {"temperature": 0, "repeat_penalty": 1, "num_ctx": min(positions, CONTEXT)}
    files = ["FROM ./model.gguf", *["ADAPTER ./adapter.gguf"] * adapter]
    lines = [*files, *(f"PARAMETER {name} {value}" for name, value in parameters.items())]
    return "\n".join([*lines, f'TEMPLATE """{go_template(tokenizer)}"""', f'SYSTEM """{system}"""']) + "\n"


def go_template(tokenizer: Any) -> str:
    """Returns the chat template of one turn in Go's template language, without the BOS that llama.cpp adds.

    Args:
        tokenizer: tokenizer with the chat template.

    Raises:
        UserError: the template contains ``{{`` or a triple quote as text.
    """
    added = json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"]
    layout = parse_layout(tokenizer, {token["content"]: token for token in added if token["content"].strip()})
    adds_bos = tokenizer.bos_token_id in tokenizer("x")["input_ids"]

    def text(pieces: list[Piece], opens: bool = False) -> str:
        kept = pieces[1:] if opens and adds_bos and pieces[:1] == [tokenizer.bos_token_id] else pieces
        return "".join(p if isinstance(p, str) else tokenizer.convert_ids_to_tokens(p) for p in kept)

    plain, after = text(layout.before_user, opens=True), text(layout.after_user)
    if layout.before_system is None:  # as in training: a system text that the template rejects precedes the user's text
        system, between, opening = plain, "\n\n", plain
    else:
        system, between, opening = text(layout.before_system, opens=True), text(layout.between), plain
    if any("{{" in piece or '"""' in piece for piece in (system, between, opening, after)):
        raise UserError("--format gguf: the chat template can't be quoted in a Modelfile. Fix: use --format merged")
    turn = f"{{{{ if .System }}}}{system}{{{{ .System }}}}{between}{{{{ else }}}}{opening}{{{{ end }}}}"
    return f"{turn}{{{{ .Prompt }}}}{after}"
