"""The training step through a real Trainer on a tiny model: normalisation, packing, clipping, evaluation, ranks."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from datamodules.batch import IGNORE_INDEX
from datamodules.errors import UserError
from lightning_modules import Backbone, CausalLMModule, CompletionCrossEntropy, Distillation, LoRA
from tests.helpers.lm_training import (
    SGD,
    Data,
    assert_same,
    batch,
    examples,
    fit,
    join_ranks,
    loader_of,
    module_for,
    one_by_one,
    quiet_trainer,
    row,
    run_two_ranks,
    trained,
)  # fmt: skip


def reference(folder, sequences, objective=None):
    """Computes one step of SGD with the forward pass of transformers, one example at a time, and one mean."""
    module = module_for(folder)
    total, count = 0, 0
    for sequence, prompt in sequences:
        logits = module.model(sequence[None]).logits[0]
        total = total + cross_entropy(logits[prompt - 1 : -1], sequence[prompt:], reduction="sum")
        count += len(sequence) - prompt
    loss = total / count
    loss.backward()
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    return {n: p.detach() - 0.1 * p.grad for n, p in module.named_parameters() if p.requires_grad}, loss.detach(), norm


def test_1_x_8_equals_8_x_1_with_uneven_completions(tiny_llama, tmp_path):
    expected, loss, norm = reference(tiny_llama, examples())
    together = module_for(tiny_llama)
    trainer = fit(together, [batch([row([example], 24) for example in examples()])], tmp_path)
    assert_same(trained(together), expected)
    assert torch.isclose(trainer.callback_metrics["train/loss"], loss)
    assert torch.isclose(trainer.callback_metrics["train/grad_norm"], norm)
    apart = module_for(tiny_llama)
    trainer = fit(apart, one_by_one(), tmp_path, accumulate_grad_batches=8)
    assert trainer.global_step == 1
    assert_same(trained(apart), expected)
    assert torch.isclose(trainer.callback_metrics["train/loss"], loss)
    assert torch.isclose(trainer.callback_metrics["train/grad_norm"], norm)


def test_a_shorter_last_accumulation_is_divided_by_its_own_tokens(tiny_llama, tmp_path):
    """Lightning divides by accumulate_grad_batches in that case too."""
    expected, loss, _ = reference(tiny_llama, examples()[:3])
    module = module_for(tiny_llama)
    trainer = fit(module, one_by_one()[:3], tmp_path, accumulate_grad_batches=8, max_steps=-1, max_epochs=1)
    assert trainer.global_step == 1
    assert_same(trained(module), expected)
    assert torch.isclose(trainer.callback_metrics["train/loss"], loss)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mistral"])
@pytest.mark.parametrize("shared_prefix", [False, True])
def test_packed_equals_one_by_one(request, tmp_path, model, shared_prefix, attention):
    folder = request.getfixturevalue(model)
    expected, _, _ = reference(folder, examples())
    halves = examples()[:5], examples()[5:]
    module = module_for(folder)
    module.model.get_base_model().set_attn_implementation(attention)
    fit(module, [batch([row(half, 64, shared_prefix) for half in halves])], tmp_path)
    assert_same(trained(module), expected)


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_clipping_by_norm_equals_torch(tiny_llama, tmp_path, clip):
    module = module_for(tiny_llama)
    before = trained(module)
    expected, _, norm = reference(tiny_llama, examples())
    fit(module, one_by_one(), tmp_path, accumulate_grad_batches=8, gradient_clip_val=clip)
    factor = min(1.0, clip / (float(norm) + 1e-6))
    clipped = {name: before[name] + (expected[name] - before[name]) * factor for name in before}
    assert_same(trained(module), clipped, atol=1e-6)
    assert torch.isclose(module.step_metrics["train/grad_norm"], norm), "logged before clipping"


def test_clipping_by_value(tiny_llama, tmp_path):
    module = module_for(tiny_llama)
    before = trained(module)
    expected, _, _ = reference(tiny_llama, examples())
    options = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    fit(module, one_by_one(), tmp_path, accumulate_grad_batches=8, **options)
    clipped = {n: before[n] + (expected[n] - before[n]).clamp(-0.001, 0.001) for n in before}
    assert_same(trained(module), clipped)
    assert any((expected[n] - before[n]).abs().max() > 0.001 for n in before), "something was clipped"


def test_rows_of_padding_only_change_nothing(tiny_llama, tmp_path):
    expected, _, _ = reference(tiny_llama, examples()[:2])
    padding = ([0] * 24, [0] * 24, [IGNORE_INDEX] * 24, [-1] * 24)
    module = module_for(tiny_llama)
    fit(module, [batch([row([e], 24) for e in examples()[:2]] + [padding])], tmp_path)
    assert_same(trained(module), expected)


# ---------------------------------------------------------------------- validation


def test_validation_is_a_mean_over_tokens_not_over_batches(tiny_llama, tmp_path):
    module = module_for(tiny_llama)
    _, loss, _ = reference(tiny_llama, examples())
    trainer = quiet_trainer(tmp_path, enable_checkpointing=False)
    results = trainer.validate(module, Data(), verbose=False)[0] | trainer.test(module, Data(), verbose=False)[0]
    assert results["val/loss"] == pytest.approx(float(loss), abs=1e-6)
    assert results["test/loss"] == results["val/loss"]
    right = total = 0
    for sequence, prompt in examples():
        predicted = module.model(sequence[None]).logits[0].argmax(-1)
        right += int((predicted[prompt - 1 : -1] == sequence[prompt:]).sum())
        total += len(sequence) - prompt
    assert results["val/token_accuracy"] == pytest.approx(right / total)


def test_zero_sums_have_the_names_of_the_sums_of_a_batch(tiny_llama):
    for objective in (CompletionCrossEntropy(), Distillation(), Distillation(alpha=0.0)):
        module = module_for(tiny_llama, objective)
        zeros, sums = module.zero_sums(), module.compute_sums(one_by_one()[0])
        assert list(zeros) == list(sums)
        assert all(value == 0 for value in zeros.values())


# ---------------------------------------------------------------------- several ranks


class Ranked(Data):
    """Each rank has different rows; the second rank has no validation rows."""

    def train_dataloader(self):
        rank = self.trainer.global_rank
        return loader_of(self.batches[rank::2])

    def val_dataloader(self):
        rows = self.batches if self.trainer.global_rank == 0 else []
        return torch.utils.data.DataLoader(Rows(rows), batch_size=None)


class Rows(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def run_rank(rank, port, folder, tmp_path):
    """Trains in one of two processes."""
    join_ranks(rank, port)
    results = []
    for alpha in (0.0, 0.5):
        module = module_for(folder, Distillation(alpha=alpha, chunk_size=5))
        trainer = quiet_trainer(
            tmp_path, devices=2, strategy="ddp", max_steps=1, accumulate_grad_batches=4, use_distributed_sampler=False,
            enable_checkpointing=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(module, Ranked())
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        results.append({"weights": trained(module), "metrics": metrics})
    torch.save(results, tmp_path / f"{rank}.pt")


def test_two_ranks_equal_one(tiny_llama, tmp_path):
    run_two_ranks(run_rank, tiny_llama, tmp_path)
    expected, loss, norm = reference(tiny_llama, examples())
    one = module_for(tiny_llama)
    fit(one, one_by_one(), tmp_path, accumulate_grad_batches=8)
    after = quiet_trainer(tmp_path, enable_checkpointing=False).validate(one, Data(), verbose=False)[0]
    taught = module_for(tiny_llama, Distillation(chunk_size=5))
    teaching = fit(taught, one_by_one(), tmp_path, accumulate_grad_batches=8).callback_metrics
    for rank in range(2):
        result, distilled = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert_same(distilled["weights"], trained(taught))
        assert distilled["metrics"]["train/kl"] == pytest.approx(float(teaching["train/kl"]), abs=1e-6)
        assert_same(result["weights"], expected)
        assert result["metrics"]["train/loss"] == pytest.approx(float(loss), abs=1e-6)
        assert result["metrics"]["train/grad_norm"] == pytest.approx(float(norm), abs=1e-5)
        assert result["metrics"]["val/loss"] == pytest.approx(after["val/loss"], abs=1e-6)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_loads_its_4_bit_base_on_its_own_gpu(rank, tiny_llama, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="needs the gpu extra")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    asked = {}

    def from_pretrained(name, **options):
        asked.update(options)
        raise OSError("the options are known")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    strategy = DDPStrategy(
        parallel_devices=[torch.device("cuda", 0), torch.device("cuda", 1)], cluster_environment=LightningEnvironment()
    )
    module = CausalLMModule(
        Backbone(str(tiny_llama), quantization="nf4", lora=LoRA(rank=4)), CompletionCrossEntropy(), SGD
    )
    module._trainer = SimpleNamespace(strategy=strategy)
    with pytest.raises(UserError, match="the options are known"):
        module.configure_model()
    assert asked["device_map"] == {"": torch.device("cuda", rank)}, "auto would put layers on the GPU of another rank"


# ---------------------------------------------------------------------- precision, quantisation and memory


def losses_before_and_after(module, tmp_path, **options):
    trainer = quiet_trainer(tmp_path, enable_checkpointing=False, max_steps=30, max_epochs=-1, **options)
    before = trainer.validate(module, Data(), verbose=False)[0]
    trainer.fit(module, Data())
    return before, trainer.validate(module, Data(), verbose=False)[0]


def test_adapters_stay_float32_on_a_bfloat16_base(tiny_llama, tmp_path):
    backbone = Backbone(str(tiny_llama), dtype="bfloat16", lora=LoRA(rank=4))
    module = CausalLMModule(backbone, CompletionCrossEntropy(), partial(torch.optim.AdamW, lr=3e-2))
    before, after = losses_before_and_after(module, tmp_path, precision="32-true")
    assert {p.dtype for p in trained(module).values()} == {torch.float32}
    assert module.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert after["val/loss"] < before["val/loss"] - 0.08


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-true", "64-true"])
@pytest.mark.parametrize("built", [False, True], ids=["new", "built"])
def test_another_precision_is_refused_before_the_base_is_loaded(tiny_llama, tmp_path, precision, built):
    backbone = Backbone(str(tiny_llama), dtype="bfloat16", lora=LoRA(rank=4))
    module = CausalLMModule(backbone, CompletionCrossEntropy(), SGD)
    if built:  # configure_model then has nothing to do
        module.configure_model()
    message = rf"trainer\.precision={precision}: .*backbone\.dtype \(bfloat16\).*Fix: set trainer\.precision to 32-true"
    for method in ("fit", "validate"):
        trainer = quiet_trainer(tmp_path, enable_checkpointing=False, precision=precision)
        with pytest.raises(UserError, match=message) as caught:
            getattr(trainer, method)(module, Data())
        assert "\n" not in str(caught.value)
    assert (module.model is not None) == built


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_backbone_sets_the_types_of_weights_and_products(tiny_llama, tmp_path, dtype):
    backbone = Backbone(str(tiny_llama), dtype=dtype, lora=LoRA(rank=4))
    module = CausalLMModule(backbone, CompletionCrossEntropy(), SGD)
    seen = []
    fit(module, one_by_one()[:1], tmp_path)
    types = {name: p.dtype for name, p in module.named_parameters()}
    assert {t for name, t in types.items() if "lora_" in name} == {torch.float32}
    assert {t for name, t in types.items() if "lora_" not in name} == {getattr(torch, dtype)}
    module.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    module.model(examples()[0][0][None])
    assert seen == [getattr(torch, dtype)]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_training_on_a_quantised_base(tiny_llama, tmp_path, quantization):
    pytest.importorskip("bitsandbytes", reason="needs the gpu extra")
    backbone = Backbone(str(tiny_llama), quantization=quantization, dtype="float32", lora=LoRA(rank=4))
    module = CausalLMModule(backbone, Distillation(alpha=0.1), partial(torch.optim.AdamW, lr=3e-2))
    before, after = losses_before_and_after(module, tmp_path)
    assert before["val/kl"] == pytest.approx(0, abs=1e-6)
    assert after["val/kl"] > 1e-3
    assert after["val/ce"] < before["val/ce"] - 0.05


def test_no_trainable_weight_is_refused(tiny_llama, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the gpu extra")
    module = CausalLMModule(
        Backbone(str(tiny_llama), quantization="nf4", dtype="float32"), CompletionCrossEntropy(), SGD
    )
    with pytest.raises(
        UserError, match=r"no weight is trainable with backbone.quantization=nf4\. Fix: set backbone.lora"
    ):
        fit(module, one_by_one(), tmp_path)


def test_out_of_memory_in_the_backward_pass(tiny_llama, tmp_path, monkeypatch):
    module = module_for(tiny_llama)

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    monkeypatch.setattr(LightningModule, "backward", fail)
    with pytest.raises(UserError, match=r"batch_size.*activation_checkpointing full"):
        fit(module, one_by_one(), tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(module, "objective", type("Failing", (CompletionCrossEntropy,), {"__call__": fail})())
    with pytest.raises(UserError, match=r"sequence_length 24 or batch_size 1"):
        fit(module, one_by_one(), tmp_path)


# ---------------------------------------------------------------------- DistributedDataParallel


def test_ddp_synchronises_the_trained_parameters_only(tiny_llama):
    module = module_for(tiny_llama)
    excluded = set(module._ddp_params_and_buffers_to_ignore)
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    assert parameters.keys() - excluded == {name for name, p in parameters.items() if p.requires_grad}
    assert buffers.keys() <= excluded
    assert buffers
