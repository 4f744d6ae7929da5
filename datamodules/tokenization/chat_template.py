"""What a model's chat template writes around the texts of a conversation of one turn.

The template is rendered with stand-ins for the system, user and assistant text, and split at them. A template that
prints today's date gets a fixed one, so that runs repeat exactly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeAlias

from datamodules.errors import UserError

Piece: TypeAlias = int | str  #: a control token's id, or text

_SYSTEM, _USER, _ASSISTANT = (f"\ue000{role}\ue001" for role in ("system", "user", "assistant"))
#: shadows the function that gives a template the date; as a macro, because a template takes no function from outside
_FIXED_DATE = "{%- macro strftime_now(format) -%}01 Jan 2025{%- endmacro %}"


@dataclass(frozen=True, slots=True)
class Layout:
    """The template's own pieces; its control tokens as ids, everything else as text.

    Attributes:
        before_user: what opens the user turn where there is no system text; BOS is in it.
        before_system: what opens the conversation where there is one; None if the template takes no system text.
        between: what stands between system and user text.
        after_user: to the end of the prompt, without the spaces that the template puts before an answer.
        lead: those spaces. They are encoded with the completion, but are no part of the answer.
        eos_id: the token that ends an answer; what the template writes after it is dropped.
        bos_id: the token that stands once, at the start; None where the format has none.
    """

    before_user: list[Piece]
    before_system: list[Piece] | None
    between: list[Piece]
    after_user: list[Piece]
    lead: str
    eos_id: int
    bos_id: int | None

    def opening(self, system: str, user: str) -> list[Piece]:
        """Pieces from BOS to the end of the user text; a system text that the template refuses goes in front of it."""
        if not system:
            return [*self.before_user, user]
        if self.before_system is None:
            return [*self.before_user, f"{system}\n\n{user}"]
        return [*self.before_system, system, *self.between, user]


def parse_layout(tokenizer: Any, control: dict[str, dict[str, Any]]) -> Layout:
    """Reads the layout off a tokenizer's chat template.

    Args:
        tokenizer: a Hugging Face tokenizer.
        control: its control tokens, by text, as ``tokenizer.json`` writes added tokens.

    Raises:
        UserError: there is no chat template, it loses or repeats a text, or the tokenizer has no EOS.
    """
    # Mistral v0.3 writes the system text only into a user turn that comes last, so it is looked for without an answer
    plain = _render(tokenizer, user=_USER, assistant=_ASSISTANT)
    with_system = _render(tokenizer, system=_SYSTEM, user=_USER)
    if plain is None:
        raise UserError(f"tokenizer {tokenizer.name_or_path}: its chat template does not keep user and assistant text")
    before_user, between_turns, after_answer = plain
    eos_id = _end_of_answer(tokenizer, _pieces(after_answer, control))
    prompt_end = between_turns.rstrip(" ")
    opening = with_bos(tokenizer, _pieces(before_user, control))
    before_system, between = None, []
    if with_system is not None:
        before_system, between = (
            with_bos(tokenizer, _pieces(with_system[0], control)),
            _pieces(with_system[1], control),
        )
    after_user = _pieces(prompt_end, control)
    written = (before_system or opening) + between + after_user
    # SmolLM2 names <|im_start|> as BOS, which opens every turn: a token that comes again marks no beginning
    bos_id = tokenizer.bos_token_id if written.count(tokenizer.bos_token_id) == 1 else None
    return Layout(opening, before_system, between, after_user, between_turns[len(prompt_end) :], eos_id, bos_id)


def template_source(tokenizer: Any) -> str:
    """The chat template as text.

    Raises:
        UserError: the tokenizer has none, as those of base models.
    """
    if not tokenizer.chat_template:
        way_out = "choose an instruction-tuned model, or put a chat_template.jinja beside its tokenizer"
        raise UserError(f"tokenizer {tokenizer.name_or_path}: no chat template; {way_out}")
    return tokenizer.get_chat_template()


def _render(tokenizer: Any, **stand_ins: str) -> list[str] | None:
    """Renders a conversation of stand-ins, by role; returns what is around them, None where one is refused or lost."""
    from jinja2 import TemplateError

    messages = [{"role": role, "content": text} for role, text in stand_ins.items()]
    source = template_source(tokenizer)
    options = {
        "chat_template": _FIXED_DATE + source if "strftime_now" in source else source,
        "add_generation_prompt": "assistant" not in stand_ins,
        "enable_thinking": False,  # Qwen 3: an empty thought in the prompt instead of a free one in the answer
    }
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError:
        return None
    parts = re.split(f"({'|'.join(stand_ins.values())})", text)
    return parts[::2] if parts[1::2] == list(stand_ins.values()) else None


def _pieces(literal: str, control: dict[str, dict[str, Any]]) -> list[Piece]:
    """Splits what the template wrote into control tokens and text, as the tokenizer itself would."""
    patterns = [
        (r"\s*" if token["lstrip"] else "") + re.escape(text) + (r"\s*" if token["rstrip"] else "")
        for text, token in sorted(control.items(), key=lambda item: -len(item[0]))
    ]
    parts = re.split(f"({'|'.join(patterns)})", literal) if patterns else [literal]
    return [control[part.strip()]["id"] if index % 2 else part for index, part in enumerate(parts) if part]


def with_bos(tokenizer: Any, pieces: list[Piece]) -> list[Piece]:
    """Puts the BOS in front that the tokenizer puts before every text, unless the template wrote it."""
    bos_id = tokenizer.bos_token_id
    adds_bos = bos_id is not None and tokenizer("")["input_ids"][:1] == [bos_id]
    return [bos_id, *pieces] if adds_bos and bos_id not in pieces else pieces


def _end_of_answer(tokenizer: Any, pieces: list[Piece]) -> int:
    """The tokenizer's EOS; or the token that the template ends a turn with, where it is another (Gemma, Llama 3)."""
    controls = [piece for piece in pieces if isinstance(piece, int)]
    eos_id = tokenizer.eos_token_id
    if eos_id is None and not controls:
        raise UserError(f"tokenizer {tokenizer.name_or_path}: no EOS token; set eos_token in its tokenizer_config.json")
    return eos_id if eos_id in controls or not controls else controls[0]
