"""The data module inside Lightning: exact resume, hooks, and construction."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from datamodules import FindingsDataModule
from datamodules.errors import UserError
from tests.helpers.findings_data import row_ids, write_archive, write_folder

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:Consider setting `persistent")


class Tiny(LightningModule):
    """A bigram model that records the ids of its training batches."""

    def __init__(self, die_at=None, estimated=False):
        super().__init__()
        self.table = torch.nn.Embedding(262, 262)
        torch.nn.init.zeros_(self.table.weight)
        self.die_at, self.estimated, self.trained = die_at, estimated, []

    def training_step(self, batch, batch_idx):
        if len(self.trained) == self.die_at:
            raise KeyError("killed")
        self.trained.append(row_ids(batch))
        loss = torch.nn.functional.cross_entropy(
            self.table(batch.input_ids_BT).flatten(0, 1), batch.labels_BT.flatten(), reduction="sum"
        )
        return loss / batch.supervised

    def validation_step(self, batch, batch_idx):
        self.log("val", float(batch.supervised), batch_size=1)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        steps = self.trainer.estimated_stepping_batches if self.estimated else 60
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(module, data, folder, ckpt_path=None, every=3, **options):
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    options = {"max_steps": 24, "max_epochs": -1, "limit_val_batches": 0} | options
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


CASES = [
    {},
    {"estimated": True},
    {"accumulate_grad_batches": 3},
    {"limit_val_batches": 2, "val_check_interval": 4, "check_val_every_n_epoch": None},
    {"limit_val_batches": 2, "num_sanity_val_steps": 1},  # at each epoch's end
    {"limit_train_batches": 7},
    {"precision": "bf16-true"},
    {"archive": True},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: ",".join(map(str, case)) or "plain")
def test_killed_twice_and_resumed_equals_uninterrupted(make_data, tmp_path, case):
    case = dict(case)
    estimated = case.pop("estimated", False)
    options = {"batch_size": 4}  # 17 steps an epoch
    if case.pop("archive", False):
        options["sources"] = [str(write_archive(tmp_path / "findings.tar.gz", [30, 20, 1, 40, 9]))]
    whole, data = Tiny(estimated=estimated), make_data(**options)
    fit(whole, data, tmp_path / "whole", **case)
    # the last step of an epoch has the two remaining batches of 17
    assert len(whole.trained) == (4 * 17 if "accumulate_grad_batches" in case else 24)

    trained, checkpoint, weights = [], None, None
    for attempt, (die_after, workers) in enumerate([(11, 0), (10, 2), (None, 1)]):
        module, resumed = Tiny(die_after, estimated), make_data(**options, num_workers=workers)
        folder = tmp_path / str(attempt)
        if die_after:
            with pytest.raises(KeyError, match="killed"):
                fit(module, resumed, folder, checkpoint, **case)
            checkpoint = max(folder.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
            loaded = torch.load(checkpoint, weights_only=True)
            done = loaded["FindingsDataModule"]["batches"]
            assert done == loaded["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
            trained = (trained + module.trained)[:done]
        else:
            fit(module, resumed, folder, checkpoint, **case)
            trained += module.trained
            weights = module.table.weight
    assert trained == whole.trained
    assert torch.equal(weights, whole.table.weight)
    assert resumed.state_dict()["digest"] == data.state_dict()["digest"]
    assert resumed.state_dict()["epoch"] == data.state_dict()["epoch"] == len(whole.trained) // 17


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [16, 17, 18, 34])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_checkpoint_at_the_end_of_an_epoch_resumes_exactly(make_data, tmp_path, step, accumulate):
    options = {"batch_size": 4}
    case = {"max_steps": -1, "max_epochs": 3, "accumulate_grad_batches": accumulate, "every": 1}
    whole = Tiny()
    fit(whole, make_data(**options), tmp_path / "whole", **case)
    assert len(whole.trained) == 3 * 17
    optimizer_step = -(-step // accumulate) if accumulate == 1 else {16: 4, 17: 5, 18: 6, 34: 10}[step]
    checkpoint = tmp_path / "whole" / f"step={optimizer_step}.ckpt"
    module, data = Tiny(), make_data(**options)
    fit(module, data, tmp_path / "resumed", checkpoint, **case)
    done = torch.load(checkpoint, weights_only=True)["FindingsDataModule"]["batches"]
    assert module.trained == whole.trained[done:]
    assert torch.equal(module.table.weight, whole.table.weight)


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_was_interrupted_is_not_consumed(make_data, tmp_path):
    module, data = Tiny(die_at=5), make_data(batch_size=4)
    with pytest.raises(KeyError):
        fit(module, data, tmp_path)
    assert data.state_dict()["batches"] == 5


@pytest.mark.filterwarnings("ignore")
def test_a_new_fit_begins_at_the_first_example(make_data, tmp_path):
    data, runs = make_data(batch_size=4), []
    for run in range(2):
        module = Tiny()
        fit(module, data, tmp_path / str(run), max_steps=5)
        runs.append(module.trained)
    assert runs[0] == runs[1]


def test_the_end_of_a_fit_prints_the_counters(make_data, tmp_path, monkeypatch):
    printed = []
    monkeypatch.setattr("datamodules.findings.rank_zero_info", printed.append)
    module = make_data()
    fit(Tiny(), module, tmp_path, max_steps=3)
    assert len(printed) == 1
    assert f"records {module.counts['records']}; " in printed[0]
    assert "examples risk" in printed[0]


def test_construction_reads_nothing(tmp_path):
    module = FindingsDataModule([str(tmp_path / "absent")], str(tmp_path / "no-tokenizer"))
    with pytest.raises(UserError, match="absent"):
        module.setup("fit")


@pytest.fixture
def stopped(make_data, tmp_path):
    """Trains five steps and saves a checkpoint; returns it."""
    trainer = fit(Tiny(), make_data(), tmp_path / "first", max_steps=5)
    trainer.save_checkpoint(tmp_path / "five.ckpt")
    return tmp_path / "five.ckpt"


@pytest.mark.parametrize(("name", "value"), [("seed", 3), ("val_fraction", 0.4), ("test_fraction", 0.3)])
def test_a_fit_is_not_resumed_with_other_held_out_data(make_data, tmp_path, stopped, name, value):
    saved = getattr(make_data(), name)
    message = rf"data\.init_args\.{name}={value}: the checkpoint was trained with {saved}; .* Fix: set it to {saved}"
    with pytest.raises(UserError, match=message):
        fit(Tiny(), make_data(**{name: value}), tmp_path / "second", stopped, max_steps=6)


def test_an_evaluation_with_another_split_is_a_warning(make_data, tmp_path, stopped):
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"resuming is not exact: val_fraction 0\.2 -> 0\.4"):
        trainer.validate(Tiny(), make_data(val_fraction=0.4), ckpt_path=stopped, weights_only=True)


def test_other_files_of_the_same_name_are_named_when_resuming(make_data, tmp_path, stopped):
    write_folder(tmp_path / "shards", [30, 20, 1, 40, 8])
    with pytest.warns(UserWarning, match=r"data\.init_args\.sources=.*: names, sizes or times of the files differ"):
        fit(Tiny(), make_data(), tmp_path / "second", stopped, max_steps=6)


def test_the_same_files_are_not_named(make_data, tmp_path, stopped, recwarn):
    fit(Tiny(), make_data(), tmp_path / "second", stopped, max_steps=6)
    assert not [warning for warning in recwarn if "sources" in str(warning.message)]


def test_a_position_beyond_the_data_is_refused(make_data, tmp_path):
    state = make_data(block_findings=4)
    for _, batch in zip(range(60), state.train_batches(), strict=False):
        state.mark_consumed(batch)
    saved = state.state_dict()
    assert saved["place"][0] > 0
    shorter = str(write_archive(tmp_path / "shorter.tar.gz", [1]))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    module = make_data(sources=[shorter], block_findings=4)
    module.trainer = trainer
    trainer.state.fn = TrainerFn.FITTING
    with pytest.raises(UserError, match=r"the checkpoint's position is beyond these data\. Fix: give the sources"):
        module.load_state_dict(saved)


def test_a_position_beyond_the_end_of_the_same_archive_is_refused(make_data, tmp_path):
    options = {"block_findings": 4, "val_fraction": 0.0, "test_fraction": 0.0}
    file = write_archive(tmp_path / "findings.tar.gz", [8] * 6)
    state = make_data(sources=[str(file)], **options)
    for _, batch in zip(range(40), state.train_batches(), strict=False):
        state.mark_consumed(batch)
    saved = state.state_dict()
    write_archive(tmp_path / "findings.tar.gz", [8])
    module = make_data(sources=[str(file)], **options)
    with pytest.warns(UserWarning, match="files differ"):
        module.load_state_dict(saved)
    with pytest.raises(UserError, match="position is beyond these data"):
        list(module.train_batches(None))


def test_a_checkpoint_without_a_position_in_the_data_is_named(make_data, tmp_path, stopped):
    checkpoint = torch.load(stopped, weights_only=True)
    del checkpoint["FindingsDataModule"]
    torch.save(checkpoint, stopped)
    module = Tiny()
    with pytest.warns(UserWarning, match=r"five\.ckpt: the checkpoint holds no position in the data; they are"):
        fit(module, make_data(), tmp_path / "second", stopped, max_steps=7)
    assert len(module.trained) == 2
