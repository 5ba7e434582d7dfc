"""The variational bound in discrete and in continuous time, as rows of `experiments.audit`.

The rows use the library's own code for every bound: `likelihood.vlb_term_bpd`, the tables of `reverse` and `schedules`,
`bound_by_steps.measure_of` and the objective `vdm`.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion import guidance, learned_schedule, likelihood, parameterizations, process, reverse, schedules
from diffusion.model import Model
from diffusion.reverse import Denoise, Reverse
from diffusion.schedules import Schedule
from experiments import audit_quadrature, audit_spaces, bound_by_steps
from experiments.audit_quadrature import Bits, Rule, Variant
from experiments.audit_spaces import Moments, Space

# Each variance is checked with every decoder and protocol. The predictions alternate: all are the same function of x_t.
PREDICTIONS = ("x0", "v", "mean")
LARGEST_ERROR = 0.1  # of a sum; with a larger one the check shows nothing


class Row(NamedTuple):
    """One construction on one space.

    kind: "bound", or "control" for a construction that must fail.
    what: the construction; `name` has its settings.
    total: Σ 2^−bits over all images, or the integral of a density; `error` is its possible error.
    mean_bits: the mean under the data; None where single images have no bits.
    exactly: whether the sum must equal 1, rather than be at most 1.
    """

    kind: str
    what: str
    space: str
    network: str
    name: str
    total: float
    error: float
    mean_bits: float | None
    mean_error: float
    entropy_bits: float
    exactly: bool = False

    @property
    def is_code(self) -> bool:
        """Whether the bits can be code lengths, given the sum, the mean and their errors."""
        long_enough = self.mean_bits is None or self.mean_bits >= self.entropy_bits - self.mean_error
        excess = abs(self.total - 1) if self.exactly else self.total - 1
        return excess <= self.error and long_enough

    def as_printed(self) -> dict[str, str]:
        """The cells of a table, by column."""
        total = f"1{self.total - 1:+.3e}" if abs(self.total - 1) < 1e-5 else f"{self.total:.6g}"
        mean = "" if self.mean_bits is None else f"{self.mean_bits:.6g}"
        words = dict(zip(self._fields, self[:5], strict=False)) | {"sum": total, "error": f"{self.error:.2g}"}
        mean_error, entropy = f"{self.mean_error:.2g}", f"{self.entropy_bits:.6g}"
        numbers = {"mean_bits": mean, "mean_error": mean_error, "entropy_bits": entropy}
        return words | numbers | {"is_code": str(self.is_code)}

    @property
    def is_as_expected(self) -> bool:
        """Whether a bound passes or a control fails, with an error small enough to tell."""
        return self.is_code == (self.kind == "bound") and self.error < LARGEST_ERROR


def row_of(kind: str, what: str, space: Space, network: str, name: str, bits: Bits) -> Row:
    """The row of a bound, from its bits of every image of the space."""
    total, error = audit_quadrature.mass(bits)
    mean, mean_error = float(space.probs @ bits.value), float(space.probs @ bits.error)
    return Row(kind, what, str(space), network, name, total, error, mean, mean_error, space.entropy_bits)


def variants(predictions: tuple[str, ...] = PREDICTIONS) -> dict[str, Variant]:
    """Every variance × decoder × protocol, by name. Of protocols with the same decoder, only the first is used."""
    found, decoders = {}, {}
    for protocol, choices in likelihood.PROTOCOLS.items():
        decoders.setdefault(choices.decoder, protocol)
    for i, variance in enumerate(reverse.VARIANCES):
        prediction = predictions[i % len(predictions)]
        for decoder in reverse.DECODERS:
            p = reverse.make(prediction, variance, decoder)
            for log_mass, protocol in decoders.items():
                found[f"{prediction}, {variance}, {decoder}, {protocol}"] = Variant(p, log_mass)
    return found


def all_schedules(num_steps: int) -> dict[str, Schedule]:
    """Every named schedule, respaced where β would exceed 1, and one that a training run might have learned."""
    found = {}
    for name, make in schedules.SCHEDULES.items():
        try:
            # The default is for 256 levels. With only a few levels, its first steps would change nothing.
            found[name] = make(num_steps, gamma_min=-6.0) if name == "linear_gamma" else make(num_steps)
        except ValueError:
            found[f"{name}, respaced"] = schedules.evenly_spaced(make(1000), num_steps)
    if num_steps < 3:  # there is nothing to learn between the two ends
        return found
    params = learned_schedule.init(schedules.cosine(num_steps))
    params["logits"] += jnp.sin(jnp.arange(num_steps - 1, dtype=jnp.float32))
    learned = learned_schedule.schedule(params | {"gamma_1": params["gamma_1"] - 1})
    # network_t as in the other schedules, so that one compiled program serves all.
    found["learned"] = dataclasses.replace(learned, network_t=found["cosine"].network_t)
    return found


def _denoise_of(moments: Moments, schedule: Schedule, p: Reverse) -> Denoise:
    return audit_spaces.denoiser(moments, p, schedule)


def x0_variance(space: Space, schedule: Schedule) -> Schedule:
    """The schedule with E Var(x_0 | x_t) of the space's data, which the variance "optimal" uses."""
    rule, _ = audit_quadrature.rules(space.num_pixels)
    table = _x0_variance(space.exact(), space.images, jnp.asarray(space.probs, jnp.float32), rule, schedule)
    return dataclasses.replace(schedule, x0_variance=table)


