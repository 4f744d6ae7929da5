"""The progress of reading: monotonic, and complete at the end."""

from types import SimpleNamespace

import pytest
from rich.progress import Progress

from commands.inspect.progress import ReadingProgress, progress_bar
from datamodules.findings import FindingsDataModule
from datamodules.statistics.scan import scan_dataset
from datamodules.stream.epoch_order import Unit, epoch_order
from datamodules.synthetic import synthesize


@pytest.mark.parametrize("name", ["folder", "some.tar.gz"])
def test_progress_is_monotonic_and_ends_at_the_size_of_the_sources(tmp_path, tiny_mistral, name):
    synthesize(tmp_path / name, findings=60, seed=2, findings_per_shard=20)
    data = FindingsDataModule([str(tmp_path / name)], str(tiny_mistral), sequence_length=4096)
    data.setup()
    sources = data.document_processor.sources
    reading, seen = ReadingProgress(sources, epoch_order(sources, epoch=0, seed=0)), []
    scan_dataset(data, progress=lambda _, place: seen.append(reading.done(place)))
    assert seen == sorted(seen)
    assert seen[-1] == reading.total > 0
    assert len(seen) >= 3


class Unsized:
    """A source whose size is not known, such as a data set on the hub."""


def test_the_total_is_unknown_if_one_size_is():
    assert ReadingProgress([Unsized()], [Unit(0, 0)]).total is None


@pytest.mark.parametrize(("limit", "expected"), [(None, 0.25), (10, 0.8), (8, 1.0), (4, 1.0)])
def test_the_bar_is_at_the_larger_of_bytes_and_limit(monkeypatch, limit, expected):
    updates = []
    monkeypatch.setattr(Progress, "update", lambda bar, task, **values: updates.append(values))
    reading = SimpleNamespace(total=100.0, done=lambda place: 25.0)
    with progress_bar(reading, limit) as show:
        show(SimpleNamespace(counts={"findings": 8}), None)
    assert updates == [{"completed": expected, "text": "8 findings"}]
