"""The option --device."""

import pytest
import torch

from commands.device import pick_device
from datamodules.errors import UserError


@pytest.mark.parametrize(("gpu", "kind"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_the_gpu_if_there_is_one(monkeypatch, gpu, kind):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    assert pick_device("auto").type == kind


def test_a_device_has_its_own_name():
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["abacus", "cuda:77"])
def test_a_device_that_does_not_exist_is_an_error(name):
    with pytest.raises(UserError, match=rf"^--device {name}: .*Fix: give auto, cpu or cuda\.$") as caught:
        pick_device(name)
    assert "\n" not in str(caught.value)
