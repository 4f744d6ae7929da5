"""A base sharded over two processes on the CPU (gloo) against the same base in one process."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from callbacks import AdapterCheckpoint
from datamodules.batch import IGNORE_INDEX, Batch
from datamodules.errors import UserError
from lightning_modules import Backbone, CausalLMModule, CompletionCrossEntropy, Distillation, LoRA
from lightning_modules.strategies import FSDP2Strategy
from main import main
from optimizers import Lion, WarmupCosine
from tests.helpers.lm_training import join_ranks, run_two_ranks

GPU_FSDP = Path(__file__).parents[3] / "configs/gpu_fsdp.yaml"
ROWS, TOKENS, STEPS, MICRO_BATCHES = 16, 24, 4, 4
IDS = torch.arange(40, 50)[None]


def make_batch(index):
    """Returns one row: an example whose length depends on the index, with labels after its fifth token."""
    generator = torch.Generator().manual_seed(index)
    length = 8 + 3 * index % 16
    ids = torch.randint(3, 250, (1, TOKENS), generator=generator)
    labels, segments = torch.full((1, TOKENS), IGNORE_INDEX), torch.full((1, TOKENS), -1)
    labels[0, 4 : length - 1], segments[0, :length] = ids[0, 5:length], 1
    positions = torch.arange(TOKENS)[None] * (segments == 1)
    return Batch(ids, positions, labels, segments, 1, int((labels != IGNORE_INDEX).sum()))


class Rows(torch.utils.data.IterableDataset):
    """A loader without a length; with one, Lightning would count the batches of a resumed epoch from its start."""

    def __init__(self, numbers):
        self.numbers = numbers

    def __iter__(self):
        return map(make_batch, self.numbers)


class Data(LightningDataModule):
    """The rows from a given one on; each rank reads every second row."""

    def __init__(self, start=0):
        super().__init__()
        self.start = start

    def loader(self, start):
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        own_rows = range(start + ranks["rank"], ROWS, ranks["num_replicas"])
        return torch.utils.data.DataLoader(Rows(own_rows), batch_size=None)

    def train_dataloader(self):
        return self.loader(self.start)

    def val_dataloader(self):
        return self.loader(0)


class SaveHalf(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == STEPS // 2 and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/half.ckpt", weights_only=False)


def module_of(model, adapter, rank=3, **backbone):
    lora = LoRA(rank=rank, alpha=6)  # a rank of 3 does not divide evenly over 2 processes
    return CausalLMModule(
        Backbone(str(model), lora=lora, adapter=str(adapter), **backbone),
        CompletionCrossEntropy(chunk_size=5),
        partial(Lion, lr=3e-4, weight_decay=5.0),
        partial(WarmupCosine, warmup_steps=1),
    )


def fit(module, folder, ranks, callbacks=(), start=0, **options):
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy=FSDP2Strategy() if ranks > 1 else "auto", max_steps=STEPS,
        accumulate_grad_batches=MICRO_BATCHES // ranks, gradient_clip_val=0.05, logger=False, num_sanity_val_steps=0,
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        enable_checkpointing=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, Data(start), weights_only=True, **options)
    return trainer


def adapter_folder(model, path, **lora):
    """Saves an adapter of random weights; half of a new adapter's weights are zeros."""
    wrapped = Backbone(str(model), lora=LoRA(rank=3, alpha=6, **lora)).build()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(path)
    return path


def half_precision(folder):
    """Saves a Llama in bfloat16 whose head is tied to its embeddings."""
    model = AutoModelForCausalLM.from_pretrained(folder["tiny_llama"], tie_word_embeddings=True)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.to(torch.bfloat16).save_pretrained(folder["tied"])


# ---------------------------------------------------------------------- the two processes


def run_rank(rank, port, folder):
    join_ranks(rank, port)
    whole_run(folder, rank)
    resumed_run(folder)
    tied_run(folder)
    refusals(folder)
    command_line_run(folder)


def whole_run(folder, rank):
    module = module_of(folder["tiny_llama"], folder["adapter"])
    trainer = fit(module, folder["two"], 2, [AdapterCheckpoint(), SaveHalf()])
    assert_sharded(module.model)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.save_checkpoint(folder["two"] / "whole.ckpt", weights_only=False)
    logits = []
    with trainer.strategy.backend.uneven_forward_context(module.model), torch.no_grad():
        for _ in range(3 - 2 * rank):
            logits.append(module.model.eval()(IDS).logits)
    torch.save({"metrics": metrics, "logits": logits}, folder["two"] / f"{rank}.pt")


