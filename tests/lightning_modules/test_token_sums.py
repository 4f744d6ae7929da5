"""Sums over batches and their means."""

import torch

from lightning_modules.token_sums import RunningSums, token_means


def test_sums_add_up_without_their_graph_and_start_again_after_reduction():
    sums = RunningSums()
    weight = torch.ones((), requires_grad=True)
    sums.add({"loss": 2 * weight, "count": torch.tensor(3.0)})
    sums.add({"loss": 3 * weight, "count": torch.tensor(1.0)})
    assert not sums.values["loss"].requires_grad
    assert sums.reduce(world_size=1) == {"loss": 5, "count": 4}
    assert not sums.values
    sums.add({"loss": weight, "count": torch.tensor(1.0)})
    sums.clear()
    assert not sums.values


def test_means_are_over_tokens_and_no_token_gives_zero():
    totals = {"loss": torch.tensor(6.0), "correct": torch.tensor(3.0), "count": torch.tensor(4.0)}
    assert token_means(totals, "val") == {"val/loss": 1.5, "val/token_accuracy": 0.75}
    assert token_means({"loss": torch.tensor(0.0), "count": torch.tensor(0.0)}, "test") == {"test/loss": 0}
