"""SHA-256 digests of states: equal exactly if two trees hold the same numbers, bit by bit, under the same names."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves with their paths, such as "params/conv_in/kernel", in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def leaf_sha256(tree: PyTree) -> dict[str, str]:
    """Each leaf's digest, over its dtype, shape and bytes, by its path."""

    def digest(leaf: Any) -> str:
        array = np.asarray(leaf)
        sha256 = hashlib.sha256(f"{array.dtype} {array.shape}\n".encode())
        sha256.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return sha256.hexdigest()

    names, leaves = zip(*named_leaves(tree), strict=True)
    with ThreadPoolExecutor() as threads:  # hashlib works on large buffers without Python's lock
        return dict(zip(names, threads.map(digest, leaves), strict=True))


def tree_sha256(tree: PyTree) -> str:
    """One digest of the whole tree, over the leaves' paths, dtypes, shapes and bytes, in the order of the paths."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(tree), key=lambda named: named[0]):
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