def assert_sharded(model):
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) == (".layers." in name), name
        if ".layers." in name:
            rows = parameter.shape[0]
            assert parameter.to_local().shape[0] in (rows // 2, rows - rows // 2), name


def resumed_run(folder):
    module = module_of(folder["tiny_llama"], folder["adapter"])
    rows = MICRO_BATCHES * STEPS // 2
    trainer = fit(module, folder["resumed"], 2, start=rows, ckpt_path=folder["two"] / "half.ckpt")
    trainer.save_checkpoint(folder["resumed"] / "whole.ckpt", weights_only=False)


def tied_run(folder):
    """Trains float32 adapters, with DoRA's vectors, on bfloat16 weights, with recomputed layers."""
    module = module_of(folder["tied"], folder["dora"], activation_checkpointing="full")
    trainer = fit(module, folder["two"], 2)
    trainer.save_checkpoint(folder["two"] / "tied.ckpt", weights_only=False)


def refusals(folder):
    """Both ranks raise the same errors, although only the first reads the weights."""
    for message, settings, objective in (
        (r"quantization nf4.*issue 20855.*strategy ddp", {"quantization": "nf4"}, CompletionCrossEntropy()),
        (r"lora null.*strategy ddp", {"lora": None}, CompletionCrossEntropy()),
        (
            r"activation_checkpointing=offload.*to full",
            {"activation_checkpointing": "offload"},
            CompletionCrossEntropy(),
        ),
        (r"kernels=fused: trainer.strategy shards.*set it to auto", {"kernels": "fused"}, CompletionCrossEntropy()),
        (r"objective\.teacher.*cache-teacher", {}, Distillation()),
        (
            r"target_modules: .*lm_head.* is outside",
            {"lora": LoRA(target_modules=("q_proj", "lm_head"))},
            CompletionCrossEntropy(),
        ),
        (r"safetensors is missing", {"model_name_or_path": str(folder["empty"])}, CompletionCrossEntropy()),
    ):
        settings = {"model_name_or_path": str(folder["tiny_llama"]), "lora": LoRA(rank=2)} | settings
        with pytest.raises(UserError, match=message):
            fit(CausalLMModule(Backbone(**settings), objective, partial(Lion, lr=1e-4)), folder["two"], 2)


def command_line_run(folder):
    """Runs fit with evaluation of the untuned and the best model, then resumes it."""
    command = ["fit", "--config", str(GPU_FSDP), "--config", str(folder["cli"] / "small.yaml")]
    assert main([*command, "--trainer.max_steps=2"]) == 0
    assert main([*command, "--trainer.max_steps=3", "--ckpt_path=last"]) == 0


def small_config(folder):
    """Returns settings with which the shipped config runs in seconds."""
    evaluation = {"class_path": "callbacks.Evaluation", "init_args": {
        "tasks": ["risk"], "num_samples": 3, "max_new_tokens": 4, "constrained": False, "baseline_train_size": 20,
    }}  # fmt: skip
    best = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {
        "filename": "best", "monitor": "train/loss", "mode": "max", "save_last": True, "every_n_train_steps": 1,
    }}  # fmt: skip
    others = [{"class_path": f"callbacks.{name}"} for name in ("RunRecord", "Preemption", "AdapterCheckpoint")]
    return {
        "model": {"init_args": {"backbone": {"model_name_or_path": str(folder["tiny_llama"]), "lora": {"rank": 3}}}},
        "data": {"init_args": {
            "sources": ["synthetic://?findings=200&seed=1"], "task_weights": {"risk": 1.0}, "sequence_length": 2048,
            "val_fraction": 0.2,
            "val_rows": 2, "num_workers": 0, "test_fraction": 0.0,
        }},
        "trainer": {
            "accelerator": "cpu", "devices": 2, "val_check_interval": 1, "log_every_n_steps": 1,
            "logger": {"init_args": {"save_dir": str(folder["cli"])}}, "callbacks": [*others, evaluation, best],
            "enable_model_summary": False, "enable_progress_bar": False,
        },
    }  # fmt: skip


# ---------------------------------------------------------------------- the results


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    names = ("two", "one", "resumed", "adapter", "tied", "dora", "empty", "cli")
    folder = {name: tmp_path_factory.mktemp(name) for name in names} | {"tiny_llama": tiny_llama}
    half_precision(folder)
    torch.manual_seed(0)
    adapter_folder(tiny_llama, folder["adapter"])
    adapter_folder(folder["tied"], folder["dora"], use_dora=True)
    shutil.copy(tiny_llama / "config.json", folder["empty"])
    (folder["cli"] / "small.yaml").write_text(yaml.safe_dump(small_config(folder)))
    run_two_ranks(run_rank, folder)
    return folder


