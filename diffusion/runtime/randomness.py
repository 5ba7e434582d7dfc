"""Every random number is a pure function of (seed, stream, step or image, position). There is no random state.

So resuming needs only the step, and no two uses of one seed share their noise.

JAX's `split(key, n)[i]` is `fold_in(key, i)`, so all numbers folded into one key must have the same meaning. The keys,
and the numbers that lead to them:

    stream                  the place of its name in STREAMS
      init                  Flax folds in a digest of each parameter's name
      train     step        of_step: t, examples, flip, labels
                  examples  position in the batch, then of_example: noise, dropout, probe
                  dropout   CRC-32 of the block's name
      monitor               as a step of train, without flip and labels
      eval, variance        split, image, then t = 1…T for ε, and NO_T for the choice of t
      importance  split, image, then the trajectory, then t = 0…T for the ε of x_t, with 0 for none (x_0 is given)
      noises    split, image, then the draw 1, 2, …, then t = 1…T for ε; draw 0 is that of eval
      ode       split, image, then 0: dequantization, 1: probes
      sample    image       0: x_T; 1…T − 1: the noise of x_t; T: of `after_step`, into which t is folded;
                            T + t: of churn at x_t (here T is the number of steps taken)

Two kinds of keys are both drawn from and folded into. This cannot change, because a run must resume bit by bit. No
number comes twice: the draw at place i is the exclusive or of the two words of the key that folding i would give.

- With the objectives "vdm" and "vdm_continuous" the decoder's term draws its ε from an example's key of dropout, whose
  own bits come from keys below it: `decoder_noise`.
- experiments/parameterizations.py draws the errors of image 0, 1, 2 and t from the evaluation's key of image t of the
  split of that number, whose ε come from keys below it.

NumPy's generators order the data and choose fixed subsets. They have nothing in common with these keys.
`default_rng(seed)` equals `default_rng((seed, 0))`, so the codec's first bits are those that order epoch 0.
"""

from functools import partial
from typing import NamedTuple

import jax
from jaxtyping import Array, Int, Key

STREAMS = ("init", "train", "monitor", "eval", "sample", "variance", "importance", "ode", "noises")
NO_T = 0  # t = 0 has no ε, so its number is free


class StepKeys(NamedTuple):
    """The keys of a training step."""

    t: Key[Array, ""]
    examples: Key[Array, ""]  # see `per_item` and `of_example`
    flip: Key[Array, ""]
    labels: Key[Array, ""]  # which are left out


class ExampleKeys(NamedTuple):
    """The keys of each example of a batch."""

    noise: Key[Array, " b"]  # ε
    dropout: Key[Array, " b"]
    probe: Key[Array, " b"]  # the signs of an objective that is probed


def stream(seed: int | Int[Array, ""], name: str) -> Key[Array, ""]:
    """The key of one of the STREAMS."""
    return jax.random.fold_in(jax.random.key(seed), STREAMS.index(name))


def per_item(key: Key[Array, ""], items: Int[Array, " b"]) -> Key[Array, " b"]:
    """A key for each item (an image, a position in the batch). It does not depend on the batch that the item is in."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, items)


def of_step(key: Key[Array, ""]) -> StepKeys:
    """The keys below that of a training step, or of the monitor."""
    return StepKeys(*jax.random.split(key, len(StepKeys._fields)))


def of_example(keys: Key[Array, " b"]) -> ExampleKeys:
    """The keys below those of examples."""
    split = partial(jax.random.split, num=len(ExampleKeys._fields))
    return ExampleKeys(*jax.vmap(split, out_axes=1)(keys))


def decoder_noise(key: Key[Array, ""]) -> Key[Array, ""]:
    """The key of an example's ε at t = 1, if the decoder's term is computed at every step; see above."""
    return jax.random.fold_in(key, ExampleKeys._fields.index("dropout"))
