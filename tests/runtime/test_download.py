"""Downloads from a server on this machine: complete or absent."""

import hashlib
import http.server
import threading
import urllib.error

import pytest

from diffusion.runtime import download as downloads
from diffusion.runtime.download import download

CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """/whole sends CONTENT, /cut a half of what it announces, /unannounced all of it without its length.

    /chunks sends a chunk that ends before its announced length.

    /parts sends the part that it is asked for, and every request but the last ends after 300,000 bytes.
    """

    asked: list[str | None] = []

    def do_GET(self):
        if self.path == "/gone":
            return self.send_error(404)
        if self.path == "/parts":
            return self.send_part()
        self.send_response(200)
        if self.path == "/chunks":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            return self.wfile.write(b"100000\r\n" + CONTENT[:1000])
        if self.path != "/unannounced":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path == "/cut" else CONTENT)

    def send_part(self):
        self.asked.append(self.headers["Range"])
        begin = int((self.asked[-1] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if begin >= len(CONTENT):
            return self.send_error(416)
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - begin))
        self.end_headers()
        self.wfile.write(CONTENT[begin : begin + 300_000])

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def url():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("num_bytes", [None, len(CONTENT)])
@pytest.mark.parametrize("name", ["whole", "unannounced"])
def test_a_file_arrives_with_a_progress_bar(url, tmp_path, capsys, name, num_bytes):
    path = tmp_path / "new" / "file"
    download(f"{url}/{name}", SHA256, path, num_bytes)
    assert path.read_bytes() == CONTENT and list(path.parent.iterdir()) == [path]
    assert f"downloading file: {'100%' if num_bytes or name == 'whole' else '1.28M'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "sha256", "num_bytes", "error", "message"),
    [
        ("whole", "0" * 64, len(CONTENT), ValueError, f"sent SHA-256 {SHA256}, not 000.*nothing was kept, try again"),
        ("whole", SHA256, 1000, ValueError, f"has {len(CONTENT)} bytes, not 1000: nothing was kept"),
        ("cut", SHA256, len(CONTENT), ConnectionError, f"broke off after 640000 of {len(CONTENT)} bytes: try again"),
        ("cut", SHA256, None, ConnectionError, f"broke off after 640000 of {len(CONTENT)} bytes: try again"),
        ("gone", SHA256, None, urllib.error.HTTPError, "404"),
    ],
)
def test_what_goes_wrong_leaves_what_was_there(url, tmp_path, name, sha256, num_bytes, error, message):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error, match=message):
        download(f"{url}/{name}", sha256, path, num_bytes)
    kept = [path.with_name("file.partial")] if name == "cut" else []  # for the next call to go on after
    assert path.read_text() == "old" and sorted(tmp_path.iterdir()) == [path, *kept]


def test_what_was_cut_goes_on_after_what_there_is(url, tmp_path):
    path, Server.asked[:] = tmp_path / "file", []
    for begin in (300_000, 600_000, 900_000, 1_200_000):
        with pytest.raises(ConnectionError, match=f"broke off after {begin} of {len(CONTENT)} bytes"):
            download(f"{url}/parts", SHA256, path, len(CONTENT))
    download(f"{url}/parts", SHA256, path, len(CONTENT))
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]
    assert Server.asked == [None, *(f"bytes={begin}-" for begin in (300_000, 600_000, 900_000, 1_200_000))]


@pytest.mark.parametrize("kept", [CONTENT, CONTENT[:700_000], b"wrong" + CONTENT[5:900_000], 2 * CONTENT])
def test_what_is_kept_is_used_only_if_all_of_it_is_right(url, tmp_path, kept):
    """A server that sends no part sends all again; what has the wrong digest is thrown away."""
    path, partial = tmp_path / "file", tmp_path / "file.partial"
    partial.write_bytes(kept)
    if kept == CONTENT[: len(kept)]:
        download(f"{url}/parts" if len(kept) == len(CONTENT) else f"{url}/whole", SHA256, path)
    else:
        with pytest.raises((ValueError, ConnectionError)):
            while True:
                download(f"{url}/parts", SHA256, path)
        download(f"{url}/whole", SHA256, path)
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]


def test_the_next_server_goes_on_where_one_failed_sent_something_else_or_was_slow(url, tmp_path, monkeypatch):
    path = tmp_path / "file"
    for name in ("gone", "cut", "chunks"):
        download([f"{url}/{name}", f"{url}/whole"], SHA256, path)
        assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]
        path.unlink()
    monkeypatch.setattr(downloads, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(downloads, "SLOW_BYTES", 2**60)
    Server.asked.clear()
    monkeypatch.setattr(downloads, "BLOCK_BYTES", 1000)
    (tmp_path / "file.partial").write_bytes(CONTENT[:1_200_000])
    download([f"{url}/parts", f"{url}/parts"], SHA256, path)
    assert path.read_bytes() == CONTENT
    assert Server.asked == ["bytes=1200000-", "bytes=1201000-"]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        download([f"{url}/cut", f"{url}/gone"], SHA256, tmp_path / "other")
