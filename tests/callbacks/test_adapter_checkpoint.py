"""Tests of AdapterCheckpoint: last and best adapters, resume, failed writes and trial runs."""

import pytest
import torch

from callbacks import AdapterCheckpoint
from tests.helpers.tiny_run import TinyData, TinyModule, best_and_last, make_trainer


def weights(run, kind):
    return torch.load(run / "adapter" / kind / "adapter.pt", weights_only=True)


def checkpoint(run, kind):
    state = torch.load(run / "checkpoints" / f"{kind}.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("model."): value for name, value in state.items()}


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


class BestAtSecondValidation(TinyModule):
    """Logs a validation loss that is lowest at the second of four validations."""

    losses = (3.0, 1.0, 2.0, 4.0)
    validations = 0

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.now = self.losses[self.validations % 4]
            self.validations += 1
        self.log("val/loss", self.now, batch_size=2)


def test_adapters_equal_the_weights_of_the_checkpoints(tmp_path):
    trainer = make_trainer(tmp_path, [AdapterCheckpoint(), best_and_last()], val_check_interval=3)
    module = BestAtSecondValidation()
    trainer.fit(module, TinyData())
    run = tmp_path / "version_0"
    assert torch.load(run / "checkpoints/best.ckpt", weights_only=True)["global_step"] == 6
    assert_equal(weights(run, "best"), checkpoint(run, "best"))
    assert_equal(weights(run, "last"), dict(module.model.state_dict()))
    assert not torch.equal(weights(run, "best")["lm_head.bias"], weights(run, "last")["lm_head.bias"])
    for kind in ("best", "last"):
        assert {file.name for file in (run / "adapter" / kind).iterdir()} == {"adapter.pt", "tokenizer.json"}
    assert {folder.name for folder in (run / "adapter").iterdir()} == {"best", "last"}


def test_the_final_adapter_is_written_without_a_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, [AdapterCheckpoint()], enable_checkpointing=False)
    module = TinyModule()
    trainer.fit(module, TinyData())
    assert_equal(weights(tmp_path / "version_0", "last"), dict(module.model.state_dict()))
    assert not (tmp_path / "version_0/adapter/best").exists()


def test_a_resumed_run_keeps_the_better_adapter(tmp_path):
    trainer = make_trainer(tmp_path, [AdapterCheckpoint(), best_and_last()], val_check_interval=6)
    trainer.fit(BestAtSecondValidation(), TinyData())
    run = tmp_path / "version_0"
    before = weights(run, "best")
    trainer = make_trainer(tmp_path, [AdapterCheckpoint(), best_and_last()], val_check_interval=6, max_epochs=2)
    module = BestAtSecondValidation()
    module.validations = 2
    trainer.fit(module, TinyData(), ckpt_path="last", weights_only=True)
    assert trainer.global_step == 24
    assert_equal(weights(run, "best"), before)
    assert_equal(weights(run, "last"), dict(module.model.state_dict()))


def test_a_failed_write_keeps_the_previous_adapter(tmp_path):
    run = tmp_path / "version_0"
    make_trainer(tmp_path, [AdapterCheckpoint(), best_and_last()]).fit(TinyModule(), TinyData())
    before = weights(run, "last")

    class Broken(TinyModule):
        def save_adapter(self, path):
            (path / "adapter.pt").write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_trainer(tmp_path, [AdapterCheckpoint()], enable_checkpointing=False).fit(Broken(), TinyData())
    assert_equal(weights(run, "last"), before)


def test_a_data_module_without_chat_format_is_supported(tmp_path, monkeypatch):
    monkeypatch.delattr(TinyData, "chat")
    make_trainer(tmp_path, [AdapterCheckpoint()], enable_checkpointing=False).fit(TinyModule(), TinyData())
    assert [file.name for file in (tmp_path / "version_0/adapter/last").iterdir()] == ["adapter.pt"]


def test_a_trial_run_writes_nothing(tmp_path):
    trainer = make_trainer(tmp_path, [AdapterCheckpoint()], fast_dev_run=True, default_root_dir=tmp_path)
    trainer.fit(TinyModule(), TinyData())
    assert not list(tmp_path.rglob("adapter*"))
