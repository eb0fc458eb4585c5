"""The probability flow: its field, its divergence and their estimators, and the densities that it transports."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from nelbo import ode
from nelbo.flow import Flow, log_prior, time_of
from nelbo.model import DiffusionModel
from nelbo.ode import solve
from nelbo.parameterizations import PARAMETERIZATIONS
from nelbo.paths import PATHS
from nelbo.schedules import Monotone, PixelMonotone, Schedule
from toys import FLOAT, build, gaussian, linear, mixture, polynomial, tensor

G0, G1 = -4.0, 5.0
SHAPE = (1, 1, 3)
CODES = torch.eye(2, dtype=FLOAT)[[0, 1, 1, 0]]


class Net(nn.Module):
    """A small smooth network that couples all pixels and reads gamma, pixel by pixel, and the code."""

    def __init__(self, shape=SHAPE, condition=2, seed=0):
        super().__init__()
        random, size, width = torch.Generator().manual_seed(seed), math.prod(shape), 7

        def matrix(rows, columns, scale):
            return nn.Parameter(scale * torch.randn(rows, columns, generator=random, dtype=FLOAT))

        self.z, self.gamma, self.out = matrix(width, size, 0.8), matrix(width, size, 0.1), matrix(size, width, 0.6)
        self.code = matrix(width, max(condition, 1), 0.7)
        self.calls = []

    def forward(self, z, gamma, conditioning=None):
        self.calls.append(z.dtype)
        level = gamma.expand(-1, *z.shape[1:]).flatten(1)
        inside = z.flatten(1) @ self.z.T + level @ self.gamma.T
        if conditioning is not None:
            inside = inside + conditioning @ self.code.T
        return (torch.tanh(inside) @ self.out.T).reshape(z.shape)


def schedule_of(kind, shape=SHAPE):
    """Every kind of schedule, far from a straight line where it can be; "given c" reads a code of size 2."""
    condition = 2 if kind.endswith("given c") else 0
    random = torch.Generator().manual_seed(1)
    if kind.startswith("linear") or kind.startswith("learned"):
        return linear(G0, G1, "learned" if kind == "learned" else "fixed")
    if kind.startswith("polynomial"):
        return polynomial(shape, G0, G1, seed=3, condition=condition)
    interior = Monotone(G0, G1, 16) if kind == "monotone" else PixelMonotone(shape, G0, G1, condition, 16)
    schedule = Schedule(interior, G0, G1).to(FLOAT)
    with torch.no_grad():
        for parameter in interior.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=FLOAT))
        interior.l1.weight.fill_(2.0)
        interior.l3.weight.mul_(40.0)
        if kind != "monotone":
            interior.l_int.weight.mul_(0.15)
            interior.l3.weight.mul_(tensor([[0.1], [1.0], [10.0]]))
    return schedule


KINDS = [
    "linear",
    "learned",
    "monotone",
    "polynomial",
    "polynomial given c",
    "pixel-monotone",
    "pixel-monotone given c",
]


def coupled(kind="polynomial given c", path="vp", parameterization="noise", seed=0):
    """A model of ``Net``: nothing exact about it, a dense Jacobian that changes with z."""
    p, q = PATHS[path](), PARAMETERIZATIONS[parameterization]()
    return DiffusionModel(Net(seed=seed), schedule_of(kind), p, q, SHAPE, 4).to(FLOAT)


def states(count=4, seed=5):
    """Random z (count, *SHAPE)."""
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=FLOAT)


def velocity(model, z, t, c):
    """Equation (1), dz/dt = gamma' [alpha' x_hat + sigma' eps_hat]; z (B, C, H, W), t (B,)."""
    gamma, rate = model.curve(c)(t)
    d_alpha, d_sigma = model.path.derivatives(gamma)
    x_hat, eps_hat = model.predict(z, gamma, c)
    return rate * (d_alpha * x_hat + d_sigma * eps_hat)


def jacobians(model, z, t, c):
    """d (dz/dt)/dz of equation (1) by autograd, (B, D, D)."""
    z = z.clone().requires_grad_()
    speed = velocity(model, z, t, c).flatten(1)
    return torch.stack([torch.autograd.grad(v.sum(), z, retain_graph=True)[0].flatten(1) for v in speed.T], 1)