@jax.jit
def _x0_variance(exact: Moments, images: Array, probs: Array, rule: Rule, schedule: Schedule) -> Float[Array, " t"]:
    def of_row(row: Schedule) -> Array:
        def of_one(image: Array, eps: Array) -> Array:
            return exact(process.q_sample(row, image, eps), row.log_snr)[1].mean()

        each = jax.vmap(jax.vmap(of_one, in_axes=(None, 0)), in_axes=(0, None))
        return probs @ (each(images, rule.eps) @ rule.weight)

    return jnp.concatenate([jnp.zeros(1), jax.lax.map(of_row, schedule[1:])])


def discrete(
    space: Space, networks: dict[str, Moments], num_steps: int, chosen: dict[str, Variant], only: tuple[str, ...] = ()
) -> Iterator[Row]:
    """Every variant with every network on every schedule, or on the schedules in `only`."""
    for schedule_name, schedule in all_schedules(num_steps).items():
        if only and schedule_name not in only:
            continue
        schedule = x0_variance(space, schedule)
        for network, moments in networks.items():
            of = jax.tree_util.Partial(_denoise_of, moments, schedule)
            found = audit_quadrature.bounds_bits(of, tuple(chosen.values()), schedule, space.images, space.num_levels)
            for name, value, error in zip(chosen, found.value, found.error, strict=True):
                full_name = f"{schedule_name}, {name}"
                yield row_of("bound", f"bound, T = {num_steps}", space, network, full_name, Bits(value, error))


CONTINUOUS = ("x̂_0 clipped", "as trained")


def at_instant(model: Model, row: Schedule, x0: Array, x_t: Array, eps: Array, output: Array) -> Float[Array, "2"]:
    """The loss that an evaluation for T → ∞ computes, and the one that training minimises (VDM, eq. 17)."""
    evaluated = bound_by_steps.measure_of(model, clip_x0=True)(row, x0, x_t, eps, output)
    trained = likelihood.bits_per_dim(parameterizations.weighted_error(model.p, row, x0, x_t, eps, output))
    return jnp.stack([evaluated, trained])


def at_end(model: Model, row: Schedule, x0: Array, x_t: Array, eps: Array, output: Array) -> Float[Array, "2"]:
    """The decoder's and the prior's terms, which both losses have."""
    ends = bound_by_steps.measure_of(model, clip_x0=True)(row, x0, x_t, eps, output)
    return jnp.stack([ends, ends])


def continuous(
    space: Space, networks: dict[str, Moments], only: tuple[str, ...] = (), num_steps: int = 6
) -> Iterator[Row]:
    """The bound for T → ∞ along each curve, or along those in `only`. A curve that ends with zero signal has none."""
    p = reverse.make("x0", "fixed_small", "bayes")
    for schedule_name, schedule in all_schedules(num_steps).items():
        if only and schedule_name not in only or not np.isfinite(np.asarray(schedule.log_snr[1:])).all():
            continue
        for network, moments in networks.items():
            model = Model(audit_spaces.instants(moments, schedule), p, schedule, space.num_levels)
            found = audit_quadrature.continuous_bits(model, space.images, at_instant, at_end)
            for name, value, error in zip(CONTINUOUS, found.value, found.error, strict=True):
                full_name = f"{schedule_name}, {name}"
                yield row_of("bound", "bound, T → ∞", space, network, full_name, Bits(value, error))


class Labels(NamedTuple):
    """A network with labels, as a pytree: the moments for each label's images and, last, for all images (no label)."""

    of_label: tuple[Moments, ...]
    schedule: Schedule


LABELLED = reverse.make("x0", "learned")


def _of_label(known: Labels, x_t: Array, network_t: Array, labels: Array) -> Array:
    outputs = [audit_spaces.denoiser(moments, LABELLED, known.schedule)(x_t, network_t) for moments in known.of_label]
    which = jnp.where(labels == guidance.NO_LABEL, len(outputs) - 1, labels)
    return jax.vmap(lambda each, k: each[k], in_axes=(1, 0))(jnp.stack(outputs), which)


def labels(space: Space) -> Iterator[Row]:
    """The rows of a network conditioned on a label, which says whether the first pixel is bright.

    With the same label for all images, it has a bound like any other network, guided or not. With each image's own
    label, the bits are conditional on the label, and the bits of the label must be added.
    """
    schedule = schedules.cosine(8)
    label = (space.levels[:, 0, 0, 0] >= space.num_levels // 2).astype(int)
    share = np.asarray([space.probs[label == y].sum() for y in (0, 1)])
    of_label = [audit_spaces.of_mixture(np.where(label == y, space.probs, 0) / share[y], space.images) for y in (0, 1)]
    network = jax.tree_util.Partial(_of_label, Labels((*of_label, space.exact()), schedule))
    batch = len(space.images) * len(audit_quadrature.rules(space.num_pixels)[0].weight)

    def bits(denoise: Denoise) -> Bits:
        model = Model(denoise, LABELLED, schedule, space.num_levels)
        of = audit_quadrature.whatever_p(model)
        found = audit_quadrature.bounds_bits(of, (Variant(model.p),), schedule, space.images, space.num_levels)
        return Bits(found.value[0], found.error[0])

    given = [bits(guidance.conditional(network, jnp.full(batch, y))) for y in (0, 1)]
    own = Bits(*(np.where(label == 0, *pair) for pair in zip(*given, strict=True)))
    named = {
        "without labels": bits(guidance.unconditional(network)),
        "one label for all": given[1],
        "one label for all, guided": bits(guidance.classifier_free(network, jnp.full(batch, 1), 1.0)),
        "its own label, paid": Bits(own.value - np.log2(share[label]), own.error),
    }
    for name, found in named.items():
        yield row_of("bound", "bound of a network with labels", space, "exact", name, found)
    yield row_of("control", "each image's own label is free", space, "exact", "cosine, T = 8", own)
