"""The bound against closed forms: exact denoisers, expectations by quadrature, float64. Nothing here is Monte Carlo."""

import math

import pytest
import torch

from nelbo.latents import KHot, OneHot, PaperKHot
from nelbo.objectives import diffusion_term, discrete_times, elbo, image_schedule_step, prior_term
from nelbo.parameterizations import PARAMETERIZATIONS
from nelbo.paths import PATHS
from nelbo.schedules import Monotone, PixelMonotone, Polynomial, Schedule, default_gamma_0
from toys import (
    FLOAT,
    build,
    decoder_mismatch,
    entropy,
    expected_diffusion,
    expected_terms,
    gauss_legendre,
    gaussian,
    gaussian_diffusion,
    given_code,
    linear,
    mixture,
    normal_grid,
    polynomial,
    prior_mismatch,
    product_grid,
    tensor,
    two_pixels,
    uniform_pixel,
)

G0, G1 = -13.3, 5.0
TOY_G0 = default_gamma_0(4)
DEVIATIONS = [0.05, 0.3, 1.0, 1.7]
FINE = gauss_legendre(32, 10)


def network_schedule(kind, shape, ends, gamma_0=G0, gamma_1=G1, seed=0):
    """A monotone network far from a straight line, with exact ends also where they are parameters."""
    random = torch.Generator().manual_seed(seed)
    interior = Monotone(gamma_0, gamma_1, 16) if kind == "monotone" else PixelMonotone(shape, gamma_0, gamma_1, 0, 16)
    schedule = Schedule(interior, gamma_0, gamma_1, ends).to(FLOAT)
    with torch.no_grad():
        for parameter in interior.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=FLOAT))
        interior.l1.weight.fill_(2.0)
        interior.l2.weight.mul_(3.0)
        interior.l3.weight.mul_(40.0)
        if kind == "pixel-monotone":
            interior.l_int.weight.mul_(0.15)
    return exact_ends(schedule, gamma_0, gamma_1)


def exact_ends(schedule, gamma_0, gamma_1):
    """Learned ends start as float32; a negative slope means the same."""
    if schedule.kind == "learned":
        with torch.no_grad():
            schedule.start.fill_(gamma_0)
            schedule.slope.fill_(gamma_0 - gamma_1)
    return schedule


def schedules(shape, gamma_0=G0, gamma_1=G1):
    """Every kind that does not depend on x, all with the same ends."""
    return {
        "fixed linear": linear(gamma_0, gamma_1),
        "learned linear": exact_ends(linear(gamma_0, gamma_1, "learned"), gamma_0, gamma_1),
        "monotone": network_schedule("monotone", shape, "fixed", gamma_0, gamma_1),
        "monotone, learned ends": network_schedule("monotone", shape, "learned", gamma_0, gamma_1, 1),
        "pixel-monotone": network_schedule("pixel-monotone", shape, "fixed", gamma_0, gamma_1, 2),
        "polynomial": polynomial(shape, gamma_0, gamma_1, seed=3),
        "polynomial, steep": polynomial(shape, gamma_0, gamma_1, seed=4, scale=4.0),
        "scalar polynomial": polynomial((1, 1, 1), gamma_0, gamma_1, seed=5),
    }


KINDS = list(schedules((1, 1, 2)))


def bend(schedule):
    """How far a schedule is from a straight line, in the middle, per pixel."""
    with torch.no_grad():
        ends = (schedule(tensor([v]))[0].flatten() for v in (0.0, 1.0))
        return (schedule(tensor([0.5]))[0].flatten() - sum(ends) / 2).abs().max().item()


def test_the_schedules_are_different():
    """Else their agreement below would mean nothing."""
    made = schedules((1, 1, 2))
    assert all(bend(schedule) > 0.5 for name, schedule in made.items() if "linear" not in name)


