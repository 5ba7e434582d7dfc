"""CIFAR-10: the official archive, its download, and a directory that TFDS prepared."""

import hashlib
import http.server
import io
import os
import shutil
import tarfile
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds

from diffusion import data
from diffusion.data import cifar10
from diffusion.data import tfds as prepared


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A CIFAR-10 archive of 5 x 2 + 3 random pictures, served over HTTP: (path, pictures by split)."""
    rng = np.random.default_rng(0)
    sizes = {"train": 10, "test": 3}
    pictures = {split: rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for split, n in sizes.items()}
    batches = {f"data_batch_{i + 1}.bin": pictures["train"][2 * i : 2 * i + 2] for i in range(5)}
    batches["test_batch.bin"] = pictures["test"]
    path = tmp_path / "server" / "cifar-10-binary.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name, batch in batches.items():
            planes = batch.transpose(0, 3, 1, 2).reshape(len(batch), 3072)
            labels = planes[:, :1] % 10  # a picture's own, so that it can be found again
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            content = np.concatenate([labels, planes], axis=1).tobytes()
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=path.parent)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(cifar10, "URLS", [f"http://127.0.0.1:{server.server_port}/{path.name}"])
    monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    yield path, pictures
    server.shutdown()
    server.server_close()


def assert_same_pictures(found, expected):
    """Equal as sets: TFDS shuffles records by a hash of their keys."""
    assert sorted(image.tobytes() for image in found) == sorted(image.tobytes() for image in expected)


def test_cifar10_is_downloaded_and_prepared(archive, tmp_path, capfd):
    _, pictures = archive
    root = tmp_path / "data"
    for split in ("train", "test"):
        loaded = data.load("cifar10", split, str(root))
        assert_same_pictures(loaded.images(), pictures[split])
        np.testing.assert_array_equal(loaded.labels(), loaded.images()[:, 0, 0, 0] % 10)
        assert (loaded.num_levels, loaded.num_classes) == (256, 10)
    assert (root / "downloads" / "cifar-10-binary.tar.gz").exists()
    assert data.describe("cifar10:3.0.2", str(root)).num_train == 10
    screen = capfd.readouterr()
    assert screen.out == "" and "downloading cifar-10-binary.tar.gz: 100%" in screen.err
    assert "WARNING" not in screen.err


@pytest.mark.parametrize("folder", ["", "downloads"])
def test_cifar10_takes_the_copy_the_user_has(archive, tmp_path, monkeypatch, folder):
    path, pictures = archive
    root = tmp_path / "data"
    (root / folder).mkdir(parents=True)
    shutil.copy(path, root / folder)
    monkeypatch.setattr(cifar10, "download", None)
    assert_same_pictures(data.load("cifar10", "test", str(root)).images(), pictures["test"])


def test_wrong_checksum_is_refused_and_leaves_nothing(archive, tmp_path, monkeypatch):
    path, _ = archive
    root = tmp_path / "data"
    monkeypatch.setattr(cifar10, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="SHA-256 .* not 0000.*nothing was kept"):
        data.load("cifar10", "train", str(root))
    assert not [found for found in root.rglob("*") if found.is_file()]
    shutil.copy(path, root)
    with pytest.raises(ValueError, match="cifar-10-binary.tar.gz has SHA-256 .*delete it"):
        data.load("cifar10", "train", str(root))
    assert (root / path.name).exists() and prepared.find("cifar10", root) is None


def test_unreachable_server_says_where_to_put_the_archive(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "URLS", [url.replace("cifar-10-binary", "gone") for url in cifar10.URLS])
    with pytest.raises(ConnectionError, match=r"404.*put a copy at .*gone\.tar\.gz"):
        data.load("cifar10", "train", str(tmp_path / "data"))


def test_pinned_checksum_is_the_one_tfds_ships():
    line = (tfds.core.tfds_path() / "url_checksums" / "cifar10.txt").read_text().split()
    assert cifar10.URLS[0] == line[0] and cifar10.SHA256 == line[2]


@pytest.mark.skipif("DIFFUSION_TFDS_DIR" not in os.environ, reason="needs DIFFUSION_TFDS_DIR with cifar10")
def test_tfds_prepared_cifar10():
    root = os.environ["DIFFUSION_TFDS_DIR"]
    test = data.load("cifar10", "test", root)
    assert test.images().shape == (10_000, 32, 32, 3)
    directory = prepared.find("cifar10", prepared.resolve_data_dir(root))
    source = tfds.builder_from_directory(directory).as_data_source("test")
    for index in (0, 1234, 9_999):
        np.testing.assert_array_equal(test.images()[index], source[index]["image"])
