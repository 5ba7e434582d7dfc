"""Tries hundreds of bad command lines, each in a forked process, so that imports cost nothing.

    python tests/faults/bad_configs.py [NUMBER=200]

Draws configs with one or two keys of a wrong type, out of range, misspelt or contradicting another key, starts main.py
with them, and prints how many ended as promised: exit code 2, a one-line error, no traceback, nothing written.
"""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import forked  # noqa: E402
from hypothesis import HealthCheck, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from configs import digits  # noqa: E402
from diffusion.experiment import config as config_lib  # noqa: E402
from diffusion.experiment import schema  # noqa: E402

DEFAULTS, KEYS = config_lib.flatten(digits.get_config()), schema.all_keys()
INTEGERS = [key for key, value in DEFAULTS.items() if type(value) is int]
NUMBERS = [key for key, value in DEFAULTS.items() if type(value) is float]
TUPLES = [key for key, value in DEFAULTS.items() if type(value) is tuple]
FLAGS = [key for key, value in DEFAULTS.items() if type(value) is bool]
CHOICES = [
    name
    for name, key in KEYS.items()
    if isinstance(key.allowed, schema.Choice) or key.allowed.words.startswith("one of ")
]
# Names with arguments that the function does not take, or not of this type or size.
BAD_CALLS = {
    "schedule.name": ("linear(0.5)", "linear(beta=0.5)", "linear(beta_end='high')", "linear(beta_end=-1.0)",
                      "linear(num_steps=5)", "linear(beta_end=open('x'))", "linear(", "learned(start='learned')",
                      "learned(inner='ends')", "learned(learning_rate=0.0)"),
    "model.network": ("unet(chanels=32)", "unet(channels=31)", "unet(out_channels=2)", "unet(dtype='float16')",
                      "unet(dropout=1.0)", "unet(channels=True)"),
    "objective.timesteps": ("loss_aware(history_length=0)", "loss_aware(uniform_share=2)", "uniform(share=1)"),
    "optim.name": (
        "adam(b2=1.0)", "adam(learning_rate=1.0)", "adam(weight_decay=0.1)", "adamw(b1='0.9')", "muon(beta=1.0)",
        "adam(eps=0.0)", "adamw(eps=-1.0)", "adamw(weight_decay=-1.0)",
    ),
    "optim.decay": ("cosine(end='zero')", "cosine(end=-1.0)", "cosine(end=1.5)", "constant(end=0.0)", "cosine(**{})"),
    "sample.method": ("ddim(eta=2)", "ddim(eta=None)", "ancestral(eta=0.5)", "ddim(clip_x0=2)"),
}  # fmt: skip
CONTRADICTIONS = [
    {"sample.num_steps": "51"}, {"eval.terms_per_image": "51"}, {"eval.num_images": "300"}, {"unet.num_groups": "5"},
    {"unet.channels": "31"}, {"unet.num_heads": "7"}, {"unet.attention_resolutions": "(3,)"},
    {"unet.channel_mult": "(1, 1, 1, 1, 1)"}, {"train.batch_size": "7", "train.grad_accum": "2"},
    {"objective.name": "simple"}, {"schedule.num_steps": "0"},
    {"eval.protocol": "ho2020", "eval.num_images": "20"}, {"objective.name": "hybrid", "model.variance": "fixed_small"},
    {"schedule.name": "harmonic", "model.prediction": "eps"}, {"objective.weighting": "p2"}, {"train.grad_accum": "64"},
    {"sample.method": "ddim", "sample.variance": "fixed_small"}, {"init_from": "nowhere"}, {"seed": "1", "sead": "1"},
]  # fmt: skip
WORDS = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=3, max_size=12)


def misspelt(key: str):
    """Keys one slip away from `key`."""
    at = st.integers(1, len(key) - 1)
    return st.one_of(
        at.map(lambda i: key[:i] + key[i + 1 :]), at.map(lambda i: key[:i] + key[i] + key[i:]), WORDS
    ).filter(lambda other: other not in KEYS and other.strip(".") and other not in ("data", "unet"))


# No "{}" among the tuples: the command line reads it as (), which is a right value for some of these keys.
BAD = st.one_of(
    st.tuples(st.sampled_from(INTEGERS), st.integers(-(10**12), -1).map(str)),
    st.tuples(st.sampled_from(INTEGERS), st.sampled_from(["many", "1.5", "(1,)", "None", "nan", "1e3", "", "0x"])),
    st.tuples(st.sampled_from(INTEGERS), st.integers(2**31, 10**30).map(str)),
    st.tuples(st.sampled_from(NUMBERS), st.sampled_from(["nan", "inf", "-inf", "-0.1", "much", "()", "1e13", ""])),
    st.tuples(st.sampled_from(FLAGS), st.sampled_from(["perhaps", "2", "()", "1.0", "None"])),
    st.tuples(st.sampled_from(TUPLES), st.sampled_from(["many", "(-1,)", "(1.5,)", "('a',)", "(1, (2,))", "{'a'}"])),
    st.tuples(st.sampled_from(CHOICES), WORDS),
    st.sampled_from([(key, call) for key, calls in BAD_CALLS.items() for call in calls]),
    st.tuples(st.sampled_from(sorted(KEYS)).flatmap(misspelt), st.just("1")),
    st.tuples(
        st.just("data.name"), st.sampled_from(["", "..", "a/..", "a/../../b", "/etc", "nowhere", "digits:9.9.9"])
    ),
).map(lambda pair: dict([pair]))


def broken_promise(overrides: dict[str, str], folder: Path) -> str:
    """ "" if the bad config ended as promised, else what happened."""
    workdir, output = folder / "run", folder / "output"
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    code = forked.start(["--config=configs/digits.py", f"--workdir={workdir}", *flags], output)
    text = output.read_text()
    last = text.strip().splitlines()[-1] if text.strip() else ""
    if code != 2 or "Traceback" in text or not last.startswith("error: ") or len(last) < 20 or workdir.exists():
        return f"{overrides}: exit code {code}, {text[-1500:]}"
    return ""


def main(number: int) -> list[str]:
    """Tries `number` bad configs; returns what went otherwise than promised."""
    os.chdir(ROOT)
    forked.import_all()
    broken, tried = [], set()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TFDS_DATA_DIR"] = folder

        @seed(0)
        @settings(max_examples=10 * number, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.one_of(BAD, st.sampled_from(CONTRADICTIONS)))
        def attempt(overrides):
            if len(tried) < number and (case := tuple(overrides.items())) not in tried:
                tried.add(case)
                own = Path(folder) / str(len(tried))
                own.mkdir()
                broken.extend(filter(None, [broken_promise(overrides, own)]))

        attempt()
    print(f"{len(tried)} bad configs: {len(tried) - len(broken)} one-line errors with exit code 2, nothing written")
    return broken


if __name__ == "__main__":
    failures = main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
    print("\n\n".join(failures))
    sys.exit(bool(failures))
