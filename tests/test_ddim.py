"""DDIM, the variances of a step, times at a table's levels, and what lies between two images: against closed forms."""

import math

import pytest
import torch

from nelbo import objectives, pixels, samplers
from nelbo.draws import Draws
from nelbo.latents import KHot
from nelbo.model import Reverse
from nelbo.parameterizations import PARAMETERIZATIONS
from nelbo.paths import PATHS
from nelbo.samplers import (
    ddim_step,
    decode_noise,
    interpolate,
    interpolate_latents,
    reverse_step,
    sample,
    slerp,
    time_grid,
    walk,
)
from nelbo.schedules import Schedule, Table, default_gamma_0, gammas_of_betas
from toys import FLOAT, build, gaussian, linear, polynomial, tensor, two_pixels

DEVIATIONS = [0.2, 0.7, 1.6]
BETAS = torch.linspace(0.005, 0.4, 20, dtype=FLOAT).numpy()
G0, G1 = -9.0, 5.0


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT)


def times(*values, rows=40):
    return (torch.full((rows,), value, dtype=FLOAT) for value in values)


def ddpm(toy, data_scale=4 / 3, **reverse):
    """The exact denoiser on the 20 noise levels of BETAS, x from -1 to 1, the network's own Gaussian as the decoder."""
    gammas = gammas_of_betas(BETAS)
    schedule = Schedule(Table(gammas), float(gammas[0]), float(gammas[-1]))
    model = build(toy, schedule, data_scale=data_scale, reverse=Reverse(decoder="gaussian", **reverse))
    exact = model.network
    model.network = lambda z, gamma, conditioning: exact(z.double(), gamma).to(z.dtype)
    return model


