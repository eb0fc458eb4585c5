"""The solver: order, truth, control of each example by itself, what it costs, and how it fails."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from nelbo.ode import (
    ADVICE,
    METHODS,
    NOT_FINITE,
    STEP_LIMIT,
    STEP_TOO_SMALL,
    SUCCESS,
    Adams,
    Past,
    Tableau,
    _integral,
    solve,
)
from toys import FLOAT, tensor


class Counted:
    """A field that keeps what it was called with; ``f(t, y, rows)`` and, where asked for, ``g(t, y, rows)``."""

    def __init__(self, f, g=None):
        self.f, self.g, self.rows, self.asked = f, g, [], []

    def __call__(self, t, y, rows, integrand):
        assert t.dtype == FLOAT and len(t) == len(y) == len(rows)
        self.rows.append(rows)
        self.asked.append(integrand)
        return self.f(t, y, rows), self.g(t, y, rows) if integrand else None

    def calls(self, examples):
        """How many rows of each example were passed, (examples,)."""
        return torch.bincount(torch.cat(self.rows), minlength=examples)


def column(values, like):
    """(B,) against ``like``."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def decay(t, y, rows):
    """y' = y cos t: y_0 exp(sin t - sin t_0)."""
    return y * column(t.cos(), y)


# Order ---------------------------------------------------------------------------------------------------------------


def trees(order):
    """Rooted trees with ``order`` nodes: tuples of subtrees."""
    if order == 1:
        return {()}
    found = set()
    for smaller in trees(order - 1):  # hang one more leaf on every node
        found |= grown(smaller)
    return found


def grown(tree):
    found = {tuple(sorted((*tree, ())))}
    for i, branch in enumerate(tree):
        found |= {tuple(sorted((*tree[:i], more, *tree[i + 1 :]))) for more in grown(branch)}
    return found


def nodes(tree):
    return 1 + sum(nodes(branch) for branch in tree)


def density(tree):
    return nodes(tree) * math.prod(density(branch) for branch in tree)


def residual(tree, a, b):
    """b . u(tree) - 1/density(tree), Butcher's order condition."""

    def stages(branch):
        u = np.ones(len(b))
        for part in branch:
            u = u * (a @ stages(part))
        return u

    return b @ stages(tree) - 1 / density(tree)


def test_there_are_as_many_trees_as_known():
    assert [len(trees(n)) for n in range(1, 7)] == [1, 1, 2, 4, 9, 20]


PAIRS = [name for name, method in METHODS.items() if isinstance(method, Tableau)]


@pytest.mark.parametrize("name", PAIRS)
def test_the_tableau_meets_its_order_conditions(name):
    """All conditions up to order p for b and up to p - 1 for b_hat = b - e; neither meets those of the next order."""
    pair = METHODS[name]
    stages = len(pair.c)
    a, b, e = np.zeros((stages, stages)), np.array(pair.b), np.array(pair.e)
    for i, row in enumerate(pair.a):
        a[i, : len(row)] = row
    assert np.allclose(a.sum(1), pair.c, atol=1e-15)
    assert np.array_equal(a[-1], b), "first same as last: the solver reuses the last stage"
    for weights, order in ((b, pair.order), (b - e, pair.order - 1)):
        met = [tree for n in range(1, order + 1) for tree in trees(n)]
        assert max(abs(residual(tree, a, weights)) for tree in met) < 1e-15
        assert max(abs(residual(tree, a, weights)) for tree in trees(order + 1)) > 1e-4


PREY = tensor([[0.6, 0.9, 1.1, 0.4], [1.5, 1.0, 0.7, 1.3], [0.9, 2.0, 1.0, 1.0], [2.5, 0.3, 2.0, 0.1]])


def volterra(t, y, rows):
    """Lotka and Volterra's cycles, each example with its own rates, driven by the time."""
    a, b, c, d = PREY.to(y)[rows].T
    u, v = y.T
    return torch.stack([a * u - b * u * v + 0.1 * torch.sin(3 * t).to(y), c * u * v - d * v], 1)


def reference(y, span, rows=(0, 1, 2, 3), **options):
    """scipy's solution for the examples ``rows`` as one system, DOP853 at 1e-12 by default: y (B, 2), and its calls."""
    chosen = torch.tensor(rows)

    def field(t, flat):
        return volterra(tensor([t]), tensor(flat).reshape(-1, 2), chosen).flatten().numpy()

    options = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-12} | options
    found = solve_ivp(field, span, y.flatten().numpy(), **options)
    return tensor(found.y[:, -1]).reshape(-1, 2), found.nfev