# Gaussian data: the diffusion term -----------------------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_diffusion_term(kind, path, parameterization):
    """1/2 sum log[(1 + s_i^2 e^-g0)/(1 + s_i^2 e^-g1)] for every schedule, path and parameterization."""
    toy = gaussian(DEVIATIONS)
    model = build(toy, schedules(toy.shape)[kind], path, parameterization)
    found = expected_diffusion(toy, model, FINE)
    assert found == pytest.approx(gaussian_diffusion(DEVIATIONS, G0, G1), rel=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_given_a_code(path):
    """A schedule given c: each value of c has its own curves, and the same term."""
    toy = gaussian(DEVIATIONS)
    model = build(toy, polynomial(toy.shape, G0, G1, seed=1, condition=2), path, "velocity")
    gammas = []
    for code in torch.eye(2, dtype=FLOAT):
        gammas.append(model.curve(code[None])(tensor([0.5]))[0])
        found = expected_diffusion(toy, model, FINE, c=code[None])
        assert found == pytest.approx(gaussian_diffusion(DEVIATIONS, G0, G1), rel=1e-9)
    assert (gammas[0] - gammas[1]).abs().min().item() > 0.1


def test_free_ends_per_pixel():
    """Where each pixel has its own ends, the closed form has them too."""
    toy = gaussian(DEVIATIONS)
    schedule = network_schedule("pixel-monotone", toy.shape, "free")
    with torch.no_grad():
        ends = [schedule(tensor([t]))[0].flatten() for t in (0.0, 1.0)]
    assert min(end.std().item() for end in ends) > 0.1
    found = expected_diffusion(toy, build(toy, schedule), FINE)
    assert found == pytest.approx(gaussian_diffusion(DEVIATIONS, *ends), rel=1e-9)


# Gaussian data: the total --------------------------------------------------------------------------------------------


def expected_prior(toy, model):
    """E of ``prior_term`` over Gaussian x: it is quadratic, so two points are exact."""
    x = (toy.variance.sqrt() * tensor([[-1.0], [1.0]])).reshape(2, *toy.shape)
    with torch.no_grad():
        return prior_term(model, x, model.curve(None)(torch.ones(2, dtype=FLOAT))[0]).mean().item()


@pytest.mark.parametrize(("path", "scale", "deviations"), [
    ("vp", 1.0, DEVIATIONS),
    ("straight", 1.0, DEVIATIONS),
    ("straight", "sigma_1", DEVIATIONS),
    ("straight", "exact", [0.6, 0.6, 0.6]),
    ("vp", "exact", [0.6, 0.6, 0.6]),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["fixed linear", "polynomial"])
def test_the_total_is_the_truth_and_two_mismatches(kind, path, scale, deviations):
    """prior + diffusion - E log p(x|z_0) = entropy + KL(q(z_1) || p(z_1)) + E KL(q(x|z_0) || p(x|z_0)).

    All closed for Gaussian data and the decoder N(z_0/alpha_0, e^gamma_0). The scale "exact" is the true standard
    deviation of z_1 of equal pixels: its mismatch is 0.
    """
    toy = gaussian(deviations)
    s_2 = toy.variance
    alpha_1, sigma_1 = PATHS[path]().coefficients(tensor(G1))
    marginal = alpha_1**2 * s_2 + sigma_1**2
    scale = {1.0: 1.0, "sigma_1": sigma_1.item(), "exact": marginal[0].sqrt().item()}[scale]
    model = build(toy, schedules(toy.shape)[kind], path, prior_scale=scale)
    diffusion = expected_diffusion(toy, model, FINE)
    noise = tensor(G0).exp()
    reconstruction = 0.5 * toy.dimensions * (math.log(2 * math.pi) + G0 + 1)

    ratio = marginal / scale**2
    prior_gap = 0.5 * (ratio - 1 - ratio.log()).sum()
    if path == "straight" and scale == pytest.approx(sigma_1.item()):
        assert prior_gap > 1e-4  # sigma_1 alone leaves alpha_1^2 s^2 out
    if len(deviations) == 3:
        assert prior_gap < 1e-12
    posterior = s_2 * noise / (s_2 + noise)  # var(x|z_0); its mean is z_0/alpha_0 shrunk by s^2/(s^2 + e^gamma_0)
    apart = (noise / (s_2 + noise)) ** 2 * (s_2 + noise)
    decoder_gap = 0.5 * (posterior / noise + apart / noise - 1 - (posterior / noise).log()).sum()
    truth = 0.5 * (2 * math.pi * math.e * s_2).log().sum() + prior_gap + decoder_gap
    total = expected_prior(toy, model) + diffusion + reconstruction
    assert total == pytest.approx(truth.item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_prior_term_is_the_kl(path):
    """Image by image against torch.distributions, with a gamma_1 for each pixel and a prior of scale 0.8."""
    toy = gaussian(DEVIATIONS)
    model = build(toy, linear(G0, G1), path, prior_scale=0.8)
    random = torch.Generator().manual_seed(0)
    x, gamma = torch.randn(2, 5, 1, 1, 4, generator=random, dtype=FLOAT)
    alpha, sigma = model.path.coefficients(gamma)
    q, p = torch.distributions.Normal(alpha * x, sigma), torch.distributions.Normal(torch.zeros_like(x), 0.8)
    expected = torch.distributions.kl_divergence(q, p).sum((1, 2, 3))
    assert torch.allclose(prior_term(model, x, gamma), expected, rtol=1e-12)


def test_one_number_at_a_time():
    """``diffusion_term`` for given t and eps by the formula, per-pixel gamma, a denoiser that errs."""
    toy = gaussian([0.5, 1.5])
    schedule = polynomial(toy.shape, G0, G1, seed=1)
    for path in PATHS:
        model = build(toy, schedule, path, "velocity", wrong={"distort": lambda e, z, g: 0.7 * e + 0.1 * z.flip(1)})
        x, eps = torch.randn(2, 3, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=FLOAT)
        t = tensor([0.1, 0.5, 0.9])
        with torch.no_grad():
            gamma, rate = schedule(t)
            z = model.path.diffuse(x, gamma, eps)
            _, eps_hat = model.predict(z, gamma)
            expected = 0.5 * (rate * (eps - eps_hat) ** 2).sum((1, 2, 3))
            assert torch.allclose(diffusion_term(model, x, t, eps), expected, rtol=1e-10)
            s, t_5 = tensor([0.0, 0.4, 0.8]), tensor([0.2, 0.6, 1.0])
            gamma, before = schedule(t_5)[0], schedule(s)[0]
            z = model.path.diffuse(x, gamma, eps)
            expected = 2.5 * ((gamma - before).expm1() * (eps - model.predict(z, gamma)[1]) ** 2).sum((1, 2, 3))
            assert torch.allclose(diffusion_term(model, x, t, eps, steps=5), expected, rtol=1e-10)


# Finite T ------------------------------------------------------------------------------------------------------------


def middles(steps):
    """One time inside each step of the grid."""
    return (torch.arange(steps, dtype=FLOAT) + 0.5) / steps, torch.full((steps,), 1 / steps, dtype=FLOAT)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["fixed linear", "polynomial"])
def test_finite_t_approaches_from_above(kind, path):
    """At every T the closed sum 1/2 sum (e^-gs - e^-gt) s^2/(1 + s^2 e^-gt); it falls, the gap halves as T doubles."""
    toy = gaussian(DEVIATIONS)
    schedule = schedules(toy.shape)[kind]
    model = build(toy, schedule, path)
    limit, gaps = gaussian_diffusion(DEVIATIONS, G0, G1), {}
    for steps in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000):
        found = expected_diffusion(toy, model, middles(steps), steps=steps)
        with torch.no_grad():
            gamma = schedule(torch.linspace(0, 1, steps + 1, dtype=FLOAT))[0].expand(-1, *toy.shape).flatten(1)
        s_2, drop = toy.variance, torch.exp(-gamma[:-1]) - torch.exp(-gamma[1:])
        closed = 0.5 * (drop * s_2 / (1 + s_2 * torch.exp(-gamma[1:]))).sum().item()
        assert found == pytest.approx(closed, rel=1e-9)
        gaps[steps] = found - limit
    assert list(gaps.values()) == sorted(gaps.values(), reverse=True) and gaps[2000] > 0
    assert gaps[1000] / gaps[2000] == pytest.approx(2, abs=0.05)
    assert gaps[2000] < 1e-2 * limit < gaps[10]


def test_discrete_times():
    """t falls into [(i-1)/T, i/T): the first step is i = 1, and a time that was rounded to 1 stays in the last."""
    s, t = discrete_times(torch.tensor([0.0, 0.0999, 0.1, 0.55, 0.9999999, 1.0]), 10)
    assert torch.allclose(s, torch.tensor([0.0, 0.0, 0.1, 0.5, 0.9, 0.9]))
    assert torch.allclose(t, torch.tensor([0.1, 0.1, 0.2, 0.6, 1.0, 1.0]))


# A discretised toy: the whole bound ----------------------------------------------------------------------------------


def truth(toy, path, scale=1.0, gamma_0=TOY_G0, log_weights=None):
    """(prior's mismatch, decoder's mismatch) of a discrete toy by integration over z_1 and z_0."""
    alpha, sigma = (v.item() for v in PATHS[path]().coefficients(tensor(G1)))
    return prior_mismatch(toy, alpha, sigma, scale, log_weights), decoder_mismatch(toy, gamma_0, log_weights)


CASES = [
    ("fixed linear", "vp", "noise"),
    ("fixed linear", "vp", "data"),
    ("fixed linear", "vp", "velocity"),
    ("fixed linear", "straight", "velocity"),
    ("monotone", "straight", "noise"),
    ("pixel-monotone", "vp", "velocity"),
    ("polynomial", "vp", "noise"),
    ("polynomial", "straight", "data"),
    ("polynomial, steep", "vp", "velocity"),
    ("scalar polynomial", "vp", "noise"),
]


@pytest.mark.parametrize(("kind", "path", "parameterization"), CASES)
def test_the_whole_bound_of_an_enumerated_toy(kind, path, parameterization):
    """Two dependent pixels of four levels, exact denoiser: bound = entropy + both mismatches, for every schedule that
    does not depend on x, per pixel too (I-MMSE)."""
    toy = two_pixels()
    model = build(toy, schedules(toy.shape, TOY_G0)[kind], path, parameterization)
    terms = expected_terms(toy, model)
    expected = entropy(toy) + sum(truth(toy, path))
    assert terms.total.item() == pytest.approx(expected, rel=2e-6)
    assert terms.total.item() > entropy(toy)
    assert terms.total.item() < entropy(toy) + (2e-3 if path == "vp" else 1e-1)
    assert terms.total is not terms.valid_total and terms.total.item() == terms.valid_total.item()


def test_the_prior_scale_counts():
    """On the straight path with s = sigma_1 the whole bound is smaller than with s = 1, by the KLs' difference."""
    toy = two_pixels()
    sigma_1 = PATHS["straight"]().coefficients(tensor(G1))[1].item()
    bounds = []
    for scale in (1.0, sigma_1):
        model = build(toy, linear(TOY_G0, G1), "straight", prior_scale=scale)
        bounds.append(expected_terms(toy, model).total.item())
        assert bounds[-1] == pytest.approx(entropy(toy) + sum(truth(toy, "straight", scale)), rel=2e-6)
    assert bounds[0] - bounds[1] > 0.01


def test_the_bound_holds_at_finite_t():
    """The enumerated toy at T = 1 to 128: above the continuous bound, falling; the gap halves as T doubles."""
    toy = two_pixels()
    model = build(toy, linear(TOY_G0, G1), "vp", "velocity")
    limit = entropy(toy) + sum(truth(toy, "vp"))
    totals = [expected_terms(toy, model, middles(steps), steps=steps).total.item() for steps in (1, 2, 4, 8, 64, 128)]
    assert totals == sorted(totals, reverse=True) and totals[-1] > limit
    assert (totals[-2] - limit) / (totals[-1] - limit) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("levels", [256, 17, 2])
def test_a_uniform_pixel_costs_log2_levels(levels):
    """8.00 bits for 256 levels: nothing but the prior's mismatch of some 1e-5 bits is added."""
    toy = uniform_pixel(levels)
    gamma_0 = default_gamma_0(levels)
    model = build(toy, linear(gamma_0, G1))
    terms = expected_terms(toy, model, gauss_legendre(1, 32))
    bits = terms.total.item() / math.log(2)
    assert bits == pytest.approx(math.log2(levels), abs=1e-4)
    alpha, sigma = (v.item() for v in model.path.coefficients(tensor(G1)))
    expected = math.log(levels) + prior_mismatch(toy, alpha, sigma)
    assert terms.total.item() == pytest.approx(expected, rel=1e-6)
    if levels == 256:  # the decoder's share
        assert terms.reconstruction.item() / math.log(2) == pytest.approx(0.010, abs=5e-4)


def test_elbo_uses_the_diffusion_term():
    """The sums above take the diffusion from ``diffusion_term``: ``elbo`` gives the same numbers, row by row."""
    toy = two_pixels()
    model = build(toy, schedules(toy.shape, TOY_G0)["polynomial"], "straight", "velocity")
    random = torch.Generator().manual_seed(0)
    m, t = torch.randint(16, (40,), generator=random), torch.rand(40, generator=random, dtype=FLOAT)
    eps, eps_0 = torch.randn(2, 40, 1, 1, 2, generator=random, dtype=FLOAT)
    x, images = (v[m].reshape(40, 1, 1, 2) for v in (toy.means, toy.images))
    for steps in (0, 10):
        terms = elbo(model, images, t=t, eps=eps, eps_0=eps_0, steps=steps, dtype=FLOAT)
        assert torch.equal(terms.diffusion, diffusion_term(model, x, t, eps, steps=steps))
        gamma_1 = model.curve(None)(torch.ones(40, dtype=FLOAT))[0]
        assert torch.equal(terms.prior, prior_term(model, x, gamma_1))
        assert torch.equal(terms.latent, torch.zeros(40, dtype=FLOAT))


def test_per_image_figures():
    """Each image's own bound; the probable ones cost less, and their mean is the whole figure."""
    toy = two_pixels()
    model = build(toy, linear(TOY_G0, G1))
    each = expected_terms(toy, model, per_image=True).total
    whole = expected_terms(toy, model).total.item()
    probability = toy.log_weights.exp()
    assert (each * probability).sum().item() == pytest.approx(whole, rel=1e-12)
    assert torch.corrcoef(torch.stack([each, -toy.log_weights]))[0, 1].item() > 0.99


# I-MMSE: the exact denoiser does not care, one that errs does --------------------------------------------------------


def information(toy, path, gamma):
    """I(x; z) = h(z) - h(eps) - log sigma of a mixture, by integration over z."""
    alpha, sigma = (v.item() for v in PATHS[path]().coefficients(tensor(gamma)))
    zeta, weights = product_grid(*normal_grid(0.15, 8.0), toy.dimensions)
    spread = torch.sqrt(alpha**2 * toy.variance + sigma**2)
    total = 0.0
    for mean, log_weight in zip(toy.means, toy.log_weights, strict=True):
        z = alpha * mean + spread * zeta
        total -= float(log_weight.exp() * (weights * toy.log_density(z, alpha, sigma, toy.log_weights)).sum())
    return total - toy.dimensions * (0.5 * math.log(2 * math.pi * math.e) + math.log(sigma))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["fixed linear", "monotone", "pixel-monotone", "polynomial"])
