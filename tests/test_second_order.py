"""i-DODE's second order: its published forms, its closed forms, its gradient, and training with it."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nelbo import checkpoints, cli, likelihood, objectives, pixels, times
from nelbo.compose import build_model
from nelbo.data import load
from nelbo.data.loader import permutation
from nelbo.draws import Draws, generator
from nelbo.errors import UserError
from nelbo.model import DiffusionModel
from nelbo.objectives import TermsAndSecondOrder, elbo, second_order_residual
from nelbo.parameterizations import PARAMETERIZATIONS
from nelbo.paths import PATHS
from nelbo.training import Loss, Trainer, train
from test_objectives import schedules
from test_times import bound, learner
from tiny import change, files, flags, metrics, tiny
from toys import FLOAT, build, gaussian, linear, mixture, polynomial, product_grid, tensor, two_pixels

quiet: dict[str, Any] = {"say": lambda line: None}
G0, G1 = -13.3, 5.0
SIGNS = tensor([-1.0, 1.0])


class Curved(nn.Module):
    """A small network of z and gamma with a full Jacobian, and parameters."""

    def __init__(self, dimensions: int, columns: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Linear(dimensions + 1 + columns, 9)
        self.outside = nn.Linear(9, dimensions)
        self.double()
        for parameter in self.parameters():
            parameter.data.mul_(3)

    def forward(self, z: torch.Tensor, gamma: torch.Tensor, conditioning: torch.Tensor | None = None) -> torch.Tensor:
        level = gamma.expand(len(z), *gamma.shape[1:]).mean((1, 2, 3))[:, None] / 10
        columns = [] if conditioning is None else [conditioning]
        h = torch.tanh(self.inside(torch.cat([z.flatten(1), level, *columns], 1)))
        return z + self.outside(h).reshape(z.shape)


def curved(shape, schedule, path, parameterization, **fields):
    """A DiffusionModel with that network."""
    p, q = PATHS[path](), PARAMETERIZATIONS[parameterization]()
    return DiffusionModel(Curved(math.prod(shape)), schedule, p, q, shape, 4, **fields).to(FLOAT)


def jacobians(model, z, gamma):
    """d out/d z for every row, (B, D, D), by autodiff entry by entry; differentiable."""
    z = z.detach().requires_grad_()
    out = model(z, gamma).flatten(1)
    parts = [torch.autograd.grad(out[:, i].sum(), z, create_graph=True)[0].flatten(1) for i in range(out.shape[1])]
    return out, torch.stack(parts, 1)


def draw(shape, rows=7, seed=0):
    """x, eps, probes of some rows."""
    random = torch.Generator().manual_seed(seed)
    x, eps = torch.randn(2, rows, *shape, generator=random, dtype=FLOAT)
    return x, eps, SIGNS[torch.randint(2, (rows, *shape), generator=random)]


T = torch.linspace(0.02, 0.97, 7, dtype=FLOAT)


# The published forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", [True, False])
@pytest.mark.parametrize("parameterization", ["velocity", "noise"])
@pytest.mark.parametrize("path", PATHS)
def test_the_published_losses(path, parameterization, importance):
    """0.1 w r^2/D with i-DODE's own network F, weights w and residuals r, and the trace by the same probe."""
    shape = (1, 2, 2)
    model = curved(shape, linear(G0, G1), path, parameterization)
    x, eps, probe = draw(shape)
    images = torch.randint(4, (7, *shape), generator=torch.Generator().manual_seed(1))
    x = 2 * (images + 0.5) / 4 - 1
    terms = elbo(
        model, images, t=T, eps=eps, eps_0=eps, importance=importance, second_order=0.1, probe=probe, dtype=FLOAT
    )
    assert isinstance(terms, TermsAndSecondOrder)
    t = times.importance(T, model.curve(None), model.path, True)[0] if importance else T
    gamma = (G0 + (G1 - G0) * t).reshape(-1, 1, 1, 1)
    alpha, sigma = (v.flatten() for v in model.path.coefficients(gamma))
    z = model.path.diffuse(x, gamma, eps)
    out, jacobian = jacobians(model, z, gamma)
    e, d = probe.flatten(1), 4
    root = math.sqrt(2) if (path, parameterization) == ("straight", "velocity") else 1.0
    target = model.parameterization.target(model.path, gamma, x, eps).flatten(1)
    mse = ((out - target) ** 2).sum(1) / root**2  # of F = out/sqrt 2
    div = torch.einsum("bi,bij,bj->b", e, jacobian, e) / root
    z_mass = {"vp": 13.293286, "straight": 11.299108}[path]
    if parameterization == "noise":
        weight, residual = (G1 - G0) / 2, sigma * div - (d - mse)
        if importance:
            weight = 0.5 * z_mass / alpha**2
    elif path == "vp":
        weight, residual = z_mass / 2 if importance else 0.5 * (G1 - G0) * alpha**2, sigma * div - alpha * (d - mse)
    else:
        weight = z_mass if importance else (G1 - G0) * alpha**2
        residual = sigma * div - d / math.sqrt(2) + math.sqrt(2) * alpha * mse
    expected = 0.1 * weight * residual**2 / d
    assert torch.allclose(terms.second_order, expected.detach(), rtol=1e-6)
    assert torch.allclose(terms.loss, terms.total + terms.second_order)