def fixed_steps(field, y, steps, method):
    """``steps`` equal steps to t = 1: each an accepted solve of its own at tolerances that bind nothing. (y, q)."""
    q, h = 0.0, 1 / steps
    for i in range(steps):
        found = solve(field, y, i * h, (i + 1) * h, rtol=1e9, atol=1e9, method=method, first_step=h, quadrature=True)
        assert found.accepted.tolist() == [1] * len(y) and found.rejected.tolist() == [0] * len(y)
        y, q = found.y, q + found.quadrature
    return y, q


@pytest.mark.parametrize("name", PAIRS)
def test_convergence_at_the_order(name):
    """Fixed steps: the slope of log error over log step is p within 0.25, for the state and for the quadrature."""

    def both(t, y):
        speed = volterra(tensor([t]), tensor(y[None, :2]), torch.tensor([0]))[0].numpy()
        return [*speed, y[0] * y[1]]

    truth = solve_ivp(both, (0.0, 1.0), [1.0, 0.5, 0.0], method="DOP853", rtol=1e-13, atol=1e-14).y[:, -1]
    field = Counted(volterra, lambda t, y, rows: y[:, 0] * y[:, 1])
    counts = [12, 16, 24, 32]
    errors = []
    for steps in counts:
        y, q = fixed_steps(field, tensor([[1.0, 0.5]]), steps, name)
        errors.append(abs(np.array([*y[0].tolist(), q.item()]) - truth))
    slopes = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slopes == pytest.approx([METHODS[name].order] * 3, abs=0.25)


