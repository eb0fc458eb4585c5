"""Samplers: the law of the samples against closed forms, keyed randomness, flat schedules, decoding, the flow."""

import itertools

import numpy as np
import pytest
import torch

from nelbo import objectives, pixels
from nelbo.compose import build_model
from nelbo.config import Config, EncoderConfig, LatentConfig, NetworkConfig, ScheduleConfig
from nelbo.draws import Draws
from nelbo.latents import KHot
from nelbo.parameterizations import PARAMETERIZATIONS
from nelbo.paths import PATHS
from nelbo.samplers import decode_noise, encode_images, reverse_step, sample, sample_ode, time_grid, walk
from nelbo.schedules import Polynomial, Schedule, default_gamma_0
from toys import FLOAT, build, gaussian, linear, mixture, polynomial, tensor, two_pixels

DEVIATIONS = [0.2, 0.7, 1.6]
G0, G1 = -9.0, 5.0
TOY_G0 = default_gamma_0(4)


class Impulse:
    """The noise of a step that is 1 in one row and 0 in the others (in no row for None)."""

    def __init__(self, row, rows):
        self.values = torch.zeros(rows, 1, 1, 1, dtype=FLOAT)
        if row is not None:
            self.values[row] = 1.0

    def normal(self, stream, shape):
        assert stream == "step"
        return self.values.expand(-1, *shape)


def variance_of_samples(model, steps, scale):
    """The sampler is linear here: its responses to z_1 and to each step's noise give the variance, (D,)."""
    rows = steps + 1
    z_1 = torch.zeros(rows, *model.shape, dtype=FLOAT)
    z_1[0] = scale
    with torch.no_grad():
        z_0 = walk(reverse_step(model), z_1, time_grid(steps), [Impulse(i + 1, rows) for i in range(steps)])
    return (z_0**2).sum(0).flatten()


def expected_variance(toy, model, steps, variance):
    """The same by the recursion of variances from that of z_1, by q(z_s|z_t) with the exact E[eps|z] = sigma z/V; and
    the true variance of z_0."""
    with torch.no_grad():
        gamma = model.schedule(torch.linspace(1, 0, steps + 1, dtype=FLOAT))[0].expand(-1, *toy.shape).flatten(1)
    alpha, sigma = model.path.coefficients(gamma)
    marginal = alpha**2 * toy.variance + sigma**2
    for i in range(steps):
        k = 1 - torch.exp(gamma[i + 1] - gamma[i])
        gain = alpha[i + 1] / alpha[i] * (1 - k * sigma[i] ** 2 / marginal[i])
        variance = gain**2 * variance + k * sigma[i + 1] ** 2
    return variance, marginal[-1]


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["linear", "polynomial"])
def test_variance_of_samples_of_gaussian_data(kind, path, parameterization):
    """Exact denoiser: the variance of z_0 is the recursion's at any T, tending to alpha_0^2 s^2 + sigma_0^2 as 1/T."""
    toy = gaussian(DEVIATIONS)
    schedule = linear(G0, G1) if kind == "linear" else polynomial(toy.shape, G0, G1, seed=2)
    model = build(toy, schedule, path, parameterization)
    alpha_1, sigma_1 = model.path.coefficients(tensor(G1))
    start = alpha_1**2 * toy.variance + sigma_1**2  # that of the true z_1, not of the prior
    apart = {}
    for steps in (1, 10, 250, 500):
        found = variance_of_samples(model, steps, start.sqrt())
        expected, limit = expected_variance(toy, model, steps, start)
        assert torch.allclose(found, expected, rtol=1e-9)
        apart[steps] = (found - limit).abs() / limit
    assert apart[500].max().item() < 0.1 < apart[1].max().item()
    ratio = apart[250] / apart[500]
    assert torch.allclose(ratio, torch.full_like(ratio, 2), rtol=0.1)


