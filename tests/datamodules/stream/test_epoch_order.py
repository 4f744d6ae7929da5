"""Order of an epoch, and walks from every place in it."""

from collections import Counter

import pytest

from datamodules.sources import open_source
from datamodules.stream.epoch_order import WHOLE, Place, Unit, epoch_order, walk
from tests.helpers.findings_data import write_archive, write_folder


def test_members_are_permuted_in_each_epoch_and_an_archive_is_first_read_in_file_order(tmp_path):
    sources = [
        open_source(str(write_folder(tmp_path / "folder", [1] * 12))),
        open_source(str(write_archive(tmp_path / "findings.tar.gz", [1] * 7))),
    ]
    first = epoch_order(sources, epoch=0, seed=0)
    assert sorted(first) == [*(Unit(0, member) for member in range(12)), Unit(1, WHOLE)]
    assert Counter(unit.source for unit in first) == {0: 12, 1: 1}
    assert first == epoch_order(sources, epoch=0, seed=0) != epoch_order(sources, epoch=0, seed=1)
    list(sources[1].raw_documents())
    second, third = (epoch_order(sources, epoch=epoch, seed=0) for epoch in (1, 2))
    assert Counter(unit.source for unit in second) == {0: 12, 1: 7}
    assert sorted(second) == sorted(third)
    assert second != third
    assert [unit.member for unit in second if unit.source == 1] != list(range(7))


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("archive", [False, True])
def test_a_walk_from_any_place_yields_the_remaining_documents(tmp_path, archive, epoch):
    sizes = [3, 1, 2, 5]
    path = write_archive(tmp_path / "a.tar.gz", sizes) if archive else write_folder(tmp_path / "f", sizes)
    sources = [open_source(str(path)), open_source(str(write_folder(tmp_path / "more", [1, 1], start=50)))]
    order = epoch_order(sources, epoch=epoch, seed=5)
    whole = [(place, raw.member) for place, _, raw in walk(sources, order)]
    assert len(whole) == 6
    for index, (place, _) in enumerate(whole):
        assert [(p, raw.member) for p, _, raw in walk(sources, order, place)] == whole[index:]
    assert list(walk(sources, order, Place(len(order), 0, 0))) == []


def test_units_with_known_documents_are_not_read(tmp_path):
    source = open_source(str(write_folder(tmp_path / "shards", [2, 3])))
    order = [Unit(0, 1), Unit(0, 0)]
    known = {Unit(0, 1): [(1, 0), (1, 7), (1, 9)]}  # positions that reading would not give
    walked = list(walk([source], order, None, known.get))
    assert [(place, unit) for place, unit, raw in walked if raw is None] == [
        (Place(0, 1, 0), Unit(0, 1)), (Place(0, 1, 7), Unit(0, 1)), (Place(0, 1, 9), Unit(0, 1)),
    ]  # fmt: skip
    assert [unit for _, unit, raw in walked if raw is not None] == [Unit(0, 0)]
    resumed = [place for place, _, _ in walk([source], order, Place(0, 1, 7), known.get)]
    assert resumed == [Place(0, 1, 7), Place(0, 1, 9), Place(1, 0, 0)]
