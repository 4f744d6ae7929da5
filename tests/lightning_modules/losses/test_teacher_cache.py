"""A cached teacher: buckets against full softmaxes in float64, and targets at the positions of their labels."""

import copy

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from datamodules.batch import IGNORE_INDEX
from datamodules.errors import UserError
from datamodules.packing import pack, to_batch
from lightning_modules.losses.objectives import Distillation
from lightning_modules.losses.teacher_cache import CachedTeacher, TeacherCache, check_key, targets_of
from lightning_modules.losses.teacher_shards import Targets, summarize
from lightning_modules.models.backend import supervised_positions
from lightning_modules.models.decoder import Predictions
from tests.helpers.teacher_cache_data import EXAMPLES, KEY, V, arrays_of, example, write_cache

N, C = 13, 7
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
TEMPERATURES = (0.5, 1.0, 2.0, 5.0)


def full(student, teacher, temperature, divergence, beta=0.5):
    """Computes the divergence [N] between full softmaxes with torch.nn.KLDivLoss."""
    return over(log_softmax(student / temperature, -1), log_softmax(teacher / temperature, -1), divergence, beta)


def over(s, t, divergence, beta=0.5):
    kl = torch.nn.KLDivLoss(reduction="none", log_target=True)
    if divergence == "forward_kl":
        return kl(s, t).sum(-1)
    if divergence == "reverse_kl":
        return kl(t, s).sum(-1)
    mixture = (beta * t.exp() + (1 - beta) * s.exp()).log()
    return (beta * kl(mixture, t) + (1 - beta) * kl(mixture, s)).sum(-1)


def bucketed(logits, ids, temperature):
    """Computes the log-probabilities of given tokens and of all others together, by summing probabilities."""
    p = torch.softmax(logits / temperature, -1)
    kept = p.gather(1, ids)
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], 1).log()


def targets(logits, k, temperature):
    ids, log_probs, tails = summarize(logits, k, [1.0, temperature])
    return Targets(ids, log_probs, tails[:, 1])


