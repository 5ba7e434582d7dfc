"""The page of a run: its samples, bits/dim, quality, curves, config and versions."""

import datetime
import re
import shlex
from typing import Any

from flax.traverse_util import flatten_dict
from markupsafe import Markup

from diffusion.reporting.page import likelihoods, numbers, parts
from diffusion.reporting.page.contents import Contents
from diffusion.reporting.page.parts import is_number, number, text_of, with_error

CONFIG, SUMMARY, EVALUATION, QUALITY = "config.json", "summary.json", "eval.json", "quality.json"
BASE = "base.json"  # the name and the values of the config file that the run started from
ABSENT = "absent"
SAMPLES, TRAJECTORY = "samples.png", "progressive.png"
PLOTS = {
    "loss.png": "The loss over training steps, and the other logged metrics",
    "bpd.png": "The term of the bound for each t, and the sum of the terms up to t",
    "rate_distortion.png": "Progressive coding: distortion and rate after each reverse step, and one against the other",
    "schedule.png": "log SNR per t: the learned schedule, and where it started",
}
MISSING = {  # file -> what it would show, and what makes it
    SUMMARY: "bits/dim, versions and digests: the run is not finished; run the same command again to continue it",
    SAMPLES: "samples and their denoising trajectory: the end of the run, or --mode=sample",
    QUALITY: "Fréchet distance and other metrics of samples: --mode=quality",
}
NOT_SCORED = "bits/dim: the run was not scored: --mode=eval --config.eval.num_images=0."
# With all pictures a page stays below 12 MB: base64 makes them 4/3 as large, and the rest is text.
MAX_BYTES, MAX_TRAJECTORY_BYTES, MAX_PLOT_BYTES, MAX_SMALL_BYTES = 2**21, 2**20, 2**19, 2**18
MAX_EARLIER = 8  # pictures of samples during training


def page(contents: Contents) -> str:
    """The HTML of a run's page."""
    found = {name: contents.json(name) for name in (SUMMARY, EVALUATION, QUALITY, CONFIG, BASE)}
    summary, quality, config = found[SUMMARY], found[QUALITY], flat(found[CONFIG])
    rows, scores = contents.metrics(), summary or found[EVALUATION]
    if numbers.is_of_other_weights(quality, scores):
        contents.problems.append(f"{QUALITY} is of other weights than the bits/dim")
    missing = [parts.element("p", f"{name}: {words}.") for name, words in MISSING.items() if not contents.has(name)]
    if summary and "test_bpd" not in summary:
        missing.append(parts.element("p", NOT_SCORED))
    plots = [parts.figure(contents, name, words, words, MAX_PLOT_BYTES, is_plot=True) for name, words in PLOTS.items()]
    sections = [
        ("samples", "Samples", _samples(contents, config)),
        ("trajectory", "Denoising trajectory", _trajectory(contents)),
        ("bound", "Bits per dimension", numbers.bound(scores) + numbers.evaluations(contents)),
        ("likelihoods", "Other likelihoods", likelihoods.tables(contents, summary)),
        ("quality", "Sample quality", numbers.quality(quality)),
        ("curves", "Curves", plots),
        ("config", "Config", _config(contents, config, found[BASE])),
        ("versions", "Versions and files", _versions(scores, found)),
        ("missing", "Not there yet", missing),
    ]
    return parts.render(
        title=contents.directory.resolve().name,
        kicker=f"{text_of(config.get('data.name', 'unknown data'))} · {_state(config, summary, rows)}",
        lead=_lead(config, scores),
        cards=_cards(scores, quality, rows),
        problems=contents.problems,
        sections=sections,
    )


def flat(groups: dict[str, Any]) -> dict[str, Any]:
    """{"unet": {"channels": 128}} -> {"unet.channels": 128}, without the version of the program."""
    return {name: value for name, value in flatten_dict(groups, sep=".").items() if name != "version"}


