"""DiffusionModel: what reaches the network, the schedule and the encoder."""

import dataclasses
import math
import typing

import pytest
import torch
from torch import nn

from nelbo import networks
from nelbo.compose import build_model, noise_parameters
from nelbo.config import (
    Config,
    DataConfig,
    EncoderConfig,
    LatentConfig,
    NetworkConfig,
    ObjectiveConfig,
    ScheduleConfig,
)
from nelbo.data.loader import AUGMENTATIONS
from nelbo.draws import Draws
from nelbo.errors import UserError
from nelbo.latents import LATENTS, Gaussian, KHot, Label
from nelbo.model import DiffusionModel
from nelbo.networks import CNNEncoder
from nelbo.ode import METHODS
from nelbo.parameterizations import PARAMETERIZATIONS, Noise, Velocity
from nelbo.paths import PATHS, Straight, VariancePreserving
from nelbo.pixels import DEQUANTIZATIONS
from nelbo.schedules import BETAS, INTERIORS
from nelbo.times import TIMES
from nelbo.verbs import evaluate
from toys import FLOAT, linear, polynomial, tensor

SHAPE = (1, 2, 2)


class Recorder:
    """A network that keeps what it was given."""

    def __call__(self, z, gamma, conditioning):
        self.seen = z, gamma, conditioning
        return 2 * z


class Heads(nn.Module):
    """An encoder whose outputs are easy to tell apart."""

    def forward(self, x):
        mean = x.flatten(1).mean(1, keepdim=True)
        return (mean.expand(-1, 3), mean.expand(-1, 3) + 1)


def model(**fields):
    schedule = fields.pop("schedule", linear(-5.0, 5.0))
    return DiffusionModel(Recorder(), schedule, VariancePreserving(), Noise(), SHAPE, 17, **fields)


def test_the_flag_and_the_latent_are_columns():
    """[c, flag]; the flag is 0 unless given; nothing at all without either."""
    z, gamma = torch.randn(2, *SHAPE), torch.zeros(1, 1, 1, 1)
    c, flag = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]), torch.tensor([1.0, 0.0])
    plain = model()
    assert torch.equal(plain(z, gamma), 2 * z) and plain.network.seen[2] is None
    both = model(latent=KHot(3, 2), flag=True)
    both(z, gamma, c, flag)
    assert torch.equal(both.network.seen[2], torch.cat([c, flag[:, None]], 1))
    both(z, gamma, c)
    assert torch.equal(both.network.seen[2], torch.cat([c, torch.zeros(2, 1)], 1))
    blind = model(latent=KHot(3, 2), network_sees_latent=False)
    blind(z, gamma, c)
    assert blind.network.seen[2] is None


def test_the_schedule_may_not_see_the_latent():
    coded = polynomial(SHAPE, -5.0, 5.0, condition=2)
    c = torch.eye(2, dtype=FLOAT)
    t = torch.full((2,), 0.5, dtype=FLOAT)
    seen = model(schedule=coded).curve(c)(t)[0]
    assert not torch.allclose(seen[0], seen[1])
    free = polynomial(SHAPE, -5.0, 5.0)
    alone = model(schedule=free, schedule_sees_latent=False).curve(c)(t)[0]
    assert torch.equal(alone[0], alone[1])


def test_predict_solves_the_output():
    """x_hat, eps_hat of the raw output, on the path and parameterization of the model."""
    straight = DiffusionModel(Recorder(), linear(-5.0, 5.0), Straight(), Velocity(), SHAPE, 17)
    z, gamma = torch.randn(2, *SHAPE), torch.tensor([-3.0, 1.0]).reshape(2, 1, 1, 1)
    x_hat, eps_hat = straight.predict(z, gamma)
    alpha, sigma = straight.path.coefficients(gamma)
    assert torch.allclose(eps_hat - x_hat, 2 * z, atol=1e-5)
    assert torch.allclose(alpha * x_hat + sigma * eps_hat, z, atol=1e-6)


def test_inference():
    """Every head goes to the posterior; a label latent takes the labels; without a latent there is no draw."""
    x, draws = torch.randn(2, *SHAPE), Draws(0, [0, 1])
    gaussian = model(latent=Gaussian(3), encoder=Heads())
    noise = gaussian.latent.noise(draws)
    draw = gaussian.infer(x, noise)
    mean = x.flatten(1).mean(1, keepdim=True)
    variance = torch.nn.functional.softplus(mean + 1)
    assert torch.allclose(draw.c, mean + variance.sqrt() * noise)
    assert model().infer(x, None) is None
    labelled = model(latent=Label(4))
    assert torch.equal(labelled.infer(x, None, torch.tensor([2, 3])).c, torch.eye(4)[2:])
    with pytest.raises(ValueError, match="labels"):
        labelled.infer(x, None)


def test_prior_draws():
    """z_1 has the prior's scale; it belongs to the number of the sample."""
    wide = model(prior_scale=0.5, latent=KHot(3, 2))
    z, c = wide.draw_prior(Draws(0, range(5000)))
    assert z.shape == (5000, *SHAPE) and z.std().item() == pytest.approx(0.5, rel=0.02)
    assert torch.equal(c.sum(1), torch.full((5000,), 2.0))
    other, _ = wide.draw_prior(Draws(0, [7]))
    assert torch.equal(other[0], z[7])
    assert model().draw_prior(Draws(0, [7]))[1] is None


