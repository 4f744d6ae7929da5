"""A logger without a folder, as those of MLflow and Comet are."""

from lightning.pytorch.loggers import Logger


class RemoteLogger(Logger):
    """Keeps its metrics in memory; ``save_dir`` is None."""

    def __init__(self):
        super().__init__()
        self.metrics = []

    @property
    def name(self):
        return "remote"

    @property
    def version(self):
        return "0f3c"

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, dict(metrics)))