def test_mutual_information_of_a_mixture(kind, path):
    """A continuous mixture in the plane: diffusion = I(x; z_0) - I(x; z_1), per-pixel schedules included."""
    toy = mixture()
    found = expected_diffusion(toy, build(toy, schedules(toy.shape, -9.0)[kind], path, "velocity"))
    assert found == pytest.approx(information(toy, path, -9.0) - information(toy, path, G1), rel=2e-6)


def early(pixel):
    """A schedule of two pixels where this one's gamma climbs first and the other's late."""
    interior = Polynomial((1, 1, 2)).to(FLOAT)
    with torch.no_grad():
        interior.d[pixel], interior.b[pixel] = 3.0, -3.0  # f' = (d - 3 t)^2
        interior.d[1 - pixel], interior.b[1 - pixel] = -5.0, 3.0  # f' = (3 t)^2
    return Schedule(interior, TOY_G0, G1).to(FLOAT)


WRONG = {
    "it sees one noise level for all pixels": {"mean_gamma": True},
    "it mixes the second pixel into the first": {
        "distort": lambda eps_hat, z, gamma: eps_hat + 0.2 * z[:, [1]] ** 2 * tensor([1.0, 0.0])
    },
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_denoiser_makes_the_schedule_matter(wrong):
    """The paper's claim, stated exactly. With a denoiser of (z, gamma) that errs, scalar schedules with the same ends
    all give the same bound, by a change of variable; per-pixel ones give others."""
    toy = two_pixels()
    exact = entropy(toy) + sum(truth(toy, "vp"))
    made = schedules(toy.shape, TOY_G0)
    made |= {"first pixel first": early(0), "second pixel first": early(1)}
    bounds = {}
    for kind in ("fixed linear", "monotone", "scalar polynomial", "first pixel first", "second pixel first"):
        model = build(toy, made[kind], "vp", "velocity", wrong=WRONG[wrong])
        bounds[kind] = expected_terms(toy, model).total.item()
        if "first" in kind and "mean_gamma" in WRONG[wrong]:
            assert expected_terms(toy, build(toy, made[kind])).total.item() == pytest.approx(exact, rel=2e-6)
    straight = bounds["fixed linear"]
    for kind in ("monotone", "scalar polynomial"):
        assert bounds[kind] == pytest.approx(straight, rel=2e-6)
    if "mean_gamma" in WRONG[wrong]:  # exact wherever the pixels share their gamma, wrong elsewhere
        assert straight == pytest.approx(exact, rel=2e-6)
        assert min(bounds["first pixel first"], bounds["second pixel first"]) > straight + 0.1
    else:  # E z^4 grows with the second pixel's noise: the first one should be done before. Better and worse.
        assert straight > exact + 0.1
        assert bounds["first pixel first"] < straight - 0.05
        assert bounds["second pixel first"] > straight + 0.05


# A schedule given c ~ q(c|x) -----------------------------------------------------------------------------------------

PROBABILITY = torch.linspace(0.05, 0.6, 16, dtype=FLOAT)[torch.randperm(16, generator=torch.Generator().manual_seed(2))]


def expected_given_code(toy, latent, times=None):
    """E over x and a two-valued c ~ q(c|x) of the bound: numbers (total, valid_total), and the terms' latent."""
    inside, code = given_code(toy, PROBABILITY)
    logits = torch.stack([1 - PROBABILITY, PROBABILITY], 1).log()
    model = build(inside, polynomial(toy.shape, TOY_G0, G1, seed=6, condition=2), latent=latent)
    sums = torch.zeros(3, dtype=FLOAT)
    for value in range(2):
        wanted = torch.eye(2, dtype=FLOAT)[value]
        # Noise that makes the latent draw this c, in its own way.
        noise = {OneHot: 100 * wanted, KHot: 1 - wanted, PaperKHot: 100 * wanted}[type(latent)]

        def draw(m, noise=noise, wanted=wanted):
            drawn = latent.posterior((logits[m],), noise.expand(len(m), 2))
            assert torch.equal(drawn.c, wanted.expand(len(m), 2))
            return drawn

        terms = expected_terms(inside, model, times, latent=draw)
        sums += code[value] * torch.stack([terms.total, terms.valid_total, terms.latent])
    gaps = [truth(inside, "vp", log_weights=row) for row in inside.log_weights]
    mismatch = sum(float(p) * sum(gap) for p, gap in zip(code, gaps, strict=True))
    return sums.tolist(), code, mismatch


@pytest.mark.parametrize("latent", [OneHot(2), KHot(2, 1)], ids=["one-hot", "k-hot"])
def test_the_gap_of_a_latent_is_the_kl_of_its_aggregate(latent):
    """E bound = entropy(x) + KL(q(c) || p(c)) + mismatches, q(c) the aggregate posterior: the denoiser given c wins
    back the I(x; c) of E KL(q(c|x) || p(c)) = I(x; c) + KL(q(c) || p(c)). The schedules of the two c differ."""
    toy = two_pixels()
    (total, valid, charged), code, mismatch = expected_given_code(toy, latent)
    gap = (code * (2 * code).log()).sum().item()
    assert gap > 0.05 and charged > gap + 0.05  # not a trivial case: c tells of x
    assert total == pytest.approx(entropy(toy) + gap + mismatch, rel=2e-6)
    assert valid == total


def test_a_network_that_does_not_see_c_loses_the_information():
    """The exact denoiser of p(x) instead of p(x|c): the bound is worse by I(x; c), but for mismatches, since a schedule
    alone tells nothing of x."""
    toy = two_pixels()
    inside, code = given_code(toy, PROBABILITY)
    latent = OneHot(2)
    joint = torch.stack([1 - PROBABILITY, PROBABILITY], 1) * toy.log_weights.exp()[:, None]
    logits = (joint / joint.sum(1, keepdim=True)).log()
    schedule = polynomial(toy.shape, TOY_G0, G1, seed=6, condition=2)
    model = build(toy, schedule, latent=latent, network_sees_latent=False)
    total = 0.0
    for value in range(2):
        noise = 100 * torch.eye(2, dtype=FLOAT)[value]

        def draw(m, noise=noise):
            return latent.posterior((logits[m],), noise.expand(len(m), 2))

        terms = expected_terms(inside, model, grid=normal_grid(0.45, 5.4), latent=draw)
        total += code[value].item() * terms.total.item()
    gap = (code * (2 * code).log()).sum().item()
    information = (joint * (joint / joint.sum(0) / joint.sum(1, keepdim=True)).log()).sum().item()
    assert information > 0.05
    assert total == pytest.approx(entropy(toy) + gap + information, abs=0.01)


def test_the_papers_k_hot_has_two_bounds():
    """The terms carry both charges; only the valid total uses log C(n, k)."""
    toy = two_pixels()
    (total, valid, charged), _, _ = expected_given_code(toy, PaperKHot(2, 1), gauss_legendre(1, 2))
    assert valid - total == pytest.approx(math.log(2) - charged, rel=1e-9)
    assert valid > total


# c = x_0: a schedule that reads the image ----------------------------------------------------------------------------


def image_model(schedule, toy=None, **fields):
    return build(toy or two_pixels(), schedule, "vp", "data", schedule_reads_image=True, **fields)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_a_schedule_that_could_read_the_image_but_does_not(path, steps):
    """Equation (7), the KL of two Gaussians, is then equation (5), draw by draw."""
    toy = two_pixels()
    random = torch.Generator().manual_seed(0)
    t, eps = torch.rand(200, generator=random, dtype=FLOAT), torch.randn(200, 1, 1, 2, generator=random, dtype=FLOAT)
    x = toy.means[torch.randint(16, (200,), generator=random)].reshape(200, 1, 1, 2)
    schedule = linear(TOY_G0, G1)
    reads = build(toy, schedule, path, "data", schedule_reads_image=True)
    found = diffusion_term(reads, x, t, eps, steps=steps)
    expected = diffusion_term(build(toy, schedule, path, "data"), x, t, eps, steps=steps)
    assert torch.allclose(found, expected, rtol=1e-7, atol=1e-10)


def reading(toy, seed=0, scale=1.0):
    """A polynomial whose coefficients are a network of the image."""
    interior = Polynomial(toy.shape, toy.dimensions, width=8).to(FLOAT)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in interior.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=random, dtype=FLOAT))
    return Schedule(interior, TOY_G0, G1)


