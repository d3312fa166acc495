"""The linear probe against scikit-learn; LP++ and ProLIP against PyTorch's own gradients and optimizers."""

import math

import pytest
import torch
from torch.nn import functional as F

from cafo.methods.linear_probe import LinearProbe
from cafo.methods.lp_plus_plus import LpPlusPlus
from cafo.methods.prolip import ProLip
from tests.cafo.methods import problem


@pytest.mark.parametrize("shots", [3, 5])  # fewer images than the features' width, and more
def test_linear_probe_is_logistic_regression(shots):
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, others, _ = problem.images(seed=7, shots=shots)
    fitted = LinearProbe(inverse_penalties=(0.01, 1.0, 30.0), tolerance=1e-9).fit(train, 0)
    for inverse_penalty in (0.01, 1.0, 30.0):
        oracle = linear_model.LogisticRegression(C=inverse_penalty, tol=1e-9, max_iter=10_000)
        oracle.fit(train.plain.embeddings.double().numpy(), train.labels.numpy())
        got = fitted.terms(others)({"inverse_penalty": inverse_penalty}).logits(0.0)
        expected = torch.from_numpy(oracle.decision_function(others.embeddings.double().numpy()))
        centred = got - got.mean(dim=1, keepdim=True)  # equal constants of all classes do not count
        problem.close(centred, (expected - expected.mean(dim=1, keepdim=True)).tolist(), 1e-3, 1e-3)


@pytest.mark.parametrize("running_sum", [True, False])
def test_lp_plus_plus(running_sum):
    train, others, _ = problem.images(seed=8, noise=3.0)
    fitted = LpPlusPlus(epochs=30, running_sum=running_sum).fit(train, 0)
    assert list(fitted.epochs) == [10, 20, 30]
    f = F.normalize(train.views.embeddings[0].double(), dim=-1)
    t, y, count = train.classifier.double().T, train.labels, len(train.labels)
    weights = torch.stack([sum(f[i] for i in range(count) if y[i] == c) for c in range(problem.N)])
    own = [torch.stack([f[i] @ t[c] for i in range(count) if y[i] == c]).mean() for c in range(problem.N)]
    text = torch.full((problem.N,), 250 * float(sum(own) / problem.N), dtype=torch.float64)
    text.requires_grad_()
    linear = torch.nn.Linear(problem.C, problem.N).double()
    linear.weight.data, linear.bias.data = weights, torch.zeros(problem.N).double()
    lr = 4 * count / torch.linalg.eigvalsh(f.T @ f).max()
    text_lr = count / (4 * max(sum((f[i] @ t[c]) ** 2 for i in range(count)) for c in range(problem.N)))
    optimizer = torch.optim.SGD(linear.parameters(), lr=float(lr), momentum=0.9)
    for epoch in range(30):
        if not running_sum:
            text.grad = None
        optimizer.zero_grad()
        F.cross_entropy(linear(f) + text * (f @ t.T), y).backward()
        optimizer.step()
        if epoch % 10 == 9:
            text.data = text.data - text_lr * text.grad
    test = F.normalize(others.embeddings.double(), dim=-1)
    expected = (linear(test) + text * (test @ t.T)).tolist()
    problem.close(fitted.terms(others)({"epoch": 30}).logits(1.0), expected, 1e-3, 1e-3)


def prolip_loop(train, inputs, weight, bias, lr, penalty, steps):
    """Adam by its equations, on gradients of the loss written out for one image after another."""
    start, first, second = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    text = train.classifier.double().T
    for step in range(steps):
        now = weight.clone().requires_grad_()
        loss = penalty * ((now - start) ** 2).sum()
        for x, label in zip(inputs[(step + 1) % len(inputs)], train.labels, strict=True):
            z = now @ x + bias
            logits = 100 * (text @ z) / z.norm()
            loss = loss - (logits[label] - logits.logsumexp(0)) / len(train.labels)
        (gradient,) = torch.autograd.grad(loss, now)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        rate = lr * (1 + math.cos(math.pi * step / steps)) / 2
        adapted = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-4
        weight = weight - rate * (first / (1 - 0.9 ** (step + 1))) / adapted
    return weight


@pytest.mark.parametrize("on_embeddings", [False, True])
def test_prolip_and_rla(on_embeddings):
    train, others, _ = problem.images(seed=9, noise=3.0)
    fitted = ProLip(on_embeddings=on_embeddings, steps=13).fit(train, 0)
    if on_embeddings:
        inputs, x = (F.normalize(f.embeddings.double(), dim=-1) for f in (train.views, others))
        weight, bias = torch.eye(problem.C).double(), torch.zeros(problem.C).double()
    else:
        inputs, x = train.views.unprojected.double(), others.unprojected.double()
        weight, bias = train.projection.weight.double(), train.projection.bias.double()
    trained = prolip_loop(train, inputs, weight, bias, 1e-2, 0.8 / problem.SHOTS, 13)
    got = fitted.weight(1e-2, 0.8)
    torch.testing.assert_close(got.double(), trained, rtol=1e-3, atol=1e-4)
    assert (trained - weight).abs().max() > 0.01
    z = F.linear(x, trained, bias)
    expected = 100 * F.normalize(z, dim=-1) @ train.classifier.double()
    terms = fitted.terms(others)({"learning_rate": 1e-2, "penalty": 0.8})
    problem.close(terms.logits(1.0), expected.tolist(), 1e-3, 1e-2)
