"""Importance-sampled times: the density is integrated and inverted, and changes no expectation and no gradient."""

import math

import pytest
import torch

from nelbo import checkpoints, likelihood, times
from nelbo.compose import build_model
from nelbo.config import refuse_changes, to_dict
from nelbo.data import load
from nelbo.data.loader import permutation
from nelbo.draws import Draws, generator
from nelbo.errors import UserError
from nelbo.objectives import diffusion_term, elbo
from nelbo.paths import PATHS, bisect
from nelbo.schedules import Schedule
from nelbo.training import train
from test_objectives import exact_ends, one_pixel, schedules
from tiny import change, metrics, tiny
from toys import (
    FLOAT,
    build,
    expected_diffusion,
    gauss_legendre,
    gaussian,
    gaussian_diffusion,
    linear,
    normal_grid,
    polynomial,
    tensor,
    two_pixels,
)

G0, G1 = -13.3, 5.0
SHAPE = (1, 1, 2)
PANELS = gauss_legendre(24, 10)
KINDS = [*schedules(SHAPE), "given a code", "free ends"]


def graded(order=12):
    """Nodes and weights on [0, 1], ever finer towards 1, where t(u) is steep because p is small."""
    panels = [(i / 32, (i + 1) / 32) for i in range(31)] + [(1 - 2.0**-k, 1 - 2.0 ** -(k + 1)) for k in range(5, 45)]
    parts = [gauss_legendre(1, order, low, high) for low, high in panels]
    return torch.cat([nodes for nodes, _ in parts]), torch.cat([weights for _, weights in parts])


GRADED = graded()


def made(kind, shape=SHAPE):
    """A schedule of any kind and rows of c for it, or None."""
    if kind == "given a code":
        return polynomial(shape, G0, G1, seed=1, condition=2), torch.eye(2, dtype=FLOAT)
    if kind == "free ends":
        fixed = schedules(shape)["pixel-monotone"]
        return Schedule(fixed.interior, G0, G1, "free").to(FLOAT), None
    return schedules(shape)[kind], None


def drawn(kind, u, path, shape=SHAPE, row=0):
    """The curve of a schedule, and times.importance of it at u."""
    schedule, codes = made(kind, shape)
    c = None if codes is None else codes[row].expand(len(u), -1)
    curve = schedule.given(c)
    return curve, *times.importance(u, curve, PATHS[path](), "linear" in kind)


# The mass ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_the_mass_is_the_integral_of_alpha_squared(path):
    """By quadrature between many gammas, by autodiff, and from infinity: mass(40) is the tail -e^-40."""
    path = PATHS[path]()
    gammas = torch.linspace(-30, 12, 22, dtype=FLOAT)
    masses = path.mass(gammas)
    for low, high, found in zip(gammas, gammas[1:], masses.diff(), strict=False):
        nodes, weights = gauss_legendre(4, 24, low.item(), high.item())
        alpha, _ = path.coefficients(nodes)
        assert found.item() == pytest.approx((weights * alpha**2).sum().item(), rel=1e-9, abs=1e-15)
    gammas.requires_grad_()
    (slope,) = torch.autograd.grad(path.mass(gammas).sum(), gammas)
    assert torch.allclose(slope, path.coefficients(gammas)[0] ** 2, rtol=1e-9, atol=1e-15)
    assert path.mass(tensor(40.0)).item() == pytest.approx(-math.exp(-40), abs=1e-16)
    assert masses.max() < 0 and bool((masses.diff() > 0).all())