def test_the_weights_of_adams_methods_are_the_textbook_s():
    """At equal steps; with fewer evaluations at hand, those of a lower order, whatever stands in the other places."""
    h = tensor([0.5, 2.0])
    ahead = h[:, None] * tensor([1.0, 0.0, -1.0, -2.0, -3.0])
    bashforth, moulton = tensor([55, -59, 37, -9]) / 24, tensor([251, 646, -264, 106, -19]) / 720
    four, five = torch.tensor([4, 4]), torch.tensor([5, 5])
    assert torch.allclose(_integral(ahead[:, 1:], four, h), h[:, None] * bashforth, rtol=1e-12)
    assert torch.allclose(_integral(ahead, five, h), h[:, None] * moulton, rtol=1e-12)
    fewer = _integral(ahead, torch.tensor([1, 3]), h)
    assert torch.allclose(fewer, h[:, None] * tensor([[1, 0, 0, 0, 0], [5 / 12, 8 / 12, -1 / 12, 0, 0]]), atol=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_weights_of_adams_methods_integrate_polynomials(sign):
    """Uneven times, the last step a millionth of those before it, forwards and backwards."""
    times = sign * tensor([[1.0, 0.0, -0.3, -1.9, -2.0], [1e-6, 0.0, -1.0, -1.5, -3.0]])
    h = times[:, 0]
    weights = _integral(times, torch.tensor([5, 5]), h)
    for degree in range(5):
        exact = h ** (degree + 1) / (degree + 1)
        size = (weights * times**degree).abs().sum(1)
        assert ((weights * times**degree).sum(1) - exact).abs().max() < 1e-13 * size.max() + 1e-25


@pytest.mark.parametrize("memory", [1, 2, 3, 4])
def test_adams_methods_converge_at_their_order(memory):
    """Fixed steps after exact values of the past: the slope of the largest error on the way is memory + 1 within 0.3,
    for the state and for the quadrature."""

    def both(t, y):
        return [*volterra(tensor([t]), tensor(y[None, :2]), torch.tensor([0]))[0].numpy(), y[0] * y[1]]

    true = solve_ivp(both, (0, 4), [1.0, 0.5, 0.0], method="DOP853", rtol=1e-13, atol=1e-14, dense_output=True).sol
    field, rows = Counted(volterra, lambda t, y, rows: y[:, 0] * y[:, 1]), torch.tensor([0])
    counts, errors = [64, 96, 128, 192], []
    for steps in counts:
        h, count = 3 / steps, torch.tensor([memory])
        times = tuple(tensor([1 - i * h]) for i in range(memory))
        known = [field(t, tensor(true(t.item())[None, :2]), rows, True) for t in times]
        past = Past(times, *zip(*known, strict=True), count)
        y, q, wrong = tensor(true(1.0)[None, :2]), true(1.0)[2], []
        for i in range(steps):
            trial = Adams(memory).attempt(field, y, tensor([h]), rows, past, True)
            assert trial.order.item() == memory + 1 == Adams(memory).order
            y, q = trial.y, q + trial.gain.item()
            past = past.then(torch.tensor([True]), tensor([1 + (i + 1) * h]), trial.k, trial.g)
            wrong.append(abs(np.array([*y[0].tolist(), q]) - true(1 + (i + 1) * h)))
        errors.append(np.max(wrong, 0))
    slopes = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slopes == pytest.approx([memory + 1] * 3, abs=0.3)


def test_adams_methods_need_fewer_evaluations():
    """Smooth fields: at equal error at most 0.85 of those of Dormand and Prince's pair."""
    y, span = tensor([[1.0, 0.5], [0.3, 2.0], [1.0, 1.0], [0.2, 0.2]]), (0.0, 10.0)
    truth, _ = reference(y, span)
    spent = {}
    for name in ("adams4", "dopri5"):
        tries = []
        for tolerance in np.logspace(-3, -8, 11):
            found = solve(volterra_field, y, *span, rtol=tolerance, atol=tolerance, method=name, max_steps=9999)
            tries.append((np.log((found.y - truth).abs().sum().item()), np.log(found.evaluations.sum().item())))
        errors, evaluations = np.array(sorted(tries)).T
        spent[name] = np.exp(np.interp(np.log([1e-3, 1e-4, 1e-5]), errors, evaluations))
    assert (spent["adams4"] < 0.85 * spent["dopri5"]).all()


# Truth ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tolerance"), [("bosh3", 1e-7), ("dopri5", 1e-10), ("adams4", 1e-9)])
@pytest.mark.parametrize("span", [(0.0, 4.0), (3.0, -1.0)])
def test_against_scipy(name, tolerance, span):
    """A non-linear, driven system, forwards and backwards: within 100 tolerances of DOP853's answer at 1e-12."""
    y = tensor([[1.0, 0.5], [0.3, 2.0], [1.0, 1.0], [0.2, 0.2]])
    found = solve(volterra_field, y, *span, rtol=tolerance, atol=tolerance, method=name, max_steps=20_000)
    assert found.success
    truth, _ = reference(y, span)
    assert (truth - y).abs().min().item() > 0.01
    assert torch.allclose(found.y, truth, rtol=100 * tolerance, atol=100 * tolerance)


def volterra_field(t, y, rows, integrand):
    return volterra(t, y, rows), None


@pytest.mark.parametrize(("name", "other", "tolerance"), [("bosh3", "RK23", 1e-4), ("dopri5", "RK45", 1e-6)])
def test_no_dearer_than_scipy_s_same_pair(name, other, tolerance):
    """The same pairs with another step control: at most a sixth more evaluations, and errors no larger."""
    y, span = tensor([[1.0, 0.5], [0.3, 2.0], [1.0, 1.0], [0.2, 0.2]]), (0.0, 10.0)
    found = solve(volterra_field, y, *span, rtol=tolerance, atol=tolerance, method=name)
    truth, _ = reference(y, span, rtol=1e-9, atol=1e-9)
    calls, theirs = 0, 0.0
    for i in range(4):
        end, evaluations = reference(y[i], span, [i], method=other, rtol=tolerance, atol=tolerance)
        calls, theirs = calls + evaluations, theirs + (end - truth[i]).abs().sum().item()
    assert 0.8 * calls < found.evaluations.sum().item() < 7 / 6 * calls
    assert (found.y - truth).abs().sum().item() < 1.1 * theirs


def stiff(t, y, rows):
    """y' = -1000 (y - cos t) - sin t: y = cos t, held there by a force a thousand times as fast."""
    return -1000 * (y - column(t.cos(), y)) - column(t.sin(), y)


@pytest.mark.parametrize(("name", "edge"), [("bosh3", 2.51), ("dopri5", 3.31), ("adams4", 0.18)])
def test_a_stiff_problem_is_solved_at_the_price_of_its_stability(name, edge):
    """About 1000 * 1.5/edge steps, all at the edge of stability, and the answer is right."""
    y, steps = torch.ones(1, 2, dtype=FLOAT), 1500 / edge
    found = solve(Counted(stiff), y, 0.0, 1.5, rtol=1e-6, atol=1e-6, method=name, max_steps=99_999)
    assert found.success and 0.8 * steps < found.accepted.item() < 1.25 * steps
    assert torch.allclose(found.y, torch.full_like(found.y, math.cos(1.5)), atol=1e-5)


def test_the_step_limit_ends_a_stiff_problem():
    """Tried steps count, rejected ones too; the state is that of the time reached, and the advice says what to do."""
    found = solve(Counted(stiff), torch.ones(3, 1, dtype=FLOAT), 0.0, 2.0, rtol=1e-6, atol=1e-6, max_steps=100)
    assert found.status.tolist() == [STEP_LIMIT] * 3 and not found.success
    assert (found.accepted + found.rejected).tolist() == [100] * 3
    assert 0.05 < found.t[0].item() < 1.0
    assert torch.allclose(found.y[:, 0], found.t.cos(), atol=1e-5)
    assert found.advice.startswith(f"3 of 3 examples stopped early (number 0 at t = {found.t[0].item():.6g}): ")
    assert ADVICE[STEP_LIMIT] in found.advice and "max_steps" in found.advice


def test_as_many_steps_as_the_limit_are_enough():
    free = solve(Counted(decay), torch.ones(1, 1, dtype=FLOAT), 0.0, 5.0)
    tried = int(free.accepted + free.rejected)
    enough = solve(Counted(decay), torch.ones(1, 1, dtype=FLOAT), 0.0, 5.0, max_steps=tried)
    assert enough.success and torch.equal(enough.y, free.y) and enough.advice == ""
    assert solve(Counted(decay), torch.ones(1, 1, dtype=FLOAT), 0.0, 5.0, max_steps=tried - 1).status.item() == 1


@pytest.mark.parametrize("name", METHODS)
def test_there_and_back(name):
    """Backwards in time: to the closed form, and back to where it came from; the field is not asked about times beyond
    either end, not even for the first step's estimate."""
    times = []

    def decay_seen(t, y, rows):
        times.append(t)
        return decay(t, y, rows)

    y = tensor([[1.0, -2.0], [0.1, 30.0]]).reshape(2, 1, 2)
    there = solve(Counted(decay_seen), y, 3.0, -2.0, rtol=1e-7, atol=1e-7, method=name)
    assert torch.allclose(there.y, y * math.exp(math.sin(-2.0) - math.sin(3.0)), rtol=1e-5)
    assert torch.equal(there.t, torch.full((2,), -2.0, dtype=FLOAT))
    back = solve(Counted(decay_seen), there.y, -2.0, 3.0, rtol=1e-7, atol=1e-7, method=name)
    assert torch.allclose(back.y, y, rtol=1e-5)
    assert -2 <= torch.cat(times).min().item() and torch.cat(times).max().item() <= 3


def test_every_example_has_its_own_start():
    """t_0 per example: the closed form of each, and nothing to pay for one that is at its end already."""
    t_0, y = tensor([0.0, 1.9, 2.0, -5.0]), tensor([[1.0], [2.0], [3.0], [0.5]])
    field = Counted(decay, lambda t, y, rows: t.cos())
    found = solve(field, y, t_0, 2.0, rtol=1e-9, atol=1e-9, quadrature=True)
    assert torch.allclose(found.y[:, 0], y[:, 0] * torch.exp(math.sin(2.0) - t_0.sin()), rtol=1e-7)
    assert torch.allclose(found.quadrature, math.sin(2.0) - t_0.sin(), atol=1e-7)
    assert found.success and found.t.tolist() == [2.0] * 4
    assert torch.equal(found.y[2], y[2]) and found.quadrature[2].item() == 0
    assert found.evaluations[2].item() == 0 and torch.equal(field.calls(4), found.evaluations)
    assert found.evaluations[3] > found.evaluations[0] > found.evaluations[1] > 0


def test_nothing_to_do():
    """No examples, or all of them at their end: no evaluation."""
    field = Counted(decay)
    for y in (torch.ones(0, 2, dtype=FLOAT), torch.ones(3, 2, dtype=FLOAT)):
        found = solve(field, y, 1.0, 1.0)
        assert found.success and torch.equal(found.y, y) and found.y is not y and found.quadrature is None
    assert field.rows == [] and solve(field, torch.ones(0, 2), 0.0, 1.0).success


# Each example by itself ----------------------------------------------------------------------------------------------

KINDS = ("easy", "waves", "stiff", "spike", "blow-up", "nan from t = 0.5", "nan at once", "waves", "late")
FAILING = {"blow-up": (STEP_TOO_SMALL, NOT_FINITE), "nan from t = 0.5": (NOT_FINITE,), "nan at once": (NOT_FINITE,)}
STARTS = tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.3, 1.99])


