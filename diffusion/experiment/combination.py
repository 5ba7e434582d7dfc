"""All values of a config together and the properties that follow from them, for the rules."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion import conditioning, learned_schedule, objectives, reverse, schedules, timesteps
from diffusion.experiment import names, sampling
from diffusion.experiment.schema import ALL_SCHEDULES, FIXED_SCHEDULES, PREDICTIONS
from diffusion.learned_schedule import Learned
from diffusion.likelihood import PROTOCOLS, Protocol
from diffusion.parameterizations import x0_per_output
from diffusion.reverse import VARIANCES, Reverse
from diffusion.samplers import Step
from diffusion.schedules import Schedule


class Combination(NamedTuple):
    """All values of a config, with the schedule and the sampler that follow from them."""

    config: ConfigDict
    schedule: Schedule  # for a learned one, its start
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
        """Whether γ_T is finite. Only then can γ be a network's input or an integration variable."""
        return bool(np.isfinite(self.schedule.log_snr[-1]))

    @property
    def knows_between(self) -> bool:
        """Whether the network can be evaluated at noise levels between the schedule's steps."""
        is_trained = self.is_continuous or self.config.model.conditioning == "gamma"
        return is_trained and self.p.prediction != "mean"

    @property
    def grid_is_continuous(self) -> bool:
        return sampling.is_continuous(self.config)

    @property
    def leaves_out_steps(self) -> bool:
        """Whether samples are drawn in fewer steps than the schedule has."""
        return 0 < self.config.sample.num_steps < self.config.schedule.num_steps

    @property
    def guides_no_step(self) -> bool:
        """Whether sample.guidance_interval contains no t that the sampler visits. Churn visits any t."""
        sample, visited = self.config.sample, self.schedule
        if not sample.guidance_interval:
            return False
        if self.leaves_out_steps and sample.grid == "even" and self.step.churn is None:
            visited = schedules.evenly_spaced(self.schedule, sample.num_steps)
        (low, high), t = sample.guidance_interval, np.asarray(visited.network_t)[1:] + 1
        if self.grid_is_continuous:
            return not (low < t[-1] and t[0] <= high)
        return not np.any((low < t) & (t <= high))

    @property
    def is_ancestral(self) -> bool:
        return names.parse(self.config.sample.method).name == "ancestral"

    @property
    def learns_variance(self) -> bool:
        return VARIANCES[self.config.model.variance].is_learned

    @property
    def loses_x0(self) -> bool:
        """Whether the network's output at t = T does not determine x_0, as for ε if ᾱ_T = 0."""
        return not np.isfinite(x0_per_output(self.p, self.schedule[self.schedule.num_steps]))

    @property
    def protocol(self) -> Protocol:
        return PROTOCOLS[self.config.eval.protocol]

    @property
    def scores_beta_tilde(self) -> bool:
        """Whether the scored variance is β̃_t."""
        scored = self.config.eval.variance
        return (self.config.model.variance if scored == "model" else scored) == "fixed_small"

    @property
    def has_weighting(self) -> bool:
        return names.parse(self.config.objective.weighting).name != "none"

    @property
    def timesteps(self) -> str:
        return names.parse(self.config.objective.timesteps).name

    @property
    def has_share_at_1(self) -> bool:
        return bool(names.parse(self.config.objective.timesteps).arguments.get("at_1", 0))

    @property
    def is_loss_aware(self) -> bool:
        return timesteps.SAMPLERS[self.timesteps] is timesteps.loss_aware


def reverse_process(config: ConfigDict) -> Reverse:
    """The reverse process that a config names. Raises a ValueError if an argument is out of range."""
    prediction, arguments = PREDICTIONS.call(config.model.prediction)
    return reverse.make(prediction, config.model.variance, config.model.decoder, **arguments)


def start_schedule(config: ConfigDict) -> tuple[Schedule, Learned | None]:
    """The schedule that a config names. For a learned one: the schedule at its start, and how it is trained.

    Raises:
        ValueError: there is no such schedule with this number of steps.
    """
    text, num_steps = config.schedule.name, config.schedule.num_steps
    if names.parse(text).name != learned_schedule.NAME:
        return ALL_SCHEDULES.bind(text)(num_steps), None
    learned = ALL_SCHEDULES.bind(text)()
    if problem := FIXED_SCHEDULES.problem(learned.start):
        raise ValueError(f"schedule.name={text!r}: start {problem}")
    return FIXED_SCHEDULES.bind(learned.start)(num_steps), learned


def schedule_of(config: ConfigDict, start: Schedule, learned: Learned | None) -> Callable[[PyTree], Schedule]:
    """params -> the schedule, with the table on which the network is conditioned."""
    of_params = learned_schedule.of_params if learned else lambda params: start
    if config.model.conditioning == "gamma":
        low, high = -start.log_snr[1], -start.log_snr[-1]
        return lambda params: conditioning.on_gamma(of_params(params), low, high)
    if config.model.rescale_t:
        return lambda params: conditioning.on_rescaled_t(of_params(params))
    return of_params
