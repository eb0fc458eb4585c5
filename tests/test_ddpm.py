"""DDPM: the table of betas, the bound term by term against closed forms, decoders, losses, diffusers' schedulers."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import nelbo
from nelbo import likelihood, objectives, pixels, samplers
from nelbo.compose import build_model
from nelbo.draws import Draws
from nelbo.errors import UserError
from nelbo.model import DiffusionModel, Reverse
from nelbo.networks import TimestepNetwork
from nelbo.parameterizations import PARAMETERIZATIONS
from nelbo.paths import PATHS
from nelbo.presets import preset
from nelbo.schedules import BETAS, Schedule, Table, betas, gammas_of_betas
from nelbo.training import train
from tiny import change, outcome
from toys import (
    FLOAT,
    Toy,
    diffusion_per_component,
    expected_terms,
    gauss_legendre,
    gaussian,
    gaussian_diffusion,
    network,
    normal_grid,
    tensor,
)

T = 40


def table(form="linear", timesteps=T):
    """The schedule of a form of betas."""
    gammas = gammas_of_betas(betas(form, timesteps))
    return Schedule(Table(gammas), gammas[0], gammas[-1])


def build(toy, parameterization="noise", reverse=None, v=None, levels=8, timesteps=T, wrong=None):
    """A DDPM with the toy's exact denoiser, whose variance output is v where it is learned."""
    p, q = PATHS["vp"](), PARAMETERIZATIONS[parameterization]()
    exact = network(toy, p, q, **(wrong or {}))

    def net(z, gamma, conditioning=None):
        out = exact(z.double(), gamma.double(), conditioning)
        return out if v is None else torch.cat((out, torch.full_like(out, v)), 1)

    return DiffusionModel(
        net, table(timesteps=timesteps), p, q, toy.shape, levels,
        data_scale=levels / (levels - 1), reverse=reverse or Reverse(decoder="gaussian"),
    ).to(FLOAT)  # fmt: skip


# The table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", BETAS)
def test_a_table_has_every_gamma_of_its_betas_and_rises_between(form):
    alpha_bar = np.cumprod(1 - betas(form, 1000))
    schedule = table(form, 1000)
    gamma, rate = schedule(torch.arange(1000, dtype=FLOAT) / 999)
    np.testing.assert_allclose(gamma.flatten(), np.log((1 - alpha_bar) / alpha_bar), rtol=1e-9, atol=1e-9)
    t = torch.linspace(0, 1, 4321, dtype=FLOAT)
    gamma, rate = schedule(t)
    assert (rate > 0).all() and (gamma.flatten().diff() > 0).all()
    t.requires_grad_()
    (slope,) = torch.autograd.grad(schedule(t)[0].sum(), t)
    torch.testing.assert_close(slope, rate.flatten(), rtol=1e-9, atol=1e-9)


