"""The loss contract through a real Trainer on a tiny model: accumulation, packing, checkpoints, the CLI."""

import copy
import os
import socket
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from datamodules.batch import IGNORE_INDEX, Batch
from datamodules.errors import UserError
from lightning_modules import Backbone, CausalLMModule, CompletionCrossEntropy, Distillation, LoRA
from lightning_modules.models.backend import check_sharding, supervised_positions
from optimizers import WarmupCosine

SGD = partial(torch.optim.SGD, lr=0.1)
#: prompt and completion lengths, uneven on purpose
EXAMPLES = [(3, 2), (5, 9), (4, 1), (2, 6), (7, 3), (3, 12), (6, 1), (2, 4)]
PREFIX = 3


def example_ids(seed, prompt, completion):
    """A prompt whose first PREFIX tokens all examples share, and a completion."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 250, (prompt + completion,), generator=generator)
    return torch.cat([torch.arange(10, 10 + PREFIX), ids]), PREFIX + prompt


def row(examples, tokens, shared_prefix=False):
    """One row of the batch contract, by hand: (input_ids, position_ids, labels, segment_ids)."""
    ids, positions, labels, segments = [], [], [], []
    if shared_prefix:
        ids += examples[0][0][:PREFIX].tolist()
        positions, labels, segments = list(range(PREFIX)), [IGNORE_INDEX] * PREFIX, [0] * PREFIX
    skip = PREFIX if shared_prefix else 0
    for number, (sequence, prompt) in enumerate(examples, start=1):
        own = sequence.tolist()
        targets = [IGNORE_INDEX] * (prompt - 1) + own[prompt:] + [IGNORE_INDEX]
        ids += own[skip:]
        labels += targets[skip:]
        positions += range(skip, len(own))
        segments += [number] * (len(own) - skip)
    padding = tokens - len(ids)
    assert padding >= 0
    ids, positions = ids + [0] * padding, positions + [0] * padding
    return ids, positions, labels + [IGNORE_INDEX] * padding, segments + [-1] * padding


def batch(rows):
    ids, positions, labels, segments = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Batch(ids, positions, labels, segments, len(rows), int((labels != IGNORE_INDEX).sum()))


def examples():
    return [example_ids(seed, *lengths) for seed, lengths in enumerate(EXAMPLES)]


def one_by_one():
    return [batch([row([example], 24)]) for example in examples()]


def module_for(folder, objective=None, optimizer=SGD, lr_scheduler=None, **lora):
    module = CausalLMModule(
        Backbone(str(folder), lora=LoRA(rank=4, alpha=8, **lora)),
        objective or CompletionCrossEntropy(chunk_size=5),
        optimizer,
        lr_scheduler,
    )
    torch.manual_seed(1)
    module.configure_model()
    for name, parameter in module.named_parameters():
        if "lora_B" in name:  # zero at first; then A would have no gradient
            torch.nn.init.normal_(parameter, std=0.05)
    return module


def fit(module, batches, tmp_path, **options):
    options = {"max_steps": 1, "logger": False, "enable_checkpointing": False} | options
    trainer = Trainer(
        accelerator="cpu", devices=1, default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*`training_step` returned.*")
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=lambda b: b))
    return trainer


def trained(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def assert_same(first, second, atol=1e-6):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def reference(folder, sequences, objective=None):
    """One step of SGD on an independent model: transformers' own forward, one example at a time, one mean."""
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


def test_a_shorter_last_window_is_divided_by_its_own_tokens(tiny_llama, tmp_path):
    """Lightning divides by accumulate_grad_batches there too, though fewer batches came."""
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
def test_clipping_is_torchs(tiny_llama, tmp_path, clip):
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


def test_rows_of_nothing_but_padding_count_nothing(tiny_llama, tmp_path):
    expected, _, _ = reference(tiny_llama, examples()[:2])
    padding = ([0] * 24, [0] * 24, [IGNORE_INDEX] * 24, [-1] * 24)
    module = module_for(tiny_llama)
    fit(module, [batch([row([e], 24) for e in examples()[:2]] + [padding])], tmp_path)
    assert_same(trained(module), expected)


