"""(prompt, completion) pair -> token ids, in the model's own chat format; masks are exact by construction.

What the chat template writes is trusted: control tokens there are control tokens. The texts are not: they are encoded
by a copy of the tokenizer that knows no control tokens, so that ``[/INST]`` in a process name stays seven characters.
For Mistral v0.3::

    <s> [INST]  You are ...⏎⏎Assess ...⏎ | {"id": ...} [/INST] |  {"severity": ...} </s>
    control     system and instruction   | content     control | completion         EOS
    the prefix: the same in all examples |                     | supervised

Between control tokens the text is one run, encoded as the model's reference does it, but for the cut behind the
prefix: the instruction ends with a newline, and no known tokenizer merges a newline with the text that follows it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.errors import UserError
from datamodules.pretrained import locate
from datamodules.tokenization.chat_template import parse_layout, template_source, with_bos

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from datamodules.tasks.base import Pair, Task
    from datamodules.tokenization.chat_template import Piece

_ANCHORS = ("\n", "x", "!")  #: texts behind which another is encoded as a continuation; the first that works
BARE_LEAD = " "  #: stands before an answer where no chat template does; the grammar allows it
_CUT = "\n[... {tokens} tokens cut ...]\n"


@dataclass(slots=True)
class Example:
    """One training example.

    Attributes:
        task: name of its task.
        prefix_length: how many of ``prompt_ids`` are the task's shared prefix.
        prompt_ids: int32, from BOS to the end of the prompt, prefix included; none is supervised.
        completion_ids: int32, the answer and the EOS that ends it; each is supervised.
        key: 64-bit digest of task, content and completion.
        input_key: 64-bit digest of task and content.
        severity: of the finding, or of the worst one (for balancing).
        category: of the finding.
        findings: how many findings it tells of.
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


@dataclass
class Overflow:
    """Decides whether an example fits a row, and counts: one that does not is dropped, never cut.

    Attributes:
        sequence_length: T, tokens of a row.
        kept: examples that fit, by task.
        dropped: examples that don't, by task.
    """

    sequence_length: int
    kept: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    def fits(self, example: Example) -> bool:
        """Whether a row holds the whole example; counts the answer.

        Raises:
            UserError: not even the task's shared prefix fits, so that no example ever would.
        """
        if example.prefix_length >= self.sequence_length:
            raise UserError(
                f"sequence_length {self.sequence_length}: the instruction of task {example.task} alone has "
                f"{example.prefix_length} tokens; set sequence_length well above that"
            )
        fits = len(example.prompt_ids) + len(example.completion_ids) <= self.sequence_length
        (self.kept if fits else self.dropped)[example.task] += 1
        return fits