def test_the_forms_end_where_their_papers_say():
    linear, quadratic = betas("linear", 1000), betas("quadratic", 1000)
    assert (linear[0], linear[-1], quadratic[0], quadratic[-1]) == pytest.approx((1e-4, 0.02, 1e-4, 0.02))
    assert linear[500] - linear[499] == pytest.approx((0.02 - 1e-4) / 999)
    assert math.sqrt(quadratic[500]) == pytest.approx((math.sqrt(1e-4) * 499 + math.sqrt(0.02) * 500) / 999)
    # Nichol and Dhariwal's abar(t) at t = 1/2, and Jabri et al.'s, which is 1/2 by symmetry.
    at = (0.5 + 0.008) / 1.008 * math.pi / 2
    wanted = (math.cos(at) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
    assert np.prod(1 - betas("cosine", 1000)[:500]) == pytest.approx(wanted)
    assert np.prod(1 - betas("sigmoid", 1000)[:500]) == pytest.approx(0.5)
    # About the same signal is left at the end for any T.
    assert np.log1p(-betas("linear", 100)).sum() == pytest.approx(np.log1p(-linear).sum(), rel=0.1)


@pytest.mark.parametrize("values", ([0.1, 1.0], [0.0, 0.1], [0.1], [[0.1, 0.2]], [0.1, float("nan")]))
def test_betas_that_leave_no_signal_or_no_noise_are_refused(values):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        gammas_of_betas(values)


def test_a_network_of_timesteps_is_told_whole_numbers_at_the_levels_and_stays_within_them():
    gammas = gammas_of_betas(betas("linear", 1000))
    told = []
    net = TimestepNetwork(lambda z, n, estimate: told.append(n) or z, gammas)
    schedule = Schedule(Table(gammas), gammas[0], gammas[-1])
    t = torch.arange(1000, dtype=FLOAT) / 999
    net(torch.zeros(1000, 1, 1, 1, dtype=FLOAT), schedule(t)[0])
    torch.testing.assert_close(told[0], torch.arange(1000, dtype=FLOAT), rtol=0, atol=1e-9)
    net(torch.zeros(2, 1, 1, 1), torch.tensor([-20.0, 40.0]).reshape(2, 1, 1, 1))
    assert told[1].tolist() == [0, 999]
    net(torch.zeros(1, 1, 1, 1), schedule(torch.tensor([0.5 / 999]))[0])
    assert 0 < float(told[2]) < 1


# The bound, term by term ---------------------------------------------------------------------------------------------

DEVIATIONS = [0.3, 0.05, 0.9]


def closed_form(deviations, timesteps, f):
    """E of the T - 1 KLs of Gaussian data with the exact denoiser: log sigma_p^2 is f between sigma_q^2 and beta."""
    alpha_bar = np.cumprod(1 - betas("linear", timesteps))
    total = 0.0
    for n in range(1, timesteps):
        a_t, a_s, beta = alpha_bar[n], alpha_bar[n - 1], 1 - alpha_bar[n] / alpha_bar[n - 1]
        small, large = beta * (1 - a_s) / (1 - a_t), beta
        p = small ** (1 - f) * large**f
        for s in deviations:
            left = s**2 * (1 - a_t) / (a_t * s**2 + 1 - a_t)  # Var(x|z_t)
            moved = a_s * (beta / (1 - a_t)) ** 2 * left  # the mean of q moves by sqrt(abar_s) beta/(1 - abar_t) x
            total += 0.5 * (math.log(p / small) + small / p - 1 + moved / p)
    return total


def every_step(timesteps):
    """Nodes and weights over t that meet each of the T - 1 steps once."""
    steps = timesteps - 1
    return (torch.arange(steps, dtype=FLOAT) + 0.5) / steps, torch.full((steps,), 1 / steps, dtype=FLOAT)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize(("variance", "v", "f"), [
    ("fixed-small", None, 0.0), ("fixed-large", None, 1.0), ("learned", -0.4, 0.3), ("learned", 1.0, 1.0),
])  # fmt: skip
def test_the_steps_of_gaussian_data_cost_their_closed_form(parameterization, variance, v, f):
    toy = gaussian(DEVIATIONS)
    model = build(toy, parameterization, Reverse(variance, decoder="gaussian"), v)
    found = diffusion_per_component(toy, model, times=every_step(T), steps=T - 1)
    assert float(found) == pytest.approx(closed_form(DEVIATIONS, T, f), rel=1e-9)


def test_fixed_small_is_the_formula_of_finite_t_that_holds_without_clipping():
    toy = gaussian([0.05, 0.1])
    clipped, plain = (build(toy, reverse=Reverse(clip=clip, decoder="gaussian")) for clip in (True, False))
    random = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(64, *toy.shape, generator=random, dtype=FLOAT) * size for size in (0.1, 1.0))
    t = torch.rand(64, generator=random, dtype=FLOAT)
    a, b = (objectives.diffusion_term(m, x, t, eps, steps=T - 1) for m in (clipped, plain))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)  # x_hat never comes near 1 here


def test_clipping_takes_an_estimate_back_to_the_range_and_lowers_the_bound_of_a_network_that_leaves_it():
    toy = gaussian([0.5, 0.5])
    wrong = {"distort": lambda eps, z, gamma: eps - 5 * torch.sign(z)}
    x = torch.full((8, *toy.shape), 0.9, dtype=FLOAT)
    t, eps = torch.linspace(0.5, 0.99, 8, dtype=FLOAT), torch.ones_like(x)
    plain, clipped = (
        objectives.diffusion_term(
            build(toy, reverse=Reverse("fixed-large", clip, "gaussian"), wrong=wrong), x, t, eps, steps=T - 1
        )
        for clip in (False, True)
    )
    assert (clipped < plain).all()
    # x_hat = 1 exactly: the KL is that of a mean which is off by 0.1.
    model = build(toy, reverse=Reverse("fixed-large", True, "gaussian"), wrong=wrong)
    alpha_bar = np.cumprod(1 - betas("linear", T))
    n = math.floor(0.5 * (T - 1)) + 1
    beta = 1 - alpha_bar[n] / alpha_bar[n - 1]
    small = beta * (1 - alpha_bar[n - 1]) / (1 - alpha_bar[n])
    moved = alpha_bar[n - 1] * (beta / (1 - alpha_bar[n])) ** 2 * 0.1**2
    wanted = 2 * 0.5 * (math.log(beta / small) + small / beta - 1 + moved / beta) * (T - 1)
    found = objectives.diffusion_term(model, x[:1], t[:1], eps[:1], steps=T - 1)
    assert float(found) == pytest.approx(wanted, rel=1e-9)


def test_the_bound_approaches_the_continuous_one_from_above_as_steps_between_the_levels_are_added():
    toy = gaussian(DEVIATIONS)
    model = build(toy, timesteps=100)
    ends = [float(model.schedule(torch.tensor([t]))[0]) for t in (0.0, 1.0)]
    truth = gaussian_diffusion(DEVIATIONS, *ends)
    gaps = [
        float(diffusion_per_component(toy, model, times=every_step(99 * k + 1), steps=99 * k)) / truth - 1
        for k in (1, 4, 16, 64)
    ]
    assert gaps[0] > 0.1 and gaps[3] > 0
    assert gaps[2] / gaps[3] == pytest.approx(4, rel=0.1)  # first order in the step
    # And in continuous time the table costs what every schedule with its ends does.
    term = diffusion_per_component(toy, model, times=gauss_legendre(99, 4))
    assert float(term) == pytest.approx(truth, rel=1e-5)