@pytest.mark.parametrize("path", PATHS)
def test_moments_of_drawn_samples(path):
    """4 000 samples with keyed noise, T = 12: means and covariances within 4.5 standard errors of the exact ones."""
    toy, count, steps = gaussian(DEVIATIONS), 4000, 12
    model = build(toy, polynomial(toy.shape, G0, G1, seed=2), path, "velocity", prior_scale=0.95)
    start = Draws(3, range(count))
    z_1, _ = model.draw_prior(start)
    with torch.no_grad():
        noise = [Draws(3, range(count), i) for i in range(steps)]
        z_0 = walk(reverse_step(model), z_1.to(FLOAT), time_grid(steps), noise)
    z_0 = z_0.flatten(1)
    variance, _ = expected_variance(toy, model, steps, torch.full((3,), 0.95**2, dtype=FLOAT))
    assert bool((z_0.mean(0).abs() < 4.5 * (variance / count).sqrt()).all())
    covariance = z_0.T @ z_0 / count
    error = torch.sqrt((torch.outer(variance, variance) + torch.diag(variance**2)) / count)
    assert bool(((covariance - torch.diag(variance)).abs() < 4.5 * error).all())


def toy_model(**fields):
    schedule = fields.pop("schedule", linear(TOY_G0, G1))
    return build(two_pixels(), schedule, parameterization="velocity", **fields).float()


def test_samples_of_the_enumerated_toy():
    """3 000 images, T = 64, exact denoiser: shares of the 16 images within 0.05 in total variation of the pmf, of which
    sampling alone makes about 0.025; the uniform distribution is 0.33 away."""
    images = sample(toy_model(), 3000, steps=64)
    assert images.dtype == torch.uint8 and images.shape == (3000, 1, 1, 2)
    share = torch.bincount(images.flatten(1).long() @ torch.tensor([4, 1]), minlength=16) / 3000
    pmf = two_pixels().log_weights.exp()
    apart = ((share - pmf).abs().sum() / 2).item()
    assert apart < 0.05


def test_sample_k_does_not_depend_on_the_others():
    model = toy_model()
    many = sample(model, 7, steps=20, seed=5)
    assert torch.equal(sample(model, 3, steps=20, seed=5), many[:3])
    assert torch.equal(sample(model, 2, steps=20, seed=5, first=4), many[4:6])
    assert len({tuple(image.flatten().tolist()) for image in sample(model, 40, steps=20, seed=5)}) > 5
    assert not torch.equal(sample(model, 40, steps=20, seed=6), sample(model, 40, steps=20, seed=5))


def flat_schedule(shape):
    """f' = (t - 1/2)^2 up to a factor: flat in the middle, where float32 cannot tell neighbouring times apart."""
    interior = Polynomial(shape)
    with torch.no_grad():
        interior.b.fill_(-2.0)
        interior.d.fill_(np.log(np.expm1(1 - 1e-3)))
    return Schedule(interior, TOY_G0, G1)


def test_a_flat_stretch_of_the_schedule_makes_no_nan():
    """Rounding makes gamma climb backwards there for some steps of T = 1000: -expm1 < 0, and its root would be NaN."""
    schedule = flat_schedule((1, 1, 2))
    with torch.no_grad():
        gamma = schedule(torch.arange(1001) / 1000)[0]
        assert float((-torch.expm1(gamma[:-1] - gamma[1:])).min()) < 0
    assert float((gamma[505] - gamma[495]).abs().max()) < 1e-4
    model = toy_model(schedule=schedule)
    step, z = reverse_step(model), torch.ones(1, 1, 1, 2)
    with torch.no_grad():
        for i in range(400, 600):
            for value in step(z, torch.tensor([i / 1000]), torch.tensor([(i + 1) / 1000])):
                assert bool(torch.isfinite(value).all())
    finite = []
    sample(model, 4, steps=1000, seen=lambda i, z, x_hat: finite.append(bool(torch.isfinite(z).all())))
    assert len(finite) == 1000 and all(finite)


def test_reverse_step_is_the_path_s():
    """mean and deviation of q(z_s|z_t, x_hat); clipping keeps x_hat within [-1, 1] and makes eps_hat agree with it."""
    toy = two_pixels()
    wrong = {"distort": lambda e, z, g: 0.3 * e}
    for path in PATHS:
        model = build(toy, polynomial(toy.shape, TOY_G0, G1, seed=1), path, "velocity", wrong=wrong)
        z = torch.randn(30, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=FLOAT)
        s, t = torch.full((30,), 0.5, dtype=FLOAT), torch.full((30,), 0.6, dtype=FLOAT)
        with torch.no_grad():
            gamma_s, gamma_t = model.schedule(s)[0], model.schedule(t)[0]
            x, eps = model.predict(z, gamma_t)
            assert bool((x.abs() > 1).any())
            mean, std, x_hat = reverse_step(model)(z, s, t)
            expected = model.path.reverse(z, eps, gamma_s, gamma_t)
            assert torch.equal(mean, expected[0]) and torch.equal(std, expected[1]) and torch.equal(x_hat, x)
            mean, _, x_hat = reverse_step(model, clip=True)(z, s, t)
            assert torch.equal(x_hat, x.clamp(-1, 1))
            alpha, sigma = model.path.coefficients(gamma_t)
            expected, _ = model.path.reverse(z, (z - alpha * x_hat) / sigma, gamma_s, gamma_t)
            assert torch.allclose(mean, expected, rtol=1e-12)


