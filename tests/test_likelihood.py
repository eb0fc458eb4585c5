"""The bound with its error bar: coverage, invariances, the two errors, paired comparison."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from nelbo.compose import build_model
from nelbo.config import Config, EncoderConfig, LatentConfig, NetworkConfig, ScheduleConfig
from nelbo.draws import Draws
from nelbo.evaluation import time_bins
from nelbo.latents import Label, OneHot
from nelbo.likelihood import Estimate, compare, draw_terms, vlb
from nelbo.objectives import elbo
from nelbo.paths import VariancePreserving
from nelbo.pixels import encode
from nelbo.schedules import default_gamma_0
from toys import (
    FLOAT,
    build,
    decoder_mismatch,
    entropy,
    given_code,
    linear,
    polynomial,
    prior_mismatch,
    two_pixels,
)

G0, G1 = default_gamma_0(4), 5.0
BITS = 2 * math.log(2)  # nats per bit/dim of two pixels


def toy_model(schedule=None, **fields):
    """The exact denoiser of the enumerated toy, in the float32 of evaluation."""
    return build(two_pixels(), schedule or linear(G0, G1), parameterization="velocity", **fields).float()


def toy_images(count, seed):
    """Fresh images of the toy."""
    toy = two_pixels()
    chosen = torch.multinomial(toy.log_weights.exp(), count, True, generator=torch.Generator().manual_seed(seed))
    return toy.images[chosen].reshape(count, *toy.shape).to(torch.uint8)


def toy_truth():
    """The expectation of the bound over images and draws, bits/dim, by integration."""
    toy = two_pixels()
    alpha, sigma = (v.item() for v in VariancePreserving().coefficients(torch.tensor(G1, dtype=FLOAT)))
    return (entropy(toy) + prior_mismatch(toy, alpha, sigma) + decoder_mismatch(toy, G0)) / BITS


@pytest.fixture(scope="module")
def evaluations():
    """200 evaluations, each of 60 fresh images and its own seed."""
    model = toy_model()
    return [vlb(model, toy_images(60, 1000 + i), times_per_shift=4, shifts=2, seed=i) for i in range(200)]


def test_the_interval_covers_the_truth(evaluations):
    """The 95 % interval, 1.96 standard errors, holds the truth in 90 to 99 % of 200 evaluations.

    The truth is the expectation over images and draws, both fresh in every evaluation.
    """
    truth = toy_truth()
    covered = sum(abs(r.mean - truth) < 1.96 * r.standard_error for r in evaluations)
    assert 180 <= covered <= 198


def test_the_mean_of_evaluations_is_the_truth(evaluations):
    """Unbiased: the mean of the 200 means lies within four of its own standard errors of the truth."""
    means = np.array([r.mean for r in evaluations])
    assert abs(means.mean() - toy_truth()) < 4 * means.std(ddof=1) / math.sqrt(200)


def test_the_standard_error_contains_the_draws(evaluations):
    """It is the spread of the means over fresh images and draws, to 15 %; adding the draws' would overstate it."""
    spread = np.std([r.mean for r in evaluations], ddof=1)
    reported = math.sqrt(np.mean([r.standard_error**2 for r in evaluations]))
    draws = math.sqrt(np.mean([r.draws_error**2 for r in evaluations]))
    assert reported == pytest.approx(spread, rel=0.15)
    assert draws > 0.5 * reported  # so that a sum would show: sqrt(1 + 0.5^2) = 1.12, sum 1.5
    for r in evaluations[:5]:
        assert r.standard_error == pytest.approx(r.per_image.std(ddof=1) / math.sqrt(60), rel=1e-12)


def test_the_draws_error_is_the_spread_over_seeds():
    """Fixed images, 200 seeds: the spread of the mean is the reported draws' error (root mean square), within 15 %;
    of each image's figure, its reported error, within 20 % on average."""
    model, images = toy_model(), toy_images(20, 0)
    results = [vlb(model, images, times_per_shift=3, shifts=2, seed=i) for i in range(200)]
    spread = np.std([r.mean for r in results], ddof=1)
    assert math.sqrt(np.mean([r.draws_error**2 for r in results])) == pytest.approx(spread, rel=0.15)
    each = np.std([r.per_image for r in results], ddof=1, axis=0)
    reported = np.sqrt(np.mean([r.per_image_error**2 for r in results], axis=0))
    assert np.mean(reported / each) == pytest.approx(1, abs=0.2)


def test_stratified_draws_are_not_independent():
    """Treating the times of a shift as independent would overstate the draws' error, where t matters more than eps."""
    model, images = small(), small_images(20)
    result = vlb(model, images, times_per_shift=16, shifts=8, seed=1)
    diffusion = result.by_time[1].reshape(20, 8 * 16)
    naive = math.sqrt((diffusion.var(1, ddof=1) / (8 * 16)).sum()) / 20
    assert result.draws_error < 0.7 * naive