# DDIM ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("path", PATHS)
def test_with_eta_1_a_step_is_the_ancestral_one(path, parameterization, clip):
    """Mean, deviation and x_hat of 40 z, per-pixel noise and a network that errs: the same to 1e-12, on both paths."""
    toy, wrong = two_pixels(), {"distort": lambda e, z, g: 0.3 * e}
    model = build(toy, polynomial(toy.shape, G0, G1, seed=1), path, parameterization, wrong=wrong)
    z = random(40, 1, 1, 2)
    for at in ((0.5, 0.6), (0.0, 0.02), (0.1, 0.9)):
        s, t = times(*at)
        found, expected = ddim_step(model, eta=1.0, clip=clip)(z, s, t), reverse_step(model, clip=clip)(z, s, t)
        for left, right in zip(found, expected, strict=True):
            assert torch.allclose(left, right.expand_as(left), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("path", PATHS)
def test_clipping_keeps_z_s_on_the_line_of_z_t(path):
    """x_hat ends at the grey levels, and eps_hat is what is then left of z_t."""
    toy = two_pixels()
    model = build(toy, linear(G0, G1), path, wrong={"distort": lambda e, z, g: 0.3 * e})
    z, (s, t) = random(40, 1, 1, 2), times(0.4, 0.6)
    free = model.predict(z, model.schedule(t)[0])[0]
    mean, std, x_hat = ddim_step(model, clip=True)(z, s, t)
    assert bool((free.abs() > 1).any()) and torch.equal(x_hat, free.clamp(-1, 1)) and not std.any()
    (alpha_s, sigma_s), (alpha_t, sigma_t) = (model.path.coefficients(model.schedule(u)[0]) for u in (s, t))
    assert torch.allclose((mean - alpha_s * x_hat) / sigma_s, (z - alpha_t * x_hat) / sigma_t, rtol=1e-10)


def variances(toy, model, steps, eta, start):
    """V_s = (alpha_s alpha_t v/V + sigma_s sqrt(1 - eta^2 k) sigma_t/V)^2 V_t + eta^2 k sigma_s^2, V = alpha_t^2 v +
    sigma_t^2, along N equal steps from V_1 = start."""
    gamma = model.schedule(time_grid(steps))[0].expand(-1, *toy.shape).flatten(1)
    alpha, sigma = model.path.coefficients(gamma)
    marginal, variance = alpha**2 * toy.variance + sigma**2, start
    for i in range(steps):
        k = 1 - torch.exp(gamma[i + 1] - gamma[i])
        direction = sigma[i + 1] * (1 - eta**2 * k).sqrt()
        gain = (alpha[i + 1] * alpha[i] * toy.variance + direction * sigma[i]) / marginal[i]
        variance = gain**2 * variance + eta**2 * k * sigma[i + 1] ** 2
    return variance, marginal[-1] / marginal[0] * start


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("path", PATHS)
def test_moments_of_ddim_samples_of_gaussian_data(path, eta):
    """4 000 samples from N(0, 1) in 12 steps, per-pixel noise: variances within 4.5 standard errors of the recursion's,
    covariances of 0."""
    toy, count, steps = gaussian(DEVIATIONS), 4000, 12
    model = build(toy, polynomial(toy.shape, G0, G1, seed=2), path, "velocity")
    z_1 = Draws(3, range(count)).normal("prior", toy.shape).to(FLOAT)
    draws = samplers.Chain("ddim", steps, eta=eta).draws(3, range(count), steps, "cpu")
    z = walk(ddim_step(model, eta=eta), z_1, time_grid(steps), draws).flatten(1)
    variance, _ = variances(toy, model, steps, eta, torch.ones(3, dtype=FLOAT))
    covariance = z.T @ z / count
    error = torch.sqrt((torch.outer(variance, variance) + torch.diag(variance**2)) / count)
    assert bool(((covariance - torch.diag(variance)).abs() < 4.5 * error).all())
    if not eta:  # linear without noise: the same number in every sample
        assert torch.allclose(z**2, variance * z_1.flatten(1) ** 2, rtol=1e-9)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("path", PATHS)
def test_with_eta_0_it_tends_to_the_flow_in_first_order(path, parameterization):
    """z_0 beside the flow's, at tolerance 1e-9, and the closed form's: half the step, half the error."""
    toy = gaussian(DEVIATIONS)
    model = build(toy, polynomial(toy.shape, G0, G1, seed=2), path, parameterization)
    z_1, step = random(5, *toy.shape), ddim_step(model)
    flow = decode_noise(model, z_1, rtol=1e-9, atol=1e-9, method="dopri5").z
    closed = variances(toy, model, 1, 0.0, z_1.flatten(1) ** 2)[1].sqrt()
    assert torch.allclose(flow.flatten(1).abs(), closed, rtol=1e-6)
    apart = [walk(step, z_1, time_grid(n), [None] * n) / flow - 1 for n in (10, 400, 800)]
    assert apart[2].abs().max() < 0.03 < apart[0].abs().max()
    ratio = apart[1] / apart[2]
    assert torch.allclose(ratio, torch.full_like(ratio, 2), rtol=0.03)


def test_with_eta_0_paths_differ_by_a_scale_alone():
    """z/alpha moves by eps_hat against sigma/alpha: 9 steps on both paths end at the same z_0/alpha_0."""
    toy, z_1, ends = gaussian(DEVIATIONS), random(5, 1, 1, 3), []
    for path in PATHS:
        model = build(toy, linear(G0, G1), path, "noise")
        (alpha_0, alpha_1), _ = model.path.coefficients(tensor([G0, G1]))
        ends.append(walk(ddim_step(model), alpha_1 * z_1, time_grid(9), [None] * 9) / alpha_0)
    assert torch.allclose(*ends, rtol=1e-10)


def test_upwards_and_down_again_comes_back_in_first_order():
    toy = two_pixels()
    model = build(toy, linear(default_gamma_0(4), G1), "vp", "noise")
    z_0 = 0.99 * toy.means[::3].reshape(-1, 1, 1, 2)
    errors = []
    for n in (200, 400, 800):
        up = walk(ddim_step(model), z_0, time_grid(n).flip(0), [None] * n)
        errors.append(float((walk(ddim_step(model), up, time_grid(n), [None] * n) - z_0).abs().max()))
    assert errors[0] > 1.8 * errors[1] > 1.8 * 1.8 * errors[2] and errors[2] < 0.01


def test_no_noise_is_drawn_where_none_is_used(monkeypatch):
    streams = []
    original = Draws.normal
    monkeypatch.setattr(
        Draws, "normal", lambda self, stream, shape: streams.append(stream) or original(self, stream, shape)
    )
    model = build(two_pixels(), linear(default_gamma_0(4), G1)).float()
    sample(model, 2, method="ddim", steps=5)
    assert streams == ["prior"]
    sample(model, 2, method="ddim", steps=5, eta=0.1)
    assert streams[1:] == ["prior", *["step"] * 5]


@pytest.mark.parametrize("eta", [0.0, 0.4])
def test_sample_k_of_ddim_does_not_depend_on_the_others(eta):
    model = build(two_pixels(), linear(default_gamma_0(4), G1)).float()
    many = sample(model, 7, method="ddim", steps=9, eta=eta, seed=5)
    assert torch.equal(sample(model, 3, method="ddim", steps=9, eta=eta, seed=5), many[:3])
    assert torch.equal(sample(model, 2, method="ddim", steps=9, eta=eta, seed=5, first=4), many[4:6])


def test_ddim_samples_of_the_enumerated_toy():
    """3 000 images in 64 steps, exact denoiser: within 0.05 in total variation of the pmf."""
    toy = two_pixels()
    model = build(toy, linear(default_gamma_0(4), G1), parameterization="velocity").float()
    images = sample(model, 3000, method="ddim", steps=64)
    share = torch.bincount(images.flatten(1).long() @ torch.tensor([4, 1]), minlength=16) / 3000
    assert ((share - toy.log_weights.exp()).abs().sum() / 2).item() < 0.05


# Variances -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("own", ["fixed-small", "fixed-large"])
def test_the_fixed_variances_of_a_step(own, path):
    """k sigma_s^2 and k sigma_t^2, the model's own or another; on VP the latter is DDPM's beta. The mean is the
    same."""
    toy = two_pixels()
    model = build(toy, polynomial(toy.shape, G0, G1, seed=1), path, reverse=Reverse(variance=own))
    z, (s, t) = random(40, 1, 1, 2), times(0.5, 0.6)
    gamma_s, gamma_t = model.schedule(s)[0], model.schedule(t)[0]
    (alpha_s, sigma_s), (alpha_t, sigma_t) = (model.path.coefficients(g) for g in (gamma_s, gamma_t))
    k = 1 - torch.exp(gamma_s - gamma_t)
    if path == "vp":
        assert torch.allclose(k * sigma_t**2, 1 - alpha_t**2 / alpha_s**2, rtol=1e-12)
    found = {name: reverse_step(model, variance=name)(z, s, t) for name in (None, "fixed-small", "fixed-large")}
    for name, expected in (("fixed-small", k * sigma_s**2), ("fixed-large", k * sigma_t**2)):
        assert torch.allclose(found[name][1] ** 2, expected.expand_as(z), rtol=1e-12)
        assert torch.equal(found[name][0], found[None][0])
    assert torch.equal(found[None][1], found[own][1])


def test_moments_of_samples_with_the_large_variance():
    """Gaussian data, exact denoiser, T = 12: V_s = gain^2 V_t + k sigma_t^2, larger than the data's; 4 000 samples."""
    toy, count, steps = gaussian(DEVIATIONS), 4000, 12
    model = build(toy, polynomial(toy.shape, G0, G1, seed=2), reverse=Reverse(variance="fixed-large"))
    z_1 = Draws(3, range(count)).normal("prior", toy.shape).to(FLOAT)
    draws = [Draws(3, range(count), i) for i in range(steps)]
    z = walk(reverse_step(model), z_1, time_grid(steps), draws).flatten(1)
    gamma = model.schedule(time_grid(steps))[0].flatten(1)
    alpha, sigma = model.path.coefficients(gamma)
    variance = torch.ones(3, dtype=FLOAT)
    for i in range(steps):
        k = 1 - torch.exp(gamma[i + 1] - gamma[i])
        gain = alpha[i + 1] / alpha[i] * (1 - k * sigma[i] ** 2 / (alpha[i] ** 2 * toy.variance + sigma[i] ** 2))
        variance = gain**2 * variance + k * sigma[i] ** 2
    assert bool(((z**2).mean(0) / variance - 1).abs().max() < 4.5 * math.sqrt(2 / count))
    assert bool((variance > alpha[-1] ** 2 * toy.variance + 1.5 * sigma[-1] ** 2).any())


def test_a_learned_variance_is_taken_or_left():
    """The network's second half v makes log-variances between the two; on request one of the two themselves."""
    toy = two_pixels()
    model = build(toy, linear(G0, G1), reverse=Reverse(variance="learned"))
    own, v = model.network, random(40, 1, 1, 2, seed=4)
    model.network = lambda z, gamma, conditioning: torch.cat((own(z, gamma), v), 1)
    z, (s, t) = random(40, 1, 1, 2), times(0.5, 0.6)
    learned, small, large = (
        reverse_step(model, variance=name)(z, s, t)[1] for name in (None, "fixed-small", "fixed-large")
    )
    f = (v + 1) / 2
    assert torch.allclose(learned.log(), f * large.log() + (1 - f) * small.log(), rtol=1e-10)
    (_, sigma_s), (_, sigma_t) = (model.path.coefficients(model.schedule(u)[0]) for u in (s, t))
    assert torch.allclose(large / small, (sigma_t / sigma_s).expand_as(z))
    with pytest.raises(ValueError, match="no output for a learned variance; its own is fixed-small"):
        reverse_step(build(toy, linear(G0, G1)), variance="learned")


# Times and tables ----------------------------------------------------------------------------------------------------


def test_grids_of_times():
    assert time_grid(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert time_grid(4, "quadratic").tolist() == [1.0, 0.5625, 0.25, 0.0625, 0.0]
    assert (time_grid(3, timesteps=11) * 10).tolist() == [10.0, 7.0, 3.0, 0.0]
    levels = time_grid(999, timesteps=1000)
    assert torch.equal(levels, torch.arange(999, -1, -1, dtype=FLOAT) / 999)
    n = time_grid(50, "quadratic", 1000) * 999  # level 0 is met once, not twice
    assert torch.allclose(n, n.round(), rtol=1e-15) and n[[0, -1]].tolist() == [999, 0]
    assert len(n.round().unique()) == len(n) == 50


@pytest.mark.parametrize("method", ["ancestral", "ddim"])
def test_a_table_is_asked_at_its_levels(method):
    """gamma at every evaluation is one of the betas' own; the decoder asks at the lowest."""
    seen, model = [], ddpm(two_pixels())
    own = model.network

    def network(z, gamma, conditioning):
        seen.append((gamma.flatten()[0].item(), z.dtype))
        return own(z, gamma, conditioning)

    model.network = network
    gammas = gammas_of_betas(BETAS)
    sample(model, 3, method=method, steps=19)
    assert [g for g, _ in seen] == pytest.approx([*gammas[::-1]], rel=1e-14)
    assert {dtype for _, dtype in seen} == {torch.float32}
    seen.clear()
    sample(model, 3, method=method, steps=5)
    nearest = [float(abs(gammas - g).min()) for g, _ in seen]
    assert len(seen) == 6 and max(nearest) < 1e-13
    with pytest.raises(ValueError, match="20 noise levels have 19 steps between them, got steps = 20"):
        sample(model, 3, method=method, steps=20)


def test_a_gaussian_decoder_takes_the_level_nearest_to_its_mean():
    """No noise after z_0: x_hat(z_0)/data_scale in one of four bins; and by the flow likewise."""
    toy, last = two_pixels(), {}
    model = ddpm(toy, data_scale=1.0)
    images = sample(model, 60, steps=19, seen=lambda i, z, x_hat: last.update(z=z))
    gamma_0 = tensor(gammas_of_betas(BETAS)[0]).reshape(1, 1, 1, 1)
    expected = ((model.predict(last["z"], gamma_0)[0] + 1) * 2).floor().clamp(0, 3).to(torch.uint8)
    assert torch.equal(images, expected) and len(images.unique()) == 4
    drawn, flow = samplers.sample_ode(model, 20)
    assert torch.equal(drawn, samplers.nearest_levels(model, model.predict(flow.z, gamma_0)[0]))
    with pytest.raises(ValueError, match="a gaussian decoder adds no noise"):
        sample(model, 2, steps=19, categorical=True)


def test_levels_of_data_that_reach_the_ends():
    """DDPM's x of level v is 2 v/(L - 1) - 1: back to v, from anywhere in its bin; beyond the ends, the end's level."""
    model = ddpm(two_pixels())
    v = torch.arange(4).reshape(4, 1, 1, 1).expand(4, 1, 1, 2).to(torch.uint8)
    x = model.reals(v, FLOAT)
    assert torch.allclose(x[:, 0, 0, 0], tensor([-1, -1 / 3, 1 / 3, 1]))
    for shift in (-0.33, 0.0, 0.33, -5.0, 5.0):
        found = samplers.nearest_levels(model, x + shift)
        assert torch.equal(found, v if abs(shift) < 1 else torch.full_like(v, 3 * (shift > 0)))


def test_the_softmax_of_scaled_data():
    """The decoder by levels of x = s encode(v): log-probabilities -(z_0/alpha_0 - s x(v))^2 exp(-gamma_0)/2."""
    toy = two_pixels()
    model = build(toy, linear(-1.0, G1), data_scale=4 / 3)
    z_0, u = random(200, 1, 1, 2), torch.rand(200, 1, 1, 2, generator=torch.Generator().manual_seed(1))
    alpha_0 = math.sqrt(1 / (1 + math.exp(-1.0)))
    values = tensor([-1, -1 / 3, 1 / 3, 1])
    p = torch.softmax(-0.5 * (z_0[..., None] / alpha_0 - values) ** 2 * math.exp(1.0), -1)
    assert torch.equal(samplers.decode(model, z_0), p.argmax(-1).to(torch.uint8))
    assert torch.equal(samplers.decode(model, z_0, uniform=u), (p.cumsum(-1) <= u[..., None]).sum(-1).to(torch.uint8))


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"method": "guess"}, "method must be one of ancestral, ddim, got 'guess'"),
        ({"spacing": "odd"}, "spacing must be one of even, quadratic, got 'odd'"),
        ({"method": "ddim", "eta": 1.5}, r"eta must lie in \[0, 1\], got 1.5"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_impossible_chains_are_refused(fields, part):
    with pytest.raises(ValueError, match=part):
        sample(build(two_pixels(), linear(G0, G1)), 1, **fields)


def test_a_schedule_that_reads_the_image_has_neither_ddim_nor_mixtures():
    toy = two_pixels()
    model = build(toy, linear(G0, G1), parameterization="data", schedule_reads_image=True)
    images = toy.images[:2].reshape(2, 1, 1, 2).to(torch.uint8)
    with pytest.raises(ValueError, match="no DDIM"):
        sample(model, 1, method="ddim")
    with pytest.raises(ValueError, match="no mixture"):
        interpolate(model, images, torch.tensor([0.5]))
    with pytest.raises(ValueError, match="no probability flow"):
        interpolate_latents(model, images, torch.tensor([0.5]))


# Between two images --------------------------------------------------------------------------------------------------


WEIGHTS = tensor([0.0, 0.3, 0.5, 1.0])


def pair():
    """Two images of four levels, one pixel of each end among them."""
    return torch.tensor([[3, 1], [0, 2]], dtype=torch.uint8).reshape(2, 1, 1, 2)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_mixture_of_two_noised_images(path, shared, monkeypatch):
    """z_t = (1 - w) z_t^A + w z_t^B at the last time of the grid below that given, with each image's noise keyed."""
    toy, seen = two_pixels(), []
    model = build(toy, linear(G0, G1), path, data_scale=4 / 3)
    original = samplers.walk
    monkeypatch.setattr(
        samplers,
        "walk",
        lambda step, z, times, draws: seen.append((z, times, draws)) or original(step, z, times, draws),
    )
    images = interpolate(model, pair(), WEIGHTS, time=0.5, steps=11, shared=shared, seed=7)
    z, along, draws = seen[0]
    assert along.tolist() == pytest.approx([5 / 11, 4 / 11, 3 / 11, 2 / 11, 1 / 11, 0])
    assert [d.index for d in draws] == [[0] * 4] * 5  # the same noise on the way down for every weight
    eps = Draws(7, [0, 0 if shared else 1]).normal("eps", (1, 1, 2)).to(FLOAT)
    alpha, sigma = model.path.coefficients(tensor(G0 + 5 / 11 * (G1 - G0)))
    a, b = alpha * tensor([[1, -1 / 3], [-1, 1 / 3]]).reshape(2, 1, 1, 2) + sigma * eps
    w = WEIGHTS.reshape(4, 1, 1, 1)
    assert torch.allclose(z.to(FLOAT), (1 - w) * a + w * b, atol=1e-6)
    assert images.shape == (4, 1, 1, 2) and images.dtype == torch.uint8


def test_from_little_noise_the_ends_are_the_images_themselves():
    model = build(two_pixels(), linear(default_gamma_0(4), G1))
    for chain in ({}, {"method": "ddim"}):
        found = interpolate(model, pair(), WEIGHTS, time=0.03, steps=100, **chain)
        assert torch.equal(found[[0, -1]], pair())


def test_spherical_interpolation():
    """On the circle between two vectors of one norm, at angles in proportion; between parallel ones on the line."""
    a, b = torch.zeros(2, 1, 1, 3, dtype=FLOAT)
    a[..., 0], b[..., 0], b[..., 1] = 2.0, 2 * math.cos(1.2), 2 * math.sin(1.2)
    found = slerp(a, b, WEIGHTS).flatten(1)
    assert torch.allclose(found.norm(dim=1), torch.full((4,), 2.0, dtype=FLOAT))
    assert torch.allclose(torch.atan2(found[:, 1], found[:, 0]), 1.2 * WEIGHTS)
    assert torch.allclose(slerp(a, 3 * a, WEIGHTS).flatten(1)[:, 0], 2 + 4 * WEIGHTS)


@pytest.mark.parametrize("path", PATHS)
def test_the_latents_of_gaussian_data_are_linear(path, monkeypatch):
    """The flow multiplies pixel i by (V_1/V_0)^(1/2) up and divides down: z_0 between is the spherical mixture of the
    scaled images, scaled back. DDIM tends to it."""
    toy = gaussian([0.2, 0.6])
    model = build(toy, polynomial(toy.shape, G0, G1, seed=2), path, "velocity")
    ends = []
    monkeypatch.setattr(samplers, "decode", lambda model, z, c=None: ends.append(z) or z)
    interpolate_latents(model, pair(), WEIGHTS, rtol=1e-8, atol=1e-8, method="dopri5")
    interpolate_latents(model, pair(), WEIGHTS, steps=1000)
    alpha, sigma = model.path.coefficients(model.schedule(tensor([0.0, 1.0]))[0].flatten(1))
    scale = torch.sqrt((alpha[1] ** 2 * toy.variance + sigma[1] ** 2) / (alpha[0] ** 2 * toy.variance + sigma[0] ** 2))
    z_0 = alpha[0] * pixels.encode(pair(), 4, FLOAT).flatten(1)
    expected = slerp(*(scale * z_0)[:, None, None], WEIGHTS).flatten(1) / scale
    assert torch.allclose(ends[0].flatten(1), expected, rtol=1e-5)
    assert torch.allclose(ends[1].flatten(1), expected, atol=5e-3)


@pytest.mark.parametrize("steps", [None, 300])
def test_the_ends_of_a_deterministic_interpolation_are_the_images(steps):
    model = build(two_pixels(), linear(default_gamma_0(4), G1))
    model.train()
    found = interpolate_latents(model, pair(), WEIGHTS, steps=steps)
    assert torch.equal(found[[0, -1]], pair()) and model.training


@pytest.mark.parametrize("way", [interpolate, interpolate_latents])
def test_every_weight_has_the_nearer_image_s_latent(way):
    seen = []

    def network(z, gamma, conditioning):
        seen.append(conditioning)
        return z

    model = build(two_pixels(), linear(G0, G1), latent=KHot(4, 2))
    model.network = network
    c = tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
    way(model, pair(), WEIGHTS, c=c, steps=4)
    assert torch.equal(seen[-1], c[[0, 0, 0, 1]])


def test_impossible_interpolations_are_refused():
    model = build(two_pixels(), linear(G0, G1))
    for way in (interpolate, interpolate_latents):
        with pytest.raises(ValueError, match="between 2 images, got 1"):
            way(model, pair()[:1], WEIGHTS)
        with pytest.raises(ValueError, match="whole numbers"):
            way(model, pair().float(), WEIGHTS)
    with pytest.raises(ValueError, match=r"time must be at least the chain's first, 0.25, got 0.2"):
        interpolate(model, pair(), WEIGHTS, time=0.2, steps=4)


def test_a_mixture_of_independent_noise_has_half_the_variance():
    """Halfway between an image and itself, 1000 pixels' noise: sigma^2/2, and sigma^2 where it is shared."""
    toy = gaussian([1.0] * 1000)
    model = build(toy, linear(G0, G1), "vp")
    twice = torch.full((2, 1, 1, 1000), 2, dtype=torch.uint8)
    for shared, share in ((False, 0.5), (True, 1.0)):
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(samplers, "walk", lambda step, z, times, draws, seen=seen: seen.append(z) or z)
            interpolate(model, twice, tensor([0.5]), time=0.5, steps=2, shared=shared)
        alpha, sigma = model.path.coefficients(tensor((G0 + G1) / 2))
        assert float(((seen[0] - alpha * 0.25) ** 2).mean() / sigma**2) == pytest.approx(share, abs=4.5 * share * 0.045)


def test_the_step_is_the_bound_s():
    """Where x_hat is clipped and the variance is large, the sampler's moments are those that the bound charges for."""
    model = ddpm(two_pixels(), variance="fixed-large", clip=True)
    z, (s, t) = random(40, 1, 1, 2), times(0.5, 0.75)
    gamma_s, gamma_t = model.schedule(s)[0], model.schedule(t)[0]
    for left, right in zip(
        reverse_step(model)(z, s, t), objectives.reverse_moments(model, z, gamma_s, gamma_t), strict=True
    ):
        assert torch.equal(left, right)