def test_the_grid_of_times():
    """Steps go from (t, s) = (1, (T-1)/T) to (1/T, 0), one after the other."""
    seen = []

    def step(z, s, t):
        seen.append((t[0].item(), s[0].item()))
        return z + 1, torch.zeros_like(z), z

    z_0 = walk(step, torch.zeros(2, 1, 1, 1, dtype=FLOAT), time_grid(4), [Impulse(None, 2)] * 4)
    assert seen == [(1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)]
    assert torch.equal(z_0, torch.full_like(z_0, 4.0))


def test_decoding():
    """By default the most probable level, on request a draw of p(v|z_0) by the sample's own uniform number."""
    model, last = toy_model(), {}

    def keep(i, z, x_hat):
        last["z"] = z

    nearest = sample(model, 200, steps=10, seed=1, seen=keep)
    gamma = torch.full((1, 1, 1, 1), TOY_G0)
    alpha = torch.sigmoid(-gamma).sqrt()
    assert torch.equal(nearest, pixels.decode(last["z"], alpha, gamma, 4))
    drawn = sample(model, 200, steps=10, seed=1, categorical=True)
    uniform = Draws(1, range(200)).uniform("decode", (1, 1, 2))
    assert torch.equal(drawn, pixels.decode(last["z"], alpha, gamma, 4, uniform))
    # Neighbouring levels are 6 deviations apart: the two differ for the few z_0 halfway.
    assert (drawn == nearest).float().mean().item() > 0.95


def test_a_schedule_that_reads_the_image():
    """Each step is that of the bound, and gamma_0 is that of the final image."""
    toy = two_pixels()
    torch.manual_seed(0)
    model = build(
        toy, Schedule(Polynomial(toy.shape, 2, width=8), TOY_G0, G1), parameterization="data", schedule_reads_image=True
    ).float()
    z, s, t = torch.randn(5, 1, 1, 2), torch.full((5,), 0.4), torch.full((5,), 0.5)
    with torch.no_grad():
        found, expected = reverse_step(model)(z, s, t), objectives.image_schedule_step(model, z, s, t)
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)
    images = sample(model, 50, steps=20)
    assert int(images.max()) <= 3 and len(images.unique()) == 4


def test_a_latent_is_drawn_from_its_prior():
    """The c of ``draw_prior`` conditions network and schedule through all steps."""
    seen = []

    def network(z, gamma, conditioning):
        seen.append(conditioning)
        return z

    model = toy_model(latent=KHot(4, 2))
    model.network = network
    sample(model, 6, steps=3, seed=2)
    expected = KHot(4, 2).prior(Draws(2, range(6)))
    assert len(seen) == 3 and all(torch.equal(c, expected) for c in seen)


def test_training_mode_is_restored():
    model = toy_model()
    model.train()
    sample(model, 1, steps=1)
    assert model.training


@pytest.mark.parametrize(("count", "steps"), [(0, 1), (1, 0)])
def test_impossible_samples_are_refused(count, steps):
    with pytest.raises(ValueError, match="at least 1"):
        sample(toy_model(), count, steps=steps)


# By the probability flow ---------------------------------------------------------------------------------------------


def network_model():
    """A small network with weights that are not those of the start, per-pixel curves given a k-hot code, in float64.

    Without Fourier features, whose short waves make a flow through random weights chaotic.
    """
    config = Config(
        schedule=ScheduleConfig(kind="polynomial", width=8),
        latent=LatentConfig(kind="k-hot", size=6, k=2),
        encoder=EncoderConfig(levels=1),
        network=NetworkConfig(channels=8, levels=1, groups=2, dropout=0.0, fourier=()),
    )
    torch.manual_seed(0)
    model = build_model(config, (1, 4, 4), 17).to(FLOAT)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=random, dtype=FLOAT))
    return model.eval()