# Decoder -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", (2, 17, 256))
def test_a_gaussian_over_the_bins_is_a_distribution_and_agrees_with_scipy(levels):
    from scipy.stats import norm

    scale, half = levels / (levels - 1), 1 / (levels - 1)
    v = torch.arange(levels).reshape(levels, 1, 1, 1)
    for mean, deviation in ((0.1, 0.01), (-0.99, 0.3), (1.2, 0.05), (0.0, 3.0)):
        m, log_variance = tensor(mean).reshape(1, 1, 1, 1), tensor(2 * math.log(deviation)).reshape(1, 1, 1, 1)
        found = pixels.bin_log_likelihood(v, m, log_variance, levels, scale)
        assert float(torch.logsumexp(found, 0)) == pytest.approx(0, abs=1e-12)
        x = 2 * np.arange(levels) / (levels - 1) - 1
        low, high = (x - half - mean) / deviation, (x + half - mean) / deviation
        low[0], high[-1] = -np.inf, np.inf
        wanted = norm.cdf(high) - norm.cdf(low)
        sure = wanted > 1e-9
        np.testing.assert_allclose(found[sure].exp(), wanted[sure], rtol=1e-5)
    far = pixels.bin_log_likelihood(v[:1] + levels - 1, tensor([[[[-40.0]]]]), tensor([[[[-8.0]]]]), levels, scale)
    assert float(far) == pytest.approx(norm.logsf((1 - half + 40) * math.exp(4)), rel=1e-9)


def test_the_tails_of_the_decoder_have_gradients():
    v = torch.tensor([0, 100, 255]).reshape(3, 1, 1, 1)
    mean = tensor([0.9, 0.9, -0.9]).reshape(3, 1, 1, 1).requires_grad_()
    found = pixels.bin_log_likelihood(v, mean, tensor([[[[-9.0]]]]), 256, 256 / 255)
    (slope,) = torch.autograd.grad(found.sum(), mean)
    assert torch.isfinite(slope).all() and (slope.flatten()[:2] < 0).all() and slope.flatten()[2] > 0


@pytest.mark.parametrize(("variance", "v"), [("fixed-small", None), ("fixed-large", None), ("learned", 0.2)])
def test_the_decoder_has_the_variance_of_the_public_code(variance, v):
    toy = gaussian([0.4, 0.4])
    model = build(toy, reverse=Reverse(variance, decoder="gaussian"), v=v)
    images = torch.tensor([[3, 5], [0, 7]]).reshape(2, *toy.shape)
    z_0 = model.reals(images, FLOAT) * 0.99
    b, alpha_bar = betas("linear", T), np.cumprod(1 - betas("linear", T))
    second = b[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1])  # the posterior's at the first two levels
    log_variance = math.log(second) if v is None else (1 + v) / 2 * math.log(b[0]) + (1 - v) / 2 * math.log(second)
    s_2 = 0.4**2
    x_hat = math.sqrt(alpha_bar[0]) * s_2 / (alpha_bar[0] * s_2 + 1 - alpha_bar[0]) * z_0
    wanted = -pixels.bin_log_likelihood(images, x_hat, tensor(log_variance).reshape(1, 1, 1, 1), 8, 8 / 7)
    torch.testing.assert_close(objectives.decoder_term(model, images, z_0), wanted, rtol=1e-9, atol=1e-9)


# The whole bound ------------------------------------------------------------------------------------------------------


def discrete_toy():
    """Two dependent pixels of 8 levels, black at -1 and white at 1, as a mixture of points."""
    random = torch.Generator().manual_seed(1)
    pmf = torch.rand(8, 8, generator=random, dtype=FLOAT) ** 4
    pmf = pmf / pmf.sum()
    images = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    return Toy(2 * images.to(FLOAT) / 7 - 1, pmf.flatten().log(), torch.zeros(2, dtype=FLOAT), 8, images)


@pytest.mark.parametrize("variance", ("fixed-small", "fixed-large"))
def test_the_evaluation_meets_every_term_once_and_is_a_bound(variance):
    toy = discrete_toy()
    model = build(toy, reverse=Reverse(variance, decoder="gaussian"))
    images = toy.images.reshape(-1, *toy.shape)
    found = likelihood.vlb(model, images, steps=T - 1, times_per_shift=T - 1, shifts=4)
    p = toy.log_weights.exp().numpy()
    entropy = -float((p * np.log2(p)).sum()) / 2
    exact = expected_terms(toy, model, times=every_step(T), grid=normal_grid(0.6, 5.4), steps=T - 1)
    for name in ("prior", "reconstruction", "diffusion"):
        each = found.per_image_terms[name]
        error = float(np.sqrt((p**2 * found.per_image_error**2).sum()))
        wanted = float(pixels.bits_per_dim(getattr(exact, name), 2))
        assert float((p * each).sum()) == pytest.approx(wanted, abs=3 * error + 1e-6)
    assert float(pixels.bits_per_dim(exact.total, 2)) > entropy
    t, _, squared = found.by_time
    assert sorted(np.unique(np.floor(t.reshape(-1, T - 1) * (T - 1)), axis=0)[0].tolist()) == list(range(T - 1))
    assert np.isfinite(squared).all() and squared.min() >= 0
    assert found.settings["decoder"] == "gaussian" and found.settings["variance"] == variance
    # The decoder is asked once a shift, with the noise of the shift's first draw, and counts in full.
    few = likelihood.vlb(model, images[:3], steps=T - 1, times_per_shift=5, shifts=2)
    x, wanted = model.reals(images[:3]), 0.0
    alpha, sigma = model.path.coefficients(model.schedule(torch.zeros(1))[0])
    for draw in (0, 5):
        z_0 = (alpha * x + sigma * Draws(0, range(3), draw).normal("eps_0", toy.shape)).float()
        wanted = wanted + objectives.decoder_term(model, images[:3], z_0) / 2
    found = few.per_image_terms["reconstruction"]
    np.testing.assert_allclose(found, pixels.bits_per_dim(wanted, 2).numpy(), rtol=1e-6)


