"""Raw document -> prepared document: parse, split, pairs, ids. The work of a reading process.

A prepared document is a function of the document and the settings alone: not of the epoch, the worker or the rank.
So any worker may make it, and it may come from the token cache.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datamodules.errors import UserError
from datamodules.pretrained.locate import cache_root
from datamodules.sources import Quarantined, Source, open_source, parse
from datamodules.stream.conflicts import merge_conflicts
from datamodules.stream.epoch_order import Place, Unit
from datamodules.stream.example_columns import Columns
from datamodules.stream.splits import Split, split_document
from datamodules.tasks import Pair, Task, build_tasks
from datamodules.tokenization.chat_format import ChatFormat, Example, load_tokenizer

if TYPE_CHECKING:
    from datamodules.records import Document
    from datamodules.sources import RawDocument

Conflicts = Literal["keep", "drop", "merge"]


@dataclass(slots=True)
class PreparedDocument:
    """What the main process needs of a document.

    Attributes:
        place: where it begins in the epoch's order.
        columns: its examples of one split, all tasks.
        records: how many records it held, quarantined ones too, of all splits.
        counts: how often what was repaired, merged or left out (``repaired.<kind>``, ``merged``, ``skipped.<reason>``).
        quarantined: records that could not be used.
    """

    place: Place
    columns: Columns
    records: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    quarantined: list[Quarantined] = field(default_factory=list)


class DocumentProcessor:
    """Settings of the way from bytes to ids; sources and tokenizer are opened when first used, in each process anew.

    Args:
        sources: as the user named them.
        tokenizer: name or path.
        tasks: their names.
        val_fraction: share of validation.
        test_fraction: share of test.
        seed: of the split.
        conflicts: ``merge`` gives equal inputs of a document one answer.
        agent_templates: folder of the agent's prompt templates, or None.
        storage_options: for remote sources.
        cache_dir: where sources keep their index; in the user's cache where None, so that resuming never reads an
            archive from its start.
    """

    def __init__(
        self,
        *,
        sources: Sequence[str],
        tokenizer: str,
        tasks: Sequence[str],
        val_fraction: float,
        test_fraction: float,
        seed: int,
        conflicts: Conflicts = "keep",
        agent_templates: str | None = None,
        storage_options: dict[str, Any] | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.specs, self.tokenizer, self.task_names = list(sources), tokenizer, list(tasks)
        self.val_fraction, self.test_fraction, self.seed, self.conflicts = val_fraction, test_fraction, seed, conflicts
        self.agent_templates, self.storage_options, self.cache_dir = agent_templates, storage_options, cache_dir
        self._close()

    def _close(self) -> None:
        self._chat: ChatFormat | None = None
        self._tasks: dict[str, Task] | None = None
        self._sources: list[Source] | None = None
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_chat": None, "_tasks": None, "_sources": None}

    @property
    def chat(self) -> ChatFormat:
        """The tokenizer's chat format."""
        if self._chat is None:
            self._chat = ChatFormat(load_tokenizer(self.tokenizer))
        return self._chat

    @property
    def tasks(self) -> dict[str, Task]:
        """Tasks by name."""
        if self._tasks is None:
            self._tasks = build_tasks(self.task_names, agent_templates=self.agent_templates)
        return self._tasks

    @property
    def sources(self) -> list[Source]:
        """Opened sources.

        Raises:
            UserError: none was given, or one is not there, empty or of the wrong kind.
        """
        if self._process != os.getpid():  # a forked worker shares open files, and their offsets, with its parent
            self._sources, self._process = None, os.getpid()
        if not self.specs:
            raise UserError("data.init_args.sources: none given; name an archive, a folder or a file of findings")
        if self._sources is None:
            cache_dir = Path(self.cache_dir) if self.cache_dir else cache_root()
            options = self.storage_options
            self._sources = [open_source(s, storage_options=options, cache_dir=cache_dir) for s in self.specs]
        return self._sources

    def prepare(self, place: Place, raw: RawDocument, split: Split) -> PreparedDocument:
        """Makes the examples of one split."""
        parsed = parse(raw)
        document, merged = self._part(parsed.document, split)
        counts = Counter({f"repaired.{kind}": n for kind, n in parsed.repairs.items()})
        if merged:
            counts["merged"] = merged
        examples: list[Example] = []
        for task in self.tasks.values():
            if pairs := list(task.pairs(document)):
                examples += self.chat.encode(task, pairs)
            counts.update(_skipped(task))
        return PreparedDocument(place, Columns.of(examples), parsed.records, counts, parsed.quarantined)

    def pairs(self, raw: RawDocument, task: str, split: Split) -> list[Pair]:
        """Makes the pairs of one split and task, not encoded."""
        return list(self.tasks[task].pairs(self._part(parse(raw).document, split)[0]))

    def _part(self, document: Document, split: Split) -> tuple[Document, int]:
        # equal inputs are on the same side, so merging after the split is the same as before it, and less work
        part = split_document(
            document, val_fraction=self.val_fraction, test_fraction=self.test_fraction, seed=self.seed
        )[split]
        return merge_conflicts(part) if self.conflicts == "merge" else (part, 0)

    def read_again(self, unit: Unit, position: int) -> RawDocument:
        """One document by its place, for a cache shard that has to be rebuilt."""
        return next(self.sources[unit.source].read_member(unit.member, position))


def _skipped(task: Task) -> dict[str, int]:
    """What a task found nothing to ask about in the last document, for tasks that count it; their count is reset."""
    skipped: Counter[str] = getattr(task, "skipped", None) or Counter()
    counts = {f"skipped.{reason}": n for reason, n in skipped.items()}
    skipped.clear()
    return counts
