"""Inception's weights: downloaded once, read by PyTorch once, converted once; every wrong file is named."""

import hashlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion.networks import inception, inception_weights
from diffusion.networks.inception_weights import layout

NAME = inception_weights.URL.rpartition("/")[2]


def test_the_layout_is_the_published_one():
    """94 convolutions with their batch norms: torchvision's 23,834,568 parameters for 1,000 classes, and 8 more."""
    shapes = layout()
    assert len(shapes) == 94 * 5 + 2
    of_batch_norms = sum(np.prod(shape) for name, shape in shapes.items() if "running" in name)
    assert sum(np.prod(shape) for shape in shapes.values()) - of_batch_norms == 23_834_568 + 8 * 2049


@pytest.fixture
def tensors(monkeypatch):
    """Weights of a network of two convolutions, which fit the layout while a test runs."""
    convolutions = {"Conv2d_1a_3x3": (4, 3, 3, 3), "Mixed_5b": {"branch1x1": (5, 4, 1, 2)}}
    monkeypatch.setattr(inception_weights, "CONVOLUTIONS", convolutions)
    random = np.random.default_rng(0)
    return {name: random.uniform(0.1, 1, shape).astype(np.float32) for name, shape in layout().items()}


class Tensor:
    """What is asked of PyTorch's."""

    def __init__(self, values):
        self.values = values

    def detach(self):
        return self

    def float(self):
        return Tensor(self.values.astype(np.float32))

    def numpy(self):
        return self.values


@pytest.fixture
def torch(monkeypatch):
    """A PyTorch that reads safetensors and counts how often."""
    fake = SimpleNamespace(calls=0)

    def load(path, map_location, weights_only):
        assert weights_only and map_location == "cpu"
        fake.calls += 1
        return {name: Tensor(values) for name, values in load_file(path).items()}

    fake.load = load
    monkeypatch.setitem(sys.modules, "torch", fake)
    return fake


