"""The table of config values that are allowed alone but not together."""

from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from diffusion import objectives, timesteps
from diffusion.experiment import other_likelihood, sampling
from diffusion.experiment.combination import Combination, start_schedule

MOSTLY = 0.5  # the share of an average that may come from its start without a hint


class Rule(NamedTuple):
    """An impossible combination, and its error message; {c} stands for the config."""

    is_broken: Callable[[Combination], bool]
    message: str


RULES = (
    Rule(
        lambda it: it.objective is objectives.simple and it.learns_variance and it.config.model.variance != "npr",
        "objective.name={c.objective.name!r} has no term that trains model.variance={c.model.variance!r}; "
        "use hybrid or vlb, or a fixed variance",
    ),
    Rule(
        lambda it: it.objective is objectives.hybrid and not it.learns_variance,
        "objective.name={c.objective.name!r} trains a variance, but model.variance={c.model.variance!r} is fixed; "
        "use simple or vlb, or a learned variance",
    ),
    Rule(
        lambda it: (it.objective_name in objectives.OF_EPS_VARIANCE) != (it.config.model.variance == "npr"),
        "objective.name={c.objective.name!r} and model.variance={c.model.variance!r}: only the objectives npr, sn and "
        "ocm train the variance npr, and they train no other; use one of them with npr, or another pair",
    ),
    Rule(
        lambda it: it.is_bound and it.has_weighting,
        "objective.weighting={c.objective.weighting!r} weights the simple loss, which "
        "objective.name={c.objective.name!r} does not have; use none, or simple or hybrid",
    ),
    Rule(
        lambda it: it.is_bound and it.timesteps in timesteps.LOSS_SHAPING,
        "objective.timesteps={c.objective.timesteps!r} weights the loss by the frequency of each t, so "
        "objective.name={c.objective.name!r} would not be a bound; use uniform or low_discrepancy, or simple or hybrid",
    ),
    Rule(
        lambda it: it.loses_x0,
        "schedule.name={c.schedule.name!r} with schedule.num_steps={c.schedule.num_steps} ends with ᾱ_T = 0, where "
        "model.prediction={c.model.prediction!r} does not determine x_0; take another prediction or another schedule",
    ),
    Rule(
        lambda it: it.learned is not None and not it.is_bound,
        "objective.name={c.objective.name!r} is not a bound, so its best schedule is the easiest one to predict; "
        "schedule.name={c.schedule.name!r} needs objective.name='vlb', 'vdm' or 'vdm_continuous'; with this objective "
        "take a fixed schedule, such as schedule.name=cosine",
    ),
    Rule(
        lambda it: it.learned is not None and it.learned.inner == "second_moment" and it.is_loss_aware,
        "schedule.name={c.schedule.name!r} minimises the second moment over uniform t, which "
        "objective.timesteps={c.objective.timesteps!r} does not draw; use uniform or low_discrepancy, or inner='bound'",
    ),
    Rule(
        lambda it: it.is_continuous and it.learned is not None and it.learned.inner == "bound",
        "objective.name={c.objective.name!r} does not depend on the schedule between its ends, so it cannot train "
        "schedule.name={c.schedule.name!r} there; use inner='second_moment' or 'fixed'",
    ),
    Rule(
        lambda it: it.is_continuous and it.is_loss_aware,
        "objective.timesteps={c.objective.timesteps!r} keeps losses for every integer t, but "
        "objective.name={c.objective.name!r} draws real t; use uniform or low_discrepancy",
    ),
    Rule(
        lambda it: it.is_vdm and it.has_share_at_1,
        "objective.timesteps={c.objective.timesteps!r} draws the decoder's term, t = 1, which "
        "objective.name={c.objective.name!r} computes for every example; use low_discrepancy without at_1",
    ),
    Rule(
        lambda it: it.is_vdm and it.config.model.decoder != "bayes",
        "objective.name={c.objective.name!r} computes the decoder's term in every training step. For it, "
        "model.decoder={c.model.decoder!r} would evaluate the network a second time; use bayes",
    ),
    Rule(
        lambda it: it.is_vdm and it.config.model.variance != "fixed_small",
        "objective.name={c.objective.name!r} is the bound for model.variance='fixed_small', not for "
        "model.variance={c.model.variance!r}",
    ),
    Rule(
        lambda it: it.is_continuous and it.p.prediction == "mean",
        "objective.name={c.objective.name!r} has steps of length 0, in which model.prediction='mean' does not "
        "determine x_0; use eps, x0 or v",
    ),
    Rule(
        lambda it: (it.is_vdm or it.config.model.conditioning == "gamma") and not it.gamma_ends,
        "schedule.name={c.schedule.name!r} with schedule.num_steps={c.schedule.num_steps} ends with γ_T = ∞, which "
        "objective.name={c.objective.name!r} with model.conditioning={c.model.conditioning!r} cannot use",
    ),
    Rule(
        lambda it: (it.is_vdm or it.config.model.conditioning == "gamma") and it.config.schedule.num_steps < 2,
        "objective.name={c.objective.name!r} with model.conditioning={c.model.conditioning!r} needs γ_1 < γ_T, so "
        "schedule.num_steps={c.schedule.num_steps} must be at least 2",
    ),
    Rule(
        lambda it: it.config.model.decoder != "network" and it.protocol.decoder is not None,
        "eval.protocol={c.eval.protocol!r} has its own decoder and cannot use model.decoder={c.model.decoder!r}",
    ),
    Rule(
        lambda it: it.protocol.kl_terms and it.config.model.conditioning != "gamma",
        "eval.protocol={c.eval.protocol!r} scores other numbers of steps than schedule.num_steps, for which a network "
        "with model.conditioning={c.model.conditioning!r} is not trained; use exact, or model.conditioning='gamma'",
    ),
    Rule(
        lambda it: it.protocol.kl_terms and not (it.scores_beta_tilde and it.p.prediction != "mean"),
        "eval.protocol={c.eval.protocol!r} scores the bound for T → ∞, which model.variance={c.model.variance!r} with "
        "eval.variance={c.eval.variance!r} and model.prediction={c.model.prediction!r} does not have; use fixed_small "
        "with eps, x0 or v",
    ),
    Rule(
        lambda it: it.config.sample.guidance_interval and it.config.model.conditioning != "t",
        "sample.guidance_interval={c.sample.guidance_interval} is in units of t, but a network with "
        "model.conditioning={c.model.conditioning!r} is not conditioned on t",
    ),
    Rule(
        lambda it: it.config.model.rescale_t and it.config.model.conditioning != "t",
        "model.rescale_t={c.model.rescale_t} rescales t, but a network with "
        "model.conditioning={c.model.conditioning!r} is not conditioned on t",
    ),
    Rule(
        lambda it: it.config.sample.guidance_interval and it.config.model.rescale_t,
        "sample.guidance_interval={c.sample.guidance_interval} is in units of t, but a network with "
        "model.rescale_t={c.model.rescale_t} is not conditioned on t itself",
    ),
    Rule(
        lambda it: it.config.eval.terms_per_image >= it.config.schedule.num_steps,
        "eval.terms_per_image={c.eval.terms_per_image} must be below schedule.num_steps={c.schedule.num_steps}; "
        "0 takes every term",
    ),
    Rule(
        lambda it: not it.step.draws_from_variance and it.config.sample.variance != "model",
        "sample.variance={c.sample.variance!r} has no effect on sample.method={c.sample.method!r}, which does not use "
        "the model's variance",
    ),
    Rule(
        lambda it: it.config.model.label_dropout > 0 and not it.config.model.conditional,
        "model.label_dropout={c.model.label_dropout} leaves out labels, but model.conditional=False uses none",
    ),
    Rule(
        lambda it: it.config.sample.labels and not it.config.model.conditional,
        "sample.labels={c.sample.labels} is only for a network with model.conditional=True",
    ),
    Rule(
        lambda it: it.config.sample.guidance != 0 and it.config.model.label_dropout == 0 and not it.config.sample.guide,
        "sample.guidance={c.sample.guidance} needs a network that is also trained without labels, by "
        "model.conditional=True with model.label_dropout > 0, or a sample.guide",
    ),
    Rule(
        lambda it: it.config.sample.guide and it.config.sample.guidance == 0,
        "sample.guide={c.sample.guide!r} has no effect with sample.guidance=0",
    ),
    Rule(
        lambda it: it.config.sample.guidance_interval and it.config.sample.guidance == 0,
        "sample.guidance_interval={c.sample.guidance_interval} has no effect with sample.guidance=0",
    ),
    Rule(
        lambda it: it.guides_no_step,
        "sample.guidance_interval={c.sample.guidance_interval} contains no t of the sampler's steps, with "
        "sample.num_steps={c.sample.num_steps} (0: all) of schedule.num_steps={c.schedule.num_steps}; nothing would be "
        "guided",
    ),
    Rule(
        lambda it: it.config.ema.length > 0 and not it.config.ema.post_hoc,
        "ema.length={c.ema.length} is composed of averages that a run with ema.post_hoc={c.ema.post_hoc} does not keep",
    ),
    Rule(
        lambda it: it.config.quality.reference == "validation" and it.config.data.validation == 0,
        "quality.reference={c.quality.reference!r} is empty, because data.validation={c.data.validation} sets no "
        "training images aside",
    ),
    Rule(
        lambda it: it.config.train.patience > 0 and it.config.data.validation == 0,
        "train.patience={c.train.patience} follows val_loss, and data.validation={c.data.validation} sets no training "
        "images aside for it; take data.validation=-1 or a number",
    ),
    Rule(
        lambda it: it.config.sample.num_steps > it.config.schedule.num_steps,
        "sample.num_steps={c.sample.num_steps} exceeds schedule.num_steps={c.schedule.num_steps}",
    ),
    Rule(
        lambda it: it.grid_is_continuous and not it.knows_between,
        "sample.grid={c.sample.grid!r} has noise levels between the steps, for which a network with "
        "objective.name={c.objective.name!r}, model.conditioning={c.model.conditioning!r} and "
        "model.prediction={c.model.prediction!r} is not trained; leave out continuous",
    ),
    Rule(
        lambda it: it.grid_is_continuous and it.config.sample.variance == "optimal",
        "sample.grid={c.sample.grid!r} has noise levels between the steps, but sample.variance={c.sample.variance!r} "
        "is known only at the steps; leave out continuous",
    ),
    Rule(
        lambda it: it.leaves_out_steps and it.p.prediction == "mean",
        "sample.num_steps={c.sample.num_steps} leaves out steps of schedule.num_steps={c.schedule.num_steps}, but "
        "model.prediction={c.model.prediction!r} is the mean for the steps of that schedule only; use 0, or eps, x0 "
        "or v",
    ),
    Rule(
        lambda it: (it.leaves_out_steps or it.grid_is_continuous)
        and it.is_ancestral
        and it.config.model.variance == "learned"
        and it.config.sample.variance == "model",
        "sample.num_steps={c.sample.num_steps} with sample.grid={c.sample.grid!r} takes other steps than those of "
        "schedule.num_steps={c.schedule.num_steps}, but model.variance={c.model.variance!r} is the variance of the "
        "steps of that schedule only; use 0, or sample.variance=fixed_small, or train with "
        "model.variance=learned_range",
    ),
    Rule(
        lambda it: it.leaves_out_steps
        and it.is_ancestral
        and it.config.sample.num_steps == 1
        and it.config.model.decoder == "bayes",
        "sample.num_steps={c.sample.num_steps} draws from p(x_0 | x_1) alone, and model.decoder={c.model.decoder!r} "
        "does not ask the network for it; use 2 or more",
    ),
)