def test_the_term_is_the_kl_of_two_gaussians():
    """Against torch.distributions, with q's step from gamma(x) and p's from gamma(x_hat), x_hat clamped to [-1, 1]."""
    toy = two_pixels()
    random = torch.Generator().manual_seed(0)
    x = toy.means[torch.randint(16, (50,), generator=random)].reshape(50, 1, 1, 2)
    eps, steps = torch.randn(50, 1, 1, 2, generator=random, dtype=FLOAT), 9
    model = image_model(reading(toy), wrong={"distort": lambda e, z, g: e * 0.5})
    i = torch.randint(steps, (50,), generator=random)
    with torch.no_grad():
        s, t = i.to(FLOAT) / steps, (i + 1).to(FLOAT) / steps
        gamma_s, gamma_t = (model.schedule(v, x.flatten(1))[0] for v in (s, t))
        z = model.path.diffuse(x, gamma_t, eps)
        x_hat = model(z, TOY_G0 + (G1 - TOY_G0) * t.reshape(-1, 1, 1, 1))
        assert bool((x_hat.abs() > 1).any())
        x_hat = x_hat.clamp(-1, 1)
        hat_s, hat_t = (model.schedule(v, x_hat.flatten(1))[0] for v in (s, t))
        assert (hat_t - gamma_t).abs().max().item() > 0.1
        alpha, sigma = model.path.coefficients(hat_t)
        q = torch.distributions.Normal(*model.path.reverse(z, eps, gamma_s, gamma_t))
        p = torch.distributions.Normal(*model.path.reverse(z, (z - alpha * x_hat) / sigma, hat_s, hat_t))
        expected = steps * torch.distributions.kl_divergence(q, p).sum((1, 2, 3))
        found = diffusion_term(model, x, s + 0.5 / steps, eps, steps=steps)
        assert torch.allclose(found, expected, rtol=1e-9)
        mean, std, estimate = image_schedule_step(model, z, s, t)
    assert torch.equal(mean, p.loc) and torch.equal(std, p.scale) and torch.equal(estimate, x_hat)