def round_trip(model, images, c, tolerance):
    """How far encoding and decoding takes z_0 from where it was, at most; and whether it is in the right bins."""
    there = encode_images(model, images, c, rtol=tolerance, atol=tolerance)
    back = decode_noise(model, there.z, c, rtol=tolerance, atol=tolerance)
    assert there.solution.success and back.solution.success and there.divergence is None
    with torch.no_grad():
        gamma_0, _ = model.curve(c)(torch.zeros(len(images), dtype=FLOAT))
    alpha_0, _ = model.path.coefficients(gamma_0)
    z_0 = alpha_0 * pixels.encode(images, model.levels, FLOAT)
    assert (there.z - z_0).abs().max().item() > 0.1
    right = torch.equal(pixels.decode(back.z, alpha_0, gamma_0, model.levels), images)
    return (back.z - z_0).abs().max().item(), right


@pytest.mark.parametrize("which", ["network", "toy"])
def test_encoding_and_decoding_come_back(which):
    """A random network and an exact denoiser: the error of the round trip falls with the tolerance, ten times at least
    for a hundred times, to less than 1e-3, and every pixel is its own again."""
    if which == "network":
        model, c = network_model(), KHot(6, 2).prior(Draws(0, range(3))).to(FLOAT)
        images = torch.randint(17, (3, 1, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        tolerances = (1e-2, 1e-4)
    else:
        toy = two_pixels()
        model, c = build(toy, polynomial(toy.shape, TOY_G0, G1, seed=1), "straight", "velocity"), None
        images = toy.images.reshape(16, 1, 1, 2).to(torch.uint8)
        tolerances = (1e-3, 1e-5, 1e-7)
    found = [round_trip(model, images, c, tolerance) for tolerance in tolerances]
    errors = [error for error, _ in found]
    assert all(less < more / 10 for more, less in itertools.pairwise(errors)) and errors[-1] < 1e-3
    assert found[-1][1]


@pytest.mark.parametrize("path", PATHS)
def test_encoded_gaussian_data_are_normal_numbers(path):
    """4 000 images of Gaussian data in 256 levels, exact denoiser: z_1 = z_0 sqrt(V_1/V_0), whose means, variances and
    correlation are those of N(0, V_1 I) within 4.5 standard errors; on VP V_1 is 1 to 0.7 %."""
    toy, count = gaussian([0.2, 0.3]), 4000
    toy.levels = 256
    model = build(toy, polynomial(toy.shape, -13.3, G1, seed=2), path, "velocity")
    x = toy.variance.sqrt() * torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=FLOAT)
    images = ((x.clamp(-0.999, 0.999) + 1) * 128).floor().to(torch.uint8).reshape(count, 1, 1, 2)
    z = encode_images(model, images, rtol=1e-6, atol=1e-6).z.flatten(1)
    with torch.no_grad():
        alpha, sigma = model.path.coefficients(model.schedule(tensor([0.0, 1.0]))[0].flatten(1))
    start, end = alpha**2 * toy.variance + sigma**2
    z_0 = alpha[0] * pixels.encode(images, 256, FLOAT).flatten(1)
    assert torch.allclose(z, z_0 * (end / start).sqrt(), rtol=1e-3, atol=1e-3)
    if path == "vp":
        assert bool(((end - 1).abs() < 0.007).all())
    z = z / end.sqrt()
    assert z.mean(0).abs().max().item() < 4.5 / count**0.5
    assert (z.var(0) - 1).abs().max().item() < 4.5 * (2 / count) ** 0.5
    assert abs((z[:, 0] * z[:, 1]).mean().item()) < 4.5 / count**0.5


@pytest.mark.parametrize("path", PATHS)
def test_ode_samples_of_gaussian_data(path):
    """z_0 = z_1 sqrt(V_0/V_1) of the keyed z_1, sample by sample; moments of 4 000 within 4.5 standard errors."""
    toy, count = gaussian(DEVIATIONS), 4000
    toy.levels = 256
    model = build(toy, polynomial(toy.shape, -13.3, G1, seed=2), path, "noise", prior_scale=0.95)
    _, found = sample_ode(model, count, seed=4, rtol=1e-5, atol=1e-5, method="dopri5")
    with torch.no_grad():
        alpha, sigma = model.path.coefficients(model.schedule(tensor([0.0, 1.0]))[0].flatten(1))
    start, end = alpha**2 * toy.variance + sigma**2
    z_1 = 0.95 * Draws(4, range(count)).normal("prior", toy.shape).to(FLOAT).flatten(1)
    z_0 = found.z.flatten(1)
    assert torch.allclose(z_0, z_1 * (start / end).sqrt(), rtol=1e-3, atol=1e-3)
    variance = 0.95**2 * start / end
    assert bool((z_0.mean(0).abs() < 4.5 * (variance / count).sqrt()).all())
    assert bool(((z_0**2).mean(0) / variance - 1).abs().max() < 4.5 * (2 / count) ** 0.5)


def test_ode_samples_of_a_mixture():
    """4 000 of them from gamma_1 = 12: means and covariances of z_0 within 4.5 standard errors of the mixture's, and
    the share of each component within 4.5 of its weight."""
    toy, count = mixture(), 4000
    model = build(toy, polynomial(toy.shape, -13.3, 12.0, seed=2), "vp", "velocity")
    z = sample_ode(model, count, seed=5)[1].z.flatten(1).to(FLOAT)
    weights = toy.log_weights.exp()
    mean = weights @ toy.means
    apart = toy.means - mean
    covariance = (weights[:, None] * apart).T @ apart + torch.diag(toy.variance)
    assert bool(((z.mean(0) - mean).abs() < 4.5 * (covariance.diagonal() / count).sqrt()).all())
    products = torch.einsum("bi,bj->bij", z - mean, z - mean)
    assert bool(((products.mean(0) - covariance).abs() < 4.5 * products.std(0) / count**0.5).all())
    nearest = ((z[:, None] - toy.means) ** 2).sum(2).argmin(1)  # they hardly overlap
    share = torch.bincount(nearest, minlength=3) / count
    assert bool(((share - weights).abs() < 4.5 * (weights * (1 - weights) / count).sqrt() + 0.005).all())


def test_ode_samples_of_the_enumerated_toy():
    """3 000 images: within 0.05 in total variation of the pmf, as by ancestral sampling."""
    images, found = sample_ode(toy_model(), 3000)
    assert images.dtype == torch.uint8 and images.shape == (3000, 1, 1, 2) and found.solution.success
    share = torch.bincount(images.flatten(1).long() @ torch.tensor([4, 1]), minlength=16) / 3000
    pmf = two_pixels().log_weights.exp()
    assert ((share - pmf).abs().sum() / 2).item() < 0.05
    gamma = torch.full((1, 1, 1, 1), TOY_G0)
    alpha = torch.sigmoid(-gamma).sqrt()
    assert torch.equal(images, pixels.decode(found.z, alpha, gamma, 4))


def test_ode_sample_k_does_not_depend_on_the_others():
    """Nor does what it costs; ``first`` names the first; the mode is restored; a decoder's draw is keyed too."""
    model = toy_model()
    model.train()
    many, record = sample_ode(model, 7, seed=5)
    for images, end, part in (
        (*sample_ode(model, 3, seed=5), slice(0, 3)), (*sample_ode(model, 2, seed=5, first=4), slice(4, 6))
    ):  # fmt: skip
        assert torch.equal(images, many[part]) and torch.allclose(end.z, record.z[part], atol=1e-6)
        assert torch.equal(end.solution.evaluations, record.solution.evaluations[part])
    assert model.training and not torch.equal(sample_ode(model, 7, seed=6)[0], many)
    drawn, _ = sample_ode(model, 7, seed=5, categorical=True)
    uniform, gamma = Draws(5, range(7)).uniform("decode", (1, 1, 2)), torch.full((1, 1, 1, 1), TOY_G0)
    assert torch.equal(drawn, pixels.decode(record.z, torch.sigmoid(-gamma).sqrt(), gamma, 4, uniform))
    with pytest.raises(ValueError, match="at least 1"):
        sample_ode(model, 0)


def test_ode_samples_take_their_latent_from_the_prior():
    """The c of ``draw_prior``, in the network for as long as a sample is at work."""
    seen = []

    def network(z, gamma, conditioning):
        seen.append(conditioning)
        return z

    model = toy_model(latent=KHot(4, 2))
    model.network = network
    sample_ode(model, 6, seed=2)
    assert torch.equal(seen[0], KHot(4, 2).prior(Draws(2, range(6)))) and len(seen) > 6


def test_images_to_be_encoded_must_be_whole_numbers():
    with pytest.raises(ValueError, match="whole numbers"):
        encode_images(toy_model(), torch.zeros(1, 1, 1, 2))