@pytest.mark.parametrize("path", PATHS)
def test_the_inverse_mass_inverts(path):
    path = PATHS[path]()
    gammas = torch.cat([torch.linspace(-40, 12, 105, dtype=FLOAT), tensor([-1e-3, 0.0, 1e-3])])
    assert torch.allclose(path.inverse_mass(path.mass(gammas)), gammas, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(("path", "expected"), [("vp", 13.293286), ("straight", 11.299108)])
def test_the_papers_masses(path, expected):
    path = PATHS[path]()
    assert (path.mass(tensor(G1)) - path.mass(tensor(G0))).item() == pytest.approx(expected, abs=5e-7)


def test_bisection_finds_every_bit():
    value = torch.linspace(0.0, 1.0, 11)
    for dtype in (torch.float32, FLOAT):
        root = bisect(
            lambda x: x.double() ** 3, value.double(), torch.zeros(11, dtype=dtype), torch.ones(11, dtype=dtype)
        )
        assert root.dtype == dtype
        assert torch.allclose(root.double(), value.double() ** (1 / 3), rtol=0, atol=torch.finfo(dtype).eps)


# The times -----------------------------------------------------------------------------------------------------------

U = torch.linspace(0.0, 1.0, 1001, dtype=FLOAT)[:-1]


def test_on_vp_the_times_are_the_papers_closed_form():
    """g = -log(e^(-Z u) (1 + e^-g0) - 1), and what bisection finds; the weight over the density is Z/2 at all times."""
    z = 13.293286
    gamma = -torch.log(torch.exp(-z * U) * (1 + math.exp(-G0)) - 1)
    curve, t, density = drawn("fixed linear", U, "vp")
    assert torch.allclose(curve(t)[0].flatten(), gamma, rtol=0, atol=1e-4)  # the paper's Z has eight digits
    for path in PATHS:
        curve, t, density = drawn("fixed linear", U, path)
        again, also = times.importance(U, curve, PATHS[path](), line=False)
        assert torch.allclose(t, again, rtol=0, atol=1e-12) and torch.allclose(density, also, rtol=1e-9)
        gamma, rate = (v.flatten() for v in curve(t))
        alpha, _ = PATHS[path]().coefficients(gamma)
        mass = {"vp": 13.293286, "straight": 11.299108}[path]
        assert torch.allclose(rate * alpha**2 / density, tensor(mass), rtol=1e-7)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_u_is_the_integral_of_the_density(kind, path):
    """u = int_0^t p for t(u) of every kind of schedule, p from its rate; and p is the weight of a velocity's error."""
    curve, t, density = drawn(kind, U, path)
    gamma, rate = curve(t)
    alpha, _ = PATHS[path]().coefficients(gamma)
    weight = (rate * alpha**2).flatten(1).sum(1)
    constant = (weight / density)[density > 1e-6]
    assert torch.allclose(constant, constant[0], rtol=1e-9)
    nodes, weights = gauss_legendre(8, 16)
    schedule, codes = made(kind)
    for i in (0, 1, 137, 500, 881, 999):
        with torch.no_grad():
            gamma, rate = schedule(nodes * t[i], None if codes is None else codes[:1].expand(len(nodes), -1))
        alpha, _ = PATHS[path]().coefficients(gamma)
        inside = (weights * t[i] * (rate * alpha**2).flatten(1).sum(1)).sum() / constant[0]
        assert inside.item() == pytest.approx(U[i].item(), abs=1e-9)
    assert t[0] == pytest.approx(0, abs=1e-12) and bool((t.diff() >= 0).all()) and t.max() < 1


def test_every_image_has_its_own_density():
    """Rows of one batch with other c: the times are those that each c has alone."""
    schedule, codes = made("given a code")
    u = U[::100]
    rows = torch.arange(len(u)) % 2
    t, density = times.importance(u, schedule.given(codes[rows]), PATHS["vp"]())
    for row in (0, 1):
        _, alone, own = drawn("given a code", u, "vp", row=row)
        assert torch.allclose(t[rows == row], alone[rows == row], atol=1e-12)
        assert torch.allclose(density[rows == row], own[rows == row], rtol=1e-9)
    assert (drawn("given a code", u, "vp", row=0)[1] - drawn("given a code", u, "vp", row=1)[1]).abs().max() > 0.02


CONFIGS = {
    "vdm": tiny("vdm-digits"),
    "idode-sp": tiny("idode-sp-digits"),
    "monotone": tiny("vdm-digits", schedule__kind="monotone", schedule__ends="learned"),
    "mulan": tiny("mulan-digits"),
    "mulan-monotone": tiny("mulan-monotone-digits"),
    "scalar": tiny("mulan-scalar-digits"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_is_enough(name):
    """Models as trained, float32: at the t that is found, M(t) of the same weights in float64 is u M(1) to 1e-6."""
    torch.manual_seed(0)
    model = build_model(CONFIGS[name], (1, 8, 8), 17)
    with torch.no_grad():
        for parameter in model.schedule.interior.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    u = torch.rand(256)
    c = None if model.latent is None else torch.nn.functional.one_hot(torch.arange(256) % 10, 10).float()
    t, density = times.importance(u, model.curve(c), model.path, name in ("vdm", "idode-sp"))
    assert t.dtype == density.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1
    exact = model.double()
    curve = exact.curve(None if c is None else c.double())

    def mass(at):
        return exact.path.mass(curve(at)[0]).flatten(1).sum(1)

    with torch.no_grad():
        zero, one = torch.zeros(256, dtype=FLOAT), torch.ones(256, dtype=FLOAT)
        reached = (mass(t.double()) - mass(zero)) / (mass(one) - mass(zero))
        assert (reached - u).abs().max().item() < 1e-6
        again, expected = times.importance(u.double(), curve, exact.path)
    assert torch.allclose(again.float(), t, atol=1e-3)
    assert torch.allclose(density.double(), expected, rtol=1e-3)


@torch.no_grad()
def test_a_flat_stretch_makes_no_nan():
    """gamma stands still at t = 1/2, where f' = d^2 (1 - 2 t)^2: p is 0 there, and the term over it stays finite."""
    toy = gaussian([0.5, 1.5])
    schedule = polynomial(toy.shape, G0, G1, scale=0.0)
    schedule.interior.b.fill_(-2 * (math.log(2) + 1e-3))
    model = build(toy, schedule, "vp", "velocity")
    curve = model.curve(None)
    assert curve(tensor([0.5]))[1].max() < 1e-25
    low, half, high = (model.path.mass(curve(tensor([t]))[0]).sum() for t in (0.0, 0.5, 1.0))
    u = (half - low) / (high - low) + torch.linspace(-1e-9, 1e-9, 201, dtype=FLOAT)
    t, density = times.importance(u, curve, model.path)
    assert (t - 0.5).abs().max() < 0.01 and 0 < density.min() < 1e-4
    x = torch.ones(201, *toy.shape, dtype=FLOAT)
    assert bool(diffusion_term(model, x, t, x, density=density).isfinite().all())
    # Exactly there the rate may round to 0: then p is the floor, and 0 over it is 0.
    _, floor = times.importance(u[:1], lambda t: (curve(t)[0], 0 * curve(t)[1]), model.path)
    assert floor.item() > 0


# Expectations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_integral_of_anything_stays(kind, path):
    """E_u l(t_u)/p(t_u) = int l dt, for l with the schedule's rate (as in the bound)."""
    u, weights = GRADED
    curve, t, density = drawn(kind, u, path)
    schedule, codes = made(kind)
    flat = schedule.given(None if codes is None else codes[:1].expand(768, -1))

    def integrand(gamma, rate):
        return (rate * torch.exp(-((gamma + 3) ** 2) / 20)).flatten(1).sum(1)

    with torch.no_grad():
        found = (weights * integrand(*curve(t)) / density).sum().item()
        nodes, even = gauss_legendre(64, 12)
        expected = (even * integrand(*flat(nodes))).sum().item()
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "free" not in kind])
def test_the_diffusion_term_stays(kind, path):
    """Gaussian data, exact denoiser: over u, the term at t(u) over its density integrates to the closed form."""
    toy = gaussian([0.3, 1.7])
    u, weights = GRADED
    schedule, codes = made(kind)
    _, t, density = drawn(kind, u, path)
    model = build(toy, schedule, path, "velocity")
    c = None if codes is None else codes[:1]
    found = expected_diffusion(toy, model, (t, weights / density), c=c)
    assert found == pytest.approx(gaussian_diffusion([0.3, 1.7], G0, G1), rel=1e-6)


def test_elbo_maps_and_divides():
    """``elbo`` with ``importance``: t is u, mapped by the schedule given c; only the diffusion term is another one."""
    toy = two_pixels()
    random = torch.Generator().manual_seed(0)
    m, u = torch.randint(16, (40,), generator=random), torch.rand(40, generator=random, dtype=FLOAT)
    eps, eps_0 = torch.randn(2, 40, 1, 1, 2, generator=random, dtype=FLOAT)
    x, images = (v[m].reshape(40, 1, 1, 2) for v in (toy.means, toy.images))
    for kind in ("fixed linear", "polynomial"):
        model = build(toy, schedules(toy.shape)[kind], "straight", "velocity")
        draw = {"eps": eps, "eps_0": eps_0, "dtype": FLOAT}
        terms = elbo(model, images, t=u, importance=True, **draw)
        t, density = times.importance(u, model.curve(None), model.path, kind == "fixed linear")
        assert (t - u).abs().max() > 0.05
        plain = elbo(model, images, t=t, **draw)
        assert torch.allclose(terms.diffusion, plain.diffusion / density, rtol=1e-9)
        assert torch.equal(terms.diffusion, diffusion_term(model, x, t, eps, density=density))
        for name in ("prior", "reconstruction", "latent", "valid_latent"):
            assert torch.equal(getattr(terms, name), getattr(plain, name))
    with pytest.raises(ValueError, match="steps must be 0"):
        elbo(model, images, t=u, importance=True, steps=10, **draw)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["linear", "polynomial"])