def small(latent="k-hot", schedule="polynomial", dropout=0.0, flag=False, **latent_fields):
    """A real network, small, with weights that are not those of the start."""
    config = Config(
        schedule=ScheduleConfig(kind=schedule, width=8),
        latent=LatentConfig(kind=latent, size=6, k=2, **latent_fields),
        encoder=EncoderConfig(levels=1),
        network=NetworkConfig(channels=8, levels=1, groups=2, dropout=dropout, flag=flag),
    )
    model = build_model(config, (1, 4, 4), 17, classes=6)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return model


def small_images(count=5):
    return torch.randint(17, (count, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("steps", [0, 10])
def test_the_batch_size_does_not_matter(steps):
    """1e-6 bits/dim with the default batch, 1, and one that splits the draws of an image.

    Per image float32 itself is no finer: this untrained network costs 10 bits/dim, so 1e-6 of the figure is asked for.
    """
    model, images = small(), small_images()
    keywords = {"times_per_shift": 3, "shifts": 2, "steps": steps, "seed": 4}
    whole = vlb(model, images, **keywords)
    for batch in (1, 7):
        other = vlb(model, images, batch=batch, **keywords)
        assert np.allclose(other.per_image, whole.per_image, rtol=1e-6, atol=0)
        assert other.mean == pytest.approx(whole.mean, abs=1e-6)
        assert other.standard_error == pytest.approx(whole.standard_error, abs=1e-6)


def test_the_order_of_the_images_does_not_matter():
    """Nor their company: an image is its index."""
    model, images = small(), small_images()
    whole = vlb(model, images, times_per_shift=2, seed=4)
    order = np.array([3, 0, 4, 1, 2])
    other = vlb(model, images[order], index=order, times_per_shift=2, seed=4)
    assert np.allclose(other.per_image, whole.per_image[order], rtol=1e-6, atol=0)
    assert np.array_equal(other.index, order)
    alone = vlb(model, images[3:4], index=np.array([3]), times_per_shift=2, seed=4)
    assert alone.per_image[0] == pytest.approx(whole.per_image[3], rel=1e-6)
    # Without its index an image gets other draws, and another seed gives others too.
    assert abs(vlb(model, images[3:4], times_per_shift=2, seed=4).per_image[0] - whole.per_image[3]) > 1e-4
    assert np.abs(vlb(model, images, times_per_shift=2, seed=5).per_image - whole.per_image).min() > 1e-4


def test_the_figures_by_hand():
    """Means over times, then shifts; both errors; terms; and the times, one draw at a time."""
    model, images, n, times, shifts = small(), small_images(3), 3, 4, 3
    result = vlb(model, images, times_per_shift=times, shifts=shifts, seed=9)
    totals = np.empty((n, shifts, times))
    grid = np.empty((n, shifts, times))
    reconstruction = np.empty((n, shifts, times))
    model.eval()
    for i in range(n):
        for r in range(shifts):
            u = Draws(9, [i], r).uniform("time").item()
            for j in range(times):
                t = torch.tensor([(u + j / times) % 1.0])
                with torch.no_grad():
                    terms = draw_terms(model, images[i : i + 1], t, Draws(9, [i], r * times + j))
                totals[i, r, j], grid[i, r, j] = terms.total.item(), t.item()
                reconstruction[i, r, j] = terms.reconstruction.item()
    bits = 16 * math.log(2)
    per_shift = totals.mean(2) / bits
    assert np.allclose(result.per_image, per_shift.mean(1), atol=1e-6)
    assert np.allclose(result.per_image_error, per_shift.std(1, ddof=1) / math.sqrt(shifts), atol=1e-6)
    assert result.mean == pytest.approx(per_shift.mean(), abs=1e-6)
    assert result.standard_error == pytest.approx(per_shift.mean(1).std(ddof=1) / math.sqrt(n), abs=1e-6)
    assert result.draws_error == pytest.approx(math.sqrt((per_shift.var(1, ddof=1) / shifts).sum()) / n, abs=1e-6)
    assert result.terms["reconstruction"].mean == pytest.approx(reconstruction.mean() / bits, abs=1e-6)
    assert set(result.terms) == {"prior", "reconstruction", "diffusion", "latent"}
    assert sum(v.mean for v in result.terms.values()) == pytest.approx(result.mean, abs=1e-9)
    assert np.allclose(result.by_time[0].reshape(n, shifts, times), grid, atol=1e-6)
    # The times of a shift lie on a grid of 1/4, each image and shift with its own offset.
    offsets = np.mod(result.by_time[0].reshape(n * shifts, times) * times, 1.0)
    assert np.allclose(offsets, offsets[:, :1], atol=1e-5)
    assert len(np.unique(offsets[:, 0].round(5))) == n * shifts


def test_a_single_shift_has_no_draws_error():
    result = vlb(toy_model(), toy_images(4, 0), times_per_shift=2, shifts=1)
    assert math.isnan(result.draws_error) and np.isnan(result.per_image_error).all()
    assert result.standard_error > 0
    lonely = vlb(toy_model(), toy_images(1, 0), times_per_shift=2)
    assert math.isnan(lonely.standard_error) and lonely.draws_error > 0


def test_finite_t_is_above_continuous_time():
    """The same images: T = 4 costs more than T = 32, which costs more than continuous time, paired."""
    model, images = toy_model(), toy_images(300, 0)
    results = {steps: vlb(model, images, times_per_shift=32, shifts=1, steps=steps) for steps in (0, 4, 32)}
    for more, less in ((4, 32), (32, 0)):
        difference = compare(results[more], results[less])
        assert difference.mean > 5 * difference.standard_error


PROBABILITY = torch.linspace(0.05, 0.6, 16, dtype=FLOAT)[torch.randperm(16, generator=torch.Generator().manual_seed(2))]


class Table(nn.Module):
    """log q(c|x) of a two-valued c, by the image."""

    def forward(self, x):
        index = ((x.flatten(1) + 1) * 2 - 0.5).round().long()
        p = PROBABILITY[index[:, 0] * 4 + index[:, 1]].to(x)
        return (torch.stack([1 - p, p], 1).log(),)


def test_each_random_number_goes_where_it_belongs():
    """``draw_terms`` is ``elbo`` of c drawn from the encoder's q(c|x) and of the streams eps, eps_0 and latent.

    The expectation of exactly these terms over q(c|x) is in test_objectives.py, by enumeration.
    """
    toy = two_pixels()
    inside, _ = given_code(toy, PROBABILITY)
    schedule = polynomial(toy.shape, G0, G1, seed=6, condition=2)
    model = build(inside, schedule, parameterization="velocity", latent=OneHot(2), encoder=Table()).float()
    images, draws = toy_images(400, 5), Draws(1, range(400), 7)
    t = draws.uniform("time")
    x = encode(images, 4)
    drawn = model.latent.posterior(Table()(x), draws.gumbel("latent", (2,)))
    share = PROBABILITY[(images.flatten(1).long() * torch.tensor([4, 1])).sum(1)].mean().item()
    assert drawn.c[:, 1].mean().item() == pytest.approx(share, abs=4 * 0.5 / 20)
    with torch.no_grad():
        found = draw_terms(model, images, t, draws)
        expected = elbo(
            model, images, t=t, eps=draws.normal("eps", toy.shape), eps_0=draws.normal("eps_0", toy.shape), latent=drawn
        )
    for name in ("prior", "reconstruction", "diffusion", "latent", "valid_latent"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert (drawn.kl - drawn.kl.mean()).abs().max().item() > 0.1


def test_options_reach_the_objective():
    """``step`` (the one-hot's temperature), ``flag``, ``steps`` and ``variance`` of ``draw_terms``: value and gradient
    are those of ``elbo`` given them, and each makes a difference."""
    model, images, draws = small("one-hot", "monotone", flag=True), small_images(3), Draws(0, range(3))
    t, x, flag = draws.uniform("time"), encode(small_images(3), 17), torch.tensor([1.0, 0.0, 1.0])
    noise = {name: draws.normal(name, (1, 4, 4)) for name in ("eps", "eps_0")}

    def gradient(terms):
        parameters = [*model.schedule.interior.parameters(), *model.encoder.parameters()]
        grads = torch.autograd.grad(terms.total.sum(), parameters, allow_unused=True)
        return torch.cat([terms.total.detach(), *[g.flatten() for g in grads if g is not None]])

    model.eval()
    found = {"none": gradient(draw_terms(model, images, t, draws))}
    for name, options in {
        "step": {"step": 60_000}, "flag": {"flag": flag}, "steps": {"steps": 7}, "variance": {"variance": True}
    }.items():  # fmt: skip
        found[name] = gradient(draw_terms(model, images, t, draws, **options))
        latent = model.infer(x, model.latent.noise(draws), None, options.pop("step", 0))
        assert torch.equal(found[name], gradient(elbo(model, images, t=t, latent=latent, **noise, **options)))
        assert not torch.allclose(found[name], found["none"], rtol=1e-3)


def test_the_papers_k_hot_has_two_figures():
    """value charges log C(n, k), as_published the categorical KL; the terms show both."""
    model, images = small(posterior="paper"), small_images()
    result = vlb(model, images, times_per_shift=2)
    valid = math.log(15) / (16 * math.log(2))
    assert result.terms["valid_latent"].mean == pytest.approx(valid, rel=1e-6)
    charged = result.terms["latent"].mean
    assert 0 < charged < valid
    assert result.as_published is not None
    others = sum(result.terms[name].mean for name in ("prior", "reconstruction", "diffusion"))
    assert result.mean == pytest.approx(others + valid, rel=1e-6)
    assert result.as_published.mean == pytest.approx(others + charged, rel=1e-6)
    assert vlb(small(), images, times_per_shift=2).as_published is None


def test_labels_are_paid_for():
    """A label latent: the labels belong to the images whatever the batch; log(classes) is charged."""
    model, images = small("label"), small_images()
    labels = np.array([0, 5, 2, 3, 1])
    result = vlb(model, images, labels=labels, times_per_shift=2)
    assert isinstance(model.latent, Label)
    assert result.terms["latent"].mean == pytest.approx(math.log(6) / (16 * math.log(2)), rel=1e-6)
    order = np.array([4, 2, 0, 1, 3])
    other = vlb(model, images[order], index=order, labels=labels[order], times_per_shift=2, batch=3)
    assert np.allclose(other.per_image, result.per_image[order], rtol=1e-6, atol=0)
    assert np.abs(vlb(model, images, labels=labels[order], times_per_shift=2).per_image - result.per_image).max() > 1e-4


def test_evaluation_leaves_the_model_as_it_was():
    """Dropout is off inside and the mode restored; progress ends at all images and the final figure."""
    model, images, seen = small(dropout=0.5), small_images(), []
    without = vlb(small(), images, times_per_shift=2, batch=3)
    model.train()
    result = vlb(model, images, times_per_shift=2, batch=3, progress=lambda done, bits: seen.append((done, bits)))
    assert model.training and np.array_equal(result.per_image, without.per_image)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == 5 and seen[-1][1] == pytest.approx(result.mean, abs=1e-6)


def test_comparison_is_paired():
    """The mean and error of per-image differences; much sharper than the two errors together on the same draws."""
    images = toy_images(200, 3)
    exact = vlb(toy_model(), images, times_per_shift=4)
    worse = vlb(toy_model(wrong={"distort": lambda e, z, g: 0.95 * e}), images, times_per_shift=4)
    difference = compare(worse, exact)
    apart = worse.per_image - exact.per_image
    assert difference == Estimate(pytest.approx(apart.mean()), pytest.approx(apart.std(ddof=1) / math.sqrt(200)))
    assert difference.mean == pytest.approx(worse.mean - exact.mean, abs=1e-12)
    assert difference.standard_error < 0.3 * math.hypot(worse.standard_error, exact.standard_error)
    assert difference.mean > 3 * difference.standard_error
    with pytest.raises(ValueError, match="same images"):
        compare(worse, dataclasses.replace(exact, index=exact.index[::-1]))


def test_arrays_are_images_too():
    images = toy_images(3, 0)
    assert vlb(toy_model(), images.numpy(), times_per_shift=2).mean == vlb(toy_model(), images, times_per_shift=2).mean


@pytest.mark.parametrize(("images", "fields"), [
    (torch.zeros(2, 1, 2, 1, dtype=torch.uint8), {}), (torch.zeros(0, 1, 1, 2, dtype=torch.uint8), {}),
    (torch.zeros(1, 2, dtype=torch.uint8), {}), (torch.zeros(1, 1, 1, 2, dtype=torch.uint8), {"times_per_shift": 0}),
    (torch.zeros(1, 1, 1, 2, dtype=torch.uint8), {"shifts": 0}),
])  # fmt: skip
def test_impossible_evaluations_are_refused(images, fields):
    with pytest.raises(ValueError, match="must be"):
        vlb(toy_model(), images, **fields)


def test_an_estimate_reads_well():
    assert str(Estimate(2.51234, 0.00321)) == "2.5123 ± 0.0032"


def test_bands_of_the_loss_by_time_are_over_images_not_draws():
    """Two draws of an image in one bin are one figure: by hand, and blind to how often a draw is repeated."""
    result = vlb(toy_model(), toy_images(3, 0), times_per_shift=2, shifts=1)
    t = np.array([[0.1, 0.2], [0.1, 0.7], [0.2, 0.3]])
    values = np.array([[1.0, 3.0], [5.0, 8.0], [2.0, 2.0]])
    for repeats in (1, 4):
        drawn = dataclasses.replace(result, by_time=(t.repeat(repeats, 1).ravel(), values.repeat(repeats, 1).ravel()))
        bins = time_bins(drawn, 2)
        assert bins["t"] == [0.25]  # one image alone, as after 0.5, leaves no error
        assert bins["mean"] == pytest.approx([(2 + 5 + 2) / 3])
        assert bins["standard_error"] == pytest.approx([1.0])  # std(2, 5, 2) = sqrt 3, over sqrt 3 images