def growth(model, t, c):
    """m (B, *SHAPE) of equation (6) and d log m/dt, the latter by autograd through the schedule and the path."""
    flow, time = Flow(model, c), t.clone().requires_grad_()
    m = flow.scale(flow.gamma(time)).expand(len(t), *SHAPE)
    if not m.requires_grad:  # a velocity's, 1
        return m, torch.zeros_like(m)
    rates = [torch.autograd.grad(m[..., i].sum(), time, retain_graph=True)[0] for i in range(SHAPE[2])]
    return m.detach(), torch.stack(rates, 1).reshape(m.shape) / m.detach()


# The field and its divergence ----------------------------------------------------------------------------------------

ALL = pytest.mark.parametrize(
    ("kind", "path", "parameterization"), list(itertools.product(KINDS, PATHS, PARAMETERIZATIONS))
)
TIMES = tensor([0.03, 0.4, 0.8, 0.97])


@ALL
def test_field_and_trace(kind, path, parameterization):
    """m dw/dt + z dlog m/dt is equation (1); the trace and the rate of sum log m are that of its Jacobian. To 1e-10.

    Examples are taken out of order, so that each must find its own code.
    """
    model, z, rows = coupled(kind, path, parameterization), states(), torch.tensor([2, 0, 3, 1])
    flow = Flow(model, CODES)
    c, z, t = CODES[rows], z[rows], TIMES[rows]
    m, m_growth = growth(model, t, c)
    w = z / m
    with torch.no_grad():
        without, nothing = flow.field(t, w, rows, False)
        speed, trace = flow.field(t, w, rows, True)
        expected = velocity(model, z, t, c)
    assert nothing is None and torch.equal(speed, without)
    assert expected.abs().max().item() > 1
    assert torch.allclose(m * speed + m_growth * z, expected, rtol=1e-10, atol=1e-12)
    divergence = torch.diagonal(jacobians(model, z, t, c), dim1=1, dim2=2).sum(1)
    assert torch.allclose(trace + m_growth.flatten(1).sum(1), divergence, rtol=1e-10, atol=1e-12)
    assert divergence.abs().min().item() > 1e-3 and divergence.std().item() > 0.1 and trace.dtype == FLOAT


def test_the_kinds_are_different():
    """Else their agreement with equation (1) would mean less: no two of them, nor two codes, share their gamma."""
    with torch.no_grad():
        middles = {
            kind: coupled(kind).curve(CODES[:2])(tensor([0.5, 0.5]))[0].expand(2, *SHAPE).flatten(1) for kind in KINDS
        }
    for one, other in itertools.combinations(KINDS[1:], 2):
        assert (middles[one] - middles[other]).abs().max().item() > 0.05
    for kind, value in middles.items():
        apart = (value[0] - value[1]).abs().max().item()
        assert apart > 0.1 if kind.endswith("given c") else apart == 0
        assert (value.std(1).max().item() > 0.1) == ("p" in kind.split()[0][:2])


def weighted_jacobian(model, z, t, c):
    """diag(gamma' B) J, whose trace is the integrand: the Jacobian of (1) without the diagonal of gamma' A."""
    return jacobians(model, z, t, c) - torch.diag_embed(growth(model, t, c)[1].flatten(1))


def traces(model, z, t, probes=None):
    """The integrand of the flow's quadrature for all examples, (B,)."""
    flow, rows = Flow(model, CODES[:1].expand(len(z), -1), probes=probes), torch.arange(len(z))
    return flow.field(t, z / flow.scale(flow.gamma(t)), rows, True)[1]


