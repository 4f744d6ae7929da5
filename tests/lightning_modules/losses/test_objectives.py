"""Each loss against torch's own losses and autograd on full logits, in float64 at odd shapes."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax, softmax

from lightning_modules.losses.objectives import CompletionCrossEntropy, Distillation, HiddenMatch
from lightning_modules.losses.teacher_cache import TeacherCache
from lightning_modules.models.backbone import Backbone
from lightning_modules.models.decoder import Predictions

N, C, V = 13, 7, 41
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


@pytest.fixture
def case():
    """Returns hidden states, labels (two are ignored), a student's head and a teacher's predictions, in float64."""
    hidden = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(C, V, bias=False, dtype=torch.float64)
    labels = torch.randint(V, (N,))
    labels[3] = labels[12] = -100
    teacher_head = torch.nn.Linear(C, V, dtype=torch.float64)
    teacher = Predictions(torch.randn(N, C, dtype=torch.float64), teacher_head)
    return hidden, head, labels, teacher


def gradients(loss, hidden, head):
    return torch.autograd.grad(loss, [hidden, head.weight])


def frozen_gradient(objective, hidden, head, *others):
    """Returns the sums and the gradient of three times the loss, with a frozen head."""
    frozen = copy.deepcopy(head).requires_grad_(False)
    sums = objective(Predictions(hidden, frozen, frozen_head=True), *others)
    return sums, torch.autograd.grad(3 * sums["loss"], hidden)[0]


def reference_divergence(student, teacher, temperature, divergence, beta):
    """Sums over rows with torch.nn.KLDivLoss, which takes log q as input and log p as target for KL(p || q)."""
    kl = torch.nn.KLDivLoss(reduction="sum", log_target=True)
    s, t = log_softmax(student / temperature, -1), log_softmax(teacher / temperature, -1)
    if divergence == "forward_kl":
        return kl(s, t)
    if divergence == "reverse_kl":
        return kl(t, s)
    mixture = (beta * softmax(teacher / temperature, -1) + (1 - beta) * softmax(student / temperature, -1)).log()
    return beta * kl(mixture, t) + (1 - beta) * kl(mixture, s)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_cross_entropy_equals_torch_in_chunks_of_any_size(case, chunk):
    hidden, head, labels, _ = case
    sums = CompletionCrossEntropy(chunk_size=chunk)(Predictions(hidden, head), labels)
    expected = cross_entropy(head(hidden), labels, reduction="sum")
    torch.testing.assert_close(sums["loss"], expected, rtol=0, atol=1e-9)
    reference = gradients(expected, hidden, head)
    for gradient, expected_gradient in zip(gradients(sums["loss"], hidden, head), reference, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)
    assert sums["correct"] == (head(hidden).argmax(-1) == labels).sum()
    frozen, gradient = frozen_gradient(CompletionCrossEntropy(chunk_size=chunk), hidden, head, labels)
    assert all(torch.equal(frozen[name], value) for name, value in sums.items())
    torch.testing.assert_close(gradient, 3 * reference[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_distillation_equals_torch(case, divergence, temperature, alpha):
    hidden, head, labels, teacher = case
    objective = Distillation(alpha=alpha, temperature=temperature, divergence=divergence, beta=0.3, chunk_size=4)
    sums = objective(Predictions(hidden, head), labels, teacher)
    kept = labels != -100
    student_logits, teacher_logits = head(hidden), teacher.head(teacher.hidden_NC).detach()
    kl = reference_divergence(student_logits[kept], teacher_logits[kept], temperature, divergence, beta=0.3)
    ce = cross_entropy(student_logits, labels, reduction="sum")
    expected = alpha * temperature**2 * kl + (1 - alpha) * ce
    torch.testing.assert_close(sums["loss"], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(sums["ce"], ce.detach(), rtol=0, atol=1e-6)
    if alpha:
        torch.testing.assert_close(sums["kl"], kl.detach(), rtol=0, atol=1e-6)
    reference = gradients(expected, hidden, head)
    for gradient, expected_gradient in zip(gradients(sums["loss"], hidden, head), reference, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-6)
    frozen, gradient = frozen_gradient(objective, hidden, head, labels, teacher)
    assert all(torch.equal(frozen[name], value) for name, value in sums.items())
    torch.testing.assert_close(gradient, 3 * reference[0], rtol=0, atol=1e-6)


def test_alpha_0_equals_cross_entropy_bit_for_bit_and_needs_no_teacher(case):
    hidden, head, labels, _ = (x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in case)
    hidden = hidden.detach().requires_grad_()
    head = head.float()
    objective = Distillation(teacher=Backbone("never/loaded"), alpha=0.0, chunk_size=5)
    assert objective.teacher_backbone is None
    distilled = objective(Predictions(hidden, head), labels)["loss"]
    plain = CompletionCrossEntropy(chunk_size=5)(Predictions(hidden, head), labels)["loss"]
    assert torch.equal(distilled, plain)
    for a, b in zip(gradients(distilled, hidden, head), gradients(plain, hidden, head), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_equal_to_the_student_gives_zero(case, divergence):
    hidden, head, labels, _ = case
    objective = Distillation(alpha=1.0, divergence=divergence, chunk_size=4)
    sums = objective(Predictions(hidden, head), labels, Predictions(hidden.detach(), head))
    assert sums["kl"].abs() < 1e-12
    for gradient in gradients(sums["loss"], hidden, head):
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_inputs_are_summed_in_float32(case, dtype):
    hidden, head, labels, teacher = case
    small = hidden.detach().to(dtype).requires_grad_()
    weight = head.weight.detach().to(dtype)
    student = Predictions(small, lambda h: (h @ weight.T).float())
    teaching = Predictions(teacher.hidden_NC.to(dtype), lambda h: (h.double() @ teacher.head.weight.T).float().detach())
    sums = Distillation(chunk_size=4)(student, labels, teaching)
    assert sums["loss"].dtype == torch.float32
    exact = Distillation(chunk_size=64)(
        Predictions(small.detach().double(), lambda h: h @ weight.double().T),
        labels,
        Predictions(teaching.hidden_NC.double(), lambda h: h @ teacher.head.weight.T),
    )
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert abs(float(sums["loss"].detach().double() / exact["loss"]) - 1) < tolerance
    sums["loss"].backward()
    assert small.grad.isfinite().all()


def test_a_teacher_gets_no_gradient(case):
    hidden, head, labels, teacher = case
    Distillation()(Predictions(hidden, head), labels, teacher)["loss"].backward()
    assert teacher.head.weight.grad is None


def test_logits_after_the_shorter_vocabulary_are_ignored(case):
    hidden, head, labels, teacher = case
    labels = labels.clamp(max=V - 5)
    longer = torch.nn.Linear(C, V + 3, dtype=torch.float64)
    longer.weight.data[:V], longer.bias.data[:V] = teacher.head.weight.data, teacher.head.bias.data
    same = Distillation()(Predictions(hidden, head), labels, teacher)
    padded = Distillation()(Predictions(hidden, head), labels, Predictions(teacher.hidden_NC, longer))
    torch.testing.assert_close(padded["loss"], same["loss"])


@pytest.mark.parametrize("objective", [CompletionCrossEntropy(), Distillation()])
def test_no_tokens_give_zero(case, objective):
    _, head, _, teacher = case
    empty = Predictions(torch.zeros(0, C, dtype=torch.float64), head)
    sums = objective(empty, torch.zeros(0, dtype=torch.long), Predictions(empty.hidden_NC, teacher.head))
    assert all(value == 0 for value in sums.values())


def test_full_logits_are_never_computed(case):
    """The head gets at most one chunk, in the backward pass too."""
    hidden, head, labels, _ = case
    seen = []

    def watched(hidden_NC):
        seen.append(len(hidden_NC))
        return head(hidden_NC)

    CompletionCrossEntropy(chunk_size=4)(Predictions(hidden, watched), labels)["loss"].backward()
    assert seen == [4, 4, 4, 1, 1, 4, 4, 4]


def test_a_frozen_head_computes_each_chunk_once(case):
    hidden, head, labels, _ = case
    head.requires_grad_(False)
    seen = []

    def watched(hidden_NC):
        seen.append(len(hidden_NC))
        return head(hidden_NC)

    objective = CompletionCrossEntropy(chunk_size=4)
    with torch.no_grad():
        objective(Predictions(hidden, watched, frozen_head=True), labels)
    sums = objective(Predictions(hidden, watched, frozen_head=True), labels)
    assert seen == [4, 4, 4, 1, 4, 4, 4, 1]
    assert not sums["correct"].requires_grad
    sums["loss"].backward()
    assert len(seen) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"alpha": 1.5}, "alpha 1.5"), ({"temperature": 0}, "temperature 0"), ({"beta": 1.0}, "beta 1.0")],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**arguments)


# ---------------------------------------------------------------------- hidden states


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_hidden_states_are_matched_on_supervised_tokens_alone(case, alpha):
    hidden, head, labels, teacher = case
    states = [torch.randn(N, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    targets = [torch.randn(N, 3, dtype=torch.float64) for _ in range(2)]
    objective = Distillation(alpha=alpha, hidden=HiddenMatch({"layers.0": "layers.1", "layers.1": "layers.3"}, 0.7))
    student = Predictions(hidden, head, states=states)
    sums = objective(student, labels, Predictions(teacher.hidden_NC, teacher.head, states=targets))
    kept = labels != -100
    expected = sum(
        torch.nn.functional.mse_loss(s[n], t[n]) / t[n].pow(2).mean()
        for s, t in zip(states, targets, strict=True)
        for n in range(N)
        if kept[n]
    ) / len(states)
    torch.testing.assert_close(sums["hidden"], expected.detach(), rtol=0, atol=1e-9)
    without = Distillation(alpha=alpha, hidden=None)(student, labels, teacher)
    torch.testing.assert_close(sums["loss"], without["loss"] + 0.7 * expected, rtol=0, atol=1e-9)
    for s in states:
        gradient = torch.autograd.grad(sums["loss"], s, retain_graph=True)[0]
        torch.testing.assert_close(gradient, torch.autograd.grad(0.7 * expected, s, retain_graph=True)[0])
        assert (gradient[~kept] == 0).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HiddenMatch({}), "layers is empty"),
        (lambda: HiddenMatch({"layers.0": "layers.0"}, 0), "weight 0"),
        (
            lambda: Distillation(hidden=HiddenMatch({"layers.0": "layers.0"}), cache=TeacherCache("somewhere")),
            "a cache holds no hidden states",
        ),
    ],
)
def test_invalid_hidden_matching_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
