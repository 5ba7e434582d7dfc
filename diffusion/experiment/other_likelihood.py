"""The likelihood other than the bound that a config names, with checks that the model has it."""

from ml_collections import ConfigDict

from diffusion.evaluation.likelihoods import Likelihood
from diffusion.experiment import names
from diffusion.experiment.schema import LIKELIHOODS

# Keys of `eval` that affect only the bound, and only likelihoods of the reverse chain -> the values without effect.
OF_THE_BOUND = {"terms_per_image": 0, "noises_per_term": 1}
OF_THE_CHAIN = {"protocol": "exact", "variance": "model"}


def check(config: ConfigDict) -> None:
    """Raises a ValueError if the config's options for the bound conflict, and the errors of `chosen`."""
    few, noises = config.eval.terms_per_image, config.eval.noises_per_term
    if few and noises > 1:
        raise ValueError(
            f"eval.noises_per_term={noises} needs every term, but eval.terms_per_image={few} takes a few; "
            "set eval.terms_per_image=0 or eval.noises_per_term=1"
        )
    chosen(config)


def chosen(config: ConfigDict) -> Likelihood | None:
    """The likelihood that eval.likelihood names; None for the bound.

    Raises:
        ValueError: its arguments are out of range, or the model does not have this likelihood.
    """
    entry = LIKELIHOODS.bind(config.eval.likelihood)
    if entry is None:
        return None
    try:
        likelihood = entry()
        likelihood.check(names.parse(config.model.prediction).name)
    except ValueError as error:
        raise _fault(config, error) from error
    return likelihood


def usable(config: ConfigDict) -> Likelihood | None:
    """The result of `chosen`. It also raises a ValueError if a required extra is not installed."""
    likelihood = chosen(config)
    if likelihood is not None:
        try:
            likelihood.check_installed()
        except ValueError as error:
            raise _fault(config, error) from error
    return likelihood


def _fault(config: ConfigDict, error: ValueError) -> ValueError:
    return ValueError(f"eval.likelihood={config.eval.likelihood!r}: {error}")


def alone(config: ConfigDict) -> Likelihood | None:
    """The result of `usable`, for a measurement without the bound.

    Raises:
        ValueError: a key is set that has no effect on it, or an error of `usable`.
    """
    likelihood = usable(config)
    if likelihood is None:
        return None
    without_part = OF_THE_BOUND | ({} if likelihood.IS_OF_THE_CHAIN else OF_THE_CHAIN)
    for name, value in without_part.items():
        if config.eval[name] != value:
            raise ValueError(
                f"eval.{name}={config.eval[name]!r} has no effect on eval.likelihood={config.eval.likelihood!r}; "
                f"add --config.eval.{name}={value}"
            )
    return likelihood
