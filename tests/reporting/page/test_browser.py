"""A page in a real browser: nothing in its console, tables that sort, no script but its own."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from diffusion.reporting import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian's package chromium) is installed")

POLICY = re.compile('<meta http-equiv="Content-Security-Policy".*?>')


@pytest.fixture
def opened(tmp_path):
    """path -> the page after its script ran, and the messages in the console."""

    def dumped(path: Path) -> tuple[str, list[str]]:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
        command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]

    return dumped


def with_script(directory: Path, script: str, keep_policy: bool = False) -> Path:
    """A copy of the page with a second script, as a user's hand; without the policy, which would not let it run."""
    text = (directory / page.NAME).read_text()
    text = text if keep_policy else POLICY.sub("", text)
    assert bool(POLICY.search(text)) == keep_policy
    copy = directory / "copy.html"
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    return copy


def body_of(content: str) -> str:
    return re.search("<body>(.*)</body>", content, re.DOTALL)[1].strip()


def test_a_page_opens_without_a_word_in_the_console(run_directory, opened):
    content, console = opened(page.write(run_directory))
    assert console == []
    assert "<button" in content, "the script ran"


def test_the_policy_stops_a_script_that_is_not_the_page_s(run_directory, opened):
    """So that the test above would see an error, and so that no file of the run could do anything."""
    page.write(run_directory)
    content, console = opened(with_script(run_directory, "document.title = 'owned'", keep_policy=True))
    assert "<title>run</title>" in content and any("Content Security Policy" in line for line in console)


def test_a_click_on_a_heading_sorts(tmp_path, opened):
    (tmp_path / "sweep").mkdir()
    lines = ["name,value", "run10,2.5", "run9,-1", "run1,", "run2,10"]
    (tmp_path / "sweep" / "table.csv").write_text("\n".join(lines))
    page.write(tmp_path / "sweep")
    script = """
        const order = () => [...document.querySelectorAll("tbody th")].map((cell) => cell.textContent).join(" ");
        const [name, value] = document.querySelectorAll("thead button");
        const found = [order()];
        for (const button of [value, value, name]) { button.click(); found.push(order()); }
        found.push(value.parentElement.ariaSort ?? "unsorted", name.parentElement.ariaSort);
        document.body.textContent = found.join("|");
    """
    content, console = opened(with_script(tmp_path / "sweep", script))
    assert console == []
    assert body_of(content).split("|") == [
        "run10 run9 run1 run2",
        "run9 run10 run2 run1",  # by number, what is missing last
        "run2 run10 run9 run1",
        "run1 run2 run9 run10",  # as a person counts
        "unsorted",
        "ascending",
    ]
