"""Parses the text and the control tokens that a chat template writes around the texts of one turn.

The template is rendered with placeholders for the system, user and assistant text, and split at them. A template that
prints today's date gets a fixed date, so that runs are reproducible.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeAlias

from datamodules.errors import UserError
from datamodules.time_limit import TimeLimitReached, time_limit

Piece: TypeAlias = int | str  #: a control token's id, or text

_SYSTEM, _USER, _ASSISTANT = (f"\ue000{role}\ue001" for role in ("system", "user", "assistant"))
TEMPLATE_SECONDS = 10.0  #: limit on the time in which a template writes one conversation; it takes milliseconds
#: replaces the function that returns the date; as a macro, because the caller can't pass functions to a template
_FIXED_DATE = "{%- macro strftime_now(format) -%}01 Jan 2025{%- endmacro %}"


@dataclass(frozen=True, slots=True)
class Layout:
    """The template's own pieces: control tokens as ids, all else as text.

    Attributes:
        before_user: pieces before the user text, with BOS, of a conversation without system text.
        before_system: pieces before the system text; None if the template does not support one.
        between: pieces between system and user text.
        after_user: pieces from the user text to the end of the prompt, without the spaces before an answer.
        lead: those spaces. They are encoded with the completion, but are not part of the answer.
        eos_id: id of the token that ends an answer; later pieces of the template are dropped.
        bos_id: id of the token at the start, which occurs once; None if the format has none.
    """

    before_user: list[Piece]
    before_system: list[Piece] | None
    between: list[Piece]
    after_user: list[Piece]
    lead: str
    eos_id: int
    bos_id: int | None

    def opening(self, system: str, user: str) -> list[Piece]:
        """Returns the pieces from BOS to the end of the user text.

        A system text that the template does not support is put before the user text, in the same turn.
        """
        if not system:
            return [*self.before_user, user]
        if self.before_system is None:
            return [*self.before_user, f"{system}\n\n{user}"]
        return [*self.before_system, system, *self.between, user]


def parse_layout(tokenizer: Any, control: dict[str, dict[str, Any]]) -> Layout:
    """Parses the layout of a tokenizer's chat template.

    Args:
        tokenizer: a Hugging Face tokenizer.
        control: its control tokens, by text, as ``tokenizer.json`` describes added tokens.

    Raises:
        UserError: there is no chat template, it loses or repeats a text, or the tokenizer has no EOS token.
    """
    # Mistral v0.3 writes the system text only into the last user turn, so this conversation has no answer
    plain = _render(tokenizer, user=_USER, assistant=_ASSISTANT)
    with_system = _render(tokenizer, system=_SYSTEM, user=_USER)
    if plain is None:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path}: its chat template does not keep user and assistant text. Fix: choose "
            "another model"
        )
    before_user, between_turns, after_answer = plain
    eos_id = _end_of_answer(tokenizer, _pieces(after_answer, control))
    prompt_end = between_turns.rstrip(" ")
    before_user_pieces = with_bos(tokenizer, _pieces(before_user, control))
    before_system, between = None, []
    if with_system is not None:
        before_system, between = (
            with_bos(tokenizer, _pieces(with_system[0], control)),
            _pieces(with_system[1], control),
        )
    after_user = _pieces(prompt_end, control)
    prompt = (before_system or before_user_pieces) + between + after_user
    # SmolLM2 names <|im_start|> as BOS, which begins every turn: a repeated token does not mark the start
    bos_id = tokenizer.bos_token_id if prompt.count(tokenizer.bos_token_id) == 1 else None
    return Layout(
        before_user_pieces, before_system, between, after_user, between_turns[len(prompt_end) :], eos_id, bos_id
    )


def template_source(tokenizer: Any) -> str:
    """Returns the chat template's source.

    Raises:
        UserError: the tokenizer has none; tokenizers of base models often have none.
    """
    if not tokenizer.chat_template:
        fix = "choose an instruction-tuned model, or put a chat_template.jinja next to its tokenizer"
        raise UserError(f"tokenizer {tokenizer.name_or_path}: no chat template. Fix: {fix}")
    return tokenizer.get_chat_template()


def _render(tokenizer: Any, **placeholders: str) -> list[str] | None:
    """Renders a conversation of placeholders and splits the output at them.

    Args:
        tokenizer: a Hugging Face tokenizer.
        placeholders: texts by role, in the order of the conversation.

    Returns:
        The parts before, between and after the placeholders; None if the template rejects or loses one of them.

    Raises:
        UserError: the template does not end within :data:`TEMPLATE_SECONDS`.
    """
    from jinja2 import TemplateError

    messages = [{"role": role, "content": text} for role, text in placeholders.items()]
    source = template_source(tokenizer)
    options = {
        "chat_template": _FIXED_DATE + source if "strftime_now" in source else source,
        "add_generation_prompt": "assistant" not in placeholders,
        "enable_thinking": False,  # Qwen 3: an empty thought in the prompt instead of a generated one in the answer
    }
    try:
        with time_limit(TEMPLATE_SECONDS):
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError:
        return None
    except TimeLimitReached:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path}: its chat template did not end within {TEMPLATE_SECONDS:g} s. Fix: "
            "choose another model"
        ) from None
    parts = re.split(f"({'|'.join(placeholders.values())})", text)
    return parts[::2] if parts[1::2] == list(placeholders.values()) else None


def _pieces(literal: str, control: dict[str, dict[str, Any]]) -> list[Piece]:
    """Splits the template's output into control tokens and text, as the tokenizer does."""
    patterns = [
        (r"\s*" if token["lstrip"] else "") + re.escape(text) + (r"\s*" if token["rstrip"] else "")
        for text, token in sorted(control.items(), key=lambda item: -len(item[0]))
    ]
    parts = re.split(f"({'|'.join(patterns)})", literal) if patterns else [literal]
    return [control[part.strip()]["id"] if index % 2 else part for index, part in enumerate(parts) if part]


def with_bos(tokenizer: Any, pieces: list[Piece]) -> list[Piece]:
    """Adds the BOS token that the tokenizer puts before every text, unless the template wrote it."""
    bos_id = tokenizer.bos_token_id
    adds_bos = bos_id is not None and tokenizer("")["input_ids"][:1] == [bos_id]
    return [bos_id, *pieces] if adds_bos and bos_id not in pieces else pieces


def _end_of_answer(tokenizer: Any, pieces: list[Piece]) -> int:
    """Returns the id of EOS, or of the other token with which the template ends a turn (Gemma, Llama 3)."""
    controls = [piece for piece in pieces if isinstance(piece, int)]
    eos_id = tokenizer.eos_token_id
    if eos_id is None and not controls:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path}: no EOS token. Fix: set eos_token in its tokenizer_config.json"
        )
    return eos_id if eos_id in controls or not controls else controls[0]