def test_the_bound_holds_where_the_schedule_reads_the_image():
    """Enumerated toy: above the entropy at every T, and what the paper saw: from some T on it is worse as T grows, as q
    and p differ in the width of every step."""
    toy = two_pixels()
    model = image_model(reading(toy, scale=0.3))
    totals = {}
    for steps in (4, 64, 1024):
        t, _ = middles(steps)
        t = t[:: max(1, steps // 16)]  # at most 16 of the steps stand for all
        totals[steps] = expected_terms(toy, model, (t, torch.full_like(t, 1 / len(t))), steps=steps).total.item()
    assert min(totals.values()) > entropy(toy) + 0.1
    assert totals[4] > totals[64] and totals[1024] > totals[64] + 0.5


def test_a_schedule_that_reads_the_image_needs_steps():
    toy = two_pixels()
    x = toy.means[:1].reshape(1, 1, 1, 2)
    with pytest.raises(ValueError, match="give steps"):
        diffusion_term(image_model(reading(toy)), x, tensor([0.5]), torch.zeros_like(x))


# Variance minimisation -----------------------------------------------------------------------------------------------


def one_pixel():
    """One pixel of four levels."""
    toy = uniform_pixel(4)
    toy.log_weights = tensor([0.4, 0.1, 0.2, 0.3]).log()
    return toy


def rows(toy, times=None, grid=None):
    """Quadrature over images, t and eps of a one-pixel toy as one batch: images, t, eps and weights."""
    (t, t_weights), (zeta, weights) = times or gauss_legendre(6, 8), grid or normal_grid()
    i, m, j = torch.cartesian_prod(*map(torch.arange, (len(t), len(toy.means), len(zeta)))).T
    weight = t_weights[i] * toy.log_weights.exp()[m] * weights[j]
    return toy.images[m].reshape(-1, *toy.shape), t[i], zeta[j].reshape(-1, *toy.shape), weight


def bound(model, images, t, eps, **keywords):
    return elbo(model, images, t=t, eps=eps, eps_0=eps, dtype=FLOAT, **keywords)


@pytest.mark.parametrize("kind", ["monotone", "polynomial"])
def test_variance_minimisation_sends_each_gradient_where_it_belongs(kind):
    """With ``variance`` the ends and the network get the gradient of the bound, the interior that of E[l^2]."""
    toy = one_pixel()
    strength = torch.ones((), dtype=FLOAT, requires_grad=True)
    if kind == "monotone":
        schedule = network_schedule("monotone", toy.shape, "learned", TOY_G0, G1)
    else:
        schedule = exact_ends(polynomial(toy.shape, TOY_G0, G1, seed=1, ends="learned"), TOY_G0, G1)
    model = build(toy, schedule, wrong={"distort": lambda e, z, g: e * strength})
    images, t, eps, weight = rows(toy, gauss_legendre(3, 4), normal_grid(0.6, 3.0))
    ends, interior = [schedule.start, schedule.slope], list(schedule.interior.parameters())
    hooked = (weight * bound(model, images, t, eps, variance=True).total).sum()
    found = torch.autograd.grad(hooked, [*ends, strength, *interior], allow_unused=True)
    plain = bound(model, images, t, eps)
    assert hooked.item() == (weight * plain.total).sum().item()
    loss = (weight * plain.total).sum()
    expected = torch.autograd.grad(loss, [*ends, strength], retain_graph=True)
    moment = (weight * plain.diffusion**2).sum()
    expected += torch.autograd.grad(moment, interior, allow_unused=True)
    compared = 0
    for left, right in zip(found, expected, strict=True):
        if right is not None and right.norm() > 1e-9:
            assert torch.allclose(left, right, rtol=1e-9, atol=1e-12)
            compared += 1
    assert compared >= 5
    unscaled = torch.autograd.grad((weight * bound(model, images, t, eps).total).sum(), interior, allow_unused=True)
    largest = max(range(len(interior)), key=lambda i: 0 if unscaled[i] is None else unscaled[i].norm().item())
    assert not torch.allclose(found[3 + largest], unscaled[largest], rtol=0.1)


def moments(model, toy):
    """By quadrature: E[l], Var[l] of the diffusion estimator, the variance over t of its mean given t, and
    E_t sqrt(E[l^2|t])."""
    images, t, eps, weight = rows(toy, gauss_legendre(16, 8))
    with torch.no_grad():
        terms = bound(model, images, t, eps)
    over = weight.reshape(128, -1).sum(1)
    per_time, square = ((weight * v).reshape(128, -1).sum(1) / over for v in (terms.diffusion, terms.diffusion**2))
    mean = (weight * terms.diffusion).sum().item()
    return {
        "root": (over * square.sqrt()).sum().item(),
        "bound": (weight * terms.total).sum().item(),
        "mean": mean,
        "variance": (weight * terms.diffusion**2).sum().item() - mean**2,
        "over t": (over * per_time**2).sum().item() - mean**2,
    }


def test_variance_minimisation_lowers_the_variance_and_keeps_the_bound():
    """A monotone schedule trained with ``variance``, exact denoiser: from 18.9 to at most 10, and the bound stays.

    The best possible second moment is (E_t sqrt(m(t)))^2 = (1/2 int sqrt(E err^4) d gamma)^2, m the second moment given
    t of the straight schedule; the trained one comes within 10 % of that optimum's variance. The gradient of the bound
    itself, to which the interior does not matter, is zero: only ``variance`` moves it.
    """
    toy = one_pixel()
    torch.manual_seed(0)
    schedule = Schedule(Monotone(TOY_G0, G1, 16), TOY_G0, G1).to(FLOAT)
    model = build(toy, schedule)
    before, straight = moments(model, toy), moments(build(toy, linear(TOY_G0, G1)), toy)
    assert before["variance"] == pytest.approx(straight["variance"], rel=0.01)
    images, t, eps, weight = rows(toy, gauss_legendre(8, 4), normal_grid(0.4, 5.0))
    sizes = []
    for variance in (False, True):
        loss = (weight * bound(model, images, t, eps, variance=variance).total).sum()
        gradient = torch.autograd.grad(loss, list(schedule.parameters()), allow_unused=True)
        sizes.append(sum(g.norm().item() for g in gradient if g is not None))
    assert sizes[0] < 1e-4 * sizes[1]
    optimizer = torch.optim.Adam(schedule.parameters(), 0.3)
    for _ in range(150):
        optimizer.zero_grad()
        (weight * bound(model, images, t, eps, variance=True).total).sum().backward()
        optimizer.step()
    after = moments(model, toy)
    best = straight["root"] ** 2 - straight["mean"] ** 2
    assert after["bound"] == pytest.approx(before["bound"], rel=1e-8)
    assert after["variance"] < 0.55 * before["variance"]
    assert best < after["variance"] < 1.1 * best
    assert after["over t"] < 0.4 * before["over t"]