def test_supervised_positions():
    data = batch([row([examples()[0]], 24), row([examples()[1]], 24)])
    expected = (data.labels_BT.flatten() != IGNORE_INDEX).nonzero().flatten()
    assert torch.equal(supervised_positions(data), expected)
    data.supervised = 0  # a loader that did not count
    assert torch.equal(supervised_positions(data), expected)
    padded = supervised_positions(data, multiple=8)
    assert len(padded) % 8 == 0
    assert torch.equal(padded[: len(expected)], expected)
    assert (data.labels_BT.flatten()[padded[len(expected) :]] == IGNORE_INDEX).all()


# ---------------------------------------------------------------------- validation


class Data(LightningDataModule):
    """Rows of the examples above, for fit, validate and test."""

    def __init__(self, batches=None):
        super().__init__()
        self.batches = batches or one_by_one()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.batches, batch_size=None, collate_fn=lambda b: b)

    val_dataloader = test_dataloader = train_dataloader


def quiet_trainer(tmp_path, **options):
    options = {"accelerator": "cpu", "devices": 1, "max_steps": 2, "logger": False} | options
    return Trainer(default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False, **options)


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


def test_a_rank_without_a_batch_has_zero_sums_under_the_same_names(tiny_llama):
    for objective in (CompletionCrossEntropy(), Distillation(), Distillation(alpha=0.0)):
        module = module_for(tiny_llama, objective)
        nothing, something = module._no_sums(), module.compute_sums(one_by_one()[0])
        assert list(nothing) == list(something)
        assert all(value == 0 for value in nothing.values())


# ---------------------------------------------------------------------- several ranks


class Ranked(Data):
    """Every rank has rows of its own; the second has no validation rows."""

    def train_dataloader(self):
        rank = self.trainer.global_rank
        return torch.utils.data.DataLoader(self.batches[rank::2], batch_size=None, collate_fn=lambda b: b)

    def val_dataloader(self):
        rows = self.batches if self.trainer.global_rank == 0 else []
        return torch.utils.data.DataLoader(Rows(rows), batch_size=None)