SIGNS = tensor(list(itertools.product([-1.0, 1.0], repeat=3))).reshape(8, *SHAPE)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_rademacher_probes(parameterization):
    """One probe gives e^T W J e; the mean over all 2^D is the exact trace, as 2^D probes at once give it; the diagonal
    costs no variance, the rest does."""
    model, t = coupled(parameterization=parameterization), TIMES[1:2].expand(8)
    z = states(1).expand(8, *SHAPE)
    matrix = weighted_jacobian(model, z[:1], t[:1], CODES[:1])[0]
    single = traces(model, z, t, SIGNS[:, None])
    flat = SIGNS.flatten(1)
    assert torch.allclose(single, torch.einsum("bi,ij,bj->b", flat, matrix, flat), rtol=1e-10)
    exact = traces(model, z[:1], t[:1])
    assert exact.item() == pytest.approx(matrix.trace().item(), rel=1e-10)
    assert single.mean().item() == pytest.approx(exact.item(), rel=1e-10)
    assert traces(model, z[:1], t[:1], SIGNS[None]).item() == pytest.approx(exact.item(), rel=1e-10)
    symmetric = (matrix + matrix.T) / 2
    variance = 2 * ((symmetric**2).sum() - (symmetric.diagonal() ** 2).sum())
    assert single.var(correction=0).item() == pytest.approx(variance.item(), rel=1e-9)
    assert variance.item() > 1e-3


def test_gaussian_probes():
    """20 000 of them: e^T W J e each, their mean within 4 standard errors of the exact trace, and their variance
    2 |S|^2 within 10 %: the diagonal costs some too."""
    count = 20_000
    model, t, z = coupled(), TIMES[1:2], states(1)
    probes = torch.randn(count, 1, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=FLOAT)
    found = traces(model, z.expand(count, *SHAPE), t.expand(count), probes)
    matrix = weighted_jacobian(model, z, t, CODES[:1])[0]
    flat = probes.flatten(1)
    assert torch.allclose(found, torch.einsum("bi,ij,bj->b", flat, matrix, flat), rtol=1e-9, atol=1e-12)
    symmetric = (matrix + matrix.T) / 2
    variance = 2 * (symmetric**2).sum().item()
    assert found.mean().item() == pytest.approx(matrix.trace().item(), abs=4 * math.sqrt(variance / count))
    assert found.var().item() == pytest.approx(variance, rel=0.1)


def test_several_probes_are_averaged():
    """Three probes: the mean of what they give one by one; each example has its own."""
    model, z = coupled(), states()
    probes = torch.randn(4, 3, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=FLOAT)
    together = traces(model, z, TIMES, probes)
    apart = torch.stack([traces(model, z, TIMES, probes[:, i : i + 1]) for i in range(3)])
    assert torch.allclose(together, apart.mean(0), rtol=1e-12)
    assert apart.std(0).min().item() > 0.01


# Along a solve -------------------------------------------------------------------------------------------------------


def by_scipy(model, z, c, e, t_0, t_1):
    """One example by DOP853, in z itself: dz/dt by equation (1) beside e^T J e dt (the trace where e is None)."""

    def field(t, state):
        at, time = tensor(state[:-1]).reshape(1, *SHAPE), tensor([t])
        with torch.no_grad():
            speed = velocity(model, at, time, c).flatten()
        matrix = jacobians(model, at, time, c)[0]
        if e is not None:
            linear_part = torch.diag(growth(model, time, c)[1].flatten())  # known exactly: no probe's to estimate
            rate = e @ (matrix - linear_part) @ e + linear_part.trace()
        else:
            rate = matrix.trace()
        return [*speed.tolist(), rate.item()]

    start = [*z.flatten().tolist(), 0.0]
    end = solve_ivp(field, (t_0, t_1), start, method="DOP853", rtol=1e-6, atol=1e-7).y[:, -1]
    return tensor(end[:-1]), end[-1]


@pytest.mark.parametrize(
    ("path", "parameterization"), [("vp", "noise"), ("vp", "velocity"), ("straight", "data"), ("straight", "velocity")]
)
def test_transport_against_scipy(path, parameterization):
    """Where z goes and the divergence on the way, by another solver in other variables: to 1e-5. One with the exact
    trace, one backwards; and with a probe that is the same from the first step to the last: redrawing it fails here."""
    model, z, c = coupled("polynomial given c", path, parameterization), states(1), CODES[1:2]
    e = tensor([1.0, -1.0, 1.0])
    for probe, t_0, t_1 in ((None, 0.9, 0.1), (e, 0.0, 1.0)):
        end, total = by_scipy(model, z, c, probe, t_0, t_1)
        flow = Flow(model, c, probes=None if probe is None else probe.reshape(1, 1, *SHAPE))
        for method in ("dopri5", "adams4"):
            found = flow.transport(z, t_0, t_1, divergence=True, rtol=1e-7, atol=1e-7, method=method)
            assert found.solution.success and abs(total) > 0.1 and (end - z.flatten()).abs().min().item() > 0.01
            assert torch.allclose(found.z.flatten(), end, atol=1e-5)
            assert found.divergence.item() == pytest.approx(total, abs=1e-5)


