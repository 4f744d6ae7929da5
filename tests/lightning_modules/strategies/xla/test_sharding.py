"""What needs no device: layouts, and words for those who lack one. Runs without torch_xla, and with it."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface

from datamodules.batch import Batch
from datamodules.errors import UserError
from lightning_modules import Backbone, CausalLMModule, CompletionCrossEntropy, LoRA
from lightning_modules.models.attention_masks import register_attention
from lightning_modules.models.backend import DEFAULT_BACKEND, backend_of
from lightning_modules.strategies import PJRTAccelerator, TruePrecision, XLABackend, XLASPMDStrategy
from lightning_modules.strategies.xla.sharding import row_spec, weight_spec
from lightning_modules.strategies.xla.tracing import place_arguments
from main import main


@pytest.mark.parametrize(
    ("shape", "devices", "expected"),
    [
        ((14336, 4096), 8, ("fsdp", None)),
        ((4096, 14336), 8, (None, "fsdp")),
        ((4096, 4096), 8, ("fsdp", None)),
        ((262, 64), 4, (None, "fsdp")),  # the larger one can't be divided
        ((4096,), 8, ("fsdp",)),
        ((3, 5), 8, (None, None)),
        ((), 8, ()),
        ((0, 8), 8, (None, "fsdp")),
    ],
)
def test_the_largest_dimension_that_can_be_is_divided(shape, devices, expected):
    assert weight_spec(shape, devices) == expected


def test_rows_are_divided_over_all_devices():
    assert row_spec(2) == (("data", "fsdp"), None)


def backend(devices):
    return XLABackend(SimpleNamespace(devices=devices), torch.device("cpu"))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pieces_are_cut_within_each_devices_rows_and_joined_again(size):
    tensor = torch.arange(4 * 6 * 2).view(24, 2)  # 4 devices with 6 positions each
    pieces = backend(4).split(tensor, size)
    assert torch.equal(backend(4).join(pieces), tensor)
    first = torch.stack([tensor[device * 6 : device * 6 + min(size, 6)] for device in range(4)]).flatten(0, 1)
    assert torch.equal(pieces[0], first)


@pytest.mark.parametrize("frozen", [True, False])
def test_an_objective_has_the_same_loss_and_gradients_over_such_pieces(frozen):
    from lightning_modules.models.decoder import Predictions

    head, hidden = torch.nn.Linear(8, 11).double(), torch.randn(24, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (24,)).masked_fill_(torch.rand(24) < 0.3, -100)
    results = []
    for chosen in (DEFAULT_BACKEND, backend(4)):
        chosen.checkpoint = DEFAULT_BACKEND.checkpoint  # XLA's own needs its devices
        sums = CompletionCrossEntropy(chunk_size=4)(Predictions(hidden, head, frozen, chosen), labels)
        results.append((*sums.values(), *torch.autograd.grad(sums["loss"], hidden)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_without_such_a_strategy_the_backend_is_pytorch():
    assert backend_of(None) is DEFAULT_BACKEND
    assert backend_of(SimpleNamespace(strategy=object())) is DEFAULT_BACKEND


def test_precision_is_the_type_that_it_says():
    model = TruePrecision("bf16-true").convert_module(torch.nn.Linear(2, 2))
    assert model.weight.dtype == torch.bfloat16
    with TruePrecision("bf16-true").tensor_init_context():
        assert torch.zeros(1).dtype == torch.bfloat16
    assert torch.zeros(1).dtype == torch.float32
    module = CausalLMModule(
        Backbone("nowhere", dtype="bfloat16", lora=LoRA()), CompletionCrossEntropy(), torch.optim.AdamW
    )
    module.model = torch.nn.Linear(2, 2)  # an adapter in float32 stays so
    assert TruePrecision("bf16-true").convert_module(module).model.weight.dtype == torch.float32


def test_arguments_get_the_places_that_the_graph_notes():
    graph = (
        "module @m attributes {a = 1} {\n"
        '  func.func @main(%arg0: tensor<4x2xbf16>, %arg1: tensor<8xf32> {mhlo.sharding = "{x}"}) -> tensor<f32> {\n'
        '    %0 = stablehlo.custom_call @Sharding(%arg0) {backend_config = "", mhlo.sharding = "{y}"} : whatever\n'
        "  }\n}\n"
    )
    placed = place_arguments(graph)
    assert '%arg0: tensor<4x2xbf16> {mhlo.sharding = "{y}"}, %arg1: tensor<8xf32> {mhlo.sharding = "{x}"})' in placed
    assert placed.count("{y}") == 2


@pytest.mark.skipif(find_spec("torch_xla") is not None, reason="here it is installed")
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


def test_constructors_open_nothing_and_refuse_what_cannot_be():
    strategy = XLASPMDStrategy(data_parallel_size=2)
    assert strategy.sharding is None and strategy.root_device == torch.device("xla", 0)
    with pytest.raises(UserError, match=r"trainer.devices 8: one process"):
        PJRTAccelerator.parse_devices(8)
    with pytest.raises(ValueError, match="virtual_devices 0"):
        PJRTAccelerator("cpu", 0)
    with pytest.raises(UserError, match="bitsandbytes does not run on a TPU"):
        backend(8).check("nf4")


def test_rows_that_cannot_be_served_there_are_refused():
    tensors = torch.zeros(4, 4, 8, dtype=torch.int64).unbind()
    strategy, flash = XLASPMDStrategy(), SimpleNamespace(backbone=SimpleNamespace(attn_implementation="pallas"))
    cached = Batch(*tensors, extras={"teacher_ids": torch.zeros(256, 32)})
    with pytest.raises(UserError, match="a cached teacher's targets are not divided over XLA devices; set it to null"):
        strategy.batch_to_device(cached)
    strategy._lightning_module = flash
    with pytest.raises(UserError, match="it knows no shared prefix"):
        strategy._check(Batch(*tensors))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_flash_kernel_is_refused_where_there_is_no_tpu(dropout):
    register_attention("pallas")
    attend = AttentionInterface()["pallas"]
    heads, mask = torch.zeros(1, 2, 8, 4), torch.zeros(1, 1, 2, 8, dtype=torch.int64)
    with pytest.raises(UserError, match="no attention dropout" if dropout else "needs a TPU"):
        attend(None, heads, heads, heads, mask, dropout=dropout)
