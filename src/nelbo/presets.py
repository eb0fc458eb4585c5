"""Presets: plain functions that return a whole configuration. Flags override single fields.

``-digits`` train on two CPU cores in minutes, ``-photos32`` and ``-fashion`` in an hour, the others hold the papers'
settings.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from nelbo.config import (
    Config,
    DataConfig,
    EncoderConfig,
    LatentConfig,
    NetworkConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReverseConfig,
    ScheduleConfig,
    TrainingConfig,
)
from nelbo.errors import UserError

__all__ = ["PRESETS", "preset"]

K_HOT = LatentConfig(kind="k-hot", size=50, k=15)


def _small(source: str, learning_rate: float, ema: float, training: TrainingConfig) -> Config:
    """What all presets for two cores share: VDM with a fixed linear schedule at 32 channels and 4 levels."""
    return Config(
        data=DataConfig(source),
        schedule=ScheduleConfig(width=64),
        network=NetworkConfig(channels=32, levels=4, groups=8),
        encoder=EncoderConfig(levels=2),
        optimizer=OptimizerConfig(learning_rate=learning_rate, decay="cosine", clip=1.0, ema=ema),
        training=replace(training, evaluate_times=4, sample_every=0, keep=2),
    )


def _digits() -> Config:
    """8x8 images of 17 levels; minutes."""
    training = TrainingConfig(
        steps=2000, batch=64, log_every=50, evaluate_every=32_000, evaluate_images=200, save_every=16_000
    )
    return _small("digits", 3e-3, 0.995, training)


def _photos32() -> Config:
    """32x32 images of 256 levels in colour; an hour."""
    training = TrainingConfig(
        steps=2000, batch=16, log_every=20, evaluate_every=8_000, evaluate_images=32, save_every=4_000
    )
    return _small("photos32", 1e-3, 0.995, training)


def _fashion() -> Config:
    """28x28 images of 256 levels; about an hour."""
    training = TrainingConfig(
        steps=6000, batch=32, precision="bf16", log_every=50, evaluate_every=32_000, evaluate_images=128,
        save_every=16_000,
    )  # fmt: skip
    return _small("fashion-mnist", 2e-3, 0.999, training)


def _cifar10() -> Config:
    """VDM's and MuLAN's CIFAR-10: 128 channels, 32 levels, dropout 0.1, 10 M steps of 128."""
    return Config(
        data=DataConfig("cifar10"),
        network=NetworkConfig(channels=128, levels=32, dropout=0.1),
        training=TrainingConfig(steps=10_000_000, batch=128),
    )


def _imagenet(size: int) -> Config:
    """ImageNet at 32x32 (32 levels) or 64x64 (64 levels): 256 channels, batch 512, 2 M steps."""
    return Config(
        data=DataConfig(f"imagenet{size}" if size == 64 else "imagenet32-old"),
        network=NetworkConfig(channels=256, levels=size),
        training=TrainingConfig(steps=2_000_000, batch=512),
    )


def _vdm(base: Config) -> Config:
    """Variational diffusion: one learned linear schedule, the noise as output, a column for augmentation."""
    schedule = replace(base.schedule, kind="linear", ends="learned")
    return replace(base, schedule=schedule, network=replace(base.network, flag=True))


def _mulan(base: Config, **changes: object) -> Config:
    """MuLAN: a polynomial schedule per pixel given a k-hot latent, 15 of 50."""
    base = replace(base, schedule=replace(base.schedule, kind="polynomial"), latent=K_HOT)
    return replace(base, **changes)  # type: ignore[arg-type]


def _augmented(base: Config, augment: Literal["turn", "vdm"]) -> Config:
    """The papers' augmented CIFAR-10: 256 channels, attention everywhere, dropout 0.05, batch 1024."""
    return replace(
        base,
        data=replace(base.data, augment=augment),
        network=replace(base.network, channels=256, attention="everywhere", dropout=0.05, flag=True),
        training=replace(base.training, batch=1024),
    )


def _idode(base: Config, path: Literal["vp", "straight"], **training: int) -> Config:
    """i-DODE: fixed linear schedule, velocity, importance-sampled times, a column for augmentation."""
    return replace(
        base,
        path=path,
        parameterization="velocity",
        objective=replace(base.objective, times="importance"),
        network=replace(base.network, flag=True),
        training=replace(base.training, **training),  # type: ignore[arg-type]
    )


