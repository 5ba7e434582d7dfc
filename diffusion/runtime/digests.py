"""SHA-256 digests of states, files and descriptions, by which cached, resumed and reused files are found."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from diffusion.runtime import files


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves with their paths, such as "params/conv_in/kernel", in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def leaf_sha256(tree: PyTree, threads: int | None = None) -> dict[str, str]:
    """Each leaf's digest, over its dtype, shape and bytes, by its path.

    Args:
        threads: the number of threads; None for as many as the machine has.
    """

    def digest(leaf: Any) -> str:
        array = np.asarray(leaf)
        sha256 = hashlib.sha256(f"{array.dtype} {array.shape}\n".encode())
        sha256.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return sha256.hexdigest()

    names, leaves = zip(*named_leaves(tree), strict=True)
    with ThreadPoolExecutor(threads) as pool:  # hashlib works on large buffers without Python's lock
        return dict(zip(names, pool.map(digest, leaves), strict=True))


def tree_sha256(tree: PyTree) -> str:
    """One digest of the whole tree, over the leaves' paths, dtypes, shapes and bytes, in the order of the paths."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(tree), key=lambda named: named[0]):
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def short_sha256(description: Any) -> str:
    """Twelve hex digits of the digest of a JSON-like description, for the name of a folder."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]


def kept_sha256(file: Path, about: str, compute: Callable[[], str]) -> str:
    """The digest that `compute` makes of a file. It is computed once and kept beside the file, if that is writable.

    Args:
        file: the file. A change of its size, its times or its place on the disk makes the kept digest invalid.
        about: everything else on which the digest depends.
    """
    stat, path = file.stat(), file.with_name(f"{file.name}.sha256")
    now = [about, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # absent or damaged
        kept = json.loads(path.read_text())
        if kept["of"] == now:
            return kept["sha256"]
    sha256 = compute()
    with contextlib.suppress(OSError):
        files.write_text(path, json.dumps({"sha256": sha256, "of": now}) + "\n")
    return sha256