def read(path):
    return torch.load(path, weights_only=True)


def assert_same_run(one, two):
    """Equal up to rounding. Where a momentum is almost zero, rounding may change the sign for Lion."""
    first, second = one["optimizer_states"][0], two["optimizer_states"][0]
    assert first["param_groups"] == second["param_groups"]
    torch.testing.assert_close(first["state"], second["state"], rtol=1e-4, atol=1e-7)
    assert one["state_dict"].keys() == two["state_dict"].keys()
    different = total = 0
    for name, tensor in one["state_dict"].items():
        assert tensor.dtype == two["state_dict"][name].dtype == torch.float32
        different += int(((tensor - two["state_dict"][name]).abs() > 1e-6).sum())
        total += tensor.numel()
    assert different <= total / 1000, f"{different} of {total} weights differ"


def test_two_ranks_equal_one_with_twice_the_accumulation(folder):
    module = module_of(folder["tiny_llama"], folder["adapter"])
    trainer = fit(module, folder["one"], 1)
    trainer.save_checkpoint(folder["one"] / "whole.ckpt", weights_only=False)
    assert_same_run(read(folder["one"] / "whole.ckpt"), read(folder["two"] / "whole.ckpt"))
    start = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder["tiny_llama"]), folder["adapter"], is_trainable=True
    )
    moved = [(a - b).abs().max() for a, b in zip(start.parameters(), module.model.parameters(), strict=True)]
    assert max(moved) > 5e-4, "the steps were too small for a comparison"
    logits = module.model.eval()(IDS).logits
    for rank in range(2):
        result = read(folder["two"] / f"{rank}.pt")
        assert result["metrics"] == pytest.approx({n: float(v) for n, v in trainer.callback_metrics.items()}, rel=1e-5)
        assert result["metrics"]["train/grad_norm"] > 0.05, "the gradient was not clipped"
        assert len(result["logits"]) == 3 - 2 * rank
        torch.testing.assert_close(result["logits"][-1], logits, rtol=0, atol=1e-4)


def test_resuming_is_exact(folder):
    whole, resumed = read(folder["two"] / "whole.ckpt"), read(folder["resumed"] / "whole.ckpt")
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        torch.testing.assert_close(whole[part], resumed[part], rtol=0, atol=0)


def test_a_checkpoint_of_two_ranks_resumes_on_one(folder):
    module = module_of(folder["tiny_llama"], folder["adapter"])
    checkpoint = read(folder["two"] / "half.ckpt")
    assert all("lora_" in name for name in checkpoint["state_dict"]), "the base is in the checkpoint"
    rows = MICRO_BATCHES * STEPS // 2
    trainer = fit(module, folder["one"], 1, start=rows, ckpt_path=folder["two"] / "half.ckpt")
    trainer.save_checkpoint(folder["one"] / "resumed.ckpt", weights_only=False)
    assert_same_run(read(folder["one"] / "resumed.ckpt"), read(folder["two"] / "whole.ckpt"))


def test_half_precision_tied_embeddings_and_dora(folder):
    module = module_of(folder["tied"], folder["dora"], kernels="eager")
    trainer = fit(module, folder["one"], 1)
    trainer.save_checkpoint(folder["one"] / "tied.ckpt", weights_only=False)
    assert_same_run(read(folder["one"] / "tied.ckpt"), read(folder["two"] / "tied.ckpt"))


def test_the_adapter_is_complete_and_loads_with_plain_peft(folder):
    saved = folder["two"] / "adapter/last"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder["tiny_llama"]), saved)
    expected = read(folder["two"] / "whole.ckpt")["state_dict"]
    loaded = {f"model.{name}": tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


def test_a_run_from_the_command_line(folder):
    run = folder["cli"] / "gpu_fsdp/version_0"
    assert [path.name for path in run.parent.iterdir()] == ["version_0"], (
        "the second fit resumed in the folder of the first"
    )
    columns = json.loads((run / "evaluation.json").read_text())["tasks"]["risk"]["columns"]
    assert all(len(columns[heading]["outcomes"]) == 3 for heading in ("untuned", "tuned"))
    assert columns["tuned"]["about"]["checkpoint"].startswith("best")
    assert read(run / "checkpoints/last.ckpt")["global_step"] == 3
    for name in ("best", "last"):
        assert (run / "adapter" / name / "adapter_model.safetensors").is_file()
