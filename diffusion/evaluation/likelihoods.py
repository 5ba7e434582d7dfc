"""The table of values for eval.likelihood."""

from diffusion.evaluation.density import Ode
from diffusion.evaluation.importance import Importance

Likelihood = Importance | Ode  # besides the bound

LIKELIHOODS: dict[str, type[Likelihood] | None] = {
    "bound": None,  # `evaluation.bound`, with keys of its own
    Importance.KIND: Importance,
    Ode.KIND: Ode,
}