def mixed(kinds):
    """A field whose example i behaves as ``kinds[i]``: states (B, 1, 3), and the integrand of a quadrature."""

    def field(t, y, rows):
        t = t[:, None, None]
        speeds = {
            "easy": -0.1 * y,
            "waves": 9 * torch.stack([y[..., 1], -y[..., 0], y[..., 0] * y[..., 1]], -1),
            "stiff": -100 * (y - t.cos()),
            "spike": y * torch.exp(-(((t - 1) / 0.05) ** 2)),
            "blow-up": y * y.abs(),
            "nan from t = 0.5": torch.where(t > 0.5, torch.nan, y),
            "nan at once": torch.nan * y,
            "late": y * torch.cos(9 * t),
        }
        return torch.stack([speeds[kinds[row]][i] for i, row in enumerate(rows.tolist())])

    return Counted(field, lambda t, y, rows: y[:, 0, 0] * torch.cos(5 * t))


START = tensor([1.0, 0.7, -0.3]).expand(len(KINDS), 1, 3)
FIELDS = ("y", "quadrature", "t", "evaluations", "accepted", "rejected", "status")


@pytest.fixture(scope="module", params=METHODS)
def company(request):
    """All kinds in one batch: the solution, its field and its options."""
    tolerance = {"bosh3": 1e-4, "dopri5": 1e-5, "adams4": 1e-5}[request.param]
    options = {"rtol": tolerance, "atol": tolerance, "method": request.param, "quadrature": True, "max_steps": 3000}
    field = mixed(KINDS)
    return solve(field, START, STARTS, 2.0, **options), field, options