def test_the_mean_over_all_probes_is_exact_along_a_solve():
    """Each of the 2^D sign vectors fixed along its own solve: they differ, and their mean is the exact divergence."""
    model, z = coupled(), states(1)
    options = {"divergence": True, "rtol": 1e-7, "atol": 1e-7}
    c = CODES[:1].expand(8, -1)
    each = Flow(model, c, probes=SIGNS[:, None]).transport(z.expand(8, *SHAPE), 0.0, 1.0, **options).divergence
    exact = Flow(model, c[:1]).transport(z, 0.0, 1.0, **options).divergence
    assert each.mean().item() == pytest.approx(exact.item(), abs=1e-6) and each.std().item() > 0.05


@pytest.mark.parametrize(("kind", "path"), [("polynomial given c", "vp"), ("linear", "straight")])
def test_adams_takes_equal_steps_in_what_the_network_sees(kind, path, monkeypatch):
    """Where no tolerance binds: 224 steps from 0 to 1, half as many for half of tau, each 1/224 of it within 2 %; as
    many as are asked for; and a handful where none are."""
    model, z, seen = coupled(kind, path), states(), []
    original = Flow.field

    def watched(self, t, w, rows, integrand):
        seen.append((t, rows))
        return original(self, t, w, rows, integrand)

    def tau(t, i):
        with torch.no_grad():
            gamma = [model.curve(CODES[i : i + 1])(at)[0].mean().item() for at in (tensor([0.0]), t, tensor([1.0]))]
        return (gamma[1] - gamma[0]) / (gamma[2] - gamma[0])

    monkeypatch.setattr(Flow, "field", watched)
    options = {"method": "adams4", "rtol": 100.0, "atol": 100.0}
    found = Flow(model, CODES).transport(z, 0.0, 1.0, **options).solution
    for i in range(len(z)):
        times = [t[(rows == i).nonzero()[0]] for t, rows in seen if i in rows]
        steps = np.diff([tau(t, i) for t in times])[-220:-1]  # without those of the beginning, which grow
        assert steps == pytest.approx(np.full(219, 1 / 224), rel=0.02)
    assert (found.accepted >= 224).all() and (found.accepted < 240).all() and not found.rejected.any()
    late = [min(np.linspace(0, 1, 201), key=lambda t: abs(tau(tensor([t]), i) - 0.5)) for i in range(len(z))]
    half = Flow(model, CODES).transport(z, tensor(late), 1.0, **options).solution
    assert (abs(half.accepted - 118) < 10).all()
    few = Flow(model, CODES).transport(z, 0.0, 1.0, least_steps=40, **options).solution
    assert (abs(few.accepted - 46) < 8).all()
    assert (Flow(model, CODES).transport(z, 0.0, 1.0, least_steps=1, **options).solution.accepted < 30).all()
    with pytest.raises(ValueError, match="least_steps must be at least 1, got 0"):
        Flow(model, CODES).transport(z, 0.0, 1.0, least_steps=0)


