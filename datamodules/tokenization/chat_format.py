"""Encodes (prompt, completion) pairs in the model's own chat format; the loss mask is exact by construction.

The chat template is trusted: a control token in its output is a control token. The texts of a conversation are not
trusted: a copy of the tokenizer without control tokens encodes them, so that ``[/INST]`` in a process name stays seven
characters. For Mistral v0.3::

    <s> [INST]  You are ...⏎⏎Assess ...⏎ | {"id": ...} [/INST] |  {"severity": ...} </s>
    control     system and instruction   | content     control | completion         EOS
    the prefix: the same in all examples |                     | supervised

The text between two control tokens is encoded in one piece, as in the model's reference, except that the prefix is
encoded separately: the instruction ends with a newline, and no known tokenizer merges a newline with the following
text.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.errors import UserError
from datamodules.pretrained import locate
from datamodules.tokenization.chat_template import parse_layout, template_source

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from datamodules.tasks.base import Pair, Task
    from datamodules.tokenization.chat_template import Piece

#: texts after which another text is encoded as a continuation; the first one that does not merge with it is used
_ANCHORS = ("\n", "x", "!")
#: system text S and user text U in ChatML, up to the answer
CHATML = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
_CUT = "\n[... {tokens} tokens cut ...]\n"


@dataclass(slots=True)
class Example:
    """One training example.

    Attributes:
        task: name of the task.
        prefix_length: number of the first ``prompt_ids`` that are the task's shared prefix.
        prompt_ids: int32 [prompt tokens], from BOS to the end of the prompt, with the prefix; none is supervised.
        completion_ids: int32 [completion tokens], the answer and its EOS; all are supervised.
        key: 64-bit digest of task, content and completion.
        input_key: 64-bit digest of task and content.
        severity: severity of the finding, or of the most severe one (for balancing).
        category: category of the finding.
        findings: number of findings in the content.
    """

    task: str
    prefix_length: int
    prompt_ids: NDArray[np.int32]
    completion_ids: NDArray[np.int32]
    key: int
    input_key: int
    severity: str
    category: str
    findings: int


class ChatFormat:
    """A tokenizer's chat format for conversations of one turn: system text, user text, answer.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template; it is not changed.

    Attributes:
        tokenizer: the given tokenizer.
        bos_id: id of the token at the start of the prompt, which occurs once; None if the format has none.
        eos_id: id of the token at the end of the completion, which occurs once in it.
        pad_id: id of padding (often the same as the EOS, so it does not identify padding).

    Raises:
        UserError: there is no chat template, it loses a text, or a text would become a control token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        state = json.loads(self._backend.to_str()) | {"padding": None, "truncation": None}
        self._fingerprint = _digest(json.dumps(state, sort_keys=True), template_source(tokenizer))
        # For some tokenizers, added tokens of whitespace are text; all other added tokens are control, special or not.
        control = {token["content"]: token for token in state["added_tokens"] if token["content"].strip()}
        self._text = _text_tokenizer(state, control, tokenizer.name_or_path)
        self._anchors = [(text, self._text.encode(text, add_special_tokens=False).ids) for text in _ANCHORS]
        self._layout = parse_layout(tokenizer, control)
        self._tail = self._encode_tail()
        self._prefixes: dict[tuple[str, str], list[int]] = {}
        self.bos_id = self._layout.bos_id
        self.eos_id = self._layout.eos_id
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def fingerprint(self) -> str:
        """Returns a digest of the tokenizer and its chat template: if it is equal, the same texts have the same ids."""
        return self._fingerprint

    def prefix_ids(self, task: Task) -> list[int]:
        """Returns the ids that all examples of a task begin with: up to the end of its instruction.

        Raises:
            ValueError: the instruction neither is empty nor ends with a newline.
            UserError: the task's prompt is in ChatML, and the tokenizer has another chat format.
        """
        key = (task.system, task.instruction)
        if key not in self._prefixes:
            if task.instruction and not task.instruction.endswith("\n"):
                raise ValueError(
                    f"task {task.name}: the instruction must end with a newline, after which the content begins"
                )
            if getattr(task, "requires_chatml", False) and not self._writes_chatml():
                raise UserError(
                    f"data.task_weights: task {task.name} is a ChatML prompt, and tokenizer "
                    f"{self.tokenizer.name_or_path} has another chat format. Fix: remove the task, or choose a ChatML "
                    "model such as embedded:smollm2-135m-instruct."
                )
            self._prefixes[key] = self._encode_pieces(self._layout.opening(task.system, task.instruction))
        return list(self._prefixes[key])

    def _writes_chatml(self) -> bool:
        """Returns whether the template writes nothing but ChatML around system and user text, as control tokens."""
        opening = [*self._layout.opening("S", "U"), *self._layout.after_user]
        text = "".join(piece if isinstance(piece, str) else self._backend.id_to_token(piece) or "" for piece in opening)
        marks = [text.count(mark) for mark in ("<|im_start|>", "<|im_end|>")]
        ids = [piece for piece in opening if isinstance(piece, int)]
        return text + self._layout.lead == CHATML and len(ids) == sum(marks)

    def encode(self, task: Task, pairs: Sequence[Pair]) -> list[Example]:
        """Encodes pairs of one task, all in one call of the tokenizer."""
        prefix, (tail_text, tail_ids) = self.prefix_ids(task), self._tail
        texts = [pair.content + tail_text for pair in pairs]
        texts += [self._layout.lead + pair.completion for pair in pairs]
        ids = self._continue(texts)
        return [
            Example(
                task=pair.task,
                prefix_length=len(prefix),
                prompt_ids=np.array(prefix + content + tail_ids, dtype=np.int32),
                completion_ids=np.array([*completion, self.eos_id], dtype=np.int32),
                key=int(_digest(pair.task, pair.content, pair.completion), 16),
                input_key=int(_digest(pair.task, pair.content), 16),
                severity=pair.severity,
                category=pair.category,
                findings=pair.findings,
            )
            for pair, content, completion in zip(pairs, ids[: len(pairs)], ids[len(pairs) :], strict=True)
        ]

    def prompt_ids(self, task: Task, contents: Sequence[str]) -> list[list[int]]:
        """Returns the ids of prompts for generation; they are the same as in training."""
        prefix, (tail_text, tail_ids) = self.prefix_ids(task), self._tail
        return [prefix + ids + tail_ids for ids in self._continue([text + tail_text for text in contents])]

    def truncate_prompt(self, task: Task, content: str, limit: int) -> tuple[list[int], int]:
        """Encodes a prompt and, if it has more than ``limit`` tokens, cuts the middle out of its content.

        A marker replaces the cut. The first tokens are kept because they identify the content, and the last because
        they are nearest to the answer.

        Returns:
            The ids, and the number of the content's tokens that were cut.

        Raises:
            UserError: the limit is too small for any of the content.
        """
        ids, cut = self.prompt_ids(task, [content])[0], 0
        spans = self._spans(content) if len(ids) > limit else []
        while len(ids) > limit:
            cut += len(ids) - limit
            kept = len(spans) - cut
            if kept < 2:
                raise UserError(
                    f"prompt limit {limit}: too small for a content of task {task.name}. Fix: raise the limit"
                )
            end, start = spans[kept - kept // 2 - 1][1], spans[-(kept // 2)][0]
            # the final cut is as long as the marker or longer, so that no character of several tokens is on both sides
            text = content[:end] + _CUT.format(tokens=cut) + content[start:]
            ids = self.prompt_ids(task, [text])[0]
        return ids, cut

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes an answer and leaves out its control tokens.

        It is the inverse of encoding, except for characters that the tokenizer itself does not distinguish
        (SentencePiece: U+2581 and a space) or normalizes.
        """
        anchor, anchor_ids = self._anchors[1]  # prevents the decoder from stripping the text's own first space
        text = self._backend.decode([*anchor_ids, *map(int, ids)], skip_special_tokens=True)
        return text.removeprefix(anchor).removeprefix(self._layout.lead)

    def _encode_tail(self) -> tuple[str, list[int]]:
        """Returns the template's text between a content and the next control token, and the ids from that token on.

        The text is encoded together with the content.
        """
        pieces = self._layout.after_user
        if pieces and isinstance(pieces[0], str):
            return pieces[0], self._encode_pieces(pieces[1:])
        return "", self._encode_pieces(pieces)

    def _encode_pieces(self, pieces: Sequence[Piece]) -> list[int]:
        """Returns the ids of control tokens and texts; consecutive texts are encoded together."""
        ids: list[int] = []
        for is_text, group in groupby(pieces, key=lambda piece: isinstance(piece, str)):
            ids += self._continue(["".join(map(str, group))])[0] if is_text else map(int, group)  # noqa: B031 (either)
        return ids

    def _continue(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes texts as continuations: without the space that SentencePiece adds before the first word.

        Each text is encoded after an anchor, whose ids are then dropped. If the two merged (a newline after a newline),
        the text is encoded after the next anchor.

        Raises:
            ValueError: a text merges with every anchor.
        """
        ids: list[list[int] | None] = [None] * len(texts)
        for anchor, anchor_ids in self._anchors:
            remaining = [index for index, encoded in enumerate(ids) if encoded is None]
            encodings = self._text.encode_batch_fast([anchor + texts[i] for i in remaining], add_special_tokens=False)
            for index, encoding in zip(remaining, encodings, strict=True):
                joint_ids = encoding.ids
                if joint_ids[: len(anchor_ids)] == anchor_ids:
                    ids[index] = joint_ids[len(anchor_ids) :]
        if None in ids:
            raise ValueError(f"the tokenizer merges {texts[ids.index(None)][:40]!r} with any text before it")
        return [encoded for encoded in ids if encoded is not None]

    def _spans(self, content: str) -> list[tuple[int, int]]:
        """Returns the first and the last-plus-one character of each token of a content."""
        anchor = _ANCHORS[0]
        offsets = self._text.encode(anchor + content, add_special_tokens=False).offsets
        return [(max(start - len(anchor), 0), end - len(anchor)) for start, end in offsets if end > len(anchor)]


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """Loads a fast tokenizer; a repository's own code is never run.

    Args:
        name: an embedded model, a local folder (weights are not needed), ``random:FOLDER``, or a name on the hub.
        revision: commit, tag or branch on the hub.

    Raises:
        UserError: it can't be found or read; the message names the fix.
    """
    from transformers import AutoTokenizer

    location = locate.resolve(name.removeprefix("random:"), weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise locate.loading_error("tokenizer", name, error) from error
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {name}: no fast tokenizer. Fix: choose a model with a tokenizer.json")
    return tokenizer


def _text_tokenizer(state: dict[str, Any], control: dict[str, Any], name: str) -> Tokenizer:
    """Builds a copy of a tokenizer without its control tokens.

    Args:
        state: the tokenizer as ``tokenizer.json`` describes it.
        control: its control tokens, by text.
        name: its name, for the error.

    Raises:
        UserError: the copy still encodes a control token's text as that token, because its vocabulary has the text.
    """
    from tokenizers import Tokenizer

    kept = [token for token in state["added_tokens"] if token["content"] not in control]
    copy = Tokenizer.from_str(json.dumps(state | {"added_tokens": kept, "post_processor": None}))
    control_ids = {token["id"] for token in control.values()}
    for text, encoding in zip(control, copy.encode_batch_fast(list(control), add_special_tokens=False), strict=True):
        if not control_ids.isdisjoint(encoding.ids):
            raise UserError(
                f"tokenizer {name}: it turns the text {text} into a control token. Fix: choose another model"
            )
    return copy


def _digest(*texts: str) -> str:
    """Returns a 64-bit digest as 16 hexadecimal digits; a separator distinguishes ("ab", "c") from ("a", "bc")."""
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=8).hexdigest()