def test_each_example_ends_as_its_kind_does(company):
    """The failing ones fail at their time, and the others arrive and are right."""
    found, _, _ = company
    for kind, status, t, y in zip(KINDS, found.status.tolist(), found.t.tolist(), found.y[:, 0], strict=True):
        if kind not in FAILING:
            assert status == SUCCESS and t == 2.0
        else:
            assert status in FAILING[kind]
            at = {"blow-up": 1.0, "nan from t = 0.5": 0.5, "nan at once": 0.0}[kind]
            assert t == pytest.approx(at, abs=1e-3) and bool(torch.isfinite(y).all())
    y = START[0, 0]
    assert torch.allclose(found.y[0, 0], y * math.exp(-0.2), rtol=1e-5)
    assert torch.allclose(found.y[2, 0, 1:], torch.full((2,), math.cos(2.0), dtype=FLOAT), atol=0.02)
    assert torch.allclose(found.y[3, 0], y * math.exp(0.05 * math.sqrt(math.pi)), rtol=1e-4)
    assert torch.allclose(found.y[5, 0], y * math.exp(0.5), rtol=1e-4)
    assert torch.equal(found.y[6], START[6]) and found.evaluations[6].item() == 2
    wanted = [i for i, status in enumerate(found.status) if status]
    assert found.advice.startswith(f"{len(wanted)} of 9 examples stopped early (number {wanted[0]} at t = ")


def test_an_example_does_not_depend_on_its_company(company):
    """Alone, in other company and in another order: the same value, quadrature, counts and status, to the last bit."""
    found, _, options = company
    order = [7, 2, 5, 0, 8, 1, 4, 6, 3]
    pick = torch.tensor(order)
    other = solve(mixed([KINDS[i] for i in order]), START[pick], STARTS[pick], 2.0, **options)
    for name in FIELDS:
        assert torch.equal(getattr(other, name), getattr(found, name)[pick])
    for i, kind in enumerate(KINDS):
        alone = solve(mixed([kind]), START[:1], STARTS[i : i + 1], 2.0, **options)
        for name in FIELDS:
            assert torch.equal(getattr(alone, name), getattr(found, name)[i : i + 1]), (kind, name)


def test_every_evaluation_is_counted(company):
    """The rows passed to the field are ``evaluations``, example by example: 2 to begin with, then one for each stage
    after the first, or for Adams the only one, of every step tried; and those that are through cost nothing more."""
    found, field, options = company
    assert torch.equal(field.calls(len(KINDS)), found.evaluations)
    per_step = METHODS[options["method"]].cost
    assert per_step == {"bosh3": 3, "dopri5": 6, "adams4": 1}[options["method"]]
    assert torch.equal(found.evaluations, 2 + per_step * (found.accepted + found.rejected))
    assert found.evaluations.max() > 10 * found.evaluations.min()
    assert int(found.rejected.max()) > 5


def test_rows_are_the_same_object_as_long_as_the_same_examples_are_at_work(company):
    """So that what belongs to them is made ready once: a new object only where an example has left."""
    _, field, _ = company
    for before, after in itertools.pairwise(field.rows):
        assert (before is after) == (before.tolist() == after.tolist())
        assert set(after.tolist()) <= set(before.tolist())
    assert len({id(rows) for rows in field.rows}) <= len(KINDS)


