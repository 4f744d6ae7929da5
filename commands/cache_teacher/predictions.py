"""Runs a teacher over examples and returns the arrays of a shard.

Shapes in names: N supervised tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from datamodules.packing import Packing, Row, pack, to_batch
from lightning_modules.losses.teacher import Teacher
from lightning_modules.losses.teacher_shards import CHUNK, id_type, summarize
from lightning_modules.models.backbone import out_of_memory_advice
from lightning_modules.models.backend import supervised_positions

if TYPE_CHECKING:
    from datamodules.findings import FindingsDataModule
    from datamodules.tokenization.chat_format import Example
    from lightning_modules.models.backbone import Backbone


@dataclass
class TeacherPredictions:
    """Computes a teacher's predictions.

    Attributes:
        backbone: the teacher.
        data: its packing, batch size and sequence length are used.
        top_k: number of tokens that are kept per position.
        temperatures: temperatures of the kept tails.
        vocabulary: number of tokens that teacher and student share.
    """

    backbone: Backbone
    data: FindingsDataModule
    top_k: int
    temperatures: list[float]
    vocabulary: int

    @cached_property
    def teacher(self) -> Teacher:
        """The loaded teacher; loaded at its first use, which is the first missing shard."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return Teacher(replace(self.backbone, lora=None).build(device), self.backbone)

    @torch.inference_mode()
    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Returns the arrays of a shard; see :mod:`lightning_modules.losses.teacher_shards`.

        Args:
            examples: examples of the shard, in the order of the arrays.
        """
        mode: Packing = "shared_prefix" if self.data.packing == "shared_prefix" else "packed"
        rows = pack(examples, sequence_length=self.data.sequence_length, mode=mode)
        by_key: dict[int, list[Any]] = {}
        for first in range(0, len(rows), self.data.batch_size):
            batch = rows[first : first + self.data.batch_size]
            parts = self._predict(batch)
            start = 0
            for example in (example for row in batch for example in row.examples):
                end = start + len(example.completion_ids)
                by_key[example.key] = [part[start:end] for part in parts]
                start = end
        ids, log_probs, tails = (np.concatenate([by_key[e.key][part] for e in examples]) for part in range(3))
        return {
            "keys": np.array([example.key for example in examples], np.uint64),
            "ends": np.cumsum([len(example.completion_ids) for example in examples]),
            "ids": ids, "log_probs": log_probs, "tails": tails,
        }  # fmt: skip

    def _predict(self, rows: list[Row]) -> list[Any]:
        """Returns ``ids``, ``log_probs`` and ``tails`` of the supervised positions of rows, on the host."""
        device = self.teacher.decoder.model.device
        batch = to_batch(rows, self.data.sequence_length)
        with out_of_memory_advice(f"data.init_args.sequence_length {self.data.sequence_length} or batch_size"):
            batch = batch.to(device)
            predictions = self.teacher.predict(batch, supervised_positions(batch))
            parts: list[list[Any]] = [[], [], []]
            for hidden_NC in predictions.hidden_NC.split(CHUNK):
                logits_NV = predictions.head(hidden_NC)[:, : self.vocabulary]
                tensors = summarize(logits_NV, self.top_k, self.temperatures)
                for part, tensor in zip(parts, tensors, strict=True):
                    part.append(tensor.cpu().numpy())
        types = (id_type(self.vocabulary), np.float16, np.float16)
        return [np.concatenate(part).astype(dtype) for part, dtype in zip(parts, types, strict=True)]
