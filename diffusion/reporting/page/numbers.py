"""The numbers of a run: the bound and its parts, other evaluations of it, and the quality of its samples."""

from typing import Any, NamedTuple

from diffusion.reporting.page.contents import Contents
from diffusion.reporting.page.markup import (
    UNKNOWN,
    Markup,
    definitions,
    element,
    is_number,
    joined,
    number,
    table,
    text_of,
    with_error,
)

SPLITS = ("test", "train")
MAX_EVALUATIONS, MAX_CLASSES = 50, 200
# Entry of summary.json after "test_" or "train_": its name and how it is printed. Ho et al. (2020), eq. 5 and 4.3.
PARTS = {
    "bpd": ("bits/dim", ".4f"),
    "decoder_bpd": ("L_0: decoder", ".4f"),
    "kl_bpd": ("L_1 + … + L_{T−1}: KL terms", ".4f"),
    "rate_bpd": ("rate: L_1 + … + L_T", ".4f"),
    "distortion_rmse": ("distortion: RMSE of x̂_0 in pixel values", ".4g"),
    "unconditional_bpd": ("bits/dim without the labels", ".4f"),
    "label_gain_bpd": ("saved by the labels, image by image", ".4f"),
    "images": ("images", ","),
}
PRIOR, PRIOR_WORDS = "prior_bpd", "L_T: prior"
# Entry of quality.json: its name, and which values are better.
METRICS = {
    "fid": ("FID", "lower"),
    "frechet_distance": ("Fréchet distance", "lower"),
    "fid_infinity": ("the same, extrapolated to infinitely many samples", "lower"),
    "kid": ("KID", "lower"),
    "inception_score": ("Inception score", "higher"),
    "precision": ("precision", "higher"),
    "recall": ("recall", "higher"),
}
DISTANCES = ("frechet_distance", "fid")  # what a run is ranked by: the first that is there
ERROR, TEST_SPLIT = "_stderr", "_test_split"
# What is compared with the reference, by the ending of its entries. The error's ending comes before.
COMPARED = {
    "": "samples",
    TEST_SPLIT: "test split",
    "_train_split": "training split",
    "_train_halves": "training split, one half with the other",
}
NOT_METRICS = ("step", "num_samples", "kid_subset_size", "classifier_test_accuracy")


class Distance(NamedTuple):
    """The Fréchet distance of a run's samples, and that of the test split, if it was measured."""

    title: str  # with its features
    value: float | int
    of_test_split: Any


def distance(quality: dict[str, Any]) -> Distance | None:
    """The Fréchet distance in quality.json; None without one."""
    for name in DISTANCES:
        if is_number(quality.get(name)):
            features = text_of(quality.get("features", ""))
            # FID is its name with the features of Inception alone.
            title = METRICS["fid" if features.startswith("inception") else name][0]
            title = f"{title} ({features})" if features else title
            return Distance(title, quality[name], quality.get(f"{name}{TEST_SPLIT}"))
    return None


def bound(scores: dict[str, Any]) -> list[Markup]:
    """Bits/dim of both splits with their parts, by class, and the protocol behind them."""
    parts = []
    if any(is_number(scores.get(f"{split}_bpd")) for split in SPLITS):
        parts.append(_bound_table(scores))
        sampling = scores.get("test_bpd_sampling_stderr")
        if is_number(sampling) and sampling > 0:
            words = "Not every term was computed: of the error of the test bits/dim, "
            parts.append(element("p", words, number(sampling), " is that of estimating the other terms."))
    protocol = scores.get("protocol")
    if isinstance(protocol, dict):
        parts.append(element("h3", "Protocol"))
        parts.append(definitions({name: text_of(value) for name, value in protocol.items()}, class_="facts"))
    by_class = scores.get("test_bpd_by_class")
    if isinstance(by_class, list):
        parts.append(_by_class(by_class))
    return parts


def _bound_table(scores: dict[str, Any]) -> Markup:
    rows = []
    for entry, (words, form) in PARTS.items():
        values = [(scores.get(f"{split}_{entry}"), scores.get(f"{split}_{entry}{ERROR}")) for split in SPLITS]
        if entry == "images" or any(is_number(value) for value, _ in values):
            rows.append([subscripts(words), *(with_error(value, error, form) for value, error in values)])
        if entry == "kl_bpd" and is_number(scores.get(PRIOR)):
            rows.append([subscripts(PRIOR_WORDS), number(scores[PRIOR], ".2g"), UNKNOWN])
    known = {f"{split}_{entry}{end}" for split in SPLITS for entry in PARTS for end in ("", ERROR)}
    # What a later version of the program writes is shown under its own name.
    others = sorted(
        key.removeprefix("test_")
        for key, value in scores.items()
        if key.startswith("test_") and key not in known and is_number(value) and not key.endswith(ERROR)
    )
    for entry in others:
        if entry != "distortion_bpd":  # the decoder's term again
            pairs = [(scores.get(f"{split}_{entry}"), scores.get(f"{split}_{entry}{ERROR}")) for split in SPLITS]
            rows.append([entry, *(with_error(value, error) for value, error in pairs)])
    caption = "The bound and its parts in bits/dim, means over images ± the standard error"
    return table(["", *SPLITS], rows, caption)