def _idode_imagenet(version: str, path: Literal["vp", "straight"], batch: int) -> Config:
    """i-DODE's ImageNet-32, old or new: VDM's network with dropout 0.1, 2 M steps."""
    base = _idode(_imagenet(32), path, batch=batch)
    return replace(base, data=DataConfig(f"imagenet32-{version}"), network=replace(base.network, dropout=0.1))


def _ddpm(base: Config, network: NetworkConfig) -> Config:
    """DDPM: T = 1000 levels of linear betas, the simple loss, fixed-large variance, the network's own decoder."""
    return replace(
        base,
        data=replace(base.data, encoding="ends", augment="flip"),
        schedule=ScheduleConfig(kind="betas", form="linear", timesteps=1000),
        network=replace(network, kind="ddpm"),
        reverse=ReverseConfig(variance="fixed-large", clip=True, decoder="gaussian"),
        objective=ObjectiveConfig(loss="simple", steps=999),
    )


def vdm_digits() -> Config:
    """VDM on 8x8 digits: learned linear schedule."""
    return _vdm(_digits())


def mulan_digits() -> Config:
    """MuLAN on 8x8 digits: noise per pixel given a latent; predicts the noise."""
    return _mulan(_digits())


def mulan_velocity_digits() -> Config:
    """MuLAN on 8x8 digits; predicts the velocity."""
    return _mulan(_digits(), parameterization="velocity")


def mulan_no_latent_digits() -> Config:
    """Ablation: noise per pixel, of time alone."""
    return _mulan(_digits(), latent=LatentConfig())


def mulan_scalar_digits() -> Config:
    """Ablation: one noise level an image, given the latent (adaptive but not multivariate)."""
    base = _mulan(_digits())
    return replace(base, schedule=replace(base.schedule, kind="scalar-polynomial"))


def mulan_monotone_digits() -> Config:
    """Ablation: a monotone network per pixel given the latent; its ends move, as publicly."""
    base = _mulan(_digits())
    return replace(base, schedule=replace(base.schedule, kind="pixel-monotone", ends="free"))


def mulan_linear_digits() -> Config:
    """Ablation: fixed linear schedule, the latent seen by the network only."""
    base = _mulan(_digits())
    return replace(base, schedule=replace(base.schedule, kind="linear"))


def mulan_label_digits() -> Config:
    """Ablation: c is the class label, charged log(10)."""
    return _mulan(_digits(), latent=LatentConfig(kind="label", size=10))


def mulan_image_digits() -> Config:
    """Ablation: c is the image itself (c = x_0), T = 100."""
    base = _mulan(_digits())
    objective = replace(base.objective, steps=100)
    return replace(base, latent=LatentConfig(kind="image"), parameterization="data", objective=objective)


def mulan_one_hot_digits() -> Config:
    """Ablation: one-hot latent, 1 of 50."""
    return _mulan(_digits(), latent=LatentConfig(kind="one-hot", size=50))


def mulan_gaussian_digits() -> Config:
    """Ablation: Gaussian latent of 50 numbers."""
    return _mulan(_digits(), latent=LatentConfig(kind="gaussian", size=50))


def mulan_paper_digits() -> Config:
    """Ablation: the paper's k-hot posterior and charge; the valid bound is reported beside."""
    return _mulan(_digits(), latent=replace(K_HOT, posterior="paper"))


def mulan_small_schedule_digits() -> Config:
    """MuLAN on 8x8 digits, its schedule network an eighth as wide."""
    base = _mulan(_digits())
    return replace(base, schedule=replace(base.schedule, width=8))


def mulan_factored_schedule_digits() -> Config:
    """MuLAN on 8x8 digits, the wide layers of its schedule network of rank 4."""
    base = _mulan(_digits())
    return replace(base, schedule=replace(base.schedule, rank=4))


def mulan_small_encoder_digits() -> Config:
    """MuLAN on 8x8 digits with the encoder of two convolutions."""
    return _mulan(_digits(), encoder=EncoderConfig(kind="cnn"))


