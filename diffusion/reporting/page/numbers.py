"""The numbers of a run as tables: the bound and its parts, other evaluations, and the quality of its samples."""

from typing import Any, NamedTuple

from diffusion.reporting.page import likelihoods, parts
from diffusion.reporting.page.contents import Contents
from diffusion.reporting.page.parts import UNKNOWN, is_number, number, text_of, with_error

SPLITS = ("test", "validation", "train")
# Entry of summary.json after the split -> its name and its format. Ho et al. (2020), eq. 5 and section 4.3.
PARTS = {
    "bpd": ("bits/dim", ".4f"),
    "decoder_bpd": ("decoder, t = 1", ".4f"),
    "kl_bpd": ("KL terms, t = 2…T", ".4f"),
    "rate_bpd": ("rate: KL terms and prior", ".4f"),
    "distortion_rmse": ("distortion: RMSE of x̂₀ in pixel values", ".4g"),
    "with_label_bpd": ("bits/dim with the label (log₂ of the number of classes)", ".4f"),
    "unconditional_bpd": ("bits/dim without labels", ".4f"),
    "label_gain_bpd": ("gain from the labels, paired by image", ".4f"),
    "images": ("images", ","),
}
# Entry of summary.json between "test_bpd_" and "_stderr" -> the cause of that part of the error.
PARTS_OF_ERROR = {
    "sampling": "not every term was computed",
    "noise": "each term is the mean over only a few ε",
}
# Entry of quality.json -> its name, and which values are better.
METRICS = {
    "fid": ("FID", "lower"),
    "frechet_distance": ("Fréchet distance", "lower"),
    "frechet_equal_n": ("Fréchet distance with equal numbers of samples and real images", "lower"),
    "fid_infinity": ("FID, extrapolated to infinitely many samples", "lower"),
    "frechet_infinity": ("Fréchet distance, extrapolated to infinitely many samples", "lower"),
    "kid": ("KID ± its standard deviation over subsets", "lower"),
    "inception_score": ("Inception score ± its standard deviation over parts", "higher"),
    "precision": ("precision", "higher"),
    "recall": ("recall", "higher"),
}
ERROR, SPREAD = "_stderr", "_std"  # earlier versions wrote standard deviations as _stderr, too
# The ending of an entry of quality.json says what is compared with the reference. An error's ending precedes it.
COMPARED = {
    "": "samples",
    "_test_split": "test split",
    "_train_split": "training split",
    "_validation_split": "validation split",
    "_train_halves": "training split, one half with the other",
}
NOT_METRICS = ("step", "num_samples", "kid_subset_size", "frechet_equal_n_images", "classifier_test_accuracy")
# One number under two names: the first if it is an FID, else the second.
TWO_NAMES = (("fid", "frechet_distance"), ("fid_infinity", "frechet_infinity"))


class Distance(NamedTuple):
    """The Fréchet distance of a run's samples; the title names its features."""

    title: str
    value: float | int


def distance(scores: dict[str, Any]) -> Distance | None:
    """The Fréchet distance in quality.json; None if there is none."""
    for entry in ("frechet_distance", "fid"):
        if is_number(scores.get(entry)):
            features = text_of(scores.get("features", ""))
            title = METRICS["fid" if _is_fid(scores) else entry][0]
            title = f"{title} ({features})" if features else title
            return Distance(title, scores[entry])
    return None


def _is_fid(scores: dict[str, Any]) -> bool:
    """Whether the Fréchet distance uses Inception features. Only then it is called FID."""
    return text_of(scores.get("features", "")).startswith("inception")


def is_of_other_weights(quality: dict[str, Any], scores: dict[str, Any]) -> bool:
    """Whether both files name their weights and these differ."""
    known = [of["ema_sha256"] for of in (quality, scores) if of.get("ema_sha256")]
    return len(known) == 2 and known[0] != known[1]


def bound(scores: dict[str, Any]) -> list[str]:
    """The bits/dim of each split with their parts, the protocol, and the bits/dim by class."""
    made = []
    found = [entry.removeprefix("test_") for entry, value in scores.items() if _is_score(entry, value)]
    if "bpd" in found:
        made.append(_bound_table(scores, found))
    for entry, words in PARTS_OF_ERROR.items():
        error = scores.get(f"test_bpd_{entry}{ERROR}")
        if is_number(error) and error > 0:
            made.append(parts.element("p", f"Part of the test bits/dim's error because {words}: {error:.4f}."))
    protocol = scores.get("protocol")
    if isinstance(protocol, dict):
        made.append(parts.element("h3", "Protocol"))
        made.append(parts.facts({name: text_of(value) for name, value in protocol.items()}))
    by_class = scores.get("test_bpd_by_class")
    if isinstance(by_class, list):
        rows = [[str(label), number(value)] for label, value in enumerate(by_class)]
        made.append(parts.table(["class", "bits/dim"], rows, "Test bits/dim by class", sortable=True))
    return made


