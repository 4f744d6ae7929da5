"""Script that validates with Evaluation on several processes, and updates the metrics with each rank's answers."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
from transformers import AutoTokenizer

from callbacks import Evaluation
from lightning_modules.evaluation.answer_parsing import parse_answer
from lightning_modules.evaluation.metrics import AnswerMetrics
from tests.helpers.tiny_evaluation import (
    EvaluationData,
    EvaluationModule,
    make_evaluation_trainer,
    make_pair,
    short_task,
)

if __name__ == "__main__":
    folder, model, ranks = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.manual_seed(0)
    trainer = make_evaluation_trainer(folder, Evaluation(max_new_tokens=5, constrained=False), ranks=ranks)
    trainer.validate(EvaluationModule(model), datamodule=EvaluationData(AutoTokenizer.from_pretrained(model)))
    parsed = []
    for index in range(17):
        pair = make_pair(index)
        answer = make_pair(index + index % 4).completion if index % 5 else "nonsense"
        parsed.append(parse_answer(short_task(), pair, answer))
    metrics = AnswerMetrics(short_task()).to(trainer.strategy.root_device)
    for start in range(trainer.global_rank, len(parsed), 3 * ranks):  # several updates on each rank
        metrics.update(parsed[start : start + 3 * ranks : ranks])
    figures = metrics.results()
    if trainer.is_global_zero:
        (folder / "metrics.json").write_text(json.dumps(figures))
