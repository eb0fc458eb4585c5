"""The networks: U-Nets without down-sampling, and the encoders of the auxiliary latent."""

from nelbo.networks.encoders import ENCODERS, CNNEncoder, UNetEncoder
from nelbo.networks.unet import NETWORKS, FlatUNet, PixelNoiseUNet

__all__ = ["ENCODERS", "NETWORKS", "CNNEncoder", "FlatUNet", "PixelNoiseUNet", "UNetEncoder"]
