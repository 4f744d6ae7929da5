"""Tests of the lookup of the best checkpoint and of the temporary use of its weights."""

import pytest
import torch

from callbacks.best_checkpoint import best_weights, find_best_checkpoint
from tests.helpers.tiny_run import TinyData, TinyModule, best_and_last, make_trainer


class IncreasingLoss(TinyModule):
    """Logs a validation loss that increases, so that the first checkpoint is the best."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", float(self.global_step), batch_size=2)


def fit(folder, module, **options):
    trainer = make_trainer(folder, [best_and_last()], **options)
    trainer.fit(module, TinyData())
    return trainer


def parameters(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_best_weights_are_loaded_inside_the_block_only(tmp_path):
    module = IncreasingLoss()
    trainer = fit(tmp_path, module, val_check_interval=4)
    best = find_best_checkpoint(trainer)
    assert (best.path.name, best.score) == ("best.ckpt", 4.0)
    last, stored = parameters(module), torch.load(best.path, weights_only=True)["state_dict"]
    with best_weights(trainer, module) as about:
        assert about == {"step": 4, "checkpoint": "best.ckpt"}
        assert_equal(parameters(module), stored)
    assert_equal(parameters(module), last)
    assert not torch.equal(last["model.lm_head.bias"], stored["model.lm_head.bias"])


def test_the_last_weights_are_restored_after_an_error(tmp_path):
    module = IncreasingLoss()
    trainer = fit(tmp_path, module, val_check_interval=4)
    last = parameters(module)
    with pytest.raises(RuntimeError, match="broken"), best_weights(trainer, module):
        raise RuntimeError("broken")
    assert_equal(parameters(module), last)


def test_the_last_weights_are_used_if_they_are_the_best(tmp_path):
    module = TinyModule()
    trainer = fit(tmp_path, module)
    with best_weights(trainer, module) as about:
        assert about == {"step": 12, "checkpoint": "best.ckpt"}


def test_the_last_weights_are_used_without_a_best_checkpoint(tmp_path):
    module = IncreasingLoss()
    trainer = fit(tmp_path / "no_validation", module, limit_val_batches=0)
    assert find_best_checkpoint(trainer) is None
    with best_weights(trainer, module) as about:
        assert about == {"step": 12}
    trainer = fit(tmp_path / "removed", IncreasingLoss(), val_check_interval=4)
    find_best_checkpoint(trainer).path.unlink()
    with best_weights(trainer, module) as about:
        assert about == {"step": 12}