def test_every_example_starts_at_its_own_time():
    """t_0 per example: the same as one by one."""
    model, z, t_0 = coupled(), states(), tensor([0.0, 0.2, 0.5, 0.9])
    options = {"divergence": True, "rtol": 1e-5, "atol": 1e-5}
    found = Flow(model, CODES).transport(z, t_0, 1.0, **options)
    for i in range(4):
        alone = Flow(model, CODES[i : i + 1]).transport(z[i : i + 1], float(t_0[i]), 1.0, **options)
        assert torch.allclose(alone.z, found.z[i : i + 1], rtol=1e-12)
        assert alone.divergence.item() == pytest.approx(found.divergence[i].item(), rel=1e-12)
        assert alone.solution.evaluations.item() == found.solution.evaluations[i].item()
    assert Flow(model, CODES).transport(z, 0.0, 1.0).divergence is None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_errors_are_measured_in_units_of_the_noise(parameterization, path, monkeypatch):
    """sigma (atol + rtol |z|) for z = m w, whatever m is, pixel by pixel and example by example."""
    model, given = coupled("polynomial given c", path, parameterization), []
    monkeypatch.setattr(
        ode, "solve", lambda *_, tolerance, **__: given.append(tolerance) or solve(*_, tolerance=tolerance, **__)
    )
    Flow(model, CODES).transport(states(), 0.9, 1.0, rtol=0.02, atol=0.01)
    t, rows, z = tensor([0.3, 0.6]), torch.tensor([1, 3]), states()[:2]
    with torch.no_grad():
        gamma, _ = model.curve(CODES[rows])(t)
        alpha, sigma = model.path.coefficients(gamma)
        m = {"noise": alpha, "data": sigma, "velocity": torch.ones_like(alpha)}[parameterization]
        expected = sigma * (0.01 + 0.02 * z.abs())
        assert torch.allclose(given[0](t, rows, (z / m).abs()) * m, expected, rtol=1e-12)


def test_the_schedule_of_a_batch_is_made_once():
    """Once for the ends and once for each set of examples at work, however many steps they take."""
    model, calls = coupled(), []
    curve = model.curve
    model.curve = lambda c: calls.append(len(c)) or curve(c)
    found = Flow(model, CODES).transport(states(), tensor([0.0, 0.3, 0.6, 0.9]), 1.0)
    assert calls[:2] == [4, 4] and calls == sorted(calls, reverse=True) and len(calls) <= 5
    assert int(found.solution.evaluations.min()) > 7


def test_a_float64_state_with_a_float32_network():
    """The network sees its own precision, the state keeps its own; the answer is the float64 one's to 1e-5."""
    model, z = coupled(), states()
    exact = Flow(model, CODES).transport(z, 0.0, 1.0, divergence=True, rtol=1e-7, atol=1e-7)
    single = coupled().float()
    found = Flow(single, CODES.float()).transport(z, 0.0, 1.0, divergence=True, rtol=1e-6, atol=1e-6)
    assert set(single.network.calls) == {torch.float32} and found.z.dtype == found.divergence.dtype == FLOAT
    assert torch.allclose(found.z, exact.z, atol=1e-5)
    assert torch.allclose(found.divergence, exact.divergence, atol=3e-5)


def test_a_flag_reaches_the_network():
    """One per example, and that of the examples at work."""
    toy, seen = gaussian([0.5]), []
    model = build(toy, linear(G0, G1), flag=True)
    inner = model.network
    model.network = lambda z, gamma, conditioning: seen.append(conditioning) or inner(z, gamma, conditioning)
    flag = tensor([1.0, 0.0])
    Flow(model, flag=flag).transport(torch.ones(2, 1, 1, 1, dtype=FLOAT), tensor([0.9, 0.0]), 1.0)
    assert torch.equal(seen[0][:, 0], flag) and torch.equal(seen[-1][:, 0], flag[1:])


def test_a_schedule_that_reads_the_image_has_no_flow():
    model = build(gaussian([0.5]), linear(G0, G1), schedule_reads_image=True)
    with pytest.raises(ValueError, match="no probability flow"):
        Flow(model)


def test_log_prior_and_time_of():
    """N(0, s^2 I) against torch.distributions; the time of a mean gamma, with ends for levels out of reach."""
    z = states()
    for scale in (1.0, 0.3):
        expected = torch.distributions.Normal(tensor(0.0), tensor(scale)).log_prob(z).flatten(1).sum(1)
        assert torch.allclose(log_prior(z, scale), expected, rtol=1e-13)
    assert log_prior(z.float(), 1.0).dtype == FLOAT
    for kind in KINDS:
        flow, zero = Flow(coupled(kind), CODES), torch.zeros(4, dtype=FLOAT)
        with torch.no_grad():
            for level in (-3.0, 0.0, 4.9):
                t = time_of(flow.gamma, level, zero)
                gamma = flow.gamma(t).expand(4, *SHAPE)
                assert torch.allclose(gamma.mean((1, 2, 3)), torch.full((4,), level, dtype=FLOAT), atol=1e-9)
            assert time_of(flow.gamma, -100.0, zero).max().item() < 1e-9
            assert time_of(flow.gamma, 100.0, zero).min().item() > 1 - 1e-9