def test_level_gamma():
    line = model(schedule_reads_image=True).level_gamma(tensor([0.0, 0.25, 1.0]))
    assert torch.equal(line.flatten(), tensor([-5.0, -2.5, 5.0])) and line.shape == (3, 1, 1, 1)


def config(schedule="linear", latent="none", **fields):
    return Config(
        schedule=ScheduleConfig(kind=schedule, width=8),
        latent=LatentConfig(kind=latent, size=6, k=2),
        encoder=EncoderConfig(levels=1),
        network=NetworkConfig(channels=8, levels=1, groups=2),
        **fields,
    )


@pytest.mark.parametrize("schedule", ["linear", "monotone", "pixel-monotone", "polynomial", "scalar-polynomial"])
@pytest.mark.parametrize("latent", ["none", "k-hot", "one-hot", "gaussian", "label"])
def test_every_composition_runs(schedule, latent):
    """Any schedule with any latent: gamma has its ends, the bound's gradient reaches every part that is used.

    In float64: the gradient of a monotone network's line is a difference, and can lie below the rounding of float32.
    """
    from nelbo.likelihood import draw_terms
    from nelbo.objectives import elbo

    built = build_model(config(schedule, latent), SHAPE, 17, classes=6)
    assert (built.schedule.gamma_0, built.schedule.gamma_1) == (pytest.approx(-7.876, abs=5e-4), 5.0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    images = torch.randint(17, (3, *SHAPE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    labels, draws, t = torch.tensor([0, 5, 3]), Draws(0, range(3)), torch.tensor([0.2, 0.5, 0.8])
    single = draw_terms(built, images, t, draws, labels=labels).total.detach()
    built.to(FLOAT)
    noise = None if built.latent is None else built.latent.noise(draws).to(FLOAT)
    latent = built.infer(built.reals(images, FLOAT), noise, labels)
    if latent is not None:
        latent = dataclasses.replace(latent, c=latent.c.to(FLOAT))
    eps, eps_0 = (draws.normal(name, SHAPE).to(FLOAT) for name in ("eps", "eps_0"))
    total = elbo(built, images, t=t.to(FLOAT), eps=eps, eps_0=eps_0, latent=latent, dtype=FLOAT).total
    assert torch.allclose(single.to(FLOAT), total, rtol=1e-4)
    total.sum().backward()
    missing = [name for name, p in built.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A normalised network does not feel a constant or a common bias, nor attention a shift of its keys.
    assert [n for n in missing if not n.endswith(("l1.bias", "k.bias"))] == []


def test_details_of_a_composition():
    """Fourier exponents as given, or the last two bits; a CNN encoder; which parameters make the noise."""
    assert build_model(config(), SHAPE, 17).network.trunk.fourier == (math.log2(17) - 2, math.log2(17) - 1)
    assert build_model(config(), SHAPE, 256).network.trunk.fourier == (6.0, 7.0)
    made = dataclasses.replace(
        config("polynomial", "k-hot"),
        encoder=EncoderConfig(kind="cnn"),
        network=NetworkConfig(channels=8, levels=1, groups=2, fourier=(5.0, 6.0)),
    )
    built = build_model(made, SHAPE, 256)
    assert built.network.trunk.fourier == (5.0, 6.0) and isinstance(built.encoder, CNNEncoder)
    names = noise_parameters(built)
    assert names == {n for n, _ in built.named_parameters() if not n.startswith("network.")} and names


def test_weights_come_from_the_seed():
    first, second = (build_model(config("polynomial", "k-hot"), SHAPE, 17) for _ in range(2))
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(("made", "levels", "classes"), [
    (config(), 1, None), (config(), 257, None), (config(latent="label"), 17, None), (config(latent="label"), 17, 10),
    (Config(schedule=ScheduleConfig(gamma_max=-8.0)), 17, None),
])  # fmt: skip
def test_impossible_models_are_refused(made, levels, classes):
    with pytest.raises(UserError):
        build_model(made, SHAPE, levels, classes)


@pytest.mark.parametrize(
    ("owner", "field", "registry"),
    [
        (ScheduleConfig, "kind", INTERIORS),
        (EncoderConfig, "kind", networks.ENCODERS),
        (NetworkConfig, "kind", {**networks.NETWORKS, **networks.TIMESTEP_NETWORKS}),
        (ScheduleConfig, "form", BETAS),
        (ObjectiveConfig, "times", TIMES),
        (Config, "path", PATHS),
        (Config, "parameterization", PARAMETERIZATIONS),
        (DataConfig, "augment", AUGMENTATIONS),
        (evaluate.Evaluate, "solver", METHODS),
        (evaluate.Evaluate, "dequantization", {*DEQUANTIZATIONS, "own"}),
    ],
)
def test_the_choices_of_the_configuration_are_those_of_the_registries(owner, field, registry):
    assert set(typing.get_args(typing.get_type_hints(owner)[field])) == set(registry)


def test_the_choices_of_the_latent_are_those_of_the_registry():
    """Beside the classes: no latent, c = x_0, and the k-hot's two posteriors, one kind with a field."""
    choices = set(typing.get_args(typing.get_type_hints(LatentConfig)["kind"]))
    assert choices == set(LATENTS) - {"k-hot-paper"} | {"none", "image"}
