"""The configuration of a run: frozen dataclasses whose attribute docstrings are the help of ``nelbo train``.

A run is a composition of the parts named here; ``nelbo.presets`` returns whole configurations and flags override
single fields. This module imports no torch, so that help and ``--dry-run`` answer at once.
"""

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from nelbo.errors import UserError

__all__ = [
    "Config",
    "DataConfig",
    "EncoderConfig",
    "LatentConfig",
    "NetworkConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ReverseConfig",
    "ScheduleConfig",
    "TrainingConfig",
    "from_dict",
    "refuse_changes",
    "to_dict",
]


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are varied."""

    source: str = "digits"
    """A named data set (digits, photos32, cifar10, fashion-mnist, imagenet32-old, imagenet32-new, imagenet64),
    hub:OWNER/NAME, a prepared folder, a .npy or .npz file of uint8 images, or a folder of image files."""
    encoding: Literal["centres", "ends"] = "centres"
    """x of a grey level: the centres of equal bins of [-1, 1] (VDM), or from -1 for black to 1 for white (DDPM)."""
    augment: Literal["none", "flip", "turn", "vdm"] = "none"
    """Changes to training images: horizontal flips; i-DODE's flips and quarter turns; VDM's, with channel swaps too."""


@dataclass(frozen=True)
class ScheduleConfig:
    """gamma(t, c) = -log SNR."""

    kind: Literal["linear", "monotone", "pixel-monotone", "polynomial", "scalar-polynomial", "betas"] = "linear"
    """Shape between the ends. polynomial and pixel-monotone: one curve per pixel; given c where there is a latent.
    betas: DDPM's noise levels, whose ends follow from the betas."""
    ends: Literal["fixed", "learned", "free"] = "fixed"
    """fixed: constants; learned: trained from gamma_min and gamma_max; free: raw monotone network, ends move."""
    gamma_min: float | None = None
    """gamma at t = 0. By default -13.3 + 2 log(256/levels): the same ratio of noise to bin width for any levels."""
    gamma_max: float = 5.0
    """gamma at t = 1."""
    width: int = 3072
    """Hidden features of the schedule network (3072 in public MuLAN, 1024 in VDM)."""
    rank: int | None = None
    """polynomial, given c: the rank of its wide layers, each a product of two. By default they are not factored."""
    form: Literal["linear", "quadratic", "cosine", "sigmoid"] = "linear"
    """betas: along the timesteps, beta itself linear or quadratic, or alpha^2 a cosine or sigmoid."""
    timesteps: int = 1000
    """betas: the number T of noise levels."""
    betas: tuple[float, ...] | None = None
    """betas: these ones, in place of a form's."""


@dataclass(frozen=True)
class LatentConfig:
    """The auxiliary latent c ~ q(c|x) that conditions schedule and network."""

    kind: Literal["none", "k-hot", "one-hot", "gaussian", "label", "image"] = "none"
    """none; k of n ones; one of n; real numbers; the class label; the image itself (c = x_0, data network, T > 0)."""
    size: int = 50
    """Entries of c (for label: classes)."""
    k: int = 15
    """Ones in a k-hot c."""
    posterior: Literal["exact", "paper"] = "exact"
    """k-hot posterior: the exact k-subset family, or the paper's noisy top-k charged a categorical KL."""
    noise: Literal["gamma", "gumbel"] = "gamma"
    """Noise on the logits of the paper's posterior."""
    network: bool = True
    """Whether the denoiser sees c too (public MuLAN: yes)."""


@dataclass(frozen=True)
class EncoderConfig:
    """The network from x to the parameters of q(c|x)."""

    kind: Literal["unet", "cnn"] = "unet"
    """unet: residual blocks at full resolution and attention; cnn: two convolutions."""
    levels: int = 4
    """Residual blocks before the middle (unet)."""
    channels: int | None = None
    """Channels (unet). By default those of the network."""