# Closed forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["fixed linear", "polynomial"])
def test_gaussian_data(kind, path, parameterization):
    """The exact denoiser of independent Gaussians: given z the residual has mean 0 and variance 2 sum gamma' Var^2.

    Var = alpha^2 s^2/(alpha^2 s^2 + sigma^2) is that of eps_i given z, and eps = mean + sqrt(Var) eta.
    """
    toy = gaussian([0.3, 1.7])
    schedule = schedules(toy.shape)[kind]
    model = build(toy, schedule, path, parameterization)
    # eta^2 - 1 is all that the residual sees of eta: +-a, 0 with the moments of N(0, 1) up to the fifth.
    eta, weights = product_grid(tensor([-math.sqrt(3), 0.0, math.sqrt(3)]), tensor([1 / 6, 2 / 3, 1 / 6]), 2)
    for t in (0.05, 0.4, 0.6, 0.95):
        with torch.no_grad():
            gamma, rate = schedule(tensor([t]))
        alpha, sigma = (v.expand(1, *toy.shape) for v in model.path.coefficients(gamma))
        total = alpha**2 * toy.variance + sigma**2
        z = tensor([0.3, -0.8]).reshape(1, *toy.shape)
        variance = alpha**2 * toy.variance / total
        eps = sigma * z / total + variance.sqrt() * eta.reshape(-1, *toy.shape)
        x = (z - sigma * eps) / alpha
        for probe in product_grid(SIGNS, SIGNS, 2)[0]:
            residual = second_order_residual(
                model, x, torch.full((9,), t, dtype=FLOAT), eps, probe.reshape(1, *toy.shape).expand_as(x)
            ).detach()
            scale = (rate * torch.ones(toy.shape)).sum().sqrt()
            assert abs((weights @ residual).item()) < 1e-9 * scale
            found, expected = (weights @ residual**2).item(), 2 * (rate * variance**2).sum().item()
            assert found == pytest.approx(expected, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("parameterization", ["noise", "velocity"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("data", ["discrete", "mixture"])
def test_the_exact_denoiser_has_no_residual(data, path, parameterization):
    """Dependent pixels, a gamma each: over eps given z and all probes the residual of the exact denoiser has mean 0;
    that of a denoiser that errs has another."""
    toy = two_pixels() if data == "discrete" else mixture()
    schedule = polynomial(toy.shape, -9.0, G1, seed=3)
    probes = product_grid(SIGNS, SIGNS, 2)[0]
    eta, weights = product_grid(SIGNS, tensor([0.5, 0.5]), 2)  # the residual is quadratic in eps
    z = tensor([0.25, -0.4])
    for t in (0.1, 0.35, 0.7):
        means = {}
        for name, wrong in (("exact", None), ("errs", {"distort": lambda e, z, g: 0.8 * e})):
            model = build(toy, schedule, path, parameterization, wrong=wrong)
            with torch.no_grad():
                gamma, rate = schedule(tensor([t]))
            alpha, sigma = (v.flatten() for v in model.path.coefficients(gamma))
            total = alpha**2 * toy.variance + sigma**2
            logits = toy.log_weights - 0.5 * ((z - alpha * toy.means) ** 2 / total).sum(1)
            i, j, k = torch.cartesian_prod(*map(torch.arange, (len(toy.means), len(eta), 4))).T
            # x given z and its component.
            mean = toy.means[i] + alpha * toy.variance / total * (z - alpha * toy.means[i])
            x = mean + (toy.variance * sigma**2 / total).sqrt() * eta[j]
            eps = (z - alpha * x) / sigma
            shape = (len(i), *toy.shape)
            residual = second_order_residual(
                model, x.reshape(shape), torch.full((len(i),), t, dtype=FLOAT), eps.reshape(shape),
                probes[k].reshape(shape),
            ).detach()  # fmt: skip
            weight = torch.softmax(logits, 0)[i] * weights[j] / 4
            means[name] = (weight @ residual).item() / rate.sum().sqrt().item()
        assert abs(means["exact"]) < 1e-7
        assert abs(means["errs"]) > 1e-3


def test_the_trace_is_unbiased_and_its_square_exceeds_by_its_variance():
    """All 2^4 probes: the mean residual has the exact trace; the square's mean is higher by
    sum_{i<j} (w_i J_ij + w_j J_ji)^2."""
    shape = (1, 2, 2)
    model = curved(shape, polynomial(shape, G0, G1, seed=2), "vp", "velocity")
    x, eps, _ = draw(shape, 1)
    t = tensor([0.6])
    probes = product_grid(*[SIGNS] * 2, 4)[0].reshape(16, *shape)
    residual = second_order_residual(model, x.expand(16, *shape), t.expand(16), eps.expand(16, *shape), probes).detach()
    gamma, rate = (v.detach() for v in model.curve(None)(t))
    alpha, sigma = model.path.coefficients(gamma)
    z = model.path.diffuse(x, gamma, eps)
    out, jacobian = jacobians(model, z, gamma)
    weighted = (rate.sqrt() * alpha * sigma).flatten()[:, None] * jacobian[0].detach()
    _, eps_hat = model.parameterization.solve(model.path, gamma, z, out.detach().reshape(z.shape))
    # eps_hat = alpha out + sigma z
    rest = (rate.sqrt() * (sigma**2 - 1 + (eps - eps_hat) ** 2)).sum()
    exact = weighted.trace() + rest
    assert residual.mean().item() == pytest.approx(exact.item(), rel=1e-10)
    both = weighted + weighted.T
    extra = (both.triu(1) ** 2).sum()
    assert (residual**2).mean().item() == pytest.approx((exact**2 + extra).item(), rel=1e-10)
    assert extra > 1e-4 * exact**2


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_the_gradient_holds_the_error_constant(path):
    """Against a residual from entry-by-entry Jacobians, the squared error detached; without detaching it differs."""
    shape = (1, 2, 2)
    model = curved(shape, polynomial(shape, G0, G1, seed=2), path, "velocity")
    x, eps, probe = draw(shape)
    parameters = [p for name, p in model.network.named_parameters() if name != "outside.bias"]  # no part of J
    found = torch.autograd.grad((second_order_residual(model, x, T, eps, probe) ** 2).sum(), parameters)
    gamma, rate = (v.detach() for v in model.curve(None)(T))
    alpha, sigma = (v.flatten(1) for v in model.path.coefficients(gamma))
    z = model.path.diffuse(x, gamma, eps)

    def expected(detach):
        out, jacobian = jacobians(model, z, gamma)
        _, eps_hat = model.parameterization.solve(model.path, gamma, z, out.reshape(z.shape))
        error = (eps - eps_hat).flatten(1) ** 2
        own = sigma if path == "vp" else 1.0  # d eps_hat/d z = alpha J + own
        weight = rate.flatten(1).sqrt() * sigma * alpha * probe.flatten(1)
        trace = torch.einsum("bi,bij,bj->b", weight, jacobian, probe.flatten(1))
        rest = rate.flatten(1).sqrt() * (sigma * own - 1 + (error.detach() if detach else error))
        return torch.autograd.grad(((trace + rest.sum(1)) ** 2).sum(), parameters)

    for left, right, other in zip(found, expected(True), expected(False), strict=True):
        assert torch.allclose(left, right, rtol=1e-8, atol=1e-10 * right.abs().max().item())
        assert not torch.allclose(left, other, rtol=1e-2)


def test_schedule_and_latent_follow_the_bound_alone():
    """The term's gradient reaches the network and nothing else; the bound's gradient is what it was."""
    config = tiny("mulan-digits", parameterization="velocity", objective__times="importance")
    model = build_model(config, (1, 8, 8), 17)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    images = torch.from_numpy(load("digits").images["train"][:6])
    u = (torch.arange(6) + 0.3) / 6

    def gradients(second_order, part):
        terms = likelihood.draw_terms(model, images, u, Draws(0, range(6)), importance=True, second_order=second_order)
        model.zero_grad()
        (terms.total if part == "bound" else terms.second_order).mean().backward()
        return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}

    added = gradients(0.1, "added")
    reached = {name for name, g in added.items() if g is not None and g.norm() > 0}
    assert reached and all(name.startswith("network.") for name in reached)
    alone, beside = gradients(0.0, "bound"), gradients(0.1, "bound")
    assert {name.split(".")[0] for name, g in alone.items() if g is not None and g.norm() > 0} == {
        "network", "schedule", "encoder",
    }  # fmt: skip
    for name, g in alone.items():
        assert (g is None) == (beside[name] is None)
        assert g is None or torch.allclose(g, beside[name], rtol=1e-4, atol=1e-6)


ATTENDING = tiny(
    "idode-sp-digits", network__channels=16, network__levels=1, network__attention="everywhere",
    objective__second_order=0.1, training__batch=4,
)  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_with_attention_recomputed_and_in_bf16(checkpointing: bool, precision: str, tmp_path: Path) -> None:
    """Fused attention has no second derivative and recomputation must know: all ways give the step of plain float32."""
    changed = change(ATTENDING, {"network.checkpointing": checkpointing, "training.precision": precision})
    norms, figures = [], []
    for config in (ATTENDING, changed):
        trainer = Trainer(config, tmp_path / "none", load("digits"))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in trainer.model.network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        trainer.take_step()
        norms.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
        figures.append(trainer.window["second_order"])
        assert sum(trainer.memory().values()) > 0
    tolerance = 0.03 if precision == "bf16" else 1e-6
    assert (norms[1] - norms[0]).norm() <= tolerance * norms[0].norm()
    assert figures[1] == pytest.approx(figures[0], rel=tolerance)


# Training ------------------------------------------------------------------------------------------------------------


def test_the_log_shows_it_beside_the_bound(tmp_path: Path) -> None:
    """Step 1 by hand: the figures of the bound are those without it, the gradient that of both."""
    config = tiny("idode-sp-digits", training__steps=1, training__log_every=1, training__evaluate_every=0)
    for weight in (0.0, 0.1):
        train(change(config, {"objective.second_order": weight}), tmp_path / str(weight), **quiet)
    (without,), (line,) = metrics(tmp_path / "0.0"), metrics(tmp_path / "0.1")
    assert "second_order" not in without
    assert line["terms"] == pytest.approx(without["terms"], rel=1e-6)
    assert line["bits_per_dim"] == pytest.approx(without["bits_per_dim"], rel=1e-6)
    model, images = build_model(config, (1, 8, 8), 17), load("digits").images["train"]
    chosen = torch.from_numpy(images[permutation(len(images), 0)[:8]])
    u = torch.remainder(float(generator(0, 0, 0, "time").random(dtype="float32")) + torch.arange(8) / 8, 1.0)
    terms = likelihood.draw_terms(
        model, chosen, u, Draws(0, range(8)), flag=torch.zeros(8), importance=True, second_order=0.1
    )
    assert isinstance(terms, TermsAndSecondOrder)
    t, density = times.importance(u, model.curve(None), model.path, line=True)
    eps = Draws(0, range(8)).normal("eps", (1, 8, 8))
    probe = 1 - 2 * (Draws(0, range(8)).uniform("probe", (1, 8, 8)) < 0.5).float()
    residual = second_order_residual(model, pixels.encode(chosen, 17), t, eps, probe)
    assert torch.allclose(terms.second_order, 0.1 * residual**2 / (2 * 64 * density), rtol=1e-4)
    loss = pixels.bits_per_dim(terms.loss.mean(), 64)
    assert line["second_order"] == pytest.approx(terms.second_order.mean().item() / (64 * math.log(2)), rel=1e-5)
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
    assert line["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert abs(norm - without["gradient_norm"]) > 1e-3 * norm


def test_every_image_has_its_own_probe() -> None:
    """Keyed by the image, not by its place in the batch."""
    model = build_model(tiny("mulan-velocity-digits"), (1, 8, 8), 17)
    images = torch.from_numpy(load("digits").images["train"][:6])
    u = (torch.arange(6) + 0.3) / 6
    whole = likelihood.draw_terms(model, images, u, Draws(0, range(6)), second_order=0.1)
    part = likelihood.draw_terms(model, images[4:], u[4:], Draws(0, (4, 5)), second_order=0.1)
    assert isinstance(whole, TermsAndSecondOrder) and isinstance(part, TermsAndSecondOrder)
    assert torch.allclose(whole.second_order[4:], part.second_order, rtol=1e-4)


def test_one_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Loss.forward

    def spoil(self: Loss, batch: Any, part: slice, step: int) -> objectives.Terms:
        terms = forward(self, batch, part, step)
        assert isinstance(terms, TermsAndSecondOrder)
        return dataclasses.replace(terms, second_order=terms.second_order * (math.nan if step == 2 else 1.0))

    monkeypatch.setattr(Loss, "forward", spoil)
    config = tiny("idode-vp-digits", objective__second_order=0.1, training__evaluate_every=0)
    with pytest.raises(UserError, match="not finite at step 3: second_order, gradient_norm; try a lower"):
        train(config, tmp_path / "run", **quiet)


def test_parts_of_a_batch_take_the_step_of_the_batch(tmp_path: Path) -> None:
    config = tiny("idode-sp-digits", objective__second_order=0.1, training__steps=3, training__log_every=1,
                  training__evaluate_every=0)  # fmt: skip
    for parts in (1, 4):
        train(change(config, {"training.accumulate": parts}), tmp_path / str(parts), **quiet)
    for line, expected in zip(metrics(tmp_path / "4"), metrics(tmp_path / "1"), strict=True):
        for name in ("bits_per_dim", "second_order", "gradient_norm"):
            assert line[name] == pytest.approx(expected[name], rel=1e-4)


def test_a_run_continued_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    config = tiny("idode-vp-digits", objective__second_order=0.1, network__dropout=0.2)
    train(config, tmp_path / "whole", **quiet)
    train(change(config, {"training.steps": 7}), tmp_path / "parts", **quiet)
    train(config, tmp_path / "parts", **quiet)
    assert metrics(tmp_path / "parts")[-2:] == metrics(tmp_path / "whole")[-2:]
    name = "checkpoints/step-000000012/weights.safetensors"
    assert files(tmp_path / "parts")[name] == files(tmp_path / "whole")[name]


@pytest.mark.parametrize("name", ["idode-vp-digits", "mulan-velocity-digits"])
def test_fine_tuning_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    """nelbo train A; nelbo train B --init-from A --objective.second-order 0.1: the bound falls on from that of A."""
    config = learner(name, training__steps=25)
    for out, fields, extra in (("A", {}, []), ("B", {"objective.second_order": 0.1}, ["--init-from", tmp_path / "A"])):
        command = ["train", name, "--out", tmp_path / out, *flags(change(config, fields)), *extra]
        assert cli.main(list(map(str, command))) == 0
    before, after = (bound(checkpoints.load_model(tmp_path / run, "last", "ema")) for run in "AB")
    assert after.mean < before.mean - 0.1
    gap = likelihood.compare(before, after)
    assert gap.mean > 5 * gap.standard_error
    record = json.loads((tmp_path / "B" / "run.json").read_text())
    assert record["config"]["objective"]["second_order"] == 0.1 and record["init"]["from"] == str(tmp_path / "A")
    assert metrics(tmp_path / "B")[-1]["second_order"] > 0
