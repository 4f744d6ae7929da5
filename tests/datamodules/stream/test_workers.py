"""Reading processes: order, errors, and the state of random generators."""

import pytest
import torch

from datamodules.errors import UserError
from datamodules.stream.epoch_order import Place, epoch_order
from datamodules.stream.preprocessing import DocumentProcessor
from datamodules.stream.workers import DocumentStream, read_documents
from tests.helpers.findings_data import write_folder

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def processor(mistral_tokenizer_folder, tmp_path):
    sources = [str(write_folder(tmp_path / "shards", [3, 1, 4, 1, 5, 9, 2]))]
    return DocumentProcessor(
        sources=sources, tokenizer=mistral_tokenizer_folder, tasks=["risk"], val_fraction=0.2, test_fraction=0, seed=0
    )


def read(processor, workers, start=None, split="train"):
    order = epoch_order(processor.sources, epoch=0, seed=0)
    return list(read_documents(DocumentStream(processor, split, order, start, None), workers))


@pytest.mark.parametrize("workers", [1, 3])
def test_documents_arrive_in_order_for_every_number_of_workers(processor, workers):
    expected = read(processor, 0)
    got = read(processor, workers)
    assert [d.place for d in got] == [d.place for d in expected] == [Place(unit, d.place.member, 0) for unit, d in
                                                                     enumerate(expected)]  # fmt: skip
    assert [d.columns.keys.tolist() for d in got] == [d.columns.keys.tolist() for d in expected]
    assert sum(len(d.columns) for d in got) > 10


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_starts_at_a_place(processor, workers):
    expected = read(processor, 0)
    got = read(processor, workers, start=expected[4].place)
    assert [d.place for d in got] == [d.place for d in expected[4:]]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_user_error_of_a_worker_is_raised_as_it_is(processor, workers, monkeypatch):
    def fail(place, raw, split):
        raise UserError("data.init_args.sources=[x]: damaged. Fix: replace it")

    monkeypatch.setattr(processor, "prepare", fail)
    with pytest.raises(UserError, match=r"^data.init_args.sources=\[x\]: damaged. Fix: replace it$"):
        read(processor, workers)


def test_reading_does_not_change_torchs_random_state(processor):
    before = torch.get_rng_state()
    read(processor, 1)
    assert torch.equal(torch.get_rng_state(), before)