# Densities -----------------------------------------------------------------------------------------------------------

DEVIATIONS = [0.05, 0.4, 1.3]


def exact_schedule(kind, toy, gamma_0, gamma_1):
    return linear(gamma_0, gamma_1) if kind == "linear" else polynomial(toy.shape, gamma_0, gamma_1, seed=4)


def density(toy, model, z, t):
    """log p(z) of the marginal at time t, which has a closed form for per-pixel schedules too; (B,)."""
    with torch.no_grad():
        alpha, sigma = (v.flatten() for v in model.path.coefficients(model.schedule(tensor([t]))[0]))
    return toy.log_density(z.flatten(1), alpha, sigma, toy.log_weights)


def points(toy, seed=0, count=6):
    """z (count, *shape): data, some of it far out."""
    random = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(toy.log_weights.exp(), count, True, generator=random)
    noise = torch.randn(count, toy.dimensions, generator=random, dtype=FLOAT)
    far = tensor([1.0, 1.0, 1.0, 1.0, 2.0, 3.0])[:, None]
    return (toy.means[chosen] + far * toy.variance.sqrt() * noise).reshape(count, *toy.shape)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "kind"), [("gaussian", "polynomial"), ("mixture", "linear"), ("mixture", "polynomial")]
)
def test_log_density(name, kind, path, parameterization):
    """log p_1(z_1) + divergence = log p_t(z_t), whose marginals are known, from t = 0 and from t = 0.3: to 1e-5 per
    dimension. Gaussian data flow linearly: z_1 = z_t sqrt(V_1/V_t), and the divergence is 1/2 sum log V_1/V_t."""
    toy = gaussian(DEVIATIONS) if name == "gaussian" else mixture()
    model = build(toy, exact_schedule(kind, toy, -13.3, 5.0), path, parameterization)
    z, t_0 = points(toy), tensor([0.0, 0.0, 0.3, 0.3, 0.3, 0.0])
    found = Flow(model).transport(z, t_0, 1.0, divergence=True, rtol=3e-7, atol=3e-7)
    truth = torch.cat([density(toy, model, z[i : i + 1], float(t)) for i, t in enumerate(t_0)])
    apart = density(toy, model, found.z, 1.0) + found.divergence - truth
    assert found.solution.success and apart.abs().max().item() < 1e-5 * toy.dimensions
    if name == "mixture":
        assert found.divergence[:2].std().item() > 0.03
    else:
        with torch.no_grad():
            ends = (model.path.coefficients(model.schedule(t)[0]) for t in (t_0, torch.ones_like(t_0)))
        start, end = (torch.sqrt(alpha**2 * toy.variance + sigma**2) for alpha, sigma in ends)
        assert torch.allclose(found.z, z * end / start, rtol=1e-5, atol=1e-5)
        expected = (end / start).log().expand(z.shape).flatten(1).sum(1)
        assert torch.allclose(found.divergence, expected, atol=1e-5 * toy.dimensions)


@pytest.mark.parametrize(
    ("path", "parameterization"),
    [("vp", "noise"), ("vp", "velocity"), ("vp", "data"), ("straight", "noise"), ("straight", "velocity")],
)
def test_log_density_with_the_prior(path, parameterization):
    """gamma from -30 to 30, where z_1 is N(0, I) to six digits on both paths: log N(z_1; 0, I) + divergence is the log
    density of the data itself, to 1e-5 per dimension."""
    toy = mixture()
    model = build(toy, exact_schedule("polynomial", toy, -30.0, 30.0), path, parameterization)
    z = points(toy)
    found = Flow(model).transport(z, 0.0, 1.0, divergence=True, rtol=1e-7, atol=1e-7, max_steps=5000)
    truth = toy.log_density(z.flatten(1), 1.0, 0.0, toy.log_weights)
    assert found.solution.success
    assert (log_prior(found.z, 1.0) + found.divergence - truth).abs().max().item() < 1e-5 * toy.dimensions
