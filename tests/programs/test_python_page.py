"""docs/python.md: its blocks run in order, unchanged."""

import re
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text()


def test_every_block_of_the_page_runs(untrained_demo, tiny_data_dir, monkeypatch):
    monkeypatch.chdir(untrained_demo)
    monkeypatch.setenv("TFDS_DATA_DIR", tiny_data_dir)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    code = code.replace("num_frames=8", "num_frames=6").replace("model.schedule, 10)", "model.schedule, 4)")
    found = {"__name__": "__main__"}
    # A reader's own code is not as strict as the tests are.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, "docs/python.md", "exec"), found)
    images, completed = found["images"], found["completed"]
    assert {found[name].shape for name in ("digits", "fast", "between", "completed")} == {(16, 8, 8, 1)}
    assert (completed[:, :, :4] == images[:, :, :4]).all() and (completed != images).any()
    assert found["trajectory"].shape == (6, 16, 8, 8, 1)
    assert found["bpd"].shape == (16,) and (found["noise_error"] > 0).all()