def test_a_far_start_of_a_neighbour_does_not_matter():
    """The least step belongs to the example: one that starts at t = -1e6 does not stop one that needs small steps."""

    def field(t, y, rows, integrand):
        return torch.where((rows == 0)[:, None], 1e9 * torch.cos(1e9 * t)[:, None], 0.0 * y), None

    found = solve(field, torch.zeros(2, 1, dtype=FLOAT), tensor([0.0, -1e6]), 1e-8, rtol=1e-9, atol=1e-9)
    assert found.success and found.y[0].item() == pytest.approx(math.sin(10.0), abs=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_an_integrand_that_nobody_asked_for_changes_nothing(name):
    def field(integrand):
        return lambda t, y, rows, asked: (-y, torch.cos(50 * t) if integrand else None)

    y = torch.ones(1, 1, dtype=FLOAT)
    without, given = (solve(field(integrand), y, 0.0, 1.0, method=name) for integrand in (False, True))
    assert torch.equal(without.y, given.y) and torch.equal(without.evaluations, given.evaluations)
    assert given.quadrature is None


@pytest.mark.parametrize("name", METHODS)
def test_a_first_step_that_is_too_long_is_tried_again(name):
    """Nothing is remembered of a step that was rejected."""
    y = torch.ones(1, 1, dtype=FLOAT)
    found = solve(Counted(decay), y, 0.0, 3.0, rtol=1e-6, atol=1e-6, method=name, first_step=2.0)
    assert found.success and found.rejected.item() >= 2
    assert found.y.item() == pytest.approx(math.exp(math.sin(3.0)), rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_longest_step_is_kept(name):
    """A field that every step integrates exactly: as many steps as the longest one asks for, and a few to begin."""
    times = []

    def field(t, y, rows, integrand):
        times.append(t.item())
        return torch.ones_like(y), None

    found = solve(field, torch.zeros(1, 1, dtype=FLOAT), 1.0, 0.0, method=name, first_step=1.0, longest_step=1 / 50)
    assert found.success and found.y.item() == pytest.approx(-1.0)
    assert 50 <= found.accepted.item() <= 50 + 10
    assert max(a - b for a, b in itertools.pairwise(sorted(set(times), reverse=True))) <= 1 / 50 * (1 + 1e-9)
    assert found.accepted.item() > solve(field, torch.zeros(1, 1, dtype=FLOAT), 1.0, 0.0, method=name).accepted.item()
    with pytest.raises(ValueError, match="longest_step must be above 0, got 0"):
        solve(field, torch.zeros(1, 1, dtype=FLOAT), 1.0, 0.0, method=name, longest_step=0)


def test_equal_steps_of_adams_sum_waves_to_nothing():
    """159 waves, too fast for any of these steps: 224 equal ones of Adams sum them to nothing, 159 take them for a
    constant, and Dormand and Prince's uneven weights keep much of them at as many evaluations."""

    def waves(t, y, rows, integrand):
        return torch.ones_like(y), torch.cos(1000 * t + 1)

    def found(method, steps):
        start, loose = torch.zeros(1, 1, dtype=FLOAT), {"rtol": 10.0, "atol": 10.0}
        return solve(waves, start, 0.0, 1.0, method=method, longest_step=1 / steps, quadrature=True, **loose)

    exact = (math.sin(1001) - math.sin(1)) / 1000
    errors = [abs(found(method, steps).quadrature.item() - exact) for method, steps in
              (("adams4", 224), ("adams4", 159), ("dopri5", 224 / 6))]  # fmt: skip
    assert errors[0] < 0.005 and errors[1] > 0.3 and errors[2] > 5 * errors[0]


def test_the_first_step_may_be_given():
    """It saves the evaluation that estimates it, and is cut to what is left; the sign is that of the way to go."""
    field = Counted(decay)
    for span in ((0.0, 1.0), (1.0, 0.0)):
        for first in (0.01, 50.0):
            found = solve(field, torch.ones(1, 1, dtype=FLOAT), *span, first_step=first, rtol=1e-8, atol=1e-8)
            assert found.evaluations.item() == 1 + 6 * int(found.accepted + found.rejected)
            assert found.y.item() == pytest.approx(math.exp(math.sin(span[1]) - math.sin(span[0])), rel=1e-6)


# Failures ------------------------------------------------------------------------------------------------------------


def test_a_field_that_is_not_finite_at_the_start():
    """Infinite or nan in one entry is enough: nothing is tried, and the advice names the network."""
    for value in (torch.nan, torch.inf):
        found = solve(
            Counted(lambda t, y, rows, value=value: torch.where(y == 2, value, y)), tensor([[1.0, 2.0]]), 0.0, 1.0
        )
        assert found.status.tolist() == [NOT_FINITE] and found.evaluations.tolist() == [2]
        assert found.t.tolist() == [0.0] and found.y.tolist() == [[1.0, 2.0]]
        assert "not finite" in found.advice and "network" in found.advice and "t = 0)" in found.advice


def test_a_field_that_is_not_finite_on_the_way():
    """The steps close in on the time where it happens, in a bounded number of tries."""
    found = solve(
        Counted(lambda t, y, rows: column(1 / (t < 0.7), y) * 1.0 - 0 * y), torch.zeros(1, 1, dtype=FLOAT), 0, 1
    )
    assert found.status.tolist() == [NOT_FINITE] and found.t.item() == pytest.approx(0.7, abs=1e-12)
    assert found.y.item() == pytest.approx(0.7, abs=1e-12)
    assert int(found.accepted + found.rejected) < 300


def test_a_quadrature_that_is_not_finite():
    """The integrand counts as the field does."""
    found = solve(
        Counted(decay, lambda t, y, rows: torch.log(0.5 - t)), torch.ones(1, 1, dtype=FLOAT), 0, 1, quadrature=True
    )
    assert found.status.tolist() == [NOT_FINITE] and found.t.item() == pytest.approx(0.5, abs=1e-9)
    assert bool(torch.isfinite(found.quadrature).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_finite_time_blow_up_is_no_hang(dtype):
    """y' = y^2 from 1 ends at t = 1; the neighbour from 0.25 is at 1/3 and arrives."""
    field = Counted(lambda t, y, rows: y**2)
    found = solve(field, torch.tensor([[1.0], [0.25]], dtype=dtype), 0.0, 1.0 + 1 / 3, rtol=1e-6, atol=1e-6)
    assert found.status[0].item() in (STEP_TOO_SMALL, NOT_FINITE) and found.status[1].item() == SUCCESS
    assert found.t[0].item() == pytest.approx(1.0, abs=1e-4)
    assert found.y[1].item() == pytest.approx(0.375, rel=1e-5)
    assert (
        found.advice.startswith("1 of 2 examples stopped early (number 0 at t = 1") and "max_steps" not in found.advice
    )
    assert int(found.evaluations.max()) < 2000


def test_a_state_that_overflows_is_not_accepted():
    """A float32 state beyond its range under a field that stays finite: an infinite scale must not let it pass."""
    field = Counted(lambda t, y, rows: torch.full_like(y, 3e38))
    found = solve(field, torch.full((1, 1), 1e38), 0.0, 10.0)
    assert found.status.item() == NOT_FINITE and math.isfinite(found.y.item()) and found.t.item() < 1.0


@pytest.mark.parametrize("options", [{"rtol": 0.0, "atol": 0.0}, {"rtol": -1e-3}, {"atol": math.nan}])
def test_impossible_tolerances_are_refused(options):
    with pytest.raises(ValueError, match="rtol and atol"):
        solve(Counted(decay), torch.ones(1, 1), 0.0, 1.0, **options)


def test_all_examples_go_the_same_way():
    with pytest.raises(ValueError, match="same direction"):
        solve(Counted(decay), torch.ones(2, 1), tensor([0.0, 2.0]), 1.0)


# The quadrature ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_the_quadrature_is_a_component_that_nothing_depends_on(name):
    """The same steps, the same numbers as the same thing carried in the state, to 1e-14."""

    def both(t, y, rows):
        return torch.cat([volterra(t, y[:, :2], rows), (y[:, :1] * y[:, 1:2] + t[:, None])], 1)

    beside = Counted(volterra, lambda t, y, rows: y[:, 0] * y[:, 1] + t)
    y, q = fixed_steps(beside, torch.ones(1, 2, dtype=FLOAT), 7, name)
    inside, _ = fixed_steps(Counted(both, lambda t, y, rows: t), tensor([[1.0, 1.0, 0.0]]), 7, name)
    assert torch.allclose(torch.cat([y, q[:, None]], 1), inside, rtol=1e-14)


@pytest.mark.parametrize("name", METHODS)
def test_the_error_of_the_quadrature_is_controlled(name):
    """A state that does not move and an integrand that does: the steps are the integrand's."""
    field = Counted(lambda t, y, rows: 0 * y, lambda t, y, rows: torch.cos((rows + 1) * 15 * t))
    found = solve(
        field, torch.ones(2, 2, dtype=FLOAT), 0, 2, rtol=1e-7, atol=1e-7, method=name, quadrature=True, max_steps=9999
    )
    truth = tensor([math.sin(30) / 15, math.sin(60) / 30])
    assert torch.allclose(found.quadrature, truth, atol=1e-6)
    assert found.accepted[1] > 1.5 * found.accepted[0] > 15
    assert torch.equal(found.y, torch.ones_like(found.y))


@pytest.mark.parametrize(("name", "unasked"), [("bosh3", 0), ("dopri5", 1)])
def test_the_integrand_is_not_asked_for_in_vain(name, unasked):
    """Not for the first step's estimate, nor where the pair gives it no weight; never without a quadrature."""
    field = Counted(decay, lambda t, y, rows: t)
    found = solve(field, torch.ones(1, 1, dtype=FLOAT), 0.0, 3.0, method=name, quadrature=True)
    tried = int(found.accepted + found.rejected)
    assert field.asked.count(False) == 1 + unasked * tried and len(field.asked) == found.evaluations.item()
    assert found.quadrature.item() == pytest.approx(4.5, rel=1e-12)
    plain = Counted(decay)
    without = solve(plain, torch.ones(1, 1, dtype=FLOAT), 0.0, 3.0, method=name)
    assert not any(plain.asked) and without.quadrature is None


# Precision -----------------------------------------------------------------------------------------------------------


def test_the_error_falls_with_the_tolerance():
    """dopri5: over eight decades the error follows the tolerance (slope 1 within 0.15) and the evaluations its -1/5th
    power (slope within 0.03); never more than 30 tolerances off."""
    tolerances = 10.0 ** -np.arange(3, 12)
    errors, calls = [], []
    for tolerance in tolerances:
        found = solve(Counted(decay), torch.ones(1, 1, dtype=FLOAT), 0.0, 10.0, rtol=tolerance, atol=tolerance)
        errors.append(abs(found.y.item() - math.exp(math.sin(10.0))))
        calls.append(found.evaluations.item())
    assert np.polyfit(np.log(tolerances), np.log(errors), 1)[0] == pytest.approx(1, abs=0.15)
    assert np.polyfit(np.log(tolerances[2:]), np.log(calls[2:]), 1)[0] == pytest.approx(-0.2, abs=0.03)
    assert max(errors / tolerances) < 30


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 3e-6), (torch.float64, 3e-13)])
def test_the_state_keeps_its_precision(dtype, floor):
    """The tightest tolerance that each bears: relative error below the floor; time and quadrature are float64."""
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    field = Counted(decay, lambda t, y, rows: t.cos())
    y = torch.tensor([[1.0, 1e-3]], dtype=dtype)
    found = solve(field, y, 0.0, 2.0, rtol=tolerance, atol=0.0, quadrature=True)
    assert found.success and found.y.dtype == dtype and found.t.dtype == found.quadrature.dtype == FLOAT
    assert torch.allclose(
        found.y.double() / y.double(), torch.full((1, 2), math.exp(math.sin(2.0)), dtype=FLOAT), rtol=floor
    )
    assert found.quadrature.item() == pytest.approx(math.sin(2.0), rel=tolerance * 10)