class Rows(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def run_rank(rank, port, folder, tmp_path):
    """What one of two processes runs."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update(address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    torch.set_num_threads(1)
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, (port, tiny_llama, tmp_path), nprocs=2)
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
def test_each_rank_pins_its_4_bit_base(rank, tiny_llama, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="needs the gpu extra")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    asked = {}

    def from_pretrained(name, **options):
        asked.update(options)
        raise OSError("far enough")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    strategy = DDPStrategy(
        parallel_devices=[torch.device("cuda", 0), torch.device("cuda", 1)], cluster_environment=LightningEnvironment()
    )
    module = CausalLMModule(
        Backbone(str(tiny_llama), quantization="nf4", lora=LoRA(rank=4)), CompletionCrossEntropy(), SGD
    )
    module._trainer = SimpleNamespace(strategy=strategy)
    with pytest.raises(UserError, match="far enough"):
        module.configure_model()
    assert asked["device_map"] == {"": torch.device("cuda", rank)}, "never auto: layers would go to the neighbour's GPU"


# ---------------------------------------------------------------------- distillation


def kl_by_hand(student, teacher, sequences, temperature=2.0):
    total, count = 0.0, 0
    for sequence, prompt in sequences:
        with torch.no_grad():
            s, t = (
                (m(sequence[None]).logits[0, prompt - 1 : -1] / temperature).log_softmax(-1) for m in (student, teacher)
            )
        total += float(torch.nn.functional.kl_div(s, t, log_target=True, reduction="sum"))
        count += len(sequence) - prompt
    return total / count


def adapter_folder(folder, path):
    """An adapter with weights of its own, as PEFT saves it."""
    model = Backbone(str(folder), lora=LoRA(rank=2, alpha=4, dropout=0.3)).build()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", ["base", "adapter", "model"])
def test_teachers(kind, tiny_llama, tmp_path):
    adapter = adapter_folder(tiny_llama, tmp_path / "teacher")
    recipe = {"base": "base", "adapter": Backbone(str(tiny_llama), adapter=adapter)}.get(kind)
    if kind == "model":  # the same tokenizer, other weights
        other = AutoModelForCausalLM.from_pretrained(tiny_llama)
        for parameter in other.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        other.save_pretrained(tmp_path / "other")
        for file in tiny_llama.glob("token*"):
            (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
        recipe = Backbone(str(tmp_path / "other"))
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    teacher = {
        "base": lambda: base,
        "adapter": lambda: PeftModel.from_pretrained(base, adapter),
        "model": lambda: other,
    }
    module = module_for(tiny_llama, Distillation(teacher=recipe, chunk_size=7), dropout=0.2)
    names, keys = set(dict(module.named_parameters())), set(module.state_dict())
    expected = kl_by_hand(copy.deepcopy(module.model).eval(), teacher[kind]().eval(), examples())
    results = quiet_trainer(tmp_path, enable_checkpointing=False).validate(module, Data(), verbose=False)[0]
    assert results["val/kl"] == pytest.approx(expected, abs=1e-6)
    assert results["val/loss"] == pytest.approx(0.5 * 4 * expected + 0.5 * results["val/ce"], abs=1e-5)
    before = {n: t.clone() for n, t in module._teacher.model.state_dict().items()}
    fit(module, one_by_one(), tmp_path, max_steps=3, accumulate_grad_batches=2)
    assert set(dict(module.named_parameters())) == names, "the teacher is in the parameters"
    assert set(module.state_dict()) == keys, "the teacher is in the checkpoint"
    model = module._teacher.model
    assert module.model.training
    assert not any(m.training for m in model.modules()), "the teacher is in training mode"
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items()), "the teacher learned"
    shared = {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert bool(shared) == (kind != "model"), "base and adapter take no second copy of the weights"


def test_accumulation_with_a_teacher(tiny_llama, tmp_path):
    results = []
    for batches, accumulate in (([batch([row([e], 24) for e in examples()])], 1), (one_by_one(), 8)):
        module = module_for(tiny_llama, Distillation(chunk_size=5))
        trainer = fit(module, batches, tmp_path, accumulate_grad_batches=accumulate)
        results.append((trained(module), trainer.callback_metrics["train/kl"]))
    assert_same(results[0][0], results[1][0])
    assert torch.isclose(results[0][1], results[1][1])


def test_a_fresh_student_of_its_own_base_has_kl_0_and_no_gradient(tiny_llama, tmp_path):
    module = CausalLMModule(Backbone(str(tiny_llama), lora=LoRA(rank=4)), Distillation(alpha=1.0), SGD)
    trainer = fit(module, one_by_one(), tmp_path)
    assert abs(trainer.callback_metrics["train/kl"]) < 1e-6
    assert trainer.callback_metrics["train/grad_norm"] < 1e-6


def test_alpha_0_trains_as_without_a_teacher(tiny_llama, tmp_path):
    results = []
    for objective in (CompletionCrossEntropy(chunk_size=5), Distillation(alpha=0.0, chunk_size=5)):
        module = module_for(tiny_llama, objective)
        fit(module, one_by_one(), tmp_path, max_steps=4)
        assert module._teacher is None
        results.append(trained(module))
    assert_same(*results, atol=0)


def test_a_teacher_with_another_tokenizer_is_refused(tiny_llama, tiny_mistral, tmp_path):
    module = module_for(tiny_llama, Distillation(teacher=Backbone(str(tiny_mistral))))
    with pytest.raises(
        UserError, match=r"tokenizer differs .*259 tokens against 262; 259 of .* the first is '<\|endoft"
    ):
        fit(module, one_by_one(), tmp_path)


def test_no_adapter_to_switch_off(tiny_llama, tmp_path):
    module = CausalLMModule(Backbone(str(tiny_llama)), Distillation(), SGD)
    with pytest.raises(UserError, match=r"backbone\.lora is null"):
        fit(module, one_by_one(), tmp_path)


# ---------------------------------------------------------------------- optimizer


def test_matrices_decay_and_vectors_do_not(tiny_llama, tmp_path):
    module = module_for(tiny_llama, optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.3), use_dora=True)
    trainer = fit(module, one_by_one(), tmp_path)
    matrices, vectors = trainer.optimizers[0].param_groups
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    held = {id(p) for group in (matrices, vectors) for p in group["params"]}
    assert held == {id(p) for p in module.parameters() if p.requires_grad}


def test_the_schedule_runs_over_the_runs_steps(tiny_llama, tmp_path):
    schedule = partial(WarmupCosine, warmup_steps=2, min_lr_ratio=0.5)
    for options in ({"max_steps": 6}, {"max_steps": -1, "max_epochs": 3, "accumulate_grad_batches": 4}):
        module = module_for(tiny_llama, lr_scheduler=schedule)
        trainer = fit(module, one_by_one(), tmp_path, **options)
        assert trainer.global_step == 6
        own = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        expected = schedule(own, 6)
        for _ in range(6):
            own.step()
            expected.step()
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(own.param_groups[0]["lr"])


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield from one_by_one()


def test_a_schedule_without_an_end(tiny_llama, tmp_path):
    module = module_for(tiny_llama, lr_scheduler=WarmupCosine)
    with pytest.raises(UserError, match=r"set trainer.max_steps"):
        fit(module, Stream(), tmp_path, max_steps=-1, max_epochs=1)


def test_nothing_to_train(tiny_llama, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the gpu extra")
    module = CausalLMModule(
        Backbone(str(tiny_llama), quantization="nf4", dtype="float32"), CompletionCrossEntropy(), SGD
    )
    with pytest.raises(UserError, match=r"nothing is trainable with backbone.quantization nf4; set backbone.lora"):
        fit(module, one_by_one(), tmp_path)


# ---------------------------------------------------------------------- precision and quantisation


def losses_before_and_after(module, tmp_path, **options):
    trainer = quiet_trainer(tmp_path, enable_checkpointing=False, max_steps=30, max_epochs=-1, **options)
    before = trainer.validate(module, Data(), verbose=False)[0]
    trainer.fit(module, Data())
    return before, trainer.validate(module, Data(), verbose=False)[0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_adapters_stay_float32_beside_a_bfloat16_base(tiny_llama, tmp_path, precision):
    backbone = Backbone(str(tiny_llama), dtype="bfloat16", lora=LoRA(rank=4))
    module = CausalLMModule(backbone, CompletionCrossEntropy(), partial(torch.optim.AdamW, lr=3e-2))
    before, after = losses_before_and_after(module, tmp_path, precision=precision)
    assert {p.dtype for p in trained(module).values()} == {torch.float32}
    assert module.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert after["val/loss"] < before["val/loss"] - 0.08


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_training_on_a_quantised_base(tiny_llama, tmp_path, quantization):
    pytest.importorskip("bitsandbytes", reason="needs the gpu extra")
    backbone = Backbone(str(tiny_llama), quantization=quantization, dtype="float32", lora=LoRA(rank=4))
    module = CausalLMModule(backbone, Distillation(alpha=0.1), partial(torch.optim.AdamW, lr=3e-2))
    before, after = losses_before_and_after(module, tmp_path)
    assert before["val/kl"] == pytest.approx(0, abs=1e-6)
    assert after["val/kl"] > 1e-3
    assert after["val/ce"] < before["val/ce"] - 0.05


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


# ---------------------------------------------------------------------- checkpoints


def checkpointed(module, tmp_path, **options):
    trainer = quiet_trainer(tmp_path, **options)
    trainer.fit(module, Data())
    path = tmp_path / "saved.ckpt"
    trainer.save_checkpoint(path)
    return trainer, path


def test_a_checkpoint_holds_trainable_tensors_only(tiny_llama, tmp_path):
    module = module_for(tiny_llama, Distillation())
    _, path = checkpointed(module, tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == set(trained(module))
    assert all("lora_" in name for name in checkpoint["state_dict"])


class Decay(torch.optim.lr_scheduler.LambdaLR):
    """A schedule that is the same for runs of any length."""

    def __init__(self, optimizer, total_steps):
        super().__init__(optimizer, lambda step: 0.9**step)


def test_resume_equals_uninterrupted(tiny_llama, tmp_path):
    arguments = {"optimizer": partial(torch.optim.AdamW, lr=1e-2), "lr_scheduler": Decay}
    options = {"max_steps": -1, "accumulate_grad_batches": 3}
    whole = module_for(tiny_llama, **arguments)
    fit(whole, one_by_one(), tmp_path, max_epochs=2, **options)
    half = module_for(tiny_llama, **arguments)
    fit(half, one_by_one(), tmp_path, max_epochs=1, **options).save_checkpoint(tmp_path / "half.ckpt")
    rest = CausalLMModule(half.backbone, half.objective, **arguments)
    trainer = quiet_trainer(tmp_path, max_epochs=2, enable_checkpointing=False, **options)
    trainer.fit(rest, Data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert trainer.global_step == 6
    assert_same(trained(rest), trained(whole), atol=0)


def test_a_module_made_in_python_loads_from_its_checkpoint_alone(tiny_llama, tmp_path):
    schedule = partial(WarmupCosine, warmup_steps=1, min_lr_ratio=0.2)
    objective = Distillation(teacher=Backbone(str(tiny_llama), adapter="some/adapter"), alpha=0.0, chunk_size=9)
    module = module_for(
        tiny_llama, objective, partial(torch.optim.AdamW, lr=3e-3), schedule, target_modules=("q_proj",)
    )
    _, path = checkpointed(module, tmp_path)
    loaded = CausalLMModule.load_from_checkpoint(path)
    assert_same(trained(loaded), trained(module), atol=0)
    assert loaded.backbone == module.backbone
    assert loaded.objective == objective
    optimizer = loaded.optimizer([torch.nn.Parameter(torch.ones(2))])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["lr"] == 3e-3
    assert isinstance(loaded.lr_scheduler(optimizer, 10), WarmupCosine)
    _, path = checkpointed(loaded, tmp_path)  # trains on, and its own checkpoint is as good
    assert CausalLMModule.load_from_checkpoint(path).hparams == module.hparams


@pytest.mark.parametrize("made_by", ["python", "cli"])
def test_arguments_replace_those_of_the_checkpoint(tiny_llama, tmp_path, made_by):
    module = module_for(tiny_llama) if made_by == "python" else cli(tmp_path, tiny_llama).model
    _, path = checkpointed(module, tmp_path)
    backbone = Backbone(str(tiny_llama), lora=module.backbone.lora, activation_checkpointing="full")
    optimizer = partial(torch.optim.SGD, lr=0.7)
    loaded = CausalLMModule.load_from_checkpoint(
        path, backbone=backbone, objective=Distillation(alpha=0.2), optimizer=optimizer, lr_scheduler=None
    )
    assert loaded.backbone == backbone
    assert loaded.objective == Distillation(alpha=0.2)
    assert loaded.optimizer([torch.nn.Parameter(torch.ones(2))]).defaults["lr"] == 0.7
    assert loaded.lr_scheduler is None


def test_what_can_not_be_stored_is_given_again(tiny_llama, tmp_path):
    def made_here(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    module = module_for(tiny_llama, optimizer=made_here)
    with pytest.warns(UserWarning, match="the checkpoint does not hold optimizer: pass it to load_from_checkpoint"):
        _, path = checkpointed(module, tmp_path)
    assert CausalLMModule.load_from_checkpoint(path, optimizer=made_here).optimizer is made_here


class Weighted(CausalLMModule):
    """Another experiment's module, with an argument of its own."""

    def __init__(self, backbone: Backbone, objective: CompletionCrossEntropy, optimizer: type, weight: float = 1.0):
        super().__init__(backbone, objective, optimizer)
        self.weight = weight


def test_a_subclass_keeps_its_own_arguments(tiny_llama, tmp_path):
    module = Weighted(
        Backbone(str(tiny_llama), lora=LoRA(rank=2)), CompletionCrossEntropy(), torch.optim.SGD, weight=2.5
    )
    assert module.hparams["weight"] == 2.5
    assert module.hparams["optimizer"] == {"class_path": "torch.optim.sgd.SGD"}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"num_top_layers": 1}, "checkpoint holds unknown 14 tensors"),
        ({"rank": 8}, "checkpoint does not fit: .* size mismatch"),
        ({"target_modules": ("q_proj", "v_proj")}, "checkpoint holds unknown 20 tensors"),
    ],
)
def test_a_checkpoint_of_another_backbone_is_refused(tiny_llama, tmp_path, lora, message):
    _, path = checkpointed(module_for(tiny_llama), tmp_path)
    with pytest.raises(UserError, match=message):
        CausalLMModule.load_from_checkpoint(path, backbone=Backbone(str(tiny_llama), lora=LoRA(**{"rank": 4} | lora)))
    _, path = checkpointed(module_for(tiny_llama, target_modules=("q_proj",)), tmp_path)
    with pytest.raises(UserError, match="checkpoint lacks 24 tensors"):
        quiet_trainer(tmp_path).validate(module_for(tiny_llama), Data(), ckpt_path=path, weights_only=True)


