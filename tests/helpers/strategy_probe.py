"""A callback for the tests of XLA runs; it reads no tensor before training has ended."""

from lightning.pytorch import Callback

from callbacks.xla_monitor import Counts


class Probe(Callback):
    """Keeps each optimizer step's loss, and XLA's counts after each micro-batch.

    Attributes:
        last: the probe of the newest run.
    """

    last = None

    def __init__(self):
        Probe.last = self
        self.losses, self.counts, self.module, self.step = [], [], None, 0

    def on_train_start(self, trainer, pl_module):
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.module = pl_module
        if self.step < trainer.global_step:
            self.step = trainer.global_step
            self.losses.append(pl_module.step_metrics["train/loss"])
        if trainer.strategy.root_device.type == "xla":
            self.counts.append((trainer.global_step, Counts.now()))

    def on_train_end(self, trainer, pl_module):
        self.losses = [float(loss) for loss in self.losses]
