"""Examples, batches of them in every packing, and runs of a CausalLMModule on the CPU that take milliseconds."""

import os
import socket
import warnings
from functools import partial

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from datamodules.batch import IGNORE_INDEX, Batch
from lightning_modules import Backbone, CausalLMModule, CompletionCrossEntropy, LoRA

SGD = partial(torch.optim.SGD, lr=0.1)
#: lengths of prompt and completion, uneven on purpose
EXAMPLES = [(3, 2), (5, 9), (4, 1), (2, 6), (7, 3), (3, 12), (6, 1), (2, 4)]
PREFIX = 3


def example_ids(seed, prompt, completion):
    """Returns token ids that start with the PREFIX tokens of all examples, and the length of the prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 250, (prompt + completion,), generator=generator)
    return torch.cat([torch.arange(10, 10 + PREFIX), ids]), PREFIX + prompt


def row(examples, tokens, shared_prefix=False):
    """Writes one row of the batch contract by hand: (input_ids, position_ids, labels, segment_ids)."""
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
    """Builds a batch from rows of :func:`row`."""
    ids, positions, labels, segments = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Batch(ids, positions, labels, segments, len(rows), int((labels != IGNORE_INDEX).sum()))


def examples():
    return [example_ids(seed, *lengths) for seed, lengths in enumerate(EXAMPLES)]


def one_by_one():
    """Returns one batch of one padded row per example."""
    return [batch([row([example], 24)]) for example in examples()]


def packed(shared_prefix=True):
    """Returns all examples in one batch of two rows, the first with or without a shared prefix."""
    return batch([row(examples()[:4], 64, shared_prefix), row(examples()[4:], 64)])


def module_for(folder, objective=None, optimizer=SGD, lr_scheduler=None, **lora):
    """Builds a module with its network and an adapter that is not zero."""
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


def loader_of(batches):
    return DataLoader(batches, batch_size=None, collate_fn=lambda item: item)


def quiet_trainer(folder, **options):
    """Builds a trainer on the CPU that prints and logs nothing."""
    options = {"accelerator": "cpu", "devices": 1, "max_steps": 2, "logger": False} | options
    return Trainer(default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, **options)


def fit(module, batches, folder, **options):
    """Trains on a list of batches, one step unless ``max_steps`` is given; returns the trainer."""
    trainer = quiet_trainer(folder, **{"max_steps": 1, "enable_checkpointing": False, "log_every_n_steps": 1} | options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*`training_step` returned.*")
        trainer.fit(module, loader_of(batches))
    return trainer


class Data(LightningDataModule):
    """The same batches for fit, validate and test; by default one example each."""

    def __init__(self, batches=None):
        super().__init__()
        self.batches = batches or one_by_one()

    def train_dataloader(self):
        return loader_of(self.batches)

    val_dataloader = test_dataloader = train_dataloader


def checkpointed(module, folder, **options):
    """Trains two steps and saves a checkpoint; returns the trainer and the path."""
    trainer = quiet_trainer(folder, **options)
    trainer.fit(module, Data())
    path = folder / "saved.ckpt"
    trainer.save_checkpoint(path)
    return trainer, path


def trained(module):
    """Returns copies of the trainable parameters by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def assert_same(first, second, atol=1e-6):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def run_two_ranks(function, *arguments):
    """Calls ``function(rank, port, *arguments)`` in two processes that may form a gloo group on the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(function, (port, *arguments), nprocs=2)


def join_ranks(rank, port):
    """Sets the environment of one of two processes; called first in the function of :func:`run_two_ranks`."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update(address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    torch.set_num_threads(1)
