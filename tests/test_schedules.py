"""Schedules: ends, rates, monotonicity, and what each kind is by its formula. float64 throughout."""

import math

import pytest
import torch

from nelbo.objectives import GradientScale
from nelbo.schedules import INTERIORS, Linear, Monotone, PixelMonotone, Polynomial, Schedule, default_gamma_0
from toys import FLOAT, gauss_legendre, tensor

G0, G1 = -13.3, 5.0
SHAPE, CODES, BATCH = (2, 3, 2), 5, 4


def randomise(module, scale, seed=0):
    """Every parameter gets normal numbers of this scale added."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=random, dtype=FLOAT))
    return module


def make(kind, ends, condition=0, seed=0):
    """A schedule of each kind with parameters far from their first values."""
    torch.manual_seed(seed)
    if kind == "linear":
        interior = Linear()
    elif kind == "monotone":
        interior = randomise(Monotone(G0, G1, width=16).to(FLOAT), 1.0, seed)
    elif kind == "pixel-monotone":
        interior = randomise(PixelMonotone(SHAPE, G0, G1, condition, width=16).to(FLOAT), 1.0, seed)
    else:
        shape = (1, 1, 1) if kind == "scalar-polynomial" else SHAPE
        interior = randomise(Polynomial(shape, condition, width=16).to(FLOAT), 0.5, seed)
    schedule = Schedule(interior, G0, G1, ends).to(FLOAT)
    if ends == "learned":  # their first values are float32
        with torch.no_grad():
            schedule.start.fill_(G0)
            schedule.slope.fill_(G1 - G0)
    return schedule


def code(batch=BATCH, seed=1):
    """Latents that are no k-hots: any real numbers will do."""
    return torch.randn(batch, CODES, generator=torch.Generator().manual_seed(seed), dtype=FLOAT)


CONDITIONED = ("pixel-monotone", "polynomial", "scalar-polynomial")
CASES = [
    (kind, ends, condition)
    for kind in INTERIORS
    if kind != "betas"  # a table of numbers: test_ddpm.py
    for ends in ("fixed", "learned", "free")
    for condition in ((0, CODES) if kind in CONDITIONED else (0,))
]


@pytest.mark.parametrize(("kind", "ends", "condition"), CASES)
def test_rate_is_the_derivative_and_positive(kind, ends, condition):
    """gamma' by its closed form equals autodiff of gamma, and gamma climbs, at 201 times for each of 3 seeds."""
    c = code(1) if condition else None
    for seed in range(3):
        schedule = make(kind, ends, condition, seed)
        t = torch.linspace(0, 1, 201, dtype=FLOAT, requires_grad=True)
        gamma, rate = schedule(t, None if c is None else c.expand(201, -1))
        size = gamma[0].numel()
        for entry in {0, size // 2, size - 1}:
            (slope,) = torch.autograd.grad(gamma.reshape(201, -1)[:, entry].sum(), t, retain_graph=True)
            assert torch.allclose(rate.reshape(201, -1)[:, entry], slope, rtol=1e-9, atol=1e-9)
        assert float(rate.detach().min()) > -1e-12  # a polynomial may touch 0
        assert float(gamma.detach().diff(dim=0).min()) > -1e-12
        if "polynomial" not in kind:
            assert float(rate.detach().min()) > 1e-3


@pytest.mark.parametrize(("kind", "ends", "condition"), [case for case in CASES if case[1] != "free"])
def test_ends_are_kept(kind, ends, condition):
    """gamma(0) and gamma(1) are the given ends for every pixel and latent, exactly up to one rounding."""
    schedule, c = make(kind, ends, condition), code() if condition else None
    for t, end in ((0.0, G0), (1.0, G1)):
        gamma, _ = schedule(torch.full((BATCH,), t, dtype=FLOAT), c)
        expected = SHAPE if kind in ("pixel-monotone", "polynomial") else (1, 1, 1)
        assert gamma.shape == (BATCH, *expected)
        assert torch.allclose(gamma, torch.full_like(gamma, end), atol=1e-14, rtol=0)


@pytest.mark.parametrize(("kind", "ends", "condition"), CASES)
def test_ends_are_those_of_the_curve(kind, ends, condition):
    """``ends`` says what the curve is at 0 and 1, one for each image; fixed ones are constants."""
    schedule = make(kind, ends, condition)
    curve, t = schedule.given(code() if condition else None), torch.zeros(BATCH, dtype=FLOAT)
    for found, time in zip(schedule.ends(t + 0.3, curve), (t, t + 1), strict=True):
        assert len(found) == BATCH and found.dtype == FLOAT
        assert torch.allclose(*torch.broadcast_tensors(found, curve(time)[0]), atol=1e-14, rtol=0)
        assert found.requires_grad == (ends != "fixed" and (kind, ends) != ("linear", "free"))


@pytest.mark.parametrize(("kind", "ends", "condition"), CASES)
def test_the_rate_integrates_to_the_climb(kind, ends, condition):
    """Gauss-Legendre quadrature of gamma' over [0, 1] gives gamma(1) - gamma(0): G1 - G0 where the ends are kept."""
    schedule, c = make(kind, ends, condition), code(1) if condition else None
    t, weights = gauss_legendre(16, 8)
    curve = schedule.given(c)
    rates = torch.stack([curve(v)[1][0] for v in t])
    climb = (weights[:, None, None, None] * rates).sum(0)
    assert torch.allclose(climb, (curve(tensor(1.0))[0] - curve(tensor(0.0))[0])[0], rtol=1e-10)
    if ends != "free":
        assert torch.allclose(climb, torch.full_like(climb, G1 - G0), rtol=1e-10)


def test_free_ends_move():
    """Without renormalisation gamma is the raw network; its ends are not those it was started from."""
    schedule = make("monotone", "free")
    at = schedule(tensor([0.0, 1.0]))[0].flatten().detach()
    raw = schedule.interior.raw(None)(tensor([0.0, 1.0]).reshape(-1, 1, 1, 1))[0].flatten().detach()
    assert torch.equal(at, raw)
    assert abs(float(at[0]) - G0) > 1e-3 and abs(float(at[1]) - G1) > 1e-3
    ends = make("pixel-monotone", "free", CODES)(torch.zeros(BATCH, dtype=FLOAT), code())[0].flatten(1).detach()
    assert float(ends.std(1).min()) > 1e-3  # each pixel has its own
    assert float(ends.std(0).min()) > 1e-3  # and each latent


def test_default_gamma_0():
    """-13.3 at 256 levels, -7.876 at 17; the ratio of the noise's deviation to a bin's width is always the same."""
    assert default_gamma_0(256) == -13.3
    assert default_gamma_0(17) == pytest.approx(-7.876, abs=5e-4)
    for levels in (2, 3, 17, 100, 256):
        ratio = math.exp(default_gamma_0(levels) / 2) / (2 / levels)
        assert ratio == pytest.approx(math.exp(-13.3 / 2) * 128, rel=1e-12)


def test_learned_linear_is_vdm():
    """gamma = b + |w| t with gradient 1 to b and sign(w) t to w; a negative w still climbs, and w = 0 has slope +1."""
    schedule = Schedule(Linear(), G0, G1, "learned").to(FLOAT)
    assert [p.item() for p in (schedule.start, schedule.slope)] == pytest.approx([G0, G1 - G0], rel=1e-7)
    t = tensor([0.0, 0.25, 1.0])
    with torch.no_grad():
        schedule.start.fill_(-11.0)
        schedule.slope.fill_(-14.0)
    gamma, rate = schedule(t)
    assert torch.equal(gamma.flatten(), tensor([-11.0, -7.5, 3.0])) and torch.equal(
        rate.expand_as(gamma).flatten(), tensor([14.0, 14.0, 14.0])
    )
    gradients = torch.autograd.grad(gamma.sum(), [schedule.start, schedule.slope])
    assert [g.item() for g in gradients] == [3.0, -1.25]
    with torch.no_grad():
        schedule.slope.fill_(0.0)
    (slope,) = torch.autograd.grad(schedule(t)[0].sum(), [schedule.slope])
    assert slope.item() == 1.25


def test_fixed_linear():
    gamma, rate = Schedule(Linear(), -10.0, 6.0)(tensor([0.0, 0.25, 1.0]))
    assert torch.equal(gamma.flatten(), tensor([-10.0, -6.0, 6.0]))
    assert torch.equal(rate.flatten(), tensor([16.0, 16.0, 16.0]))
    assert not list(Schedule(Linear(), -10.0, 6.0).parameters())


def test_monotone_by_hand():
    """r = l1(t) + l3(s(l2(2t - 1)))/width for a width of two, written out."""
    interior = Monotone(G0, G1, width=2).to(FLOAT)
    with torch.no_grad():
        interior.l1.weight.fill_(-3.0)  # counts as 3
        interior.l1.bias.fill_(0.5)
        interior.l2.weight.copy_(tensor([[1.0], [-2.0]]))
        interior.l2.bias.copy_(tensor([0.1, -0.2]))
        interior.l3.weight.copy_(tensor([[4.0, -1.0]]))
    t = tensor([0.3]).reshape(1, 1, 1, 1)
    value, _ = interior.raw(None)(t)

    def s(v):
        return 2 / (1 + math.exp(-v)) - 1

    expected = 3 * 0.3 + 0.5 + (4 * s(-0.4 + 0.1) + 1 * s(2 * -0.4 - 0.2)) / 2
    assert value.item() == pytest.approx(expected, rel=1e-14)


def test_pixel_monotone_by_hand():
    """r = l1(t) + l3(s(l_int(s(l2(2u - 1)))))/width on u = [c, t], one hidden unit, two pixels."""
    interior = PixelMonotone((1, 1, 2), G0, G1, condition=1, width=1).to(FLOAT)
    with torch.no_grad():
        interior.l1.weight.fill_(-2.0)
        interior.l1.bias.fill_(0.5)
        interior.l2.weight.copy_(tensor([[0.7, -1.1]]))
        interior.l2.bias.copy_(tensor([0.2]))
        interior.l_int.weight.fill_(-1.3)
        interior.l_int.bias.fill_(-0.1)
        interior.l3.weight.copy_(tensor([[2.0], [-0.5]]))
    value, _ = interior.raw(tensor([[0.6]]))(tensor([0.3]).reshape(1, 1, 1, 1))

    def s(v):
        return 2 / (1 + math.exp(-v)) - 1

    inner = s(1.3 * s(0.7 * 0.2 + 1.1 * -0.4 + 0.2) - 0.1)
    expected = [2 * 0.3 + 0.5 + 2.0 * inner, 2 * 0.3 + 0.5 + 0.5 * inner]
    assert torch.allclose(value.flatten(), tensor(expected), rtol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_polynomial_against_quadrature(seed):
    """u(t) = int_0^t (a s^2 + b s + d)^2 ds / int_0^1 of the same, by an exact Gauss rule, at several t per pixel."""
    schedule = make("polynomial", "fixed", CODES, seed)
    c = code(seed=seed)
    a, b, d = (v.detach() for v in schedule.interior.coefficients(c))
    assert a.shape == (BATCH, *SHAPE)

    def integral(end):
        nodes, weights = gauss_legendre(1, 3, 0.0, end)  # exact to degree 5
        return sum(w * (a * s**2 + b * s + d) ** 2 for s, w in zip(nodes, weights, strict=True))

    for t in (0.1, 0.5, 0.9):
        gamma, rate = schedule(torch.full((BATCH,), t, dtype=FLOAT), c)
        assert torch.allclose(gamma, G0 + (G1 - G0) * integral(t) / integral(1.0), rtol=1e-12)
        assert torch.allclose(rate, (G1 - G0) * (a * t**2 + b * t + d) ** 2 / integral(1.0), rtol=1e-12)


def test_polynomial_network_is_the_papers():
    """a, b, d by dense -> swish -> dense -> swish -> three heads; a starts at 0, d is 1e-3 + softplus."""
    interior = Polynomial(SHAPE, CODES, width=7).to(FLOAT)
    c = code()
    a, b, d = interior.coefficients(c)
    assert torch.equal(a, torch.zeros_like(a)) and float(b.detach().std()) > 0.05

    def swish(v):
        return v / (1 + torch.exp(-v))

    h = swish(interior.dense_2(swish(interior.dense_1(c))))
    assert torch.allclose(b.flatten(1), interior.head_b(h), rtol=1e-12)
    assert torch.allclose(d.flatten(1), 1e-3 + torch.log1p(torch.exp(interior.head_d(h))), rtol=1e-12)


def test_a_factored_polynomial_is_the_full_one_of_its_products():
    """With a rank the second layer and the heads are products of two; a still starts at 0."""
    full, factored = Polynomial(SHAPE, CODES, width=7).to(FLOAT), Polynomial(SHAPE, CODES, width=7, rank=2).to(FLOAT)
    size = math.prod(SHAPE)
    assert sum(p.numel() for p in factored.parameters()) == 5 * 7 + 7 + 4 * 7 * 2 + 2 * 7 + 7 + 3 * (2 * size + size)
    assert torch.equal(factored.coefficients(code())[0], torch.zeros(BATCH, *SHAPE, dtype=FLOAT))
    randomise(factored, 0.5)
    weights = {"dense_1.weight": factored.dense_1.weight, "dense_1.bias": factored.dense_1.bias}
    for name in ("dense_2", "head_a", "head_b", "head_d"):
        first, second = getattr(factored, name)
        weights |= {f"{name}.weight": second.weight @ first.weight, f"{name}.bias": second.bias}
        assert torch.linalg.matrix_rank(weights[f"{name}.weight"]) == 2
    full.load_state_dict(weights)
    for ours, theirs in zip(factored.coefficients(code()), full.coefficients(code()), strict=True):
        assert float(ours.detach().std()) > 0.1 and torch.allclose(ours, theirs, rtol=1e-12)


def test_polynomial_coefficients_stand_for_their_own_pixels():
    """Entry (channel, row, column) of gamma follows its own coefficient in channels-first order."""
    interior = Polynomial(SHAPE).to(FLOAT)
    with torch.no_grad():
        interior.b[5] = 2.0  # channel 0, row 2, column 1
    gamma = Schedule(interior, G0, G1)(tensor([0.5]))[0][0]
    other = torch.ones(SHAPE, dtype=torch.bool)
    other[0, 2, 1] = False
    assert len(gamma[other].unique()) == 1 and gamma[0, 2, 1] != gamma[0, 0, 0]


def test_time_only_and_scalar_polynomials():
    """Without a latent all images share the curves; a scalar polynomial has one curve for all pixels, its own for each
    latent; a per-pixel one has as many as there are pixels."""
    t = torch.full((BATCH,), 0.4, dtype=FLOAT)
    alone = make("polynomial", "fixed")(t)[0]
    assert alone.shape == (BATCH, *SHAPE) and torch.equal(alone, alone[:1].expand_as(alone))
    assert len(alone[0].detach().flatten().unique()) == math.prod(SHAPE)
    scalar = make("scalar-polynomial", "fixed", CODES)(t, code())[0]
    assert scalar.shape == (BATCH, 1, 1, 1) and len(scalar.detach().flatten().unique()) == BATCH


def test_given_runs_once_for_any_time():
    """``given(c)`` at several times equals one call for each; a single time serves a whole batch of latents."""
    for kind in CONDITIONED:
        schedule, c = make(kind, "fixed", CODES), code()
        curve = schedule.given(c)
        for t in (0.0, 0.3, 1.0):
            whole = schedule(torch.full((BATCH,), t, dtype=FLOAT), c)
            one = curve(tensor(t))
            for left, right in zip(whole, one, strict=True):
                assert torch.allclose(left, right, rtol=1e-13) and left.shape == right.shape


def test_gradient_hook_scales_the_interior_and_leaves_the_ends():
    """GradientScale: values unchanged; gradients to interior parameters times the factor, those to the ends plain."""
    factor = tensor([0.5, -2.0, 3.0])
    t, weight = tensor([0.2, 0.5, 0.9]), tensor([1.0, 2.0, -0.7]).reshape(-1, 1, 1, 1)
    schedule = make("monotone", "learned")
    ends, interior = [schedule.start, schedule.slope], list(schedule.interior.parameters())
    plain = schedule.given()(t)
    scale = GradientScale()
    hooked = schedule.given(None, scale)(t)
    for left, right in zip(plain, hooked, strict=True):
        assert torch.equal(left, right)

    def loss(curve, factor=1.0):
        gamma, rate = curve
        return ((gamma.sin() + 0.1 * rate**2) * weight * factor).sum()

    scale.factor = factor
    found = torch.autograd.grad(loss(hooked), ends + interior, allow_unused=True)
    expected = torch.autograd.grad(loss(plain), ends, retain_graph=True)
    expected += torch.autograd.grad(loss(plain, factor.reshape(-1, 1, 1, 1)), interior, allow_unused=True)
    for left, right in zip(found, expected, strict=True):
        assert (left is None) == (right is None)
        assert left is None or torch.allclose(left, right, rtol=1e-12, atol=1e-14)


def test_gradient_hook_needs_its_factor():
    scale = GradientScale()
    u = scale(torch.ones(2, requires_grad=True))
    with pytest.raises(AssertionError, match="factor"):
        u.sum().backward()
    constant = torch.ones(2)
    assert scale(constant) is constant


@pytest.mark.parametrize(("ends", "gammas"), [("loose", (-1.0, 1.0)), ("fixed", (1.0, 1.0)), ("fixed", (2.0, 1.0))])
def test_impossible_schedules_are_refused(ends, gammas):
    with pytest.raises(ValueError, match=r"gamma_0 must lie below|ends must be"):
        Schedule(Linear(), *gammas, ends)


def test_the_slope_of_a_positive_weight_at_zero_is_one():
    """|w| at exactly 0 has slope +1, as in the public (JAX) networks: a weight that starts there can still grow."""
    interior = Monotone(G0, G1, width=2).to(FLOAT)
    with torch.no_grad():
        interior.l1.weight.zero_()
    value, rate = interior.raw(None)(tensor([0.25]).reshape(1, 1, 1, 1))
    (by_value,) = torch.autograd.grad(value.sum(), interior.l1.weight, retain_graph=True)
    (by_rate,) = torch.autograd.grad(rate.sum(), interior.l1.weight)
    assert by_value.item() == 0.25 and by_rate.item() == 1.0