def check(config: ConfigDict) -> None:
    """Raises a one-line ValueError about the first rule that a config breaks. Call `config.check` first."""
    schedule, learned = start_schedule(config)
    combination = Combination(config, schedule, learned, sampling.step(config))
    for rule in RULES:
        if rule.is_broken(combination):
            raise ValueError(rule.message.format(c=config))
    sampling.check_grid(config, schedule)
    other_likelihood.check(config)


def hints(config: ConfigDict) -> list[str]:
    """Hints about values that are possible but probably not meant, one line each."""
    found, num_steps = [], config.train.num_steps
    still = config.ema.decay**num_steps
    if still > MOSTLY:
        shorter = max(0.0, 1 - float(f"{10 / num_steps:.0e}"))
        found.append(
            f"ema.decay={config.ema.decay} over train.num_steps={num_steps}: the average that is scored and sampled "
            f"will still weight its start by {still:.0%}; ema.decay={shorter:.6g} forgets it"
        )
    if config.train.validate_every and not config.data.validation:
        found.append(
            f"train.validate_every={config.train.validate_every} has no effect: data.validation=0 sets no training "
            "images aside for val_loss; a new run with data.validation=-1 sets aside a tenth"
        )
    return found


def check_labels(config: ConfigDict, num_classes: int) -> None:
    """Raises a ValueError unless the data have the labels that the config needs."""
    if config.model.conditional and num_classes == 0:
        raise ValueError(f"model.conditional=True needs labels, and data.name={config.data.name!r} has none")
    if beyond := [label for label in config.sample.labels if label >= num_classes]:
        raise ValueError(
            f"sample.labels={config.sample.labels}: {beyond[0]} is not one of the labels 0…{num_classes - 1} of "
            f"data.name={config.data.name!r}"
        )
