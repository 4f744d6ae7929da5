"""Pairs of one task together with their token ids, so that each prompt is tokenized once per evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_modules.generation.prefix_cache import truncate_prompts

if TYPE_CHECKING:
    from datamodules.tasks.base import Pair, Task
    from datamodules.tokenization.chat_format import ChatFormat, Example


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs of one task and their token ids.

    Token limit, likelihood, forced choice and generation all need the same prompts; they share one encoding.

    Attributes:
        chat: chat format of the model's tokenizer.
        task: the task of the pairs.
        pairs: the pairs.
        examples: the token ids of each pair, in the same order.
    """

    chat: ChatFormat
    task: Task
    pairs: Sequence[Pair]
    examples: Sequence[Example]

    @classmethod
    def encode(cls, chat: ChatFormat, task: Task, pairs: Sequence[Pair]) -> EncodedPairs:
        """Encodes the prompts and completions of pairs."""
        return cls(chat, task, pairs, chat.encode(task, pairs))

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self.pairs)

    def __getitem__(self, part: slice) -> EncodedPairs:
        """Returns some of the pairs, for instance one rank's ``[rank::world_size]``."""
        return EncodedPairs(self.chat, self.task, self.pairs[part], self.examples[part])

    def select(self, indices: Sequence[int]) -> EncodedPairs:
        """Returns the pairs at ``indices``."""
        pairs, examples = [self.pairs[index] for index in indices], [self.examples[index] for index in indices]
        return EncodedPairs(self.chat, self.task, pairs, examples)

    @property
    def contents(self) -> list[str]:
        """The variable part of each prompt."""
        return [pair.content for pair in self.pairs]

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of each whole prompt."""
        return [example.prompt_ids.tolist() for example in self.examples]

    @property
    def completions(self) -> list[list[int]]:
        """Token ids of each expected answer, including its end-of-sequence token."""
        return [example.completion_ids.tolist() for example in self.examples]

    def truncated_prompts(self, limit: int) -> list[list[int]]:
        """Returns the prompts, each cut to at most ``limit`` tokens; see :func:`truncate_prompts`."""
        return truncate_prompts(self.chat, self.task, self.contents, self.prompts, limit)[0]