def test_the_figure_does_not_depend_on_the_batch():
    toy = discrete_toy()
    model, images = build(toy), toy.images[:5].reshape(-1, *toy.shape)
    a, b = (likelihood.vlb(model, images, steps=T - 1, times_per_shift=4, batch=n) for n in (256, 3))
    np.testing.assert_allclose(a.per_image, b.per_image, rtol=0, atol=1e-9)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_the_ode_of_gaussian_data_gives_the_density_and_the_networks_own_decoder(parameterization):
    toy = gaussian([0.3, 0.6])
    model = build(toy, parameterization)
    images = torch.tensor([[3, 5], [0, 7], [4, 2]]).reshape(3, *toy.shape)
    found = likelihood.ode(
        model, images, dequantization="variational", trace="exact", replicates=1, rtol=1e-10, atol=1e-10,
        method="dopri5", double=True,
    )  # fmt: skip
    alpha, sigma = (float(v) for v in model.path.coefficients(model.schedule(torch.zeros(1))[0]))
    z = alpha * model.reals(images, FLOAT) + sigma * Draws(0, range(3), 0).normal("eps_0", toy.shape).double()
    spread = alpha**2 * tensor([0.3, 0.6]) ** 2 + sigma**2
    density = (-0.5 * z.flatten(1) ** 2 / spread - 0.5 * torch.log(2 * math.pi * spread)).sum(1)
    wanted = pixels.bits_per_dim(-density, 2).numpy()
    density_found = found.per_image_terms["prior"] + found.per_image_terms["divergence"]
    # The prior N(0, I) is not quite what the flow makes of the data at the last level: the truth at t = 1 is known too.
    alpha_1, sigma_1 = (float(v) for v in model.path.coefficients(model.schedule(torch.ones(1))[0]))
    last = alpha_1**2 * tensor([0.3, 0.6]) ** 2 + sigma_1**2
    z_1 = z.flatten(1) * (last / spread).sqrt()
    gap = (-0.5 * z_1**2 - 0.5 * math.log(2 * math.pi)).sum(1) - (
        -0.5 * z_1**2 / last - 0.5 * torch.log(2 * math.pi * last)
    ).sum(1)
    np.testing.assert_allclose(density_found, wanted - pixels.bits_per_dim(gap, 2).numpy(), rtol=0, atol=2e-6)
    decoder = objectives.decoder_term(model, images, z)
    np.testing.assert_allclose(
        found.per_image_terms["decoder"], pixels.bits_per_dim(decoder, 2).numpy(), rtol=0, atol=1e-6
    )
    assert found.is_bound


def test_the_flow_of_a_table_takes_steps_that_are_equal_in_t():
    """Its network sees the timestep: what a step may miss are waves of t, not of gamma."""
    toy = gaussian([0.3, 0.6])
    model = build(toy)
    gammas, told = model.schedule.interior.cubic.powers[3], []
    exact, number = model.network, TimestepNetwork(None, [*gammas.tolist(), model.schedule.gamma_1])

    def net(z, gamma, conditioning=None):
        told.append(float(number.timestep(gamma.flatten())[0]) / (T - 1))
        return exact(z, gamma)

    model.network = net
    images = torch.tensor([[3, 5]]).reshape(1, *toy.shape)
    likelihood.ode(model, images, dequantization="variational", replicates=1, rtol=0.9, atol=0.9, least_steps=50)
    apart = np.diff(np.unique(np.round(told, 9)))
    assert 49 <= len(apart) < 70 and apart.max() < 1.001 / 50


def test_the_flow_does_not_start_below_the_lowest_noise_that_was_trained():
    toy = gaussian([0.3, 0.6])
    model = build(toy, levels=256)
    with pytest.raises(ValueError, match=r"gamma = -11.80, below .* -5"):
        likelihood.ode(model, torch.tensor([[3, 5]]).reshape(1, *toy.shape), dequantization="uniform")


# Losses ---------------------------------------------------------------------------------------------------------------