def _state(config: dict[str, Any], summary: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    if summary:
        return ending(summary)
    if not rows:
        return "not trained yet"
    return f"unfinished: step {text_of(rows[-1]['step'])} of {text_of(config.get('train.num_steps'))}"


def ending(summary: dict[str, Any]) -> str:
    """How the run with this summary ended."""
    step, stopped = text_of(summary.get("step")), summary.get("stopped_early")
    if not isinstance(stopped, dict):
        return f"finished at step {step}"
    count = text_of(stopped.get("validations"))
    return f"stopped early at step {step}, after {count} validations without a lower val_loss"


def _lead(config: dict[str, Any], scores: dict[str, Any]) -> str:
    """The experiment in one sentence."""
    if not config:
        return ""

    def value(key: str) -> str:
        return text_of(config.get(key))

    parameters = f" with {text_of(scores['num_params'])} parameters" if is_number(scores.get("num_params")) else ""
    return (
        f"{value('model.network')}{parameters}; {value('train.num_steps')} steps of {value('train.batch_size')} "
        f"images; {value('model.prediction')}-prediction; {value('model.variance')} variance; "
        f"{value('objective.name')} objective; {value('schedule.name')} schedule, T = {value('schedule.num_steps')}"
    )


def _cards(scores: dict[str, Any], quality: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, str]:
    """The main numbers."""
    cards = {}
    protocol = scores.get("protocol")
    labels = f", labels {text_of(protocol['labels'])}" if isinstance(protocol, dict) and "labels" in protocol else ""
    for split in numbers.SPLITS:
        if is_number(scores.get(f"{split}_bpd")):
            title = f"bits/dim, {text_of(scores.get(f'{split}_images'))} {split} images{labels}"
            cards[title] = with_error(scores[f"{split}_bpd"], scores.get(f"{split}_bpd_stderr"))
    distance = numbers.distance(quality)
    if distance is not None:
        title = f"{distance.title}, {text_of(quality.get('num_samples'))} samples"
        cards[title] = number(distance.value, ".4g")
    losses = [row["loss"] for row in rows if is_number(row.get("loss"))]
    if losses and not scores:
        cards[f"loss at step {text_of(rows[-1]['step'])}"] = number(losses[-1])
    seconds = scores.get("seconds")
    if is_number(seconds) and 0 <= seconds < 10**10:
        cards[f"time, on {text_of(scores.get('device'))}"] = str(datetime.timedelta(seconds=round(seconds)))
    return cards


def _samples(contents: Contents, config: dict[str, Any]) -> list[str]:
    """The last samples, and those during training; if there are many, evenly chosen ones."""
    caption = "The first samples" + (", a row per class" if config.get("model.conditional") else "")
    made = [parts.figure(contents, SAMPLES, "Samples of the model, side by side", caption, MAX_BYTES)]
    matches = [re.fullmatch(r"samples_(\d+)\.png", name) for name in contents.matching("samples_*.png")]
    steps = sorted(int(match[1]) for match in matches if match)
    chosen = [steps[round(i * (len(steps) - 1) / (MAX_EARLIER - 1))] for i in range(MAX_EARLIER)] if steps else []
    thumbs = [
        parts.figure(contents, f"samples_{step}.png", f"Samples at step {step:,}", f"step {step:,}", MAX_SMALL_BYTES)
        for step in dict.fromkeys(chosen)
    ]
    if any(thumbs):
        made.append(parts.element("h3", "During training"))
        made.append(Markup('<div class="thumbs">{}</div>').format(Markup().join(thumbs)))
    return made


def _trajectory(contents: Contents) -> list[str]:
    alt = "The network's prediction of the image at each frame: a row per sample, from noise to image"
    caption = "x̂₀, the network's prediction of the image: a row per sample, from noise (left) to image (right)"
    return [parts.figure(contents, TRAJECTORY, alt, caption, MAX_TRAJECTORY_BYTES)]


def _config(contents: Contents, config: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """The keys that differ from the config file, the command of the run, and all keys."""
    if not config:
        return []
    values = flat(base["values"]) if isinstance(base.get("values"), dict) else {}
    name = text_of(base.get("config"))
    if values and not name.partition(":")[0].endswith("of_run.py"):  # earlier versions wrote that for forks
        keys = sorted(config.keys() | values.keys())
        changed = [key for key in keys if config.get(key, ABSENT) != values.get(key, ABSENT)]
        cells = [[key, *(text_of(of.get(key, ABSENT)) for of in (values, config))] for key in changed]
        given = [f"--config.{key}={value}" for key in changed if (value := config.get(key, ABSENT)) is not ABSENT]
        arguments = [f"--config={name}", f"--workdir={contents.directory}", *given]
        made = [
            parts.table(["key", name, "this run"], cells, f"Keys that differ from {name}")
            if changed
            else parts.element("p", f"No key differs from {name}."),
            parts.element("p", "The command of this run. Running it again continues where the run stopped:"),
            parts.element("pre", " \\\n    ".join(["python main.py", *map(shlex.quote, arguments)])),
        ]
    else:
        made = [
            parts.element("p", "There is no config file to compare. This command continues where the run stopped:"),
            parts.element("pre", shlex.join(["python", "main.py", f"--workdir={contents.directory}"])),
        ]
    lines = "\n".join(f"{key} = {text_of(value)}" for key, value in sorted(config.items()))
    return [*made, parts.folded(f"All {len(config)} keys", lines)]


def _versions(scores: dict[str, Any], found: dict[str, dict[str, Any]]) -> list[str]:
    """The device, versions and digests behind the numbers, and the files that hold them."""
    versions = scores["versions"] if isinstance(scores.get("versions"), dict) else {}
    named = {"device": scores.get("device"), **{f"{name} version": value for name, value in versions.items()}}
    facts = {name: text_of(value) for name, value in named.items() if value is not None}
    facts |= {"seconds": number(scores["seconds"], ".1f")} if "seconds" in scores else {}
    digests = {name: text_of(value) for name, value in scores.items() if name.endswith("_sha256")}
    return [parts.facts(facts), parts.facts(digests, "list"), *(parts.folded(*file) for file in found.items())]
