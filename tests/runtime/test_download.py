"""Downloads from a server on this machine: complete, or not there."""

import hashlib
import http.server
import threading
import urllib.error

import pytest

from diffusion.runtime.download import download

CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """/whole sends CONTENT, /cut a half of what it announces, /unannounced all of it without its length."""

    def do_GET(self):
        if self.path == "/gone":
            return self.send_error(404)
        self.send_response(200)
        if self.path != "/unannounced":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path == "/cut" else CONTENT)

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
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
