"""Compares loss and time with TRL, with the same data, order, optimizer and learning rate.

    python benchmarks/parity.py --sources SHARDS --output FOLDER [--steps 300]

A real small model (SmolLM2-135M-Instruct in NF4, LoRA r=16 on every projection) learns to score findings, once by
:class:`~lightning_modules.CausalLMModule` (all examples of a step in one row with their shared prefix) and once by
``SFTTrainer`` of TRL (padded rows, completion-only loss). Both start from the same adapter, train on the same examples
in the same order, and make the same number of AdamW steps at one constant rate. One function measures the held-out
loss of both. Writes ``parity.json`` and a plot of the curves, and prints the difference.

TRL keeps the adapter of a 4-bit base in bf16, which loses small steps; ``TRL, float32`` converts it back to float32, so
that each dtype of the adapter has an arm with the same arithmetic.

``--arms`` adds further arms: FP8 products with the base, and Lion with an adapter in float32, in bf16, and in bf16 with
a float32 copy in the optimizer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from datamodules import FindingsDataModule  # noqa: E402
from datamodules.packing import Row, pack, to_batch  # noqa: E402
from lightning_modules import Backbone, CausalLMModule, CompletionCrossEntropy, LoRA  # noqa: E402
from optimizers import Lion  # noqa: E402

RATE, BATCH, HELD_OUT, ROW = 2e-4, 16, 256, 8192
ADAMW = partial(torch.optim.AdamW, lr=RATE, weight_decay=0.01)
#: name -> (dtype of the adapter, optimizer, FP8 products)
ARMS: dict[str, tuple[Any, Any, bool]] = {
    "module": ("float32", ADAMW, False),
    "module, bf16": ("bfloat16", ADAMW, False),
    "module, FP8": ("float32", ADAMW, True),
    "Lion, float32": ("float32", partial(Lion, lr=RATE / 4, weight_decay=0.04), False),
    "Lion, bf16": ("bfloat16", partial(Lion, lr=RATE / 4, weight_decay=0.04), False),
    "Lion, bf16 with a copy": ("bfloat16", partial(Lion, lr=RATE / 4, weight_decay=0.04, master_weights=True), False),
}
#: arm of TRL -> the arm with the same arithmetic (TRL casts the adapter of a 4-bit base to bf16)
PEERS = {"TRL, float32": "module", "TRL": "module, bf16"}


def examples(options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Returns training examples in the order of the run, and held-out examples."""
    data = FindingsDataModule([options.sources], options.model, {"risk": 1.0}, val_fraction=0.06, test_fraction=0.0)
    task = data.tasks["risk"]
    splits = {}
    for split, count in (("train", options.steps * BATCH), ("val", HELD_OUT)):
        pairs = data.pairs(split, "risk", count)
        splits[split] = [e for e in data.chat.encode(task, pairs) if len(e.prompt_ids) + len(e.completion_ids) <= 1024]
    order = np.random.default_rng(0)
    train: list[Any] = []
    while len(train) < options.steps * BATCH:  # epochs, each in a new order
        train += [splits["train"][i] for i in order.permutation(len(splits["train"]))]
    return train[: options.steps * BATCH], splits["val"]


def backbone(
    options: argparse.Namespace, adapter: str | None = None, adapter_dtype: Any = "float32", **settings: Any
) -> Backbone:
    """Returns the settings of the model that every arm trains."""
    lora = LoRA(16, 32, dtype=adapter_dtype)
    return Backbone(options.model, options.quantization, options.dtype, lora=lora, adapter=adapter, **settings)


def build_module(backbone: Backbone, device: str, optimizer: Any = ADAMW) -> CausalLMModule:
    """Builds a module on its device."""
    module = CausalLMModule(backbone, CompletionCrossEntropy(), optimizer)
    torch.manual_seed(0)
    with torch.device(device):
        module.configure_model()
    return module.to(device).train()


def held_out_loss(adapter: Path, examples: list[Any], options: argparse.Namespace) -> float:
    """Measures the mean loss per token of an adapter with eager kernels and packed rows, for either trainer."""
    module = build_module(backbone(options, str(adapter), kernels="eager"), options.device).eval()
    total = count = 0.0
    with torch.no_grad():
        for row in pack(examples, sequence_length=2048, mode="packed"):
            sums = module.compute_sums(to_batch([row], 2048).to(options.device))
            total, count = total + float(sums["loss"]), count + float(sums["count"])
    return total / count