def losses(model, weighting, t=None, **more):
    random = torch.Generator().manual_seed(3)
    n = T if t is None else len(t)
    images = torch.randint(0, 8, (n, *model.shape), generator=random)
    eps = torch.randn(n, *model.shape, generator=random, dtype=FLOAT)
    t = (torch.arange(T, dtype=FLOAT) + 0.5) / T if t is None else t
    return images, eps, objectives.weighted(model, images, weighting, t=t, eps=eps, steps=T - 1, dtype=FLOAT, **more)


@pytest.mark.parametrize("variance", ("fixed-small", "fixed-large"))
def test_a_grid_over_the_levels_is_the_bound(variance):
    toy = gaussian([0.3, 0.6])
    model = build(toy, reverse=Reverse(variance, decoder="gaussian"))
    images, eps, terms = losses(model, None)
    x = model.reals(images, FLOAT)
    first, rest = terms.reconstruction / T, terms.diffusion / T
    assert (first[1:] == 0).all() and rest[0] == 0
    gamma_0 = model.schedule(torch.zeros(1))[0]
    z_0 = model.path.diffuse(x[:1], gamma_0, eps[:1])
    torch.testing.assert_close(first[:1], objectives.decoder_term(model, images[:1], z_0), rtol=1e-10, atol=0)
    t = (torch.arange(T - 1, dtype=FLOAT) + 0.5) / (T - 1)
    steps = objectives.diffusion_term(model, x[1:], t, eps[1:], steps=T - 1) / (T - 1)
    torch.testing.assert_close(rest[1:], steps, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(terms.loss, terms.total)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("weight", ("none", "snr", "min-snr", "p2"))
def test_weights_are_those_of_the_papers(parameterization, weight):
    toy = gaussian([0.3, 0.6])
    wrong = {"distort": lambda eps, z, gamma: 0.8 * eps + 0.1}
    model = build(toy, parameterization, wrong=wrong)
    images, eps, terms = losses(model, objectives.Weighting(weight=weight, p2_gamma=0.5))
    x = model.reals(images, FLOAT)
    gamma = model.schedule(torch.arange(T, dtype=FLOAT) / (T - 1))[0]
    z = model.path.diffuse(x, gamma, eps)
    x_hat, eps_hat = model.predict(z, gamma)
    alpha, sigma = model.path.coefficients(gamma)
    errors = {
        "noise": eps_hat - eps,
        "data": x_hat - x,
        "velocity": (alpha * eps_hat - sigma * x_hat) - (alpha * eps - sigma * x),
    }
    snr = torch.exp(-gamma)
    factors = {"none": 1 / model.parameterization.weight(model.path, gamma), "snr": torch.ones_like(snr),
               "min-snr": snr.clamp(max=5) / snr, "p2": (1 + snr) ** -0.5}  # fmt: skip
    of_noise = (factors[weight] * (eps_hat - eps) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(terms.error, of_noise, rtol=1e-8, atol=1e-12)
    if weight == "none":
        torch.testing.assert_close(
            terms.error, (errors[parameterization] ** 2).flatten(1).mean(1), rtol=1e-8, atol=1e-12
        )
        l1 = losses(model, objectives.Weighting(norm="l1"))[2]
        torch.testing.assert_close(l1.error, errors[parameterization].abs().flatten(1).mean(1), rtol=1e-8, atol=1e-12)
    # The error of x_hat is in units of encode's x, here 7/8 of DDPM's.
    wanted = ((x_hat - x) ** 2).flatten(1).mean(1) * (7 / 8) ** 2
    torch.testing.assert_close(terms.squared_error, wanted, rtol=1e-6, atol=1e-12)
    at = torch.arange(1, T, dtype=FLOAT) / (T - 1) - 0.5 / (T - 1)
    for clip in (False, True):
        model.reverse = replace(model.reverse, clip=clip)
        found = objectives.elbo(model, images[1:], t=at, eps=eps[1:], eps_0=eps[1:], steps=T - 1, dtype=FLOAT)
        kept = x_hat.clamp(-1, 1) if clip else x_hat
        wanted = ((kept - x) ** 2).flatten(1).mean(1) * (7 / 8) ** 2
        torch.testing.assert_close(found.squared_error, wanted[1:], rtol=1e-6, atol=1e-12)
    # In bits/dim, which training divides by, the loss is the error itself.
    torch.testing.assert_close(pixels.bits_per_dim(terms.loss, model.dimensions), terms.error)


def test_min_snr_of_a_velocity_is_clipped_snr_over_snr_plus_one():
    toy, gamma = gaussian([0.5]), torch.linspace(-9, 9, 7, dtype=FLOAT).reshape(-1, 1, 1, 1)
    snr = torch.exp(-gamma)
    for parameterization, wanted in (
        ("velocity", snr.clamp(max=5) / (snr + 1)), ("data", snr.clamp(max=5)), ("noise", snr.clamp(max=5) / snr),
    ):  # fmt: skip
        found = objectives.Weighting(weight="min-snr")(build(toy, parameterization), gamma)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


def test_the_hybrid_loss_trains_the_variance_by_the_bound_and_nothing_else():
    toy = gaussian([0.3, 0.6])
    mean, v = (torch.tensor(value, dtype=FLOAT, requires_grad=True) for value in (0.9, 0.1))
    model = build(toy, reverse=Reverse("learned", decoder="gaussian"), v=0.0)
    exact = model.network

    def net(z, gamma, conditioning=None):
        out = exact(z, gamma)[:, :1]
        return torch.cat((mean * out, v.expand_as(out)), 1)

    model.network = net
    _, _, hybrid = losses(model, objectives.Weighting(hybrid=0.001))
    _, _, simple = losses(model, objectives.Weighting())
    bits = pixels.bits_per_dim(hybrid.loss.mean(), 2)
    of_mean, of_v = torch.autograd.grad(bits, (mean, v), retain_graph=True)
    (alone,) = torch.autograd.grad(simple.error.mean(), mean)
    torch.testing.assert_close(of_mean, alone)
    bound = pixels.bits_per_dim((hybrid.diffusion + hybrid.reconstruction).mean(), 2)
    (wanted,) = torch.autograd.grad(0.001 * bound, v)
    torch.testing.assert_close(of_v, wanted)
    assert abs(float(of_v)) > 0
    _, _, full = losses(model, None)
    assert torch.autograd.grad(full.loss.mean(), mean)[0] != 0


def test_a_network_that_reads_its_own_estimate_is_a_function_of_z_when_evaluated_and_half_blind_in_training():
    seen = []

    def net(z, n, estimate):
        seen.append(estimate)
        return 0.5 * z + 0.25 * estimate

    gammas = gammas_of_betas(betas("linear", T))
    model = DiffusionModel(
        TimestepNetwork(net, gammas), table(), PATHS["vp"](), PARAMETERIZATIONS["data"](), (1, 1, 2), 8,
        self_condition=True,
    ).to(FLOAT)  # fmt: skip
    z, gamma = (
        torch.randn(400, 1, 1, 2, dtype=FLOAT, generator=torch.Generator().manual_seed(0)),
        tensor(0.0).reshape(1, 1, 1, 1),
    )
    model.eval()
    torch.testing.assert_close(model(z, gamma.expand(400, 1, 1, 1)), 0.5 * z + 0.25 * 0.5 * z)
    assert (seen[0] == 0).all() and len(seen) == 2
    model.train()
    torch.manual_seed(0)
    out = model(z, gamma.expand(400, 1, 1, 1))
    told = ((out - 0.5 * z).flatten(1).abs().sum(1) > 0).double().mean()
    assert 0.4 < float(told) < 0.6  # 400 tosses: 4 standard deviations
    assert not seen[3].requires_grad


# diffusers -----------------------------------------------------------------------------------------------------------

KINDS = {"epsilon": "noise", "sample": "data", "v_prediction": "velocity"}


def scheduler(**settings):
    """diffusers' DDPMScheduler with its products in float64: in float32 its 1 - abar_0 is 1.7e-4 off."""
    from diffusers import DDPMScheduler

    found = DDPMScheduler(num_train_timesteps=100, beta_start=1e-3, beta_end=0.2, **settings)
    found.betas = found.betas.double()
    found.alphas = 1 - found.betas
    found.alphas_cumprod = torch.cumprod(found.alphas, 0)
    found.one = torch.tensor(1.0, dtype=FLOAT)
    return found


@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize(("variance_type", "variance"), [
    ("fixed_small", "fixed-small"), ("fixed_large", "fixed-large"), ("learned_range", "learned"),
])  # fmt: skip
@pytest.mark.parametrize("clip", (False, True))
def test_a_step_is_that_of_diffusers(prediction, variance_type, variance, clip):
    theirs = scheduler(prediction_type=prediction, variance_type=variance_type, clip_sample=clip)
    gammas = gammas_of_betas(theirs.betas.numpy())
    random = torch.Generator().manual_seed(0)
    z, out, v = (torch.randn(2, 1, 2, 2, generator=random, dtype=FLOAT) for _ in range(3))
    v = v.tanh()
    learned = variance == "learned"
    model = DiffusionModel(
        lambda *_: torch.cat((out, v), 1) if learned else out, Schedule(Table(gammas), gammas[0], gammas[-1]),
        PATHS["vp"](), PARAMETERIZATIONS[KINDS[prediction]](), (1, 2, 2), 256, reverse=Reverse(variance, clip),
    )  # fmt: skip
    for n in (1, 50, 99):
        s, t = ((torch.tensor([m], dtype=FLOAT) / 99).expand(2) for m in (n - 1, n))
        mean, std, x_hat = objectives.reverse_moments(model, z, model.schedule(s)[0], model.schedule(t)[0])
        step = theirs.step(torch.cat((out, v), 1) if learned else out, n, z, generator=torch.Generator().manual_seed(5))
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=FLOAT)
        torch.testing.assert_close(mean + std * noise, step.prev_sample, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(x_hat, step.pred_original_sample, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("eta", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("clip", (False, True))
def test_a_ddim_step_is_that_of_diffusers(prediction, eta, clip):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        num_train_timesteps=100, beta_start=1e-3, beta_end=0.2, prediction_type=prediction, clip_sample=clip
    )
    theirs.alphas_cumprod = torch.cumprod(1 - theirs.betas.double(), 0)
    theirs.set_timesteps(10)
    gammas = gammas_of_betas(theirs.betas.double().numpy())
    random = torch.Generator().manual_seed(0)
    z, out, noise = (torch.randn(2, 1, 2, 2, generator=random, dtype=FLOAT) for _ in range(3))
    model = DiffusionModel(
        lambda *_: out, Schedule(Table(gammas), gammas[0], gammas[-1]), PATHS["vp"](),
        PARAMETERIZATIONS[KINDS[prediction]](), (1, 2, 2), 256,
    )  # fmt: skip
    step = samplers.ddim_step(model, eta=eta, clip=clip)
    for n in (10, 50, 90):
        s, t = ((torch.tensor([m], dtype=FLOAT) / 99).expand(2) for m in (n - 10, n))
        mean, std, x_hat = step(z, s, t)
        wanted = theirs.step(out, n, z, eta=eta, use_clipped_model_output=True, variance_noise=noise if eta else None)
        torch.testing.assert_close(mean + std * noise, wanted.prev_sample, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(x_hat, wanted.pred_original_sample, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("theirs", "ours"), [
    ("linear", "linear"), ("scaled_linear", "quadratic"), ("squaredcos_cap_v2", "cosine"),
])  # fmt: skip
def test_betas_are_those_of_diffusers(theirs, ours):
    from diffusers import DDPMScheduler

    np.testing.assert_allclose(DDPMScheduler(beta_schedule=theirs).betas.numpy(), betas(ours, 1000), rtol=1e-5)


def test_the_network_of_the_paper_has_its_size_and_is_diffusers_own():
    from diffusers import UNet2DModel

    model = nelbo.build(preset("ddpm-cifar10"), (3, 32, 32), 256)
    unet = model.network.network.unet
    assert isinstance(unet, UNet2DModel) and sum(p.numel() for p in model.parameters()) == 35_746_307
    assert unet.config.down_block_types == ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    assert (unet.config.freq_shift, unet.config.flip_sin_to_cos, unet.config.norm_eps) == (1, False, 1e-6)
    tiny = nelbo.build(preset("ddpm-digits"))
    unet = tiny.network.network.unet.eval()
    torch.nn.init.normal_(unet.conv_out.weight)  # which begins as zero
    z, n = torch.randn(2, 1, 8, 8), torch.tensor([7, 990])
    gamma = tiny.schedule(n.double() / 999)[0]
    with torch.no_grad():
        torch.testing.assert_close(tiny.eval()(z, gamma), unet(z, n).sample, rtol=1e-6, atol=1e-6)


def test_an_evaluation_may_take_another_variance_than_a_learned_one():
    toy = discrete_toy()
    learned = build(toy, reverse=Reverse("learned", decoder="gaussian"), v=1.0)
    large = build(toy, reverse=Reverse("fixed-large", decoder="gaussian"))
    images = toy.images[:4].reshape(-1, *toy.shape)
    learned.reverse = replace(learned.reverse, variance="fixed-large")
    a, b = (likelihood.vlb(m, images, steps=T - 1, times_per_shift=5) for m in (learned, large))
    np.testing.assert_allclose(a.per_image, b.per_image, rtol=1e-9)


# Configuration and training ------------------------------------------------------------------------------------------

MISTAKES = [
    ({"schedule.timesteps": 1}, "schedule.timesteps must be at least 2, got 1"),
    ({"schedule.betas": (0.1, 1.5)}, "schedule.betas must be at least 2 numbers strictly between 0 and 1"),
    ({"schedule.ends": "learned"}, "schedule.kind = betas has its own ends"),
    ({"schedule.kind": "linear"}, "network.kind = ddpm sees timesteps: it needs schedule.kind = betas, got linear"),
    ({"network.flag": True}, "network.kind = ddpm takes no conditioning"),
    ({"latent.kind": "k-hot"}, "network.kind = ddpm takes no conditioning"),
    ({"network.multipliers": ()}, "network.multipliers must be whole numbers above 0"),
    ({"network.kind": "flat", "network.self_condition": True}, "need network.kind = ddpm or attention"),
    ({"objective.steps": 0}, "objective.steps must be above 0"),
    ({"objective.loss": "hybrid"}, "it needs reverse.variance = learned"),
    ({"reverse.variance": "learned"}, "objective.loss = simple does not train reverse.variance = learned"),
    ({"objective.times": "importance", "objective.steps": 0, "reverse.decoder": "levels"}, "follows the bound"),
    ({"objective.min_snr": 0.0}, "objective.min_snr must be above 0"),
    ({"training.fid_samples": 0}, "training.fid_samples must be above 0"),
]


@pytest.mark.parametrize(("fields", "wanted"), MISTAKES)
def test_a_configuration_that_contradicts_itself_is_refused_by_name(fields, wanted):
    with pytest.raises(UserError, match=re.escape(wanted)):
        change(preset("ddpm-digits"), fields)


def test_images_that_cannot_be_halved_so_often_are_refused():
    with pytest.raises(UserError, match="height and width must be multiples of 4, got 6x8"):
        build_model(change(preset("ddpm-digits"), {"network.multipliers": (1, 1, 1)}), (1, 6, 8), 17)


@pytest.mark.parametrize("fields", [
    {}, {"objective.loss": "hybrid", "reverse.variance": "learned"},
    {"objective.loss": "bound", "schedule.form": "cosine"},
    {"parameterization": "velocity", "objective.weight": "min-snr", "network.self_condition": True},
    {"network.kind": "flat", "network.levels": 1, "objective.loss": "simple"},
    {"network.kind": "attention", "network.self_condition": True},
])  # fmt: skip
def test_every_loss_trains_and_the_run_is_its_own_again(tmp_path, fields):
    """Four steps and two more after a stop are six steps; the loss of step 1 is the error of the untrained network."""
    small = {"network.channels": 8, "network.groups": 2, "training.batch": 8, "training.steps": 6,
             "training.log_every": 1, "training.evaluate_every": 0, "optimizer.warmup": 1,
             "optimizer.decay": "none"}  # fmt: skip
    config = change(preset("ddpm-digits"), small | fields)
    quiet = {"say": lambda line: None}
    train(config, tmp_path / "whole", **quiet)
    train(change(config, {"training.steps": 4}), tmp_path / "parts", **quiet)
    train(config, tmp_path / "parts", **quiet)
    whole, parts = outcome(tmp_path / "whole"), outcome(tmp_path / "parts")
    assert whole["metrics.jsonl"] == parts["metrics.jsonl"]
    name = "checkpoints/step-000000006/weights.safetensors"
    assert whole[name] == parts[name]
    first = whole["metrics.jsonl"][0]
    assert ("error" in first) == (config.objective.loss != "bound")
    if not fields:  # an untrained network whose last layer is zero: the noise itself
        assert first["error"] == pytest.approx(1.0, abs=0.15)


def test_the_network_starts_as_the_paper_does():
    """The last convolution, and the second of every block, are zero: the output is 0."""
    model = nelbo.build(preset("ddpm-digits")).eval()
    out = model(torch.randn(2, 1, 8, 8), torch.zeros(2, 1, 1, 1))
    assert (out == 0).all()


def test_a_ddpm_of_ones_own_is_asked_with_timesteps():
    told = []
    net = torch.nn.Conv2d(1, 1, 1)
    model = nelbo.ddpm(lambda x, t: told.append(t) or net(x), [0.1, 0.2, 0.3], (1, 2, 2), 4, variance="fixed-large")
    images = torch.tensor([[0, 1], [2, 3]]).reshape(1, 1, 2, 2)
    found = likelihood.vlb(model, images, steps=2, times_per_shift=2)
    assert sorted({round(float(v), 6) for t in told for v in t}) == [0, 1, 2] and found.is_bound
    assert float(model.reals(images).min()) == -1 and float(model.reals(images).max()) == 1
    assert model.schedule.timesteps == 3 and model.reverse == Reverse("fixed-large", True, "gaussian")


def test_a_distance_is_taken_every_so_many_images_and_changes_nothing_else(tmp_path):
    small = {"network.channels": 8, "network.groups": 2, "training.batch": 8, "training.steps": 4,
             "training.log_every": 2, "training.evaluate_every": 0, "optimizer.warmup": 1,
             "optimizer.decay": "none"}  # fmt: skip
    config = change(preset("ddpm-digits"), small)
    often = {"training.fid_every": 16, "training.fid_samples": 12, "training.fid_steps": 2,
             "training.fid_extractor": "random"}  # fmt: skip
    said = []
    train(config, tmp_path / "without", say=said.append)
    train(change(config, often), tmp_path / "with", say=said.append)
    without, found = (outcome(tmp_path / name) for name in ("without", "with"))
    lines = [line for line in found["metrics.jsonl"] if line["kind"] == "fid"]
    assert [(line["step"], line["samples"], line["extractor"]) for line in lines] == [
        (2, 12, "random"),
        (4, 12, "random"),
    ]
    assert all(line["fid"] > line["floor"] > 0 for line in lines)
    assert [line for line in found["metrics.jsonl"] if line["kind"] != "fid"] == without["metrics.jsonl"]
    name = "checkpoints/step-000000004/weights.safetensors"
    assert found[name] == without[name]
    assert any("distance (random)" in line for line in said)


def test_the_report_has_rate_and_distortion(tmp_path):
    from nelbo import evaluation
    from nelbo.report import write_report

    small = {"network.channels": 8, "network.groups": 2, "training.batch": 8, "training.steps": 2}
    train(change(preset("ddpm-digits"), small), tmp_path / "run", say=lambda line: None)
    settings = evaluation.Settings(checkpoint="last", images=4, times=60)
    record = evaluation.evaluate(tmp_path / "run", settings).record
    page = write_report([tmp_path / "run"], tmp_path / "page.html", "last").read_text()
    section = page.split('id="rate"')[1].split("</section>")[0]
    rate = record["terms"]["prior"]["mean"] + record["terms"]["diffusion"]["mean"]
    assert "<svg" in section and f"{rate:.4f}" in section
    assert "decoder: the network" in page and "variance fixed-large" in page