def subscripts(words: str) -> Markup:
    """ "L_0 and L_{T−1}" with 0 and T−1 set low."""
    first, *others = words.split("_")
    parts = [first]
    for other in others:
        low, _, rest = other[1:].partition("}") if other.startswith("{") else (other[:1], "", other[1:])
        parts += [element("sub", low), rest]
    return joined(parts)


def _by_class(values: list[Any]) -> Markup:
    """A bar per class, from 0."""
    numbers = [value for value in values if is_number(value)]
    longest = max(numbers, default=0)
    rows = []
    for label, value in enumerate(values[:MAX_CLASSES]):
        width = 100 * value / longest if is_number(value) and longest > 0 else 0
        bar = element("span", class_="bar", style=f"width: {0.12 * max(width, 0):.3f}rem")
        rows.append([str(label), number(value), bar])
    left_out = f" (the first {MAX_CLASSES} of {len(values)})" if len(values) > MAX_CLASSES else ""
    caption = f"Test bits/dim by class{left_out}"
    return table(["class", "bits/dim", ""], rows, caption, sortable=True)


def evaluations(contents: Contents) -> list[Markup]:
    """What --mode=eval measured, apart from the run's own numbers."""
    names = contents.matching("evaluations/*/eval.json")
    if not names:
        return []
    rows = []
    for name in names[:MAX_EVALUATIONS]:
        scores = contents.json(name)
        protocol = scores.get("protocol") if isinstance(scores.get("protocol"), dict) else {}
        rows.append(
            [
                name.split("/")[1],
                with_error(scores.get("test_bpd"), scores.get("test_bpd_stderr")),
                with_error(scores.get("train_bpd"), scores.get("train_bpd_stderr")),
                *(text_of(protocol.get(key)) for key in ("name", "variance", "estimator")),
            ]
        )
    left_out = f" (the first {MAX_EVALUATIONS} of {len(names)})" if len(names) > MAX_EVALUATIONS else ""
    head = ["evaluation", "test bits/dim", "train bits/dim", "protocol", "variance", "estimator"]
    caption = f"Further evaluations{left_out}"
    return [table(head, rows, caption, sortable=True)]


def quality(scores: dict[str, Any]) -> list[Markup]:
    """Every metric of the samples, beside those of real images as the scale to read it by."""
    endings = (ERROR, *(ending for ending in COMPARED if ending))
    names = [name for name, value in scores.items() if is_number(value) and not name.endswith(endings)]
    names = sorted((name for name in names if name not in NOT_METRICS), key=_place)
    # quality.json has the Fréchet distance under both names; FID is that of Inception's features alone.
    other = "frechet_distance" if text_of(scores.get("features", "")).startswith("inception") else "fid"
    if {"fid", "frechet_distance"} <= set(names):
        names.remove(other)
    if not names:
        return []
    columns = [ending for ending in COMPARED if any(is_number(scores.get(f"{name}{ending}")) for name in names)]
    rows = []
    for name in names:
        words, better = METRICS.get(name, (name, UNKNOWN))
        numbers = [(scores.get(f"{name}{end}"), scores.get(f"{name}{ERROR}{end}")) for end in columns]
        rows.append([words, *(with_error(value, error, ".4g") for value, error in numbers), better])
    caption = (
        f"{text_of(scores.get('num_samples'))} samples against {text_of(scores.get('reference'))}; "
        f"features: {text_of(scores.get('features'))}. The numbers of real images are the scale to read them by."
    )
    parts = [table(["", *(COMPARED[ending] for ending in columns), "better"], rows, caption)]
    if isinstance(scores.get("note"), str):
        parts.append(element("p", f"Note: {scores['note']}.", class_="quiet"))
    facts = {name: text_of(scores[name]) for name in ("sampler", "step") if name in scores}
    return [*parts, definitions(facts, class_="facts wide")]


def _place(name: str) -> tuple[int, str]:
    """The known metrics first, in their order."""
    known = list(METRICS)
    return (known.index(name) if name in known else len(known), name)