def train_with_module(
    arm: str, train: list[Any], start: Path, output: Path, options: argparse.Namespace
) -> tuple[list[float], float]:
    """Trains by this project's module; returns losses and seconds."""
    dtype, optimizer, fp8 = ARMS[arm]
    module = build_module(backbone(options, str(start), dtype, fp8=fp8), options.device, optimizer)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = module.optimizer(parameters)
    prefix = train[0].prefix_length
    losses = []
    for step in range(options.steps):
        if step == 1:  # the first step compiles kernels
            _wait(options.device)
            begin = time.monotonic()
        row = Row(train[step * BATCH : (step + 1) * BATCH], prefix)
        batch = module.transfer_batch_to_device(to_batch([row], ROW), torch.device(options.device), 0)
        sums = module.compute_sums(batch)
        sums["loss"].backward()
        torch._foreach_mul_([p.grad for p in parameters], 1 / sums["count"])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(sums["loss"].detach() / sums["count"])
    _wait(options.device)
    seconds = time.monotonic() - begin
    module.save_adapter(output)
    return [float(loss) for loss in losses], seconds


def train_with_trl(
    arm: str, train: list[Any], start: Path, output: Path, options: argparse.Namespace
) -> tuple[list[float], float]:
    """Trains by TRL; returns losses and seconds."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = [
        {
            "input_ids": [*map(int, e.prompt_ids), *map(int, e.completion_ids)],
            "completion_mask": [0] * len(e.prompt_ids) + [1] * len(e.completion_ids),
        }
        for e in train
    ]
    model = backbone(options, str(start)).build(options.device)
    tokenizer = AutoTokenizer.from_pretrained(backbone(options).location)
    gpu = options.device == "cuda"
    settings = SFTConfig(
        output_dir=str(output), per_device_train_batch_size=BATCH, max_steps=options.steps, learning_rate=RATE,
        lr_scheduler_type="constant", optim="adamw_torch", weight_decay=0.01, max_grad_norm=1.0,
        bf16=gpu, use_cpu=not gpu,
        max_length=2048, packing=False, completion_only_loss=True, logging_steps=1, report_to=[], save_strategy="no",
        gradient_checkpointing=False, dataloader_num_workers=2 if gpu else 0, disable_tqdm=True,
    )  # fmt: skip

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if not self.marks:
                _wait(options.device)
                self.marks.append(time.monotonic())

    clock = Clock()
    trainer = InOrder(
        model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[clock]
    )
    if arm == "TRL, float32":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.train()
    _wait(options.device)
    seconds = time.monotonic() - clock.marks[0]
    model.save_pretrained(output)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], seconds


def plot(result: dict[str, Any], file: Path) -> None:
    """Plots every curve and its running mean."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for index, name in enumerate(name for name in result if name != "untuned"):
        colour = f"C{index}"
        losses = np.array(result[name]["losses"])
        mean = np.convolve(losses, np.ones(10) / 10, "valid")
        label = f"{name}: held-out {result[name]['held_out']:.4f}, {result[name]['seconds']:.0f} s"
        axes.plot(losses, color=colour, alpha=0.25)
        axes.plot(np.arange(len(mean)) + 9, mean, color=colour, label=label)
    axes.set(xlabel="step of 16 examples", ylabel="training loss per token", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Parses the command line and runs the arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", required=True, help="shards of findings")
    parser.add_argument("--output", required=True, help="folder for figures, plot and adapters")
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--arms", nargs="*", default=["module", *PEERS], choices=[*ARMS, *PEERS])
    options = parser.parse_args()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    train, held_out = examples(options)
    build_module(backbone(options), options.device).save_adapter(output / "start")
    result: dict[str, Any] = {"untuned": held_out_loss(output / "start", held_out, options)}
    for name in options.arms:
        trainer = partial(train_with_trl if name in PEERS else train_with_module, name)
        folder = output / name.replace(" ", "_")
        losses, seconds = trainer(train, output / "start", folder, options)
        loss = held_out_loss(folder, held_out, options)
        result[name] = {"losses": losses, "seconds": seconds, "held_out": loss}
        print(
            f"{name}: training loss {losses[0]:.4f} -> {losses[-1]:.4f}, held-out {loss:.4f}, {seconds:.1f} s",
            flush=True,
        )
        (output / "parity.json").write_text(json.dumps(result))
    for peer, arm in PEERS.items():
        if {arm, peer} <= result.keys():
            first, second = result[arm], result[peer]
            apart, faster = first["held_out"] / second["held_out"] - 1, second["seconds"] / first["seconds"]
            print(f"{arm}: held-out loss {apart:+.2%} of that of {peer}, {faster:.1f} times as fast")
    plot(result, output / "parity.png")


if __name__ == "__main__":
    main()
