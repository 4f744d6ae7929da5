"""The FSDP2 backend in one process, on a mesh of one rank; test_fsdp2.py runs it on two."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from datamodules.errors import UserError
from lightning_modules import Backbone, LoRA
from lightning_modules.models.backend import is_sharded
from lightning_modules.strategies import FSDP2Backend
from lightning_modules.strategies.fsdp2_backend import gather, shard_like

IDS = torch.arange(40, 50)[None]


@pytest.fixture(scope="module")
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def backend(mesh):
    return FSDP2Backend(mesh, torch.device("cpu"))


@pytest.fixture(scope="module")
def model(backend, tiny_llama):
    return backend.build(Backbone(str(tiny_llama), lora=LoRA(rank=2)), torch.device("cpu"))


def test_layers_are_sharded_and_filled_with_the_weights_of_the_base(model, tiny_llama):
    torch.manual_seed(0)
    expected = dict(Backbone(str(tiny_llama), lora=LoRA(rank=2)).build().named_parameters())
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) == is_sharded(parameter) == (".layers." in name)
        if "lora_A" not in name:  # drawn at random
            assert torch.equal(gather(parameter.detach()), expected[name])


def test_host_copies_are_full_tensors(backend, model):
    host = backend.to_host(dict(model.named_parameters()))
    assert not any(is_sharded(tensor) for tensor in host.values())
    assert host["base_model.model.lm_head.weight"].shape == model.get_output_embeddings().weight.shape


def test_norm_and_shards_of_sharded_gradients(backend, mesh):
    full = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    sharded = distribute_tensor(full, mesh, [Shard(0)])
    assert backend.total_norm([sharded, torch.tensor([12.0])]) == 13
    backend.local_shards([sharded])[0].mul_(2)
    assert torch.equal(gather(sharded), 2 * full)


def test_tensors_are_sharded_like_others_of_their_shape(mesh):
    like = distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)])
    tensor = torch.arange(8.0).view(4, 2)
    sharded = shard_like(tensor, like)
    assert isinstance(sharded, DTensor) and sharded.placements == like.placements
    assert torch.equal(gather(sharded), tensor)
    scalar = torch.tensor(3.0)  # such as an optimizer's step
    assert shard_like(scalar, like) is scalar
    assert shard_like(tensor, torch.zeros(4, 2)) is tensor
    assert gather(tensor) is tensor


def test_calls_within_the_uneven_context_are_counted_and_the_hook_is_removed(backend, model):
    decoder = model.get_base_model().model
    hooks = len(decoder._forward_pre_hooks)
    with backend.uneven_forward_context(model), torch.no_grad():
        assert len(decoder._forward_pre_hooks) == hooks + 1
        assert model.eval()(IDS).logits.isfinite().all()
    assert len(decoder._forward_pre_hooks) == hooks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": None}, r"lora null.*it shards a frozen base"),
        ({"activation_checkpointing": "selective"}, r"activation_checkpointing=selective.*to full"),
        ({"lora": LoRA(target_modules=("q_proj", "lm_head"))}, r"target_modules: .*lm_head.* is outside"),
        ({"model_name_or_path": "./no/such/folder"}, "no such folder"),
    ],
)
def test_settings_that_sharded_weights_do_not_support_are_refused(backend, tiny_llama, settings, message):
    settings = {"model_name_or_path": str(tiny_llama), "lora": LoRA(rank=2)} | settings
    with pytest.raises(UserError, match=message):
        backend.build(Backbone(**settings), torch.device("cpu"))


def test_a_teacher_is_refused(backend):
    backend.check("none")
    with pytest.raises(UserError, match=r"objective\.teacher.*can't read sharded weights.*cache-teacher"):
        backend.check("none", teacher=True)
