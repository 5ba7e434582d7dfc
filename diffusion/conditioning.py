"""The input on which a network is conditioned: the table `network_t`, where it differs from t − 1.

Both tables have a range of about 1000, for which a time embedding is made. They are part of the schedule, so training,
the bound, the samplers and the codec all give the network the same number. The entry of t = 0 is below all others; no
network is evaluated on clean data.
"""

import dataclasses

import jax.numpy as jnp
from jax.typing import ArrayLike

from diffusion.schedules import Schedule

NUM_STEPS = 1000.0  # T of Ho et al. (2020), whose time embedding this is


def on_rescaled_t(schedule: Schedule) -> Schedule:
    """The schedule with network_t = (t − 1) 1000/T, whatever T is; at T = 1000 it is the same schedule.

    Source: Nichol & Dhariwal's code (improved-diffusion, respace.py), whose default is `rescale_timesteps=True`. As
    there, `schedules.respace` keeps the numbers of the T used in training.

    Args:
        schedule: one that is not respaced.
    """
    return dataclasses.replace(schedule, network_t=schedule.network_t * (NUM_STEPS / schedule.num_steps))


def gamma_line(start: Schedule) -> tuple[float, float]:
    """(a, b) with γ = a + b network_t, for the network_t of `on_gamma` with the ends of `start`."""
    low, high = -float(start.log_snr[1]), -float(start.log_snr[-1])
    return low, (high - low) / NUM_STEPS


def on_gamma(schedule: Schedule, low: ArrayLike, high: ArrayLike) -> Schedule:
    """The schedule with network_t = 1000 (γ_t − low)/(high − low), which states the noise in x_t for every T.

    So one network serves every T. A learned γ_t also passes its gradient through the network. Source: Kingma et al.
    (2021, VDM), whose code rescales γ by its ends before training and multiplies it by 1000.

    Args:
        schedule: one with a finite γ_T.
        low, high: γ_1 and γ_T of the schedule before training.
    """
    scaled = NUM_STEPS * (-schedule.log_snr - low) / (high - low)
    return dataclasses.replace(schedule, network_t=jnp.where(schedule.t > 0, scaled, -1.0))
