"""The source of a teacher's predictions for a batch: a frozen model, a cache, or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from datamodules.batch import Batch
from datamodules.findings import FindingsDataModule
from lightning_modules.losses.objectives import Objective
from lightning_modules.losses.teacher import Teacher, build_teacher
from lightning_modules.losses.teacher_cache import CachedTeacher, targets_of
from lightning_modules.losses.teacher_shards import Targets
from lightning_modules.models.backbone import Backbone
from lightning_modules.models.backend import Backend
from lightning_modules.models.decoder import Decoder, Predictions


class TeacherSource:
    """Provides a teacher's predictions.

    It is not an ``nn.Module``, so the teacher is not in the training module's ``state_dict()`` or ``parameters()``, and
    is never in training mode.

    Attributes:
        teacher: the frozen model; None until :meth:`build`, and for an objective without one.
        cache: the opened cache; None without one.
    """

    def __init__(self) -> None:
        self.teacher: Teacher | None = None
        self.cache: CachedTeacher | None = None

    def open_cache(self, objective: Objective, data: FindingsDataModule, student: Backbone, batches: int) -> None:
        """Opens the objective's cache, if it has one, and has the data module add the targets to its batches.

        Args:
            objective: names the cache.
            data: the data module, after its ``setup``.
            student: backbone of the model that is trained.
            batches: of training that the run reads, over all ranks; 0 or less if unknown.

        Raises:
            UserError: the cache does not fit the run, or is too short for it.
        """
        self.cache = data.extras = objective.cached_teacher(data, student)
        if self.cache is not None and batches > 0:
            self.cache.check_length(batches * data.batch_size)

    def build(
        self,
        objective: Objective,
        student: Backbone,
        model: Any,
        decoder: Decoder,
        backend: Backend,
        device: torch.device,
    ) -> None:
        """Builds the objective's teacher, once; does nothing for an objective without one.

        Args:
            objective: names the teacher.
            student: backbone of the model that is trained.
            model: that model, whose base the teacher may share.
            decoder: of that model.
            backend: of the strategy.
            device: the device that trains.

        Raises:
            UserError: the teacher can't be built, or its tokenizer is not the student's.
        """
        backbone = objective.teacher_backbone
        if backbone is None or self.teacher is not None:
            return
        if backbone != "base":
            backend.check(backbone.quantization)
        self.teacher = build_teacher(backbone, student, model, backend.build_device(device), decoder)
        backend.place(self.teacher.model)

    def predict(
        self, batch: Batch, positions_N: Tensor | None, labels_N: Tensor, layers: Sequence[str]
    ) -> Predictions | Targets | None:
        """Returns the predictions at the given positions; None without a teacher and without cached targets.

        Args:
            batch: on the device.
            positions_N: of the flattened rows; None for all.
            labels_N: labels at these positions.
            layers: names of the teacher's layers whose hidden states are wanted.
        """
        if self.teacher is not None:
            return self.teacher.predict(batch, positions_N, layers)
        return targets_of(batch, labels_N, self.cache.vocabulary if self.cache is not None else None)
