"""The networks: U-Nets without down-sampling, DDPM's with it, and the encoders of the auxiliary latent."""

from nelbo.networks.attention_unet import AttentionUNet
from nelbo.networks.encoders import ENCODERS, CNNEncoder, UNetEncoder
from nelbo.networks.timesteps import TIMESTEP_NETWORKS, DiffusersUNet, TimestepNetwork, ddpm_unet
from nelbo.networks.unet import NETWORKS, FlatUNet, PixelNoiseUNet

__all__ = [
    "ENCODERS",
    "NETWORKS",
    "TIMESTEP_NETWORKS",
    "AttentionUNet",
    "CNNEncoder",
    "DiffusersUNet",
    "FlatUNet",
    "PixelNoiseUNet",
    "TimestepNetwork",
    "UNetEncoder",
    "ddpm_unet",
]
