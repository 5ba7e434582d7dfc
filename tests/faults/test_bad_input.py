"""Any wrong input of a user is a one-line error before any compilation, and nothing is written."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion import interop
from diffusion.data import tfds
from diffusion.interop import diffusers, files
from diffusion.networks.unet import UNet

BAD_CONFIGS = Path(__file__).parent / "bad_configs.py"


@pytest.mark.parametrize("number", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_generated_bad_configs(number):
    result = subprocess.run([sys.executable, str(BAD_CONFIGS), str(number)], capture_output=True, text=True)
    words = f"{number} bad configs: {number} one-line errors with exit code 2, nothing written"
    assert result.returncode == 0 and words in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("name", ["..", "a/..", "../a", "a/../b", "/etc", "a/.", "", "a/b/c", "a\0", "a\n"])
def test_the_name_of_a_data_set_does_not_leave_its_directory(name, tmp_path):
    with pytest.raises(ValueError, match="must look like"):
        tfds.find(name, tmp_path)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small network in the published layout."""
    directory = tmp_path_factory.mktemp("published")
    unet = UNet(channels=4, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=2, out_channels=1)
    shapes = diffusers._param_shapes(unet, (8, 8, 1))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    interop.save_diffusers(directory, unet, params, sample_size=8)
    return directory


def lying_header(change):
    """A safetensors file whose header says something else than its bytes."""

    def rewrite(content: bytes) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return rewrite


def first(header):
    return header[next(name for name in header if name != "__metadata__")]


LIES = {
    "a longer header than the file": lambda b: struct.pack("<Q", 2**62) + b[8:],
    "no header": lambda b: b"",
    "a header of zeros": lambda b: b[:8] + bytes(len(b) - 8),
    "a header that is no JSON": lambda b: b[:8] + b"}" + b[9:],
    "another shape": lying_header(lambda header: first(header).update(shape=[10**6, 10**6])),
    "a negative shape": lying_header(lambda header: first(header).update(shape=[-1])),
    "another dtype": lying_header(lambda header: first(header).update(dtype="F64")),
    "an unknown dtype": lying_header(lambda header: first(header).update(dtype="pickle")),
    "offsets beyond the file": lying_header(lambda header: first(header).update(data_offsets=[0, 2**40])),
    "offsets that go back": lying_header(lambda header: first(header).update(data_offsets=[8, 0])),
    "a tensor that is missing": lying_header(lambda header: header.pop(next(iter(set(header) - {"__metadata__"})))),
    "truncated data": lambda b: b[:-10],
    "bytes behind the data": lambda b: b + bytes(10),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_file_with_a_lying_header_is_refused_by_name(lie, published, tmp_path):
    (tmp_path / files.CONFIG_FILE).write_bytes((published / files.CONFIG_FILE).read_bytes())
    honest = (published / files.WEIGHTS_FILE).read_bytes()
    (tmp_path / files.WEIGHTS_FILE).write_bytes(LIES[lie](honest))
    with pytest.raises(ValueError, match=str(tmp_path / files.WEIGHTS_FILE)) as raised:
        interop.load_diffusers(tmp_path)
    assert "\n" not in str(raised.value)