def mulan_pixel_noise_digits() -> Config:
    """Ablation: the U-Net that sees the noise level of every pixel."""
    base = _mulan(_digits())
    return replace(base, network=replace(base.network, kind="pixel-noise"))


def idode_vp_digits() -> Config:
    """i-DODE on 8x8 digits, variance-preserving path."""
    return _idode(_digits(), "vp")


def idode_sp_digits() -> Config:
    """i-DODE on 8x8 digits, straight path."""
    return _idode(_digits(), "straight")


def ddpm_digits() -> Config:
    """DDPM on 8x8 digits: T = 1000, linear betas, simple loss."""
    base = _ddpm(_digits(), NetworkConfig(channels=32, multipliers=(1, 2), attention_at=(4,), groups=8))
    data = replace(base.data, augment="none")  # a flipped digit is no digit
    return replace(base, data=data, optimizer=replace(base.optimizer, weight_decay=0.0, beta_2=0.999))


def ddpm_photos32() -> Config:
    """DDPM on 32x32 crops of two photographs."""
    base = _ddpm(_photos32(), NetworkConfig(channels=32, multipliers=(1, 2, 2), attention_at=(16,), groups=8))
    return replace(base, optimizer=replace(base.optimizer, weight_decay=0.0, beta_2=0.999))


def vdm_photos32() -> Config:
    """VDM on 32x32 crops of two photographs."""
    return _vdm(_photos32())


def mulan_photos32() -> Config:
    """MuLAN on 32x32 crops of two photographs; predicts the noise."""
    return _mulan(_photos32())


def mulan_velocity_photos32() -> Config:
    """MuLAN on 32x32 crops of two photographs; predicts the velocity."""
    return _mulan(_photos32(), parameterization="velocity")


def idode_vp_photos32() -> Config:
    """i-DODE on 32x32 crops of two photographs, variance-preserving path."""
    return _idode(_photos32(), "vp")


def idode_sp_photos32() -> Config:
    """i-DODE on 32x32 crops of two photographs, straight path."""
    return _idode(_photos32(), "straight")


def vdm_fashion() -> Config:
    """VDM on Fashion-MNIST."""
    return _vdm(_fashion())


def mulan_fashion() -> Config:
    """MuLAN on Fashion-MNIST; predicts the noise."""
    return _mulan(_fashion())


def vdm_cifar10() -> Config:
    """VDM, CIFAR-10 (2.65 bits/dim in the paper)."""
    return _vdm(_cifar10())


def vdm_cifar10_aug() -> Config:
    """VDM, augmented CIFAR-10 (2.49): monotone network, 256 channels, attention everywhere."""
    base = _vdm(_augmented(_cifar10(), "vdm"))
    return replace(base, schedule=replace(base.schedule, kind="monotone", width=1024))


def mulan_cifar10() -> Config:
    """MuLAN, CIFAR-10, noise (2.60 as VLB in the paper): public schedule width, latent, encoder."""
    return _mulan(_cifar10(), latent=replace(K_HOT, posterior="paper"))


def mulan_small_schedule_cifar10() -> Config:
    """mulan-cifar10 with a schedule network of 256 features: 2.4 M parameters for 37.9 M."""
    base = mulan_cifar10()
    return replace(base, schedule=replace(base.schedule, width=256))


def mulan_factored_schedule_cifar10() -> Config:
    """mulan-cifar10, schedule network's wide layers of rank 64: 1.7 M parameters for 37.9 M."""
    base = mulan_cifar10()
    return replace(base, schedule=replace(base.schedule, rank=64))


def mulan_small_encoder_cifar10() -> Config:
    """mulan-cifar10 with MuLAN's encoder of two convolutions."""
    return replace(mulan_cifar10(), encoder=EncoderConfig(kind="cnn"))


def mulan_velocity_cifar10() -> Config:
    """MuLAN, CIFAR-10, velocity (2.59 as VLB, 2.55 by the ODE)."""
    return replace(mulan_cifar10(), parameterization="velocity")


