"""Parameter groups and the length of the schedule in a training run; the normalisation of gradients."""

from functools import partial

import pytest
import torch

from datamodules.errors import UserError
from lightning_modules.models.backend import DEFAULT_BACKEND
from lightning_modules.optimization import normalize_gradients, parameter_groups
from optimizers import WarmupCosine
from tests.helpers.lm_training import fit, module_for, one_by_one


def test_matrices_decay_and_vectors_do_not(tiny_llama, tmp_path):
    module = module_for(tiny_llama, optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.3), use_dora=True)
    trainer = fit(module, one_by_one(), tmp_path)
    matrices, vectors = trainer.optimizers[0].param_groups
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    grouped = {id(p) for group in (matrices, vectors) for p in group["params"]}
    assert grouped == {id(p) for p in module.parameters() if p.requires_grad}


def test_the_schedule_has_the_steps_of_the_run(tiny_llama, tmp_path):
    schedule = partial(WarmupCosine, warmup_steps=2, min_lr_ratio=0.5)
    for options in ({"max_steps": 6}, {"max_steps": -1, "max_epochs": 3, "accumulate_grad_batches": 4}):
        module = module_for(tiny_llama, lr_scheduler=schedule)
        trainer = fit(module, one_by_one(), tmp_path, **options)
        assert trainer.global_step == 6
        reference = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        expected = schedule(reference, 6)
        for _ in range(6):
            reference.step()
            expected.step()
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(reference.param_groups[0]["lr"])


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield from one_by_one()


def test_a_schedule_for_a_run_without_an_end_is_refused(tiny_llama, tmp_path):
    module = module_for(tiny_llama, lr_scheduler=WarmupCosine)
    with pytest.raises(UserError, match=r"trainer.max_steps=-1.*Fix: set trainer.max_steps"):
        fit(module, Stream(), tmp_path, max_steps=-1, max_epochs=1)


def test_parameter_groups_leave_out_empty_groups():
    matrix, vector = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3))
    assert parameter_groups([matrix]) == [{"params": [matrix]}]
    assert parameter_groups([vector]) == [{"params": [vector], "weight_decay": 0.0}]


@pytest.mark.parametrize("clip", [None, 0.0, 0.01, 100.0])
def test_normalised_gradients_equal_torchs_clipping(clip):
    gradients = [torch.randn(5, 3), torch.randn(7)]
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient * 0.25
    expected_norm = torch.nn.utils.clip_grad_norm_(parameters, clip or float("inf"))
    norm = normalize_gradients(gradients, torch.tensor(0.25), DEFAULT_BACKEND, clip, "norm")
    torch.testing.assert_close(norm, expected_norm)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_clipping_by_value_follows_the_normalisation():
    gradients = [torch.tensor([-8.0, 0.4, 2.0])]
    norm = normalize_gradients(gradients, torch.tensor(0.5), DEFAULT_BACKEND, 0.7, "value")
    assert torch.equal(gradients[0], torch.tensor([-0.7, 0.2, 0.7]))
    assert norm == pytest.approx((16 + 0.04 + 1) ** 0.5)