def test_the_adapter_loads_with_plain_peft(tiny_llama, tmp_path):
    module = module_for(tiny_llama)
    fit(module, one_by_one(), tmp_path)
    module.save_adapter(tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    assert not list((tmp_path / "adapter").glob("*.bin"))
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert loaded.peft_config["default"].base_model_name_or_path == str(tiny_llama)
    ids = examples()[0][0][None]
    assert torch.equal(loaded.eval()(ids).logits, module.model.eval()(ids).logits)
    again = Backbone(str(tiny_llama), adapter=str(tmp_path / "adapter")).build()
    assert torch.equal(again.eval()(ids).logits, module.model(ids).logits)


# ---------------------------------------------------------------------- the CLI


def cli(tmp_path, folder, args=(), **init_args):
    arguments = {
        "backbone": {
            "model_name_or_path": str(folder),
            "lora": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        },
        "objective": {"class_path": "lightning_modules.CompletionCrossEntropy"},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "lr_scheduler": {
            "class_path": "optimizers.WarmupCosine",
            "init_args": {"warmup_steps": 1, "min_lr_ratio": 0.1},
        },
    } | init_args
    config = {"model": {"class_path": "lightning_modules.CausalLMModule", "init_args": arguments}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return LightningCLI(
        LightningModule,
        subclass_mode_model=True,
        run=False,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=None,
        args=["--config", str(path), "--trainer.logger", "false", *args],
    )


def test_the_cli_builds_a_light_module(tmp_path, tiny_llama):
    module = cli(tmp_path, "a/model/that/is/nowhere").model
    assert isinstance(module, CausalLMModule)
    assert module.model is None
    lora = LoRA(rank=4, alpha=8, target_modules=("q_proj", "v_proj"))
    assert module.backbone == Backbone("a/model/that/is/nowhere", lora=lora)


def test_a_module_made_by_the_cli_loads_from_its_checkpoint_alone(tmp_path, tiny_llama):
    module = cli(tmp_path, tiny_llama, objective={
        "class_path": "lightning_modules.Distillation",
        "init_args": {"teacher": {"model_name_or_path": str(tiny_llama), "quantization": "none"}, "alpha": 0.25},
    }).model  # fmt: skip
    assert module.objective == Distillation(teacher=Backbone(str(tiny_llama)), alpha=0.25)
    _, path = checkpointed(module, tmp_path)
    loaded = CausalLMModule.load_from_checkpoint(path)
    assert_same(trained(loaded), trained(module), atol=0)
    assert (loaded.backbone, loaded.objective) == (module.backbone, module.objective)


@pytest.mark.parametrize(
    ("class_path", "init_args"),
    [
        ("torch.optim.AdamW", {"lr": 1e-3, "weight_decay": 0.1}),
        ("optimizers.Lion", {"lr": 1e-4, "betas": [0.9, 0.99]}),
        ("bitsandbytes.optim.Lion8bit", {"lr": 1e-4, "min_8bit_size": 16}),
        ("bitsandbytes.optim.PagedAdamW8bit", {"lr": 1e-4, "min_8bit_size": 16}),
    ],
)
def test_optimizers_by_class_path(tmp_path, tiny_llama, class_path, init_args):
    if class_path.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes", reason="needs the gpu extra")
    module = cli(tmp_path, tiny_llama, optimizer={"class_path": class_path, "init_args": init_args}).model
    trainer, _ = checkpointed(module, tmp_path)
    optimizer = trainer.optimizers[0]
    assert type(optimizer).__name__ == class_path.rpartition(".")[2]
    assert optimizer.defaults["lr"] == init_args["lr"]
    assert isinstance(trainer.lr_scheduler_configs[0].scheduler, WarmupCosine)


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy])
@pytest.mark.parametrize(
    ("quantization", "way_out"),
    [("nf4", r"issue 20855.*strategy ddp.*quantization none"), ("none", r"strategies\.FSDP2Strategy.*ddp")],
)
def test_a_strategy_that_shards_is_refused_with_the_way_out(kind, quantization, way_out):
    strategy = object.__new__(kind)  # its constructor wants GPUs
    with pytest.raises(UserError, match=rf"trainer.strategy {kind.__name__}.*{way_out}"):
        check_sharding(strategy, quantization)
    check_sharding(SingleDeviceStrategy("cpu"), quantization)
