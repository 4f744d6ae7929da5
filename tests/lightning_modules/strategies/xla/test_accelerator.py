"""The accelerator and the strategy without devices, and the errors for users who lack torch_xla or a TPU."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface

from datamodules.batch import Batch
from datamodules.errors import UserError
from lightning_modules.models.attention_masks import register_attention
from lightning_modules.strategies import PJRTAccelerator, XLASPMDStrategy
from lightning_modules.strategies.xla import accelerator
from main import main


@pytest.mark.skipif(find_spec("torch_xla") is not None, reason="torch_xla is installed")
@pytest.mark.parametrize("config", ["tpu", "tpu_smoke"])
def test_without_torch_xla_the_error_names_it_and_what_works(config, capsys, tmp_path):
    assert main(["fit", "--config", f"configs/{config}.yaml", f"--trainer.logger.init_args.save_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "torch_xla is not installed" in error and "configs/gpu.yaml" in error


@pytest.mark.skipif(find_spec("torch_xla") is None, reason="needs torch_xla")
@pytest.mark.tpu
def test_without_a_tpu_the_error_names_the_check_and_what_works(capsys, tmp_path):
    assert main(["fit", "--config", "configs/tpu.yaml", f"--trainer.logger.init_args.save_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "num_available_chips() finds none" in error and "configs/tpu_smoke.yaml" in error


def test_constructors_open_no_device_and_validate_their_arguments():
    strategy = XLASPMDStrategy(data_parallel_size=2)
    assert strategy.sharding is None and strategy.root_device == torch.device("xla", 0)
    with pytest.raises(UserError, match=r"trainer.devices 8: one process"):
        PJRTAccelerator.parse_devices(8)
    with pytest.raises(ValueError, match="virtual_devices 0"):
        PJRTAccelerator("cpu", 0)
    assert [PJRTAccelerator.parse_devices(devices) for devices in ("auto", -1, "1")] == [1, 1, 1]


def test_batches_that_xla_devices_do_not_support_are_refused():
    tensors = torch.zeros(4, 4, 8, dtype=torch.int64).unbind()
    strategy, flash = XLASPMDStrategy(), SimpleNamespace(backbone=SimpleNamespace(attn_implementation="pallas"))
    cached = Batch(*tensors, extras={"teacher_ids": torch.zeros(256, 32)})
    with pytest.raises(UserError, match="a cached teacher's targets can't be sharded over XLA devices; set it to null"):
        strategy.batch_to_device(cached)
    strategy._lightning_module = flash
    with pytest.raises(UserError, match="does not support a shared prefix"):
        strategy.check_batch(Batch(*tensors))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_flash_kernel_is_refused_without_a_tpu(dropout):
    register_attention("pallas")
    attend = AttentionInterface()["pallas"]
    heads, mask = torch.zeros(1, 2, 8, 4), torch.zeros(1, 1, 2, 8, dtype=torch.int64)
    with pytest.raises(UserError, match="no attention dropout" if dropout else "needs a TPU"):
        attend(None, heads, heads, heads, mask, dropout=dropout)


def test_a_machine_without_a_tpu_is_refused_with_the_fix(monkeypatch):
    monkeypatch.setattr(accelerator, "num_tpu_chips", lambda: 0)
    with pytest.raises(UserError, match=r"num_available_chips\(\) finds.*tpu_smoke\.yaml"):
        accelerator.check_tpu()
    monkeypatch.setattr(accelerator, "num_tpu_chips", lambda: 4)
    accelerator.check_tpu()
