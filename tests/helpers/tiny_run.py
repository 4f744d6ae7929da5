"""A training run with steps of a few milliseconds, for tests of callbacks; also a script for tests of signals."""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from callbacks import AdapterCheckpoint, Preemption, RunRecord
from datamodules.batch import IGNORE_INDEX, PADDING, Batch
from optimizers import Lion, WarmupCosine

ROW, PADDED, SUPERVISED, FINDINGS, VOCABULARY = 16, 3, 5, 2, 11


def make_batch(index):
    """Returns two rows of 16 positions, each with 3 padding positions, 5 labels and 2 examples."""
    generator = torch.Generator().manual_seed(index)
    ids_BT = torch.randint(VOCABULARY, (2, ROW), generator=generator)
    segments_BT = torch.ones(2, ROW, dtype=torch.int64)
    segments_BT[:, 6:] = 2
    segments_BT[:, ROW - PADDED :] = PADDING
    labels_BT = torch.full((2, ROW), IGNORE_INDEX)
    labels_BT[:, 4 : 4 + SUPERVISED] = ids_BT[:, 5 : 5 + SUPERVISED]
    positions_BT = torch.arange(ROW).expand(2, ROW).clone()
    counts = {"findings": 2 * FINDINGS, "supervised": 2 * SUPERVISED, "padding": 2 * PADDED}
    return Batch(ids_BT, positions_BT, labels_BT, segments_BT, **counts)


class Rows:
    """Loader with a length and the position of the last yielded row."""

    def __init__(self, length, start=0):
        self.length, self.start, self.position = length, start, start

    def __len__(self):
        return self.length

    def __iter__(self):
        start, self.start = self.start, 0
        for position in range(start + 1, self.length + 1):
            self.position = position
            yield make_batch(position)


class Tokenizer:
    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


class Chat:
    tokenizer = Tokenizer()


class TinyData(LightningDataModule):
    """Data module with a cursor, which Lightning restores before any loader is created.

    The state of a loader would be restored too late: ``estimated_stepping_batches`` in ``configure_optimizers``
    iterates first.
    """

    chat = Chat()

    def __init__(self, train=12, val=3):
        super().__init__()
        self.train, self.val, self.start, self.rows = train, val, 0, None

    def fingerprint(self):
        return f"{self.train}-{self.val}"

    def train_dataloader(self):
        self.rows = Rows(self.train, self.start)
        return self.rows

    def val_dataloader(self):
        return Rows(self.val)

    def state_dict(self):
        return {"position": self.rows.position}

    def load_state_dict(self, state):
        self.start = state["position"] % self.train


class TinyModule(LightningModule):
    """Predicts the next token from the current one; calls ``on_step(stage, batch_idx)`` in each step."""

    def __init__(self, on_step=lambda stage, index: None):
        super().__init__()
        self.on_step = on_step
        self.model = None

    def configure_model(self):
        if self.model is None:
            with torch.random.fork_rng():
                torch.manual_seed(3)
                self.model = nn.ModuleDict({"embed": nn.Embedding(VOCABULARY, 8), "lm_head": nn.Linear(8, VOCABULARY)})

    def loss(self, batch):
        logits_BTV = self.model["lm_head"](self.model["embed"](batch.input_ids_BT))
        return nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch.labels_BT.flatten())

    def training_step(self, batch, batch_idx):
        self.on_step("train", batch_idx)
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.on_step("val", batch_idx)
        self.log("val/loss", self.loss(batch), batch_size=2)

    def configure_optimizers(self):
        optimizer = Lion(self.parameters(), lr=3e-4)
        scheduler = WarmupCosine(optimizer, self.trainer.estimated_stepping_batches, warmup_steps=2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def save_adapter(self, path):
        if self.trainer.is_global_zero:
            torch.save(self.model.state_dict(), path / "adapter.pt")


def set_global_step(trainer, step):
    """Sets ``trainer.global_step``, which has no setter, to the given number of optimizer steps."""
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step


def make_trainer(folder, callbacks, **options):
    """Returns a trainer on CPU that logs to ``<folder>/version_0``."""
    logger = TensorBoardLogger(folder, name="", version="version_0")
    options = {"max_epochs": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 0, "devices": 1} | options
    if not any(hasattr(callback, "refresh_seconds") for callback in callbacks):
        options["enable_progress_bar"] = False
    return Trainer(accelerator="cpu", logger=logger, callbacks=callbacks, enable_model_summary=False, **options)


def best_and_last(**options):
    """Returns a checkpoint callback that writes ``best.ckpt`` and ``last.ckpt``."""
    return ModelCheckpoint(filename="best", monitor="val/loss", save_last=True, **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    arguments = parser.parse_args()

    def print_batch(stage, index):
        if stage == "train":
            os.write(1, f"batch {index}\n".encode())
            time.sleep(0.3)

    callbacks = [RunRecord(), Preemption(agree_every_n_steps=1), AdapterCheckpoint(), best_and_last()]
    strategy = "ddp" if arguments.devices > 1 else "auto"
    options = {"accumulate_grad_batches": 3, "devices": arguments.devices, "strategy": strategy}
    make_trainer(arguments.folder, callbacks, **options).fit(TinyModule(print_batch), TinyData())
