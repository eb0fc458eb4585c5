"""Data: image sets, batches in a reproducible order, and the classical figures that a model has to beat."""

from nelbo.data.baselines import Baseline, baselines
from nelbo.data.dataset import Dataset
from nelbo.data.loader import Batch, Batches
from nelbo.data.sources import load

__all__ = ["Baseline", "Batch", "Batches", "Dataset", "baselines", "load"]
