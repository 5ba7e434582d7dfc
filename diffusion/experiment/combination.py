"""A config's values all together, and what follows from them: what a rule asks."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion import conditioning, learned_schedule, objectives, reverse, timesteps
from diffusion.experiment import names
from diffusion.experiment.schema import ALL_SCHEDULES, FIXED_SCHEDULES, PREDICTIONS
from diffusion.learned_schedule import Learned
from diffusion.likelihood import PROTOCOLS, Protocol
from diffusion.parameterizations import x0_per_output
from diffusion.reverse import VARIANCES, Reverse
from diffusion.samplers import Step
from diffusion.schedules import Schedule


class Combination(NamedTuple):
    """A config's values, all together, and the schedule and the sampler that follow from them."""

    config: ConfigDict
    schedule: Schedule  # of a learned one, as it starts
    learned: Learned | None
    step: Step  # of the sampler

    @property
    def p(self) -> Reverse:
        return reverse_process(self.config)

    @property
    def objective(self) -> Callable:
        return objectives.OBJECTIVES[self.objective_name]

    @property
    def objective_name(self) -> str:
        return names.parse(self.config.objective.name).name

    @property
    def is_bound(self) -> bool:
        return self.objective_name in objectives.BOUNDS

    @property
    def is_vdm(self) -> bool:
        return self.objective is objectives.vdm

    @property
    def is_continuous(self) -> bool:
        return objectives.TIMES.get(self.objective_name) == "continuous"

    @property
    def gamma_ends(self) -> bool:
        """Whether γ_T is finite, so that γ can be a network's input or an integral's variable."""
        return bool(np.isfinite(self.schedule.log_snr[-1]))

    @property
    def knows_between(self) -> bool:
        """Whether the network can be asked about noise levels between the schedule's steps."""
        is_trained = self.is_continuous or self.config.model.conditioning == "gamma"
        return is_trained and self.config.model.prediction != "mean"

    @property
    def grid_is_continuous(self) -> bool:
        return names.parse(self.config.sample.grid).arguments.get("continuous", False)

    @property
    def learns_variance(self) -> bool:
        return VARIANCES[self.config.model.variance].is_learned

    @property
    def loses_x0(self) -> bool:
        """Whether at t = T the network's output says nothing of x_0: of ε, where ᾱ_T = 0."""
        return not np.isfinite(x0_per_output(self.p, self.schedule[self.schedule.num_steps]))

    @property
    def protocol(self) -> Protocol:
        return PROTOCOLS[self.config.eval.protocol]

    @property
    def scores_beta_tilde(self) -> bool:
        """Whether the variance that is scored is β̃_t."""
        scored = self.config.eval.variance
        return (self.config.model.variance if scored == "model" else scored) == "fixed_small"

    @property
    def has_weighting(self) -> bool:
        return names.parse(self.config.objective.weighting).name != "none"

    @property
    def timesteps(self) -> str:
        return names.parse(self.config.objective.timesteps).name

    @property
    def is_loss_aware(self) -> bool:
        return timesteps.SAMPLERS[self.timesteps] is timesteps.loss_aware


def reverse_process(config: ConfigDict) -> Reverse:
    """The reverse process that a config names. Raises a ValueError where an argument is out of range."""
    prediction, arguments = PREDICTIONS.call(config.model.prediction)
    return reverse.make(prediction, config.model.variance, config.model.decoder, **arguments)


def start_schedule(config: ConfigDict) -> tuple[Schedule, Learned | None]:
    """The schedule that a config names, or the one that a learned schedule starts from and how it is trained.

    Raises:
        ValueError: there is no such schedule of so many steps.
    """
    text, num_steps = config.schedule.name, config.schedule.num_steps
    if names.parse(text).name != learned_schedule.NAME:
        return ALL_SCHEDULES.bind(text)(num_steps), None
    learned = ALL_SCHEDULES.bind(text)()
    if problem := FIXED_SCHEDULES.problem(learned.start):
        raise ValueError(f"schedule.name={text!r}: start {problem}")
    return FIXED_SCHEDULES.bind(learned.start)(num_steps), learned


def schedule_of(config: ConfigDict, start: Schedule, learned: Learned | None) -> Callable[[PyTree], Schedule]:
    """params -> the schedule, with what the network is conditioned on."""
    of_params = learned_schedule.of_params if learned else lambda params: start
    if config.model.conditioning == "gamma":
        low, high = -start.log_snr[1], -start.log_snr[-1]
        return lambda params: conditioning.on_gamma(of_params(params), low, high)
    if config.model.rescale_t:
        return lambda params: conditioning.on_rescaled_t(of_params(params))
    return of_params
