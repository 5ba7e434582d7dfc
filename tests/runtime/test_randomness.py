"""Random numbers are functions of seed, stream and item, and no two uses share numbers."""

import itertools
import re
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.data import batch_indices
from diffusion.runtime import randomness

DIFFUSION = Path(randomness.__file__).parents[1]
fold_in = jax.random.fold_in


def test_no_seed_stream_or_item_shares_its_key():
    keys = [
        randomness.per_item(randomness.stream(seed, name), jnp.arange(20))
        for seed in (0, 1, 2**31 - 1)
        for name in randomness.STREAMS
    ]
    data = np.concatenate([jax.random.key_data(key) for key in keys])
    assert len(np.unique(data, axis=0)) == len(data)


def test_an_item_keeps_its_key_in_any_batch_and_under_jit():
    key = randomness.stream(3, "eval")
    alone = randomness.per_item(key, jnp.asarray([7]))
    batch = jax.jit(lambda seed: randomness.per_item(randomness.stream(seed, "eval"), jnp.asarray([2, 7, 9])))(3)
    np.testing.assert_array_equal(jax.random.key_data(batch)[1:2], jax.random.key_data(alone))


def test_a_stream_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError):
        randomness.stream(0, "evaluation")


# --- The tree of keys that randomness.py describes

MOST_VALUES = 1024 * 1024 * 3  # of an image
STEPS = 4  # T
BLOCKS = ("mid_block_0", "mid_block_1") + tuple(
    f"{way}_{level}_block_{i}" for way in ("down", "up") for level in range(8) for i in range(100)
)


def keys_of_examples(key, path):
    """The keys that are drawn from for two examples: of ε, of dropout, of the decoder's own ε and of the probe."""
    for position, example in enumerate(randomness.per_item(key, jnp.arange(2))):
        own = randomness.of_example(example[None])
        yield (*path, position, "noise"), own.noise[0]
        yield (*path, position, "probe"), own.probe[0]
        yield (*path, position, "decoder"), randomness.decoder_noise(example)
        for block in BLOCKS[:3]:
            yield (*path, position, block), fold_in(own.dropout[0], zlib.crc32(block.encode()))


def drawn_keys(seed):
    """(the path, the key) of all that is drawn from, at a small size."""
    train, monitor = (randomness.stream(seed, name) for name in ("train", "monitor"))
    yield ("init",), randomness.stream(seed, "init")
    for step in range(2):
        own = randomness.of_step(fold_in(train, step))
        yield from ((("train", step, name), getattr(own, name)) for name in ("t", "flip", "labels"))
        yield from keys_of_examples(own.examples, ("train", step))
    yield ("monitor", "t"), randomness.of_step(monitor).t
    yield from keys_of_examples(randomness.of_step(monitor).examples, ("monitor",))
    for name, split in itertools.product(("eval", "variance"), range(2)):
        for image, key in enumerate(randomness.per_item(fold_in(randomness.stream(seed, name), split), jnp.arange(2))):
            yield from (((name, split, image, t), fold_in(key, t)) for t in (randomness.NO_T, *range(1, STEPS + 1)))
    for name, split, image in itertools.product(("importance", "noises", "ode"), range(2), range(2)):
        (key,) = randomness.per_item(fold_in(randomness.stream(seed, name), split), jnp.asarray([image]))
        for i in range(2):
            below = {(t,): fold_in(fold_in(key, i), t) for t in range(STEPS + 1)} if name != "ode" else {}
            yield from (((name, split, image, i, *t), own) for t, own in (below or {(): fold_in(key, i)}).items())
    for image, key in enumerate(randomness.per_item(randomness.stream(seed, "sample"), jnp.arange(2))):
        yield from ((("sample", image, t), fold_in(key, t)) for t in range(STEPS))
        yield from ((("hook", image, t), fold_in(fold_in(key, STEPS), t)) for t in range(1, STEPS + 1))


def words(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_no_two_draws_take_the_same_key():
    paths, keys = zip(*(((seed, *path), key) for seed in (0, 1) for path, key in drawn_keys(seed)), strict=True)
    named: dict[tuple[int, ...], tuple] = {}
    for path, key in zip(paths, jax.random.key_data(jnp.stack(keys)).tolist(), strict=True):
        assert named.setdefault(tuple(key), path) == path
    assert len(named) == len(set(paths)) > 150


def test_a_draw_from_a_key_and_the_keys_below_it_share_no_number():
    """What makes the two keys harmless that are both drawn from and folded into: see randomness.py."""
    example = randomness.per_item(randomness.of_step(fold_in(randomness.stream(0, "train"), 0)).examples, jnp.arange(1))
    shared = randomness.of_example(example).dropout[0]
    assert words(randomness.decoder_noise(example[0])) == words(shared)
    bits = np.asarray(jax.random.bits(shared, (1000,)))
    below = np.array([words(fold_in(shared, i)) for i in range(20)], np.uint32)
    np.testing.assert_array_equal(bits[:20], below[:, 0] ^ below[:, 1])  # two halves, combined
    assert not np.isin(bits, below).any()
    # Nor are a block's words among those that make an image's ε: its number is beyond the last pixel.
    numbers = [zlib.crc32(block.encode()) for block in BLOCKS]
    assert len(set(numbers)) == len(BLOCKS) and min(numbers) > MOST_VALUES


def test_what_splits_a_key_is_what_folds_a_number_into_it():
    """So of_step, of_example and numbers that are folded must be told apart; and old runs keep their numbers."""
    key = randomness.stream(3, "train")
    for count in (2, 4, 7):
        assert [words(one) for one in jax.random.split(key, count)] == [words(fold_in(key, i)) for i in range(count)]
    assert [words(one) for one in randomness.of_step(key)] == [words(fold_in(key, i)) for i in range(4)]
    own = randomness.of_example(key[None])
    assert [words(one[0]) for one in own] == [words(fold_in(key, i)) for i in range(3)]


def test_the_first_epoch_has_the_order_of_a_generator_of_the_seed():
    for seed in (0, 5):
        order = np.random.default_rng(seed).permutation(50)
        np.testing.assert_array_equal(batch_indices(seed, 0, 50, 50), order)
    assert not np.array_equal(batch_indices(5, 1, 50, 50), np.random.default_rng(5).permutation(50))


DERIVING = {
    "runtime/randomness.py": 5,
    "training/step.py": 2,  # a step's key; shapes
    "networks/unet.py": 1,  # a block's dropout
    "evaluation/bound.py": 3,  # a split's key; the choice of t; another draw of ε
    "evaluation/pairs.py": 1,  # a split's key
    "evaluation/importance.py": 1,  # a trajectory's
    "evaluation/density.py": 1,  # of the dequantization and of the probes
    "likelihood.py": 2,  # ε of an image and t
    "samplers.py": 3,  # noise; of the hook
    "exact/oracles.py": 1,  # of a key that the caller gives
    "experiment/memory.py": 1,  # shapes
}


def test_every_place_that_makes_a_key_is_known():
    """A new one needs a number that has no meaning yet, and a line in randomness.py."""
    pattern = re.compile(r"\brandom\.(?:fold_in|split)\b")
    found = {str(path.relative_to(DIFFUSION)): pattern.findall(path.read_text()) for path in DIFFUSION.rglob("*.py")}
    assert {name: len(uses) for name, uses in found.items() if uses} == DERIVING
