"""Times in [0, 1) at which the diffusion term is sampled.

    (1)  stratified   t_i = (u + i/n) mod 1,  i = 0 .. n - 1, one shift u             (VDM appendix I.1)
    (2)  uniform      t_i independent

With (1) over a batch the times of a step lie evenly; over the draws of one image they are a randomly shifted
trapezoidal rule: unbiased, of much smaller variance, and not independent, so that an error bar needs several shifts.
"""

import torch
from torch import Tensor

__all__ = ["TIMES", "stratified", "uniform"]


def stratified(u: Tensor, positions: Tensor, n: int) -> Tensor:
    """Equation (1): shifts u and positions i (both broadcastable), n strata."""
    return torch.remainder(u + positions / n, 1.0)


def uniform(u: Tensor, positions: Tensor, n: int) -> Tensor:
    """Equation (2): u must be one number per position."""
    return u


TIMES = {"stratified": stratified, "uniform": uniform}