def _is_score(entry: str, value: Any) -> bool:
    is_of_bound = entry.startswith("test_") and not likelihoods.is_of_another(entry)
    return is_of_bound and is_number(value) and not entry.endswith(ERROR)


def _entry(scores: dict[str, Any], split: str, entry: str) -> Any:
    """An entry of a split. validation_images counts the images set aside; the protocol counts those scored."""
    protocol = scores.get("protocol")
    said = protocol.get("validation_images") if isinstance(protocol, dict) else None
    if (split, entry) == ("validation", "images") and isinstance(said, str):
        first = said.partition(" ")[0]
        return int(first) if first.isdecimal() else None
    return scores.get(f"{split}_{entry}")


def _bound_table(scores: dict[str, Any], found: list[str]) -> str:
    """A table with a row per part. Unknown entries, from later versions, come last under their own names."""
    known = [entry for entry in PARTS if entry in found]
    splits = [split for split in SPLITS if f"{split}_bpd" in scores]
    rows = []
    others = [entry for entry in found if entry not in (*PARTS, "distortion_bpd")]  # it repeats the decoder's term
    for entry in known + others:
        words, form = PARTS.get(entry, (entry, ".4f"))
        values = [(_entry(scores, split, entry), scores.get(f"{split}_{entry}{ERROR}")) for split in splits]
        rows.append([words, *(with_error(value, error, form) for value, error in values)])
        if entry == "kl_bpd":
            rows.append(["prior", number(scores.get("prior_bpd"), ".2g"), *[UNKNOWN] * (len(splits) - 1)])
    return parts.table(["", *splits], rows, "The bound and its parts in bits/dim, means over images ± standard error")


def evaluations(contents: Contents) -> list[str]:
    """The results of --mode=eval, as a table of their own."""
    rows = []
    for name in contents.matching("evaluations/*/eval.json"):
        scores = contents.json(name)
        protocol = scores.get("protocol") if isinstance(scores.get("protocol"), dict) else {}
        bpd = [with_error(scores.get(f"{split}_bpd"), scores.get(f"{split}_bpd{ERROR}")) for split in SPLITS]
        described = [text_of(protocol.get(key)) for key in ("name", "variance", "estimator")]
        rows.append([name.split("/")[1], *bpd, *described])
    head = ["evaluation", *(f"{split} bits/dim" for split in SPLITS), "protocol", "variance", "estimator"]
    return [parts.table(head, rows, "Further evaluations", sortable=True)] if rows else []


def _error(scores: dict[str, Any], name: str, ending: str) -> Any:
    """The number after ± for an entry of quality.json."""
    return scores.get(f"{name}{SPREAD}{ending}", scores.get(f"{name}{ERROR}{ending}"))


def quality(scores: dict[str, Any]) -> list[str]:
    """Every metric of the samples, beside the same metric of real images for comparison."""
    endings = (ERROR, SPREAD, *(ending for ending in COMPARED if ending))
    found = [name for name, value in scores.items() if is_number(value) and not name.endswith(endings)]
    for names in TWO_NAMES:
        if set(names) <= set(found):
            found.remove(names[_is_fid(scores)])
    found = [name for name in METRICS if name in found] + [name for name in found if name not in METRICS]
    found = [name for name in found if name not in NOT_METRICS]
    if not found:
        return []
    columns = [ending for ending in COMPARED if any(is_number(scores.get(f"{name}{ending}")) for name in found)]
    rows = []
    for name in found:
        own = dict(TWO_NAMES).get(name, name)  # earlier versions wrote fid for all features
        words, better = METRICS.get(name if _is_fid(scores) else own, (name, UNKNOWN))
        if name == "frechet_equal_n":
            words += f", {text_of(scores.get('frechet_equal_n_images'))}"
        values = [(scores.get(f"{name}{end}"), _error(scores, name, end)) for end in columns]
        rows.append([words, *(with_error(value, error, ".4g") for value, error in values), better])
    caption = (
        f"{text_of(scores.get('num_samples'))} samples against {text_of(scores.get('reference'))}; "
        f"features: {text_of(scores.get('features'))}. Compare the samples with the numbers of real images."
    )
    made = [parts.table(["", *(COMPARED[ending] for ending in columns), "better"], rows, caption)]
    if isinstance(scores.get("note"), str):
        made.append(parts.element("p", f"Note: {scores['note']}."))
    return [*made, parts.facts({name: text_of(scores[name]) for name in ("sampler", "step") if name in scores}, "list")]
