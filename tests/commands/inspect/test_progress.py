"""The progress of reading: monotonic, and complete at the end."""

import pytest

from commands.inspect.progress import ReadingProgress
from datamodules.findings import FindingsDataModule
from datamodules.statistics.scan import scan_dataset
from datamodules.stream.epoch_order import epoch_order
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