@pytest.fixture
def case():
    hidden = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(C, V, dtype=torch.float64)
    labels = torch.randint(V, (N,))
    labels[3] = labels[12] = IGNORE_INDEX
    return hidden, head, labels, 2 * torch.randn(N, V, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_over_buckets_equals_torch(case, divergence, temperature, alpha):
    hidden, head, labels, teacher = case
    objective = Distillation(alpha=alpha, temperature=temperature, divergence=divergence, beta=0.5, chunk_size=4)
    kept = targets(teacher, 6, temperature)
    for frozen in (False, True):
        model = copy.deepcopy(head).requires_grad_(not frozen)
        sums = objective(Predictions(hidden, model, frozen), labels, kept)
        logits = head(hidden)
        both = (bucketed(x, kept.ids_NK, temperature) for x in (logits, teacher))
        kl = over(*both, divergence)[labels != IGNORE_INDEX].sum()
        expected = alpha * temperature**2 * kl + (1 - alpha) * cross_entropy(logits, labels, reduction="sum")
        torch.testing.assert_close(sums["loss"], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(sums["kl"], kl.detach(), rtol=0, atol=1e-6)
        ours, theirs = (torch.autograd.grad(loss, hidden)[0] for loss in (sums["loss"], expected))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_buckets_are_a_lower_bound_that_rises_with_k_to_the_full_divergence(case, divergence, temperature):
    hidden, head, labels, teacher = case
    labels = labels.clamp(min=0)
    objective = Distillation(temperature=temperature, divergence=divergence)
    upper = float(full(head(hidden).detach(), teacher, temperature, divergence).sum())
    bounds = [
        float(objective(Predictions(hidden, head), labels, targets(teacher, k, temperature))["kl"])
        for k in (1, 3, 8, 20, V - 1)
    ]
    assert bounds == sorted(bounds)
    assert 0 <= bounds[0] < upper
    assert bounds[-1] == pytest.approx(upper, abs=1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_cached_teacher_equal_to_the_student_gives_zero(case, divergence):
    hidden, head, labels, _ = case
    objective = Distillation(alpha=1.0, divergence=divergence, chunk_size=4)
    sums = objective(Predictions(hidden, head), labels, targets(head(hidden).detach(), 5, 2.0))
    assert sums["kl"].abs() < 1e-12
    assert torch.autograd.grad(sums["loss"], hidden)[0].abs().max() < 1e-12


def test_a_teacher_with_probability_1_has_an_empty_tail(case):
    hidden, head, labels, teacher = case
    teacher[:, 0] = 1e6
    kept = targets(teacher, 4, 2.0)
    kept = Targets(kept.ids_NK, kept.log_probs_NK.half(), kept.tail_N.half())
    sums = Distillation()(Predictions(hidden, head), labels, kept)
    assert sums["kl"].isfinite()
    assert torch.autograd.grad(sums["loss"], hidden)[0].isfinite().all()


def test_logits_after_the_teachers_vocabulary_are_ignored(case):
    hidden, head, labels, teacher = case
    labels = labels.clamp(max=V - 5)
    kept = targets(teacher, 4, 2.0)
    wider = torch.nn.Linear(C, V + 3, dtype=torch.float64)
    wider.weight.data[:V], wider.bias.data[:V] = head.weight.data, head.bias.data
    expected = Distillation()(Predictions(hidden, head), labels, kept)["kl"]
    cut = Targets(kept.ids_NK, kept.log_probs_NK, kept.tail_N, vocabulary=V)
    assert torch.isclose(Distillation()(Predictions(hidden, wider), labels, cut)["kl"], expected)


# ---------------------------------------------------------------------- on disk


@pytest.fixture
def folder(tmp_path):
    return write_cache(tmp_path)


def opened(folder, key=KEY, temperature=2.0):
    return CachedTeacher(TeacherCache(str(folder), top_k=4), key, temperature)


@pytest.mark.parametrize("mode", ["none", "packed", "shared_prefix"])
def test_targets_are_at_the_positions_of_their_labels(folder, mode):
    cache = opened(folder)
    rows = pack(EXAMPLES[::-1], sequence_length=32, mode=mode)
    batch = to_batch(rows, 32, batch_size=len(rows) + 1)
    batch.extras = cache(rows)
    labels = batch.labels_BT.flatten()[supervised_positions(batch)]
    read = targets_of(batch, labels, cache.vocabulary)
    assert (read.ids_NK == labels[:, None]).all()
    expected = {e.key: a for part in (EXAMPLES[:5], EXAMPLES[5:]) for e, a in split(part)}
    ordered = [expected[e.key] for row in rows for e in row.examples]
    assert np.array_equal(read.log_probs_NK.numpy(), np.concatenate([a for a, _ in ordered]))
    assert np.array_equal(read.tail_N.numpy(), np.concatenate([a for _, a in ordered]))


def split(examples):
    arrays = arrays_of(examples)
    starts = [0, *arrays["ends"]]
    for e, a, b in zip(examples, starts, starts[1:], strict=False):
        yield e, (arrays["log_probs"][a:b], arrays["tails"][a:b, 1])


def test_positions_without_a_label_add_nothing(folder):
    """With all positions in the objective, as on a TPU, targets are still those of their labels."""
    cache = opened(folder)
    rows = pack(EXAMPLES[:5], sequence_length=40, mode="shared_prefix")
    batch = to_batch(rows, 40)
    batch.extras = cache(rows)
    labels = batch.labels_BT.flatten()
    hidden, head = torch.randn(len(labels), C), torch.nn.Linear(C, V)
    losses = []
    for positions in (supervised_positions(batch), supervised_positions(batch, 16), torch.arange(len(labels))):
        read = targets_of(batch, labels[positions], V)
        assert (read.ids_NK[:, 0] == labels[positions])[labels[positions] >= 0].all()
        losses.append(Distillation()(Predictions(hidden[positions], head), labels[positions], read)["kl"])
    torch.testing.assert_close(losses[1:], losses[:1] * 2)


def test_an_empty_batch_has_a_loss_of_0(folder):
    batch = to_batch([], 16, batch_size=1)
    batch.extras = opened(folder)([])
    objective, empty = Distillation(chunk_size=4), torch.zeros(0, dtype=torch.long)
    for labels in (empty, batch.labels_BT.flatten()):
        student = Predictions(torch.randn(len(labels), C), torch.nn.Linear(C, V))
        assert float(objective(student, labels, targets_of(batch, labels, V))["loss"]) == 0


def test_a_batch_without_targets_has_none():
    batch = to_batch(pack(EXAMPLES, sequence_length=64, mode="packed"), 64)
    assert targets_of(batch, batch.labels_BT.flatten(), V) is None
    with pytest.raises(UserError, match="hold no targets"):
        Distillation()(Predictions(torch.zeros(1, C), torch.nn.Linear(C, V)), torch.zeros(1, dtype=torch.long), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "b"}, "tokenizer was a, is b"),
        ({"data": {"seed": 1, "task_weights": {"risk": 1.0}}}, r"data\.seed was 0, is 1"),
        ({"data": {"seed": 0, "task_weights": {"triage": 1.0}}}, r"data\.task_weights\.risk was 1\.0, is None"),
        ({"top_k": 8}, "top_k was 4, is 8"),
    ],
)
def test_another_key_is_refused_with_the_part_that_differs(folder, change, message):
    with pytest.raises(UserError, match=message):
        opened(folder, KEY | change)


def test_a_machine_without_the_teacher_can_use_its_cache(folder):
    check_key({"teacher": {"weights": "abc", "dtype": "x"}}, {"teacher": {"weights": "absent", "dtype": "x"}}, folder)


def test_unusable_caches_are_refused(folder):
    with pytest.raises(UserError, match=r"temperature 3: the cache .* has 1, 2"):
        opened(folder, temperature=3.0)
    with pytest.raises(UserError, match="covers 10 rows of training and the run takes 11"):
        opened(folder).check_length(11)
    opened(folder).check_length(10)
    with pytest.raises(UserError, match="an example is not in it"):
        opened(folder)(pack([example(5, 4, 3)], sequence_length=32, mode="packed"))
    with pytest.raises(UserError, match="positions there and 9 here"):
        opened(folder)(pack([example(EXAMPLES[0].key, 4, 9)], sequence_length=32, mode="packed"))
    (folder / "done.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        opened(folder)
    with pytest.raises(UserError, match="no teacher's cache there"):
        opened(folder / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"top_k": 0}, "top_k 0"), ({"temperatures": (1.0, 0.0)}, r"temperatures \[1\.0, 0\.0\]")],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        TeacherCache("folder", **arguments)
