"""The fast path on a GPU, in bf16 over an NF4 base of Mistral-7B's widths, against PEFT over transformers in fp32."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from datamodules.batch import Batch
from lightning_modules import Backbone, CausalLMModule, CompletionCrossEntropy, LoRA

pytestmark = pytest.mark.gpu
CONFIG = json.loads((Path(__file__).parents[2] / "benchmarks/mistral-7b/config.json").read_text())
LAYERS, PREFIX, LENGTHS = 4, 29, (180, 95, 261, 64)


@pytest.fixture(scope="module")
def examples():
    """Token ids of examples that begin with the same prefix, and how long their prompts are."""
    generator = torch.Generator().manual_seed(3)
    prefix = torch.randint(5, 32768, (PREFIX,), generator=generator)
    ids = [torch.cat([prefix, torch.randint(5, 32768, (n,), generator=generator)]) for n in LENGTHS]
    return [(example, len(example) * 2 // 3) for example in ids]


def labelled(ids, prompt):
    labels = torch.full_like(ids, -100)
    labels[prompt - 1 : -1] = ids[prompt:]
    return labels


def one_by_one(examples):
    for ids, prompt in examples:
        rows = [t[None] for t in (ids, torch.arange(len(ids)), labelled(ids, prompt), torch.ones_like(ids))]
        yield Batch(*rows, supervised=len(ids) - prompt)


def one_row(examples, shared):
    """All examples in one row, behind their prefix or each with its own."""
    cut, parts = PREFIX if shared else 0, []
    if shared:
        head = examples[0][0][:PREFIX]
        parts.append((head, torch.arange(PREFIX), torch.full_like(head, -100), torch.zeros_like(head)))
    for number, (ids, prompt) in enumerate(examples, 1):
        columns = (ids, torch.arange(len(ids)), labelled(ids, prompt), torch.full_like(ids, number))
        parts.append(tuple(column[cut:] for column in columns))
    return [Batch(*(torch.cat(column)[None] for column in zip(*parts, strict=True)))]


def built(folder, **options):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": LAYERS}))
    backbone = Backbone(f"random:{folder}", "nf4", "bfloat16", lora=LoRA(64, 128), **options)
    module = CausalLMModule(backbone, CompletionCrossEntropy(), partial(torch.optim.AdamW, lr=1e-4))
    torch.manual_seed(4)  # of the adapter's A
    with torch.device("cuda"):
        module.configure_model()
    module.to("cuda").train()
    torch.manual_seed(5)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)  # zeros at the start would leave A without a gradient
    return module


def exact_twin(folder):
    """The same model in fp32: NF4's numbers as plain weights, transformers' modules, PEFT's adapters."""
    from bitsandbytes.functional import dequantize_4bit

    module = built(folder, kernels="plain")
    for layer in [m for m in module.modules() if hasattr(m, "base_layer")]:
        base = layer.base_layer
        dense = nn.Linear(base.in_features, base.out_features, bias=False, device="cuda")
        dense.weight = nn.Parameter(dequantize_4bit(base.weight.data, base.weight.quant_state).float(), False)
        layer.base_layer = dense
    module.model.float()
    return module


def run(module, batches):
    """Mean loss and every adapter's gradient."""
    module.zero_grad()
    sums = [module._step(module.transfer_batch_to_device(batch, torch.device("cuda"), 0)) for batch in batches]
    loss = sum(s["loss"] for s in sums) / sum(s["count"] for s in sums)
    loss.backward()
    return float(loss), {n: p.grad.double().flatten() for n, p in module.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def exact(tmp_path_factory, examples):
    loss, grads = run(exact_twin(tmp_path_factory.mktemp("exact")), one_by_one(examples))
    torch.cuda.empty_cache()
    return loss, grads


@pytest.mark.parametrize("memory", ["full", "balanced", "low"])
@pytest.mark.parametrize("layout", ["one by one", "packed", "behind a shared prefix"])
def test_loss_and_gradients_equal_the_exact_ones(layout, memory, examples, exact, tmp_path):
    module = built(tmp_path, kernels="fast", activation_memory=memory)
    batches = one_by_one(examples) if layout == "one by one" else one_row(examples, layout != "packed")
    loss, grads = run(module, batches)
    expected_loss, expected = exact
    assert abs(loss - expected_loss) <= 0.003 * expected_loss
    assert grads.keys() == expected.keys()
    cosines = {name: float(torch.cosine_similarity(grad, expected[name], 0)) for name, grad in grads.items()}
    worst = min(cosines, key=cosines.get)
    print(f"{layout}, {memory}: loss {loss:.5f} of {expected_loss:.5f}, lowest cosine {cosines[worst]:.5f} ({worst})")
    assert cosines[worst] >= 0.999


def test_fp8_is_near(examples, exact, tmp_path):
    loss, grads = run(built(tmp_path, kernels="fast", fp8=True), one_row(examples, True))
    cosines = [float(torch.cosine_similarity(grad, exact[1][name], 0)) for name, grad in grads.items()]
    mean = sum(cosines) / len(cosines)
    print(f"FP8: loss {loss:.5f} of {exact[0]:.5f}, cosines from {min(cosines):.4f}, mean {mean:.4f}")
    assert abs(loss - exact[0]) <= 0.01 * exact[0]
    assert min(cosines) >= 0.95