def ddpm_cifar10() -> Config:
    """DDPM, CIFAR-10 (3.75 bits/dim, FID 3.17): simple loss, flips, 800 k steps of 128."""
    base = _ddpm(_cifar10(), NetworkConfig(channels=128, dropout=0.1))
    optimizer = OptimizerConfig(weight_decay=0.0, beta_2=0.999, warmup=5000, clip=1.0, ema=0.9999)
    return replace(base, optimizer=optimizer, training=replace(base.training, steps=800_000))


def vdm_imagenet32() -> Config:
    """VDM, ImageNet-32, old version (3.72)."""
    return _vdm(_imagenet(32))


def mulan_imagenet32() -> Config:
    """MuLAN, ImageNet-32, old version, noise (3.71 as VLB)."""
    return _mulan(_imagenet(32), latent=replace(K_HOT, posterior="paper"))


def vdm_imagenet64() -> Config:
    """VDM, ImageNet-64 (3.40): 256 channels, 64 levels."""
    return _vdm(_imagenet(64))


def idode_vp_cifar10() -> Config:
    """i-DODE, CIFAR-10, VP (2.56 by ODE on the better path, fine-tuned: --objective.second-order 0.1)."""
    return _idode(_cifar10(), "vp", steps=6_000_000)


def idode_sp_cifar10() -> Config:
    """i-DODE, CIFAR-10, straight path; fine-tuned as idode-vp-cifar10."""
    return _idode(_cifar10(), "straight", steps=6_000_000)


def idode_vp_cifar10_aug() -> Config:
    """i-DODE, augmented CIFAR-10, VP (2.42 by ODE on the better path): attention everywhere."""
    return _idode(_augmented(_cifar10(), "turn"), "vp", steps=1_950_000)


def idode_sp_cifar10_aug() -> Config:
    """i-DODE, augmented CIFAR-10, straight path."""
    return _idode(_augmented(_cifar10(), "turn"), "straight", steps=1_950_000)


def idode_vp_imagenet32_old() -> Config:
    """i-DODE, ImageNet-32, old version, VP (3.69 by ODE on the better path, fine-tuned)."""
    return _idode_imagenet("old", "vp", 512)


def idode_sp_imagenet32_old() -> Config:
    """i-DODE, ImageNet-32, old version, straight path."""
    return _idode_imagenet("old", "straight", 512)


def idode_vp_imagenet32_new() -> Config:
    """i-DODE, ImageNet-32, new version, VP (3.43 by ODE on the better path, fine-tuned)."""
    return _idode_imagenet("new", "vp", 128)


def idode_sp_imagenet32_new() -> Config:
    """i-DODE, ImageNet-32, new version, straight path."""
    return _idode_imagenet("new", "straight", 128)


PRESETS: dict[str, Callable[[], Config]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        vdm_digits,
        mulan_digits,
        mulan_velocity_digits,
        mulan_no_latent_digits,
        mulan_scalar_digits,
        mulan_monotone_digits,
        mulan_linear_digits,
        mulan_label_digits,
        mulan_image_digits,
        mulan_one_hot_digits,
        mulan_gaussian_digits,
        mulan_paper_digits,
        mulan_pixel_noise_digits,
        mulan_small_schedule_digits,
        mulan_factored_schedule_digits,
        mulan_small_encoder_digits,
        idode_vp_digits,
        idode_sp_digits,
        ddpm_digits,
        vdm_photos32,
        mulan_photos32,
        mulan_velocity_photos32,
        idode_vp_photos32,
        idode_sp_photos32,
        ddpm_photos32,
        vdm_fashion,
        mulan_fashion,
        vdm_cifar10,
        vdm_cifar10_aug,
        mulan_cifar10,
        mulan_velocity_cifar10,
        mulan_small_schedule_cifar10,
        mulan_factored_schedule_cifar10,
        mulan_small_encoder_cifar10,
        idode_vp_cifar10,
        idode_sp_cifar10,
        idode_vp_cifar10_aug,
        idode_sp_cifar10_aug,
        ddpm_cifar10,
        vdm_imagenet32,
        mulan_imagenet32,
        idode_vp_imagenet32_old,
        idode_sp_imagenet32_old,
        idode_vp_imagenet32_new,
        idode_sp_imagenet32_new,
        vdm_imagenet64,
    )
}


def preset(name: str) -> Config:
    """The configuration of a preset."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; the choices are {', '.join(PRESETS)}")
    return PRESETS[name]()
