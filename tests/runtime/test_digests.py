"""Digests of trees."""

import jax.numpy as jnp
import numpy as np

from diffusion.runtime.digests import tree_sha256


def test_the_digest_changes_with_every_single_property():
    tree = {"a": np.array([1.0, 2.0], np.float32), "b": np.zeros((2, 3), np.int32)}
    digest = tree_sha256(tree)
    assert digest == tree_sha256({"b": jnp.asarray(tree["b"]), "a": jnp.asarray(tree["a"])})
    changed = [
        tree | {"a": np.array([1.0, np.nextafter(np.float32(2), np.float32(3))], np.float32)},
        tree | {"a": tree["a"].view(np.int32)},
        tree | {"b": tree["b"].reshape(3, 2)},
        {"a": tree["a"], "c": tree["b"]},
        {"a": {"b": tree["a"]}, "b": tree["b"]},
    ]
    assert len({digest} | {tree_sha256(other) for other in changed}) == 1 + len(changed)