class ChatFormat:
    """A tokenizer's chat format for conversations of one turn: system text, user text, answer.

    A task whose system text is None is none: its prompt is the bare text, as sys-scan-graph's agent sends its own.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template; it is not changed.

    Attributes:
        tokenizer: what was given.
        bos_id: the token that stands once, at the start; None where the format has none.
        eos_id: the token that stands once, at the end of the completion.
        pad_id: what to fill rows with (often the EOS, so never look for padding by it).

    Raises:
        UserError: no chat template, one that loses a text, or text that would become a control token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        state = json.loads(self._backend.to_str()) | {"padding": None, "truncation": None}
        self._fingerprint = _digest(json.dumps(state, sort_keys=True), template_source(tokenizer))
        # Whitespace runs are text for some tokenizers; every other added token is control, marked as special or not.
        control = {token["content"]: token for token in state["added_tokens"] if token["content"].strip()}
        self._text = _text_tokenizer(state, control, tokenizer.name_or_path)
        self._anchors = [(text, self._text.encode(text, add_special_tokens=False).ids) for text in _ANCHORS]
        self._layout = parse_layout(tokenizer, control)
        self._tail = self._encode_tail()
        self._start = with_bos(tokenizer, [])
        self._prefixes: dict[tuple[str | None, str], list[int]] = {}
        self.bos_id = self._layout.bos_id
        self.eos_id = self._layout.eos_id
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def fingerprint(self) -> str:
        """Digest of the tokenizer and its chat template: with the same one, the same texts give the same ids."""
        return self._fingerprint

    def prefix_ids(self, task: Task) -> list[int]:
        """Ids that are the same in every example of a task: up to the end of its instruction."""
        key = (task.system, task.instruction)
        if key not in self._prefixes:
            if not task.instruction.endswith("\n"):
                raise ValueError(f"task {task.name}: the instruction must end with a newline, where the content begins")
            if task.system is None:
                first = self._text.encode(task.instruction, add_special_tokens=False).ids
                self._prefixes[key] = [*map(int, self._start), *first]
            else:
                self._prefixes[key] = self._encode_pieces(self._layout.opening(task.system, task.instruction))
        return list(self._prefixes[key])

    def encode(self, task: Task, pairs: Sequence[Pair]) -> list[Example]:
        """Encodes pairs of one task, all in one call of the tokenizer."""
        prefix, (tail_text, tail_ids) = self.prefix_ids(task), self._ending(task)
        texts = [pair.content + tail_text for pair in pairs]
        texts += [self._lead(task) + pair.completion for pair in pairs]
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
        """Ids of prompts that wait for an answer; the same as in training."""
        prefix, (tail_text, tail_ids) = self.prefix_ids(task), self._ending(task)
        return [prefix + ids + tail_ids for ids in self._continue([text + tail_text for text in contents])]

    def truncate_prompt(self, task: Task, content: str, limit: int) -> tuple[list[int], int]:
        """Ids of a prompt of at most ``limit`` tokens, and how many of the content's tokens were cut for it.

        The cut is in the middle of the content, with a marker in its place: the first tokens say what it is, and the
        last are nearest to the answer.

        Raises:
            UserError: the limit leaves no room for the content.
        """
        ids, cut = self.prompt_ids(task, [content])[0], 0
        spans = self._spans(content) if len(ids) > limit else []
        while len(ids) > limit:
            cut += len(ids) - limit
            kept = len(spans) - cut
            if kept < 2:
                raise UserError(f"prompt limit {limit}: too small for a content of task {task.name}; raise it")
            end, start = spans[kept - kept // 2 - 1][1], spans[-(kept // 2)][0]
            # a character of several tokens can't stand on both sides: the cut is longer, to make room for the marker
            text = content[:end] + _CUT.format(tokens=cut) + content[start:]
            ids = self.prompt_ids(task, [text])[0]
        return ids, cut

    def decode(self, ids: Iterable[int], task: Task | None = None) -> str:
        """Text of an answer: control tokens are left out, and nothing else is.

        It is the inverse of encoding, but for what the tokenizer itself can't tell apart (SentencePiece: U+2581 and a
        space) or normalises.

        Args:
            ids: of the answer.
            task: that is answered; None for any with a chat template around it.
        """
        anchor, anchor_ids = self._anchors[1]  # keeps the decoder from stripping a space that is the text's own
        text = self._backend.decode([*anchor_ids, *map(int, ids)], skip_special_tokens=True)
        return text.removeprefix(anchor).removeprefix(self._lead(task))

    def _lead(self, task: Task | None) -> str:
        """What stands before an answer and is no part of it."""
        return self._layout.lead if task is None or task.system is not None else BARE_LEAD

    def _ending(self, task: Task) -> tuple[str, list[int]]:
        """What follows a content: text that joins its run, then ids."""
        return self._tail if task.system is not None else ("", [])

    def _encode_tail(self) -> tuple[str, list[int]]:
        """What follows the content: text up to the first control token, which joins the content's run; then ids."""
        pieces = self._layout.after_user
        if pieces and isinstance(pieces[0], str):
            return pieces[0], self._encode_pieces(pieces[1:])
        return "", self._encode_pieces(pieces)

    def _encode_pieces(self, pieces: Sequence[Piece]) -> list[int]:
        """Ids of control tokens and texts; neighbouring texts are one run."""
        ids: list[int] = []
        for is_text, group in groupby(pieces, key=lambda piece: isinstance(piece, str)):
            ids += self._continue(["".join(map(str, group))])[0] if is_text else map(int, group)  # noqa: B031 (either)
        return ids

    def _continue(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts as they continue another text: without the dummy space that SentencePiece puts at a start.

        Each is encoded behind an anchor whose ids are then dropped; where the two merged (a newline before a newline),
        behind the next anchor.

        Raises:
            ValueError: a text merges with every anchor.
        """
        ids: list[list[int] | None] = [None] * len(texts)
        for anchor, anchor_ids in self._anchors:
            waiting = [index for index, done in enumerate(ids) if done is None]
            encodings = self._text.encode_batch_fast([anchor + texts[i] for i in waiting], add_special_tokens=False)
            for index, encoding in zip(waiting, encodings, strict=True):
                whole = encoding.ids
                if whole[: len(anchor_ids)] == anchor_ids:
                    ids[index] = whole[len(anchor_ids) :]
        if None in ids:
            raise ValueError(f"the tokenizer merges {texts[ids.index(None)][:40]!r} with whatever stands before it")
        return [done for done in ids if done is not None]

    def _spans(self, content: str) -> list[tuple[int, int]]:
        """First and last-plus-one character of each of a content's tokens."""
        anchor = _ANCHORS[0]
        offsets = self._text.encode(anchor + content, add_special_tokens=False).offsets
        return [(max(start - len(anchor), 0), end - len(anchor)) for start, end in offsets if end > len(anchor)]


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """Loads a fast tokenizer; code that a repository brings is never run.

    Args:
        name: an embedded model, a local folder (a tokenizer without weights will do), ``random:FOLDER``, or a hub name.
        revision: commit, tag or branch on the hub.

    Raises:
        UserError: it can't be found or read; the message says what to set.
    """
    from transformers import AutoTokenizer

    location = locate.resolve(name.removeprefix("random:"), weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise locate.loading_error("tokenizer", name, error) from error
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {name}: no fast tokenizer; choose a model with a tokenizer.json")
    return tokenizer


def _text_tokenizer(state: dict[str, Any], control: dict[str, Any], name: str) -> Tokenizer:
    """A copy of a tokenizer that knows no control tokens.

    Raises:
        UserError: its model still builds one from text, as one whose pieces include them can.
    """
    from tokenizers import Tokenizer

    kept = [token for token in state["added_tokens"] if token["content"] not in control]
    copy = Tokenizer.from_str(json.dumps(state | {"added_tokens": kept, "post_processor": None}))
    control_ids = {token["id"] for token in control.values()}
    for text, encoding in zip(control, copy.encode_batch_fast(list(control), add_special_tokens=False), strict=True):
        if not control_ids.isdisjoint(encoding.ids):
            raise UserError(f"tokenizer {name}: it turns the text {text} into a control token; choose another model")
    return copy


def _digest(*texts: str) -> str:
    """64-bit digest of texts as 16 hexadecimal digits; the separator keeps ("ab", "c") from ("a", "bc")."""
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=8).hexdigest()
