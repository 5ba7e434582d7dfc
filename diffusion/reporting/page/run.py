"""The page of a run: its samples, bits/dim, quality, curves, config and versions."""

import shlex
from typing import Any

from diffusion.reporting.page import curves, layout, numbers, samples
from diffusion.reporting.page.contents import Contents
from diffusion.reporting.page.layout import Page
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

CONFIG, SUMMARY, EVALUATION, QUALITY = "config.json", "summary.json", "eval.json", "quality.json"
BASE = "base.json"  # the config file that the run started from: its name, and its values
ABSENT = "absent"
MISSING = {  # file: what it would show, and what makes it
    SUMMARY: "bits/dim, versions and digests: the run is not finished; the same command goes on",
    "samples.png": "samples and their denoising trajectory: the end of the run, or --mode=sample",
    QUALITY: "Fréchet distance and other metrics of samples: --mode=quality",
}


def page(contents: Contents) -> Page:
    """What the page of a run says."""
    found = {name: contents.json(name) for name in (SUMMARY, EVALUATION, QUALITY, CONFIG, BASE)}
    summary, quality, config = found[SUMMARY], found[QUALITY], flat(found[CONFIG])
    rows, scores = contents.metrics(), summary or found[EVALUATION]
    drawn = contents.samples()
    sections = [
        ("samples", "Samples", samples.section(contents, drawn)),
        ("trajectory", "Denoising trajectory", samples.trajectory(contents, drawn)),
        ("bound", "Bits per dimension", numbers.bound(scores) + numbers.evaluations(contents)),
        ("quality", "Sample quality", numbers.quality(quality)),
        ("curves", "Curves", curves.section(contents, rows)),
        ("config", "Config", _config(contents, config, found[BASE])),
        ("versions", "Versions and files", _versions(scores, found)),
        ("missing", "Not there yet", _missing(contents)),
    ]
    return Page(
        title=contents.directory.resolve().name,
        kicker=f"{text_of(config.get('data.name', 'unknown data'))} · {_state(config, summary, rows)}",
        lead=_lead(config, scores),
        cards=_cards(config, scores, quality, rows),
        notes=contents.problems,
        sections=sections,
    )


def flat(groups: dict[str, Any]) -> dict[str, Any]:
    """{"unet": {"channels": 128}} -> {"unet.channels": 128}."""
    values: dict[str, Any] = {}
    for name, value in groups.items():
        if isinstance(value, dict):
            values |= {f"{name}.{key}": item for key, item in flat(value).items()}
        else:
            values[name] = value
    return values


def _state(config: dict[str, Any], summary: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    if summary:
        return f"finished at step {text_of(summary.get('step'))}"
    if not rows:
        return "not trained yet"
    return f"unfinished: step {text_of(rows[-1]['step'])} of {text_of(config.get('train.num_steps'))}"


def _lead(config: dict[str, Any], scores: dict[str, Any]) -> str:
    """The experiment in a sentence."""

    def value(key: str) -> str:
        return text_of(config.get(key))

    parts = [
        f"{value('model.network')}{_parameters(scores)}",
        f"{value('train.num_steps')} steps of {value('train.batch_size')} images",
        f"{value('model.prediction')}-prediction",
        f"{value('model.variance')} variance",
        f"{value('objective.name')} objective",
        f"{value('schedule.name')} schedule, T\u00a0=\u00a0{value('schedule.num_steps')}",
    ]
    return "; ".join(parts) if config else ""


def _parameters(scores: dict[str, Any]) -> str:
    return f" with {text_of(scores['num_params'])} parameters" if is_number(scores.get("num_params")) else ""


def _cards(
    config: dict[str, Any], scores: dict[str, Any], quality: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Markup]:
    cards = {}
    for split in ("test", "train"):
        if is_number(scores.get(f"{split}_bpd")):
            title = f"bits/dim, {text_of(scores.get(f'{split}_images'))} {split} images"
            cards[title] = with_error(scores[f"{split}_bpd"], scores.get(f"{split}_bpd_stderr"))
    distance = numbers.distance(quality)
    if distance is not None:
        scale = element("span", " test split ", number(distance.of_test_split, ".4g"), class_="error")
        shown = [number(distance.value, ".4g"), scale if is_number(distance.of_test_split) else ""]
        cards[f"{distance.title}, {text_of(quality.get('num_samples'))} samples"] = joined(shown)
    losses = [row["loss"] for row in rows if is_number(row.get("loss"))]
    if losses and not scores:
        cards[f"loss at step {text_of(rows[-1]['step'])}"] = number(losses[-1])
    if is_number(scores.get("seconds")):
        title = f"time, on {text_of(scores.get('device'))}"
        cards[title] = element("data", duration(scores["seconds"]), value=repr(scores["seconds"]))
    return cards


def duration(seconds: float | int) -> str:
    """147.6 -> "2 min 28 s"."""
    whole = round(seconds)
    days, hours, minutes = whole // 86_400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days:,} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s"


def _config(contents: Contents, config: dict[str, Any], base: dict[str, Any]) -> list[Markup]:
    """What differs from the config file, the command of the run, and all keys."""
    if not config:
        return []
    parts = []
    values = flat(base["values"]) if isinstance(base.get("values"), dict) else {}
    if values:
        name = text_of(base.get("config"))
        changed = [key for key in sorted(config.keys() | values.keys()) if _value(config, key) != _value(values, key)]
        cells = [[element("code", key), text_of(_value(values, key)), text_of(_value(config, key))] for key in changed]
        sentence = f"Keys that differ from {name}" if changed else f"No key differs from {name}."
        parts.append(table(["key", name, "this run"], cells, sentence) if changed else element("p", sentence))
        settings = [f"--config.{key}={_literal(config[key])}" for key in changed if key in config]
        arguments = [f"--config={name}", f"--workdir={contents.directory}", *settings]
        parts.append(element("p", "The command of this run; given again, it goes on where the run stopped:"))
        parts.append(element("pre", " \\\n    ".join(["python main.py", *map(shlex.quote, arguments)])))
    else:
        parts.append(element("p", f"There is no {BASE}, which says from which config file the run started."))
    facts = {key: text_of(value) or '""' for key, value in sorted(config.items())}
    parts.append(element("details", element("summary", f"All {len(facts)} keys"), definitions(facts, class_="facts")))
    return parts


def _value(values: dict[str, Any], key: str) -> Any:
    return values.get(key, ABSENT)


def _literal(value: Any) -> str:
    """A value of config.json as the command line takes it."""
    return value if isinstance(value, str) else repr(value)


def _versions(scores: dict[str, Any], found: dict[str, dict[str, Any]]) -> list[Markup]:
    """What the numbers depend on, and the files that they come from."""
    versions = scores.get("versions")
    facts = {"device": scores.get("device"), "seconds": scores.get("seconds")}
    facts |= {f"{name} version": value for name, value in versions.items()} if isinstance(versions, dict) else {}
    shown = {name: number(value, ".1f") if is_number(value) else text_of(value) for name, value in facts.items()}
    shown = {name: value for name, value in shown.items() if value != UNKNOWN}
    digests = {name: element("code", text_of(value)) for name, value in scores.items() if name.endswith("_sha256")}
    folded = [layout.raw(name, value) for name, value in found.items()]
    parts = [definitions(shown, class_="facts")] if shown else []
    parts += [definitions(digests, class_="facts wide")] if digests else []
    return parts + folded


def _missing(contents: Contents) -> list[Markup]:
    lines = [
        element("li", element("code", name), f" ({words})") for name, words in MISSING.items() if not contents.has(name)
    ]
    return [element("ul", *lines)] if lines else []