def test_the_gradient_is_unbiased(kind, path):
    """Of the ends, the interior and the network, for a few images and eps, by quadrature over u and over t."""
    toy = two_pixels()
    strength = torch.ones((), dtype=FLOAT, requires_grad=True)
    ends = -6.0, 3.0  # where all gradients are of a size
    schedule = linear(*ends, "learned") if kind == "linear" else polynomial(toy.shape, *ends, 1, ends="learned")
    model = build(toy, exact_ends(schedule, *ends), path, "velocity", wrong={"distort": lambda e, z, g: e * strength})
    nodes, weights = GRADED
    random = torch.Generator().manual_seed(0)
    images = toy.images[torch.randint(16, (5,), generator=random)].reshape(5, *toy.shape)
    eps = torch.randn(5, *toy.shape, generator=random, dtype=FLOAT)
    i, j = torch.cartesian_prod(torch.arange(len(nodes)), torch.arange(5)).T
    parameters = [strength, *schedule.parameters()]
    found, expected = (
        torch.autograd.grad(
            elbo(model, images[j], t=nodes[i], eps=eps[j], eps_0=eps[j], importance=importance, dtype=FLOAT).total
            @ weights[i],
            parameters,
        )
        for importance in (True, False)
    )
    assert len(found) == {"linear": 3, "polynomial": 6}[kind] and min(g.norm().item() for g in expected) > 0.01
    for left, right in zip(found, expected, strict=True):
        assert torch.allclose(left, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_the_variance_falls(path):
    """One pixel, a velocity that errs by as much at all times: with importance what t adds to the variance is gone."""
    toy = one_pixel()
    model = build(toy, linear(G0, G1), path, "velocity")
    exact = model.network
    model.network = lambda z, gamma, c: exact(z, gamma, c) + 2.0
    (nodes, t_weights), (zeta, weights) = PANELS, normal_grid()
    i, m, j = torch.cartesian_prod(*map(torch.arange, (len(nodes), len(toy.means), len(zeta)))).T
    images, eps = toy.images[m].reshape(-1, *toy.shape), zeta[j].reshape(-1, *toy.shape)
    mean, variance, of_t = {}, {}, {}
    for importance in (True, False):
        with torch.no_grad():
            draws = {"t": nodes[i], "eps": eps, "eps_0": eps, "dtype": FLOAT}
            term = elbo(model, images, importance=importance, **draws).diffusion.reshape(len(nodes), -1)
        inside = (toy.log_weights.exp()[m] * weights[j]).reshape(len(nodes), -1)
        per_time, square = (inside * term).sum(1), (inside * term**2).sum(1)
        mean[importance] = (t_weights @ per_time).item()
        variance[importance] = (t_weights @ square).item() - mean[importance] ** 2
        of_t[importance] = (t_weights @ per_time**2).item() - mean[importance] ** 2
    assert mean[True] == pytest.approx(mean[False], rel=1e-6)
    assert variance[True] < 0.5 * variance[False]
    assert of_t[True] < 0.03 * of_t[False]


# Training ------------------------------------------------------------------------------------------------------------
def learner(name, **fields):
    """A preset scaled down to learn something in seconds."""
    return tiny(
        name,
        **{
            "training__steps": 60, "training__batch": 16, "optimizer__learning_rate": 1e-2, "optimizer__warmup": 5,
            "training__evaluate_every": 0, "training__save_every": 0,
        } | fields,
    )  # fmt: skip


def bound(model):
    """Bits/dim of the same 48 validation images and draws."""
    images = load("digits").images["validation"][:48]
    return likelihood.vlb(model, images, times_per_shift=2, shifts=2)


def learned(config, run, **keywords):
    """The bound of a run's averaged weights after training."""
    train(config, run, say=lambda line: None, **keywords)
    return bound(checkpoints.load_model(run, "last", "ema"))


TRAININGS = {
    "idode-vp": learner("idode-vp-digits"),
    "idode-sp": learner("idode-sp-digits"),
    "mulan, importance": learner("mulan-velocity-digits", objective__times="importance"),
    "mulan, straight": learner("mulan-velocity-digits", path="straight"),
    "vdm, importance": learner("vdm-digits", objective__times="importance", schedule__kind="monotone"),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_it_trains(name, tmp_path):
    """The bound on validation images falls from what it is of the network that returns z."""
    config = TRAININGS[name]
    before, after = bound(build_model(config, (1, 8, 8), 17)), learned(config, tmp_path / "run")
    assert after.mean < 0.65 * before.mean
    gap = likelihood.compare(before, after)
    assert gap.mean > 10 * gap.standard_error


@pytest.mark.parametrize("name", ["idode-sp-digits", "mulan-velocity-digits"])
def test_parts_of_a_batch_take_the_step_of_the_batch(name, tmp_path):
    config = tiny(name, objective__times="importance", training__steps=3, training__log_every=1,
                  training__evaluate_every=0)  # fmt: skip
    for parts in (1, 4):
        train(change(config, {"training.accumulate": parts}), tmp_path / str(parts), say=lambda line: None)
    for line, expected in zip(metrics(tmp_path / "4"), metrics(tmp_path / "1"), strict=True):
        assert line["bits_per_dim"] == pytest.approx(expected["bits_per_dim"], rel=1e-5)
        assert line["terms"] == pytest.approx(expected["terms"], rel=1e-4, abs=1e-7)
        assert line["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)


def test_training_uses_the_mapped_times(tmp_path):
    """The figures of step 1 are those of the step's stratified u, mapped by each image's own schedule."""
    config = tiny("mulan-digits", objective__times="importance", training__steps=1, training__log_every=1,
                  training__evaluate_every=0)  # fmt: skip
    train(config, tmp_path / "run", say=lambda line: None)
    model, data = build_model(config, (1, 8, 8), 17), load("digits")
    shift = float(generator(0, 0, 0, "time").random(dtype="float32"))
    images = torch.from_numpy(data.images["train"][permutation(len(data.images["train"]), 0)[:8]])
    u = torch.remainder(shift + torch.arange(8) / 8, 1.0)
    terms = likelihood.draw_terms(model, images, u, Draws(0, range(8)), importance=True)
    (line,) = metrics(tmp_path / "run")
    assert line["terms"]["diffusion"] == pytest.approx(terms.diffusion.mean().item() / (64 * math.log(2)), rel=1e-5)
    plain = likelihood.draw_terms(model, images, u, Draws(0, range(8)))
    assert abs((plain.diffusion - terms.diffusion).mean() / terms.diffusion.mean()) > 0.01


REFUSED = {
    "importance needs continuous time: objective.steps = 0 .* got 10 and none": {
        "objective.times": "importance", "objective.steps": 10,
    },
    "objective.second_order above 0 needs continuous time": {"objective.second_order": 0.1, "objective.steps": 10},
    "got 10 and image": {
        "objective.times": "importance", "objective.steps": 10, "latent.kind": "image", "parameterization": "data",
        "schedule.kind": "polynomial",
    },
    "needs objective.times = stratified or uniform": {
        "objective.times": "importance", "objective.minimise_variance": True, "schedule.kind": "monotone",
        "optimizer.clip": 0.0,
    },
    "objective.second_order must be 0 or more, got -0.1": {"objective.second_order": -0.1},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_go_together_is_refused(message):
    with pytest.raises(UserError, match=message) as error:
        change(tiny("vdm-digits", schedule__ends="fixed"), REFUSED[message])
    assert "\n" not in str(error.value)


def test_a_run_from_before_there_was_a_second_order_goes_on():
    """A field that a run's record does not have had its default."""
    config = tiny("vdm-digits")
    old = to_dict(config)
    del old["objective"]["second_order"]
    refuse_changes(old, config, "runs/a")
    with pytest.raises(UserError, match=r"objective.second_order was 0.0 when runs/a began and is 0.1 now"):
        refuse_changes(old, change(config, {"objective.second_order": 0.1}), "runs/a")
