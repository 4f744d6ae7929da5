"""A tiny model, a data module and held-out pairs for the tests of the evaluation."""

import json
from io import StringIO

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.console import Console
from transformers import AutoModelForCausalLM

from datamodules.tasks import RiskTask
from datamodules.tasks.base import Pair, compact_json
from datamodules.tokenization.chat_format import ChatFormat
from lightning_modules.evaluation.evaluate import PredictionResult
from lightning_modules.evaluation.results import TaskResults


def short_task():
    """Returns the risk task with a short instruction, because a byte is a token in the toy tokenizers."""
    task = RiskTask()
    task.system, task.instruction = "", "Rate.\n"
    return task


def make_pair(index):
    """Returns a pair whose severity follows from its title."""
    severity = ("info", "low", "high")[index % 3]
    content = compact_json({"title": "t" + "abc"[index % 3], "category": "network", "n": index})
    answer = compact_json({"severity": severity, "risk_score": 10 * (index % 3)})
    return Pair("risk", content, answer, severity, "network", 1)


PAIRS = {"val": [make_pair(i) for i in range(7)], "test": [make_pair(i) for i in range(50, 54)]}
PAIRS["train"] = [make_pair(i) for i in range(100, 130)]


def task_results(pairs, wrong_answer):
    """Returns results with a baseline, a tuned model that is always right, and an untuned one that is always wrong."""
    results = TaskResults(short_task(), "val", pairs, input_determined={"network"})
    results.add("majority class", [PredictionResult(pairs[0].completion)] * len(pairs), baseline=True)
    results.add("tuned", [PredictionResult(pair.completion, nll=1.0, tokens=4) for pair in pairs])
    results.add("untuned", [PredictionResult(wrong_answer, False, nll=9.0, tokens=4) for _ in pairs])
    results.about["tuned"] = {"step": 12, "checkpoint": "best.ckpt"}
    return results


class EvaluationData(LightningDataModule):
    """Data module of the pairs above.

    Attributes:
        requests: arguments of each call of ``pairs``.
    """

    def __init__(self, tokenizer):
        super().__init__()
        self.chat, self.tasks, self.requests = ChatFormat(tokenizer), {"risk": short_task()}, []

    def pairs(self, split, task, limit, *, balanced=False):
        self.requests.append((split, task, limit, balanced))
        return PAIRS[split][:limit]

    def loader(self, split):
        examples = self.chat.encode(self.tasks["risk"], PAIRS[split])
        rows = [torch.tensor([[*e.prompt_ids.tolist(), *e.completion_ids.tolist()]]) for e in examples]
        return torch.utils.data.DataLoader(rows, batch_size=None)

    def train_dataloader(self):
        return self.loader("train")

    def val_dataloader(self):
        return self.loader("val")

    def test_dataloader(self):
        return self.loader("test")


class EvaluationModule(LightningModule):
    """Trains a Hugging Face model from a directory."""

    def __init__(self, directory):
        super().__init__()
        self.directory, self.model = directory, None

    def configure_model(self):
        if self.model is None:
            self.model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32)

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def make_evaluation_trainer(directory, callback, steps=0, logger=False, ranks=1, **options):
    """Returns a trainer on CPU with the callback, which prints to a buffer."""
    callback.console = Console(file=StringIO(), width=160)
    return Trainer(
        max_steps=steps, accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", logger=logger,
        default_root_dir=directory, callbacks=[callback], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0, limit_val_batches=1, **options,
    )  # fmt: skip


def read_risk_record(directory, name="evaluation.json"):
    """Returns the record of the risk task in an evaluation file."""
    return json.loads((directory / name).read_text())["tasks"]["risk"]
