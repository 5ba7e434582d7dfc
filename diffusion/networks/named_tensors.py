"""One-line error messages about a set of named tensors."""

MAX_NAMED = 3  # in one message


def refuse_differences(found: dict[str, tuple], expected: dict[str, tuple]) -> None:
    """Raises a ValueError that names the first tensors that are missing, extra or of another shape than expected."""
    differences = [f"{name} is missing" for name in expected.keys() - found.keys()]
    differences += [f"{name} is extra" for name in found.keys() - expected.keys()]
    differences += [
        f"{name} is {tuple(found[name])} instead of {tuple(expected[name])}"
        for name in found.keys() & expected.keys()
        if tuple(found[name]) != tuple(expected[name])
    ]
    if differences:
        raise ValueError(first_few(sorted(differences)))


def first_few(items: list[str]) -> str:
    """The first few items, and the number of the others."""
    more = f" and {len(items) - MAX_NAMED} more" if len(items) > MAX_NAMED else ""
    return "; ".join(items[:MAX_NAMED]) + more