@pytest.fixture
def published(tensors, tmp_path, monkeypatch):
    """A file that passes for the published one."""
    path = tmp_path / NAME
    save_file(tensors | {"Conv2d_1a_3x3.bn.num_batches_tracked": np.array(7)}, path)
    monkeypatch.setattr(inception_weights, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def assert_folded(params, tensors):
    """Convolution and batch norm by hand, on random patches."""
    for name, layer in (
        ("Conv2d_1a_3x3", params["Conv2d_1a_3x3"]),
        ("Mixed_5b.branch1x1", params["Mixed_5b"]["branch1x1"]),
    ):
        kernel = tensors[f"{name}.conv.weight"].astype(np.float64)
        patch = np.random.default_rng(1).standard_normal(kernel.shape[1:])
        weight, bias, mean, var = (
            tensors[f"{name}.bn.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        wanted = (np.einsum("oihw,ihw->o", kernel, patch) - mean) / np.sqrt(var + 0.001) * weight + bias
        found = np.einsum("hwio,ihw->o", layer["kernel"], patch) + layer["bias"]
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_array_equal(params["fc"], tensors["fc.weight"].T)


def test_pytorch_reads_the_published_file_once(published, tensors, torch):
    assert_folded(inception.load(published), tensors)
    assert_folded(inception.load(published), tensors)
    assert torch.calls == 1
    kept = published.with_name(f"{NAME}.safetensors")
    assert sorted(published.parent.iterdir()) == [published, kept]

    published.unlink()  # the converted file alone says where it comes from
    assert_folded(inception.load(kept), tensors)
    assert inception.digest(kept) == inception_weights.SHA256
    assert torch.calls == 1


def test_another_file_of_the_same_name_is_converted_anew(published, tensors, torch):
    inception.load(published)
    tensors["fc.weight"] += 1
    save_file(tensors, published)
    assert_folded(inception.load(published, check_digest=False), tensors)
    assert torch.calls == 2


def test_weights_that_cannot_be_kept_are_used(published, tensors, torch, monkeypatch, caplog):
    def full(path):
        raise OSError(f"{path} could not be written (No space left on device)")

    monkeypatch.setattr(inception_weights, "replacing", full)
    assert_folded(inception.load(published), tensors)
    assert "No space left on device" in caplog.text and list(published.parent.iterdir()) == [published]


def test_without_pytorch_one_line_says_what_to_do(published, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeError, match=rf"PyTorch is needed for .*{NAME}: pip install -e '.\[inception\]'"):
        inception.load(published)


def test_safetensors_of_the_published_names_need_no_pytorch(tensors, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "mine.safetensors"
    save_file(tensors, path)
    assert_folded(inception.load(str(path), check_digest=False), tensors)
    assert inception.digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=rf"mine.safetensors is not the published .* {inception.digest(path)}"):
        inception.load(path)


def test_a_converted_file_whose_tensors_changed_is_damaged(published, tensors, torch):
    inception.load(published)
    kept = published.with_name(f"{NAME}.safetensors")
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1  # the last number's last bits stay finite
    kept.write_bytes(content)
    for path in (published, kept):
        with pytest.raises(ValueError, match="safetensors is damaged: .*; delete it"):
            inception.load(path)
    kept.write_bytes(content[:100])
    with pytest.raises(ValueError, match="safetensors is damaged"):
        inception.load(kept)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fc.weight", None, "fc.weight is missing"),
        ("fc.weight", lambda t: t.T, r"fc.weight is \(2048, 1008\) instead of \(1008, 2048\)"),
        ("fc.weight", lambda t: t.astype(np.int32), "not float, NaN or Inf in fc.weight"),
        ("fc.bias", lambda t: t * np.nan, "not float, NaN or Inf in fc.bias"),
        ("AuxLogits.fc.bias", lambda t: np.zeros(1), "AuxLogits.fc.bias is extra"),
    ],
)
def test_other_layouts_are_refused_by_name(tensors, tmp_path, name, change, message):
    changed = {} if change is None else {name: np.ascontiguousarray(change(tensors.get(name)))}
    path = tmp_path / "mine.safetensors"
    save_file({n: t for n, t in tensors.items() if n != name} | changed, path)
    with pytest.raises(ValueError, match=f"mine.safetensors: {message}"):
        inception.load(path, check_digest=False)


def test_absent_files_are_named(tmp_path):
    for function in (inception.load, inception.digest):
        with pytest.raises(FileNotFoundError, match="no Inception weights at .*gone.pth"):
            function(tmp_path / "gone.pth")


def test_pytorch_itself_reads_and_refuses(tensors, tmp_path):
    """Where it is installed: a file of half precision, and one with an object that would have to be unpickled."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "mine.pth"
    halves = {name: torch.tensor(tensor).to(torch.bfloat16) for name, tensor in tensors.items()}
    torch.save(halves, path)
    wanted = {name: half.float().numpy() for name, half in halves.items()}
    assert_folded(inception.load(path, check_digest=False), wanted)
    for content in ({"fc.weight": Tensor(1)}, [1, 2]):
        torch.save(content, path)
        with pytest.raises(ValueError, match="mine.pth is not a PyTorch state_dict: "):
            inception.load(path, check_digest=False)
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="mine.pth is not a PyTorch state_dict: "):
        inception.load(path, check_digest=False)


def test_the_published_file_is_downloaded_once_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []

    def download(url, sha256, path, num_bytes):
        asked.append((url, sha256, num_bytes))
        path.parent.mkdir()
        path.write_bytes(b"weights")

    monkeypatch.setattr(inception_weights, "download", download)
    path = tmp_path / "diffusion" / NAME
    assert inception.published_weights() == path and inception.published_weights() == path
    assert asked == [(inception_weights.URL, inception_weights.SHA256, 95_628_359)]
    kept = path.with_name(f"{NAME}.safetensors")
    path.rename(kept)
    assert inception.published_weights() == kept and len(asked) == 1


def test_a_failed_download_says_where_a_copy_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(inception_weights, "URL", "http://127.0.0.1:1/inception.pth")  # nobody listens there
    with pytest.raises(ConnectionError, match="could not download .*refused.*: put a copy at .*/inception.pth"):
        inception.published_weights()