def test_a_tolerance_of_its_own():
    """A state and tolerance 1024 times as large: the same steps and 1024 times the state, to the last bit; each example
    has its own, at the beginning of each step. With a larger one fewer steps will do."""
    y, asked, large = torch.ones(2, 3, dtype=FLOAT), [], tensor([[1.0], [1024.0]])

    def allowed(t, rows, size):
        asked.append((t.tolist(), rows.tolist()))
        return 1e-7 * large[rows].expand_as(size)

    options = {"rtol": 0.0, "atol": 1e-7}
    plain = solve(Counted(decay), y, 0.0, 3.0, **options)
    found = solve(Counted(decay), y * large, 0.0, 3.0, tolerance=allowed, **options)
    assert torch.equal(found.y, plain.y * large) and torch.equal(found.evaluations, plain.evaluations)
    tried = int((plain.accepted + plain.rejected)[0])
    assert len(asked) == tried + 1 and asked[-1][0][0] < 3.0 and asked[0] == ([0.0, 0.0], [0, 1])
    loose = solve(Counted(decay), y, 0.0, 3.0, tolerance=lambda t, rows, size: 1e-4 + 0 * size, **options)
    assert bool((loose.accepted < plain.accepted).all())


def test_a_tolerance_beyond_float32_fails_with_advice():
    """Rounding looks like error: the steps shrink until one of the limits ends it."""
    found = solve(Counted(lambda t, y, rows: -50 * y + 50), torch.full((1, 64), 0.3), 0.0, 5.0, rtol=1e-12, atol=1e-12)
    assert found.status.item() in (STEP_LIMIT, STEP_TOO_SMALL) and "rtol" in found.advice
    assert int(found.accepted + found.rejected) <= 1000


def test_the_state_given_is_left_alone():
    y = torch.ones(2, 3)
    solve(Counted(decay), y, 0.0, 1.0)
    assert torch.equal(y, torch.ones(2, 3))