@dataclass(frozen=True)
class NetworkConfig:
    """The denoiser: a U-Net, without down-sampling (flat, pixel-noise) or with it (ddpm, attention)."""

    kind: Literal["flat", "pixel-noise", "ddpm", "attention"] = "flat"
    """flat sees the mean of gamma over the image; pixel-noise sees gamma of every pixel; ddpm and attention see a
    timestep of betas: diffusers' UNet2DModel, and the U-Net of denoising-diffusion-pytorch."""
    channels: int = 128
    """Channels of every layer; ddpm, attention: of the first."""
    levels: int = 32
    """flat, pixel-noise: residual blocks on the way down; one more on the way up."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """ddpm, attention: channels at each halving of the resolution, as multiples of channels."""
    blocks: int = 2
    """ddpm: residual blocks at each resolution."""
    attention_at: tuple[int, ...] = (16,)
    """ddpm: heights of the feature maps where attention acts, besides the middle."""
    full_at: tuple[int, ...] | None = None
    """attention: heights of the feature maps where attention is full, linear elsewhere. By default the smallest."""
    heads: tuple[int, ...] = (4,)
    """attention: heads of every attention, or one number for each resolution."""
    head_features: tuple[int, ...] | None = None
    """Features of an attention head. By default all channels make one head; attention: 32, also one for each
    resolution."""
    first_channels: int | None = None
    """attention: channels of the first convolution. By default channels."""
    cosines_first: bool = False
    """ddpm: cosines before sines in the embedding of time (diffusers' own default, not DDPM's)."""
    frequency_shift: float = 1.0
    """ddpm: s of the embedding's frequencies 10000^(-j/(c/2 - s)) (1 is DDPM's, 0 diffusers' own default)."""
    downsample_padding: Literal[0, 1] = 0
    """ddpm: zeros around a map that is halved: 0, beyond its end only (DDPM); 1, on every side."""
    self_condition: bool = False
    """ddpm, attention: the network also gets its own estimate of the image (zeros half of the time in training)."""
    groups: int = 32
    """Groups of the group normalisation. With as many groups as channels the network cannot see time at all."""
    norm_eps: float = 1e-6
    """Added to the variance in the group normalisation."""
    dropout: float = 0.0
    """Probability of dropping an activation in training."""
    attention: Literal["middle", "everywhere"] = "middle"
    """flat, pixel-noise: where attention acts."""
    fourier: tuple[float, ...] | None = None
    """Exponents f of the Fourier features sin, cos(2^f 2 pi z). By default log2(levels/4) and log2(levels/2)."""
    flag: bool = False
    """A conditioning column that says whether an image was augmented (VDM has it always; 0 at test)."""
    skip: float = 1.0
    """flat, pixel-noise: the output is skip z plus what the last layer puts out (sqrt 2 for velocities of i-DODE)."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True)
class ReverseConfig:
    """What the generative model does at finite T, and the decoder. An evaluation may choose otherwise."""

    variance: Literal["fixed-small", "fixed-large", "learned"] = "fixed-small"
    """Variance of a step of p: that of the posterior q(z_s|z_t,x); beta; an output of the network between the two."""
    clip: bool = False
    """Keep the estimate of x within the grey levels, in the bound too."""
    decoder: Literal["levels", "gaussian"] = "levels"
    """p(x|z_0): a softmax over grey levels around z_0 (VDM); the network's Gaussian, integrated over the bin (DDPM)."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised: the negative evidence lower bound, or a weighted error."""

    loss: Literal["bound", "simple", "hybrid"] = "bound"
    """bound; simple: the mean error of the network's output (DDPM); hybrid: simple, and the bound for the variance."""
    steps: int = 0
    """T of the discrete-time bound; 0 is continuous time. T noise levels of DDPM are T - 1 steps and the decoder."""
    norm: Literal["l2", "l1"] = "l2"
    """simple, hybrid: the error squared or its magnitude."""
    weight: Literal["none", "snr", "min-snr", "p2"] = "none"
    """simple, hybrid: weight of the error: none; that of the noise's error 1 (snr), min(SNR, c)/SNR, (k + SNR)^-g."""
    min_snr: float = 5.0
    """min-snr: c."""
    p2_k: float = 1.0
    """p2: k."""
    p2_gamma: float = 1.0
    """p2: g."""
    hybrid: float = 0.001
    """hybrid: weight of the bound in bits/dim beside the simple loss."""
    times: Literal["stratified", "uniform", "importance"] = "stratified"
    """How t is drawn over a batch in training: a grid with a random shift; independently; the grid by importance."""
    minimise_variance: bool = False
    """Train the schedule's interior on the estimator's variance (VDM appendix I.2) instead of on the bound."""
    second_order: float = 0.0
    """Weight of i-DODE's second-order term, added in training only (0.1 in the paper, to fine-tune a trained model)."""
    latent_weight: float = 1.0
    """Weight of the latent's charge in the loss; every figure charges it in full."""
    prior_scale: float = 1.0
    """Standard deviation of the prior p(z_1)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with the public decay mask (everything but biases), and the moving average of the weights."""

    learning_rate: float = 2e-4
    """Step size after warm-up."""
    schedule_learning_rate: float | None = None
    """Step size of the noise schedule's and the encoder's parameters. By default learning_rate."""
    beta_1: float = 0.9
    """Decay of the first moment."""
    beta_2: float = 0.99
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay, per unit of learning rate."""
    warmup: int = 100
    """Steps of linear warm-up from 0."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """Decay of the learning rate to 0 over the run, after warm-up."""
    clip: float = 0.0
    """Largest L2 norm of the gradient; 0 is no clipping."""
    ema: float = 0.9999
    """Decay per step of the moving average of the weights, which evaluation and sampling use."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how large, how often."""

    steps: int = 10_000_000
    """Optimizer steps in all."""
    batch: int = 128
    """Images in an optimizer step, over all processes."""
    accumulate: int = 1
    """Parts into which a batch is split to save memory."""
    precision: Literal["float32", "bf16"] = "float32"
    """Arithmetic of the denoiser in training; losses and evaluation are float32 always. In training, float32
    convolutions of a GPU round what they multiply to TF32, which is torch's choice."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the denoiser for training, its images with channels last. It takes minutes at every start, and on a CPU a
    C++ compiler. auto: on a GPU, where weights are not sharded and no second order is asked for."""
    seed: int = 0
    """Seed of initial weights, data order, times, noise and dropout."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int = 1_000_000
    """Images between evaluations on the validation split; 0 is never."""
    evaluate_images: int = 512
    """Validation images used for interim evaluations, at most."""
    evaluate_times: int = 4
    """Stratified times per image, per shift, in interim evaluations."""
    sample_every: int = 10_000_000
    """Images between grids of samples; 0 is never."""
    fid_every: int = 0
    """Images between FIDs of samples against the training images; 0 is never."""
    fid_samples: int = 5000
    """Samples of such a FID. Its bias falls with their number: compare figures of one number only."""
    fid_steps: int = 50
    """DDIM steps of such a sample."""
    fid_extractor: Literal["inception", "small", "random"] = "inception"
    """Features of such a FID (see nelbo fid --help)."""
    fid_weights: str | None = None
    """File of the extractor's weights. By default inception's are fetched."""
    sharding: Literal["none", "full"] = "none"
    """full: each of several processes holds its part of weights, gradients, moments and average (FSDP)."""
    save_every: int = 1_000_000
    """Images between checkpoints; 0 is only at the end."""
    keep: int = 3
    """Last checkpoints kept, besides the best."""


@dataclass(frozen=True)
class Config:
    """A run of nelbo: which parts, which data, how trained."""

    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    path: Literal["vp", "straight"] = "vp"
    """(alpha, sigma) for each gamma: variance preserving, or the straight line of flow matching."""
    parameterization: Literal["noise", "data", "velocity"] = "noise"
    """What the network puts out."""
    latent: LatentConfig = field(default_factory=LatentConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    reverse: ReverseConfig = field(default_factory=ReverseConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        check(self)


TIMESTEPS = ("ddpm", "attention")  # the kinds of network that are told a timestep
POSITIVE = (
    "schedule.width schedule.rank latent.size latent.k encoder.channels network.channels network.groups "
    "objective.prior_scale optimizer.learning_rate optimizer.schedule_learning_rate optimizer.eps training.steps "
    "training.batch training.accumulate training.log_every training.evaluate_images training.evaluate_times "
    "training.keep training.fid_samples training.fid_steps network.blocks objective.min_snr objective.hybrid "
    "network.norm_eps network.first_channels objective.p2_k"
).split()
NOT_NEGATIVE = (
    "network.levels encoder.levels objective.steps objective.latent_weight objective.p2_gamma objective.second_order "
    "optimizer.weight_decay optimizer.warmup optimizer.clip training.seed training.evaluate_every "
    "network.frequency_shift training.sample_every training.save_every training.fid_every"
).split()
FRACTIONS = "network.dropout optimizer.beta_1 optimizer.beta_2 optimizer.ema".split()


def check(config: Config) -> None:
    """Raise UserError where a field is out of range or two fields contradict each other."""

    def value(path: str) -> Any:
        group, name = path.split(".")
        return getattr(getattr(config, group), name)

    for name, number in _flatten(dataclasses.asdict(config)).items():
        for n in number if isinstance(number, tuple) else (number,):
            if isinstance(n, float) and not math.isfinite(n):
                raise UserError(f"{name} must be finite, got {n}")
    for path in POSITIVE:
        if value(path) is not None and not value(path) > 0:
            raise UserError(f"{path} must be above 0, got {value(path)}")
    for path in NOT_NEGATIVE:
        if not value(path) >= 0:
            raise UserError(f"{path} must be 0 or more, got {value(path)}")
    for path in FRACTIONS:
        if not 0 <= value(path) < 1:
            raise UserError(f"{path} must lie in [0, 1), got {value(path)}")
    network, latent, schedule, training = config.network, config.latent, config.schedule, config.training
    objective = config.objective
    if not training.seed < 2**64:
        raise UserError(f"training.seed must lie below 2^64, got {training.seed}")
    for name, channels in (("network", network.channels), ("encoder", config.encoder.channels or network.channels)):
        if channels % 2 or channels < 4:
            raise UserError(f"{name}.channels must be even and at least 4 (sines and cosines of time), got {channels}")
        if channels % network.groups and network.kind != "attention":  # which has no groups
            raise UserError(f"network.groups must divide {name}.channels = {channels}, got {network.groups}")
    if network.groups == network.channels and network.kind != "attention":
        raise UserError(
            f"network.groups must be fewer than network.channels, got {network.groups} of both: "
            "a network normalised channel by channel cannot see time or conditioning"
        )
    if latent.kind == "k-hot" and not latent.k < latent.size:
        raise UserError(f"latent.k must be below latent.size = {latent.size}, got {latent.k}")
    if training.batch % training.accumulate:
        raise UserError(f"training.accumulate must divide training.batch = {training.batch}, got {training.accumulate}")
    if config.data.augment != "none" and not network.flag and network.kind not in TIMESTEPS:
        raise UserError(f"data.augment = {config.data.augment} needs network.flag = True, which tells the network")
    if schedule.gamma_min is not None and schedule.gamma_min >= schedule.gamma_max:
        raise UserError(
            f"schedule.gamma_min must lie below schedule.gamma_max = {schedule.gamma_max}, got {schedule.gamma_min}"
        )
    _check_heads(network)
    _check_ddpm(config)
    if schedule.rank is not None and (schedule.kind != "polynomial" or latent.kind == "none"):
        raise UserError(
            "schedule.rank needs schedule.kind = polynomial and a latent, "
            f"got schedule.kind = {schedule.kind} and latent.kind = {latent.kind}"
        )
    if schedule.rank is not None and not schedule.rank < schedule.width:
        raise UserError(f"schedule.rank must lie below schedule.width = {schedule.width}, got {schedule.rank}")
    if schedule.ends == "free" and schedule.kind not in ("monotone", "pixel-monotone"):
        raise UserError(f"schedule.ends = free needs schedule.kind monotone or pixel-monotone, got {schedule.kind}")
    if objective.minimise_variance and (schedule.kind, schedule.ends) not in (
        ("monotone", "fixed"),
        ("monotone", "learned"),
    ):
        raise UserError(
            "objective.minimise_variance needs schedule.kind = monotone with fixed or learned ends, "
            f"got {schedule.kind} with {schedule.ends} ends"
        )
    if latent.kind == "image" and (config.parameterization != "data" or not objective.steps):
        raise UserError(
            "latent.kind = image needs parameterization = data and objective.steps above 0 (the schedule "
            f"reads x_hat), got {config.parameterization} and {objective.steps}"
        )
    if latent.kind == "image" and schedule.kind not in ("polynomial", "scalar-polynomial", "pixel-monotone"):
        raise UserError(
            "latent.kind = image needs a schedule that reads c (polynomial, scalar-polynomial, "
            f"pixel-monotone), got {schedule.kind}"
        )
    if latent.kind == "image" and schedule.ends != "fixed":
        raise UserError(
            "latent.kind = image needs schedule.ends = fixed (the decoder must not learn of the image through gamma at "
            f"t = 0), got {schedule.ends}"
        )
    for wanted, name in (
        (objective.times == "importance", "objective.times = importance"),
        (objective.second_order > 0, "objective.second_order above 0"),
    ):
        if wanted and (objective.steps or latent.kind == "image"):
            raise UserError(
                f"{name} needs continuous time: objective.steps = 0 and a latent.kind other than image, "
                f"got {objective.steps} and {latent.kind}"
            )
    if objective.minimise_variance and objective.times == "importance":
        raise UserError(
            "objective.minimise_variance needs objective.times = stratified or uniform (it shapes the density of "
            "gamma itself), got importance"
        )
    if objective.minimise_variance and config.optimizer.clip:
        raise UserError(
            "objective.minimise_variance needs optimizer.clip = 0 (the schedule's gradient is hundreds of times the "
            f"network's, which a common norm would crush), got {config.optimizer.clip}"
        )


def _check_heads(network: NetworkConfig) -> None:
    """Heads of attention that the channels can be divided into."""
    several = (1, len(network.multipliers)) if network.kind == "attention" else (1,)
    found = (1,) if network.head_features is None else network.head_features
    for name, numbers in (("heads", network.heads), ("head_features", found)):
        if len(numbers) not in several or min(numbers) < 1:
            raise UserError(
                f"network.{name} must be 1 whole number above 0, or for network.kind = attention one for each of "
                f"network.multipliers, got {numbers}"
            )
    if network.kind not in TIMESTEPS and network.channels % found[0]:
        raise UserError(f"network.head_features must divide network.channels = {network.channels}, got {found[0]}")
    if not network.frequency_shift < network.channels / 2:
        raise UserError(
            f"network.frequency_shift must lie below half of network.channels = {network.channels}, got "
            f"{network.frequency_shift}"
        )


def _check_ddpm(config: Config) -> None:
    """What a schedule of betas, a network of timesteps and the weighted losses need."""
    schedule, network, objective, reverse = config.schedule, config.network, config.objective, config.reverse
    if schedule.timesteps < 2:
        raise UserError(f"schedule.timesteps must be at least 2, got {schedule.timesteps}")
    if schedule.betas is not None:
        if schedule.kind != "betas":
            raise UserError(f"schedule.betas needs schedule.kind = betas, got {schedule.kind}")
        if len(schedule.betas) < 2 or not all(0 < beta < 1 for beta in schedule.betas):
            raise UserError("schedule.betas must be at least 2 numbers strictly between 0 and 1")
    if schedule.kind == "betas" and (schedule.ends != "fixed" or schedule.gamma_min is not None):
        raise UserError(
            "schedule.kind = betas has its own ends: leave schedule.ends = fixed, schedule.gamma_min = None"
        )
    if network.kind in TIMESTEPS:
        if schedule.kind != "betas":
            raise UserError(
                f"network.kind = {network.kind} sees timesteps: it needs schedule.kind = betas, got {schedule.kind}"
            )
        if network.flag or (config.latent.kind != "none" and config.latent.network):
            raise UserError(
                f"network.kind = {network.kind} takes no conditioning: it needs network.flag = False and latent.kind = "
                f"none or latent.network = False, got {network.flag}, {config.latent.kind} and {config.latent.network}"
            )
        if not network.multipliers or min(network.multipliers) < 1:
            raise UserError(f"network.multipliers must be whole numbers above 0, got {network.multipliers}")
    elif network.self_condition or reverse.variance == "learned":
        raise UserError(
            "network.self_condition and reverse.variance = learned need network.kind = ddpm or attention, got "
            f"{network.kind}"
        )
    if reverse.decoder == "gaussian" and schedule.kind != "betas":
        raise UserError(
            f"reverse.decoder = gaussian has its variance from the first betas: schedule.kind must be betas, got "
            f"{schedule.kind}"
        )
    if reverse.decoder == "gaussian" and not objective.steps:
        raise UserError("reverse.decoder = gaussian is trained at finite T: objective.steps must be above 0 (T - 1)")
    if objective.loss == "hybrid" and (reverse.variance != "learned" or not objective.steps):
        raise UserError(
            "objective.loss = hybrid trains the variance: it needs reverse.variance = learned and objective.steps "
            f"above 0, got {reverse.variance} and {objective.steps}"
        )
    if objective.loss == "simple" and reverse.variance == "learned":
        raise UserError("objective.loss = simple does not train reverse.variance = learned: use hybrid or bound")
    if objective.loss != "bound":
        for wanted, name in (
            (objective.minimise_variance, "objective.minimise_variance"),
            (objective.second_order > 0, "objective.second_order"),
            (objective.times == "importance", "objective.times = importance"),
            (config.latent.kind != "none", f"latent.kind = {config.latent.kind}"),
            (schedule.ends != "fixed" or schedule.kind not in ("linear", "betas"), "a learned schedule"),
        ):
            if wanted:
                raise UserError(f"{name} follows the bound: it needs objective.loss = bound, got {objective.loss}")


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain dicts, as JSON would give them back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any], cls: type = Config, where: str = "") -> Any:
    """The inverse of ``to_dict``. Unknown keys, wrong types and wrong choices raise UserError."""
    if not isinstance(values, dict):
        raise UserError(f"{where or 'the configuration'} must be a table of fields, got {values!r}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"unknown field {where}{unknown[0]}; the choices are {', '.join(hints)}")
    parsed = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            parsed[name] = from_dict(value, typing.cast(type, hint), f"{where}{name}.")
        else:
            parsed[name] = _parse(value, hint, where + name)
    return cls(**parsed)


def _parse(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where} must be one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if type(None) in arguments:
        if value is None:
            return None
        (hint,) = (a for a in arguments if a is not type(None))
        return _parse(value, hint, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} must be a list of numbers, got {value!r}")
        return tuple(_parse(v, arguments[0], where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{where} must be of type {hint.__name__}, got {value!r}")
    return value


# Fields that may change when a run is continued: they do not alter the trajectory of the weights. (What data.source
# holds is compared by content.)
FREE = (
    "training.steps training.log_every training.evaluate_every training.evaluate_images training.evaluate_times "
    "training.sample_every training.save_every training.keep data.source training.fid_every training.fid_samples "
    "training.fid_steps training.fid_extractor training.fid_weights training.sharding "
    "training.compile"
).split()


def refuse_changes(old: dict[str, Any], config: Config, run: str) -> None:
    """UserError that names a field whose change since ``run`` began (``old``) would alter its trajectory."""
    # A run that began before a field existed has its default.
    before, now = _flatten(to_dict(Config())) | _flatten(old), _flatten(to_dict(config))
    for name in before | now:
        if before.get(name) == now.get(name):
            continue
        if name in FREE and not (name == "training.steps" and config.optimizer.decay != "none"):
            continue
        why = "; with a decaying learning rate the number of steps is fixed" if name == "training.steps" else ""
        raise UserError(
            f"{name} was {before.get(name)!r} when {run} began and is {now.get(name)!r} now{why}: a change that alters "
            f"the trajectory needs a new run (--out) or the old value; free to change are {', '.join(FREE)}"
        )


def _flatten(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{where}{name}.") if isinstance(value, dict) else {where + name: value}
    return flat
