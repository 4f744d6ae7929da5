"""Examples as columns: the form in which processes, the token cache and checkpoints exchange examples.

Five thousand small arrays take 100 ms to send between processes, seven large ones 1 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.tokenization.chat_format import Example

_TEXTS = ("task", "severity", "category")


@dataclass(slots=True)
class Columns:
    """N examples, column by column.

    Attributes:
        tokens: int32, prompt and completion of all examples, concatenated.
        prompts: int32 [N], number of tokens of each prompt.
        completions: int32 [N], number of tokens of each completion.
        prefixes: int32 [N], number of tokens of each shared prefix.
        keys: uint64 [N], digests of task, content and completion.
        inputs: uint64 [N], digests of task and content.
        findings: int32 [N], number of findings that each example is about.
        texts: int32 [3, N], task, severity and category as indices into ``names``.
        names: the distinct strings.
    """

    tokens: NDArray[np.int32]
    prompts: NDArray[np.int32]
    completions: NDArray[np.int32]
    prefixes: NDArray[np.int32]
    keys: NDArray[np.uint64]
    inputs: NDArray[np.uint64]
    findings: NDArray[np.int32]
    texts: NDArray[np.int32]
    names: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Number of tokens of each example, int32 [N]."""
        return self.prompts + self.completions

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Self:
        """Builds columns from examples."""
        codes: dict[str, int] = {}
        texts = [[codes.setdefault(getattr(e, name), len(codes)) for e in examples] for name in _TEXTS]
        ids = [part for e in examples for part in (e.prompt_ids, e.completion_ids)]
        return cls(
            tokens=np.concatenate(ids).astype(np.int32, copy=False) if ids else np.empty(0, np.int32),
            prompts=np.array([len(e.prompt_ids) for e in examples], np.int32),
            completions=np.array([len(e.completion_ids) for e in examples], np.int32),
            prefixes=np.array([e.prefix_length for e in examples], np.int32),
            keys=np.array([e.key for e in examples], np.uint64),
            inputs=np.array([e.input_key for e in examples], np.uint64),
            findings=np.array([e.findings for e in examples], np.int32),
            texts=np.array(texts, np.int32).reshape(len(_TEXTS), len(examples)),
            names=list(codes),
        )

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Concatenates columns.

        Args:
            parts: at least one.
        """
        if len(parts) == 1:
            return parts[0]
        codes: dict[str, int] = {}
        texts = []
        for part in parts:
            recode = np.array([codes.setdefault(name, len(codes)) for name in part.names], np.int32)
            texts.append(recode[part.texts] if len(recode) else part.texts)
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS if name != "texts"}
        return cls(**arrays, texts=np.concatenate(texts, axis=1), names=list(codes))

    def select(self, indices: Sequence[int] | np.ndarray) -> list[Example]:
        """Returns the examples at some indices; their ids are views into ``tokens``."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        examples: dict[int, Example] = {}
        for i in map(int, indices):
            if i in examples:
                continue
            start = int(ends[i]) - int(self.prompts[i]) - int(self.completions[i])
            middle = start + int(self.prompts[i])
            task, severity, category = (self.names[code] for code in self.texts[:, i])
            examples[i] = Example(
                task=task,
                prefix_length=int(self.prefixes[i]),
                prompt_ids=self.tokens[start:middle],
                completion_ids=self.tokens[middle : int(ends[i])],
                key=int(self.keys[i]),
                input_key=int(self.inputs[i]),
                severity=severity,
                category=category,
                findings=int(self.findings[i]),
            )
        return [examples[int(i)] for i in indices]

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors and strings, which ``torch.load(weights_only=True)`` reads."""
        state: dict[str, Any] = {name: to_tensor(getattr(self, name)) for name in _ARRAYS}
        return state | {"names": list(self.names)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """Returns the columns that :meth:`state_dict` was called on."""
        arrays = {name: state[name].numpy() for name in _ARRAYS}
        for name in ("keys", "inputs"):
            arrays[name] = arrays[name].view(np.uint64)
        return cls(**arrays, names=list(state["names"]))


_ARRAYS = tuple(field.name for field in fields(Columns) if field.name != "names")


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """Copies an array to a tensor; unsigned keys become int64 of the same bits, which every torch version loads."""
    return torch.from_numpy(np.array(array.view(np.int64) if array.dtype == np.uint64 else array))
