"""The bound for T = 30 and ∞ of a run in continuous time: its estimate equals the full bound's, and its errors."""

import json
import shutil

import numpy as np
import pytest

from diffusion import data
from diffusion.evaluation.bound import full_bound
from diffusion.evaluation.images import subset
from diffusion.experiment import build, workdir
from diffusion.runtime import devices
from experiments import bound_by_steps


def test_a_run_in_continuous_time_trains_and_its_bound_for_its_own_t_is_that_of_eval(vdm_run, vdm, tmp_path, capsys):
    run = shutil.copytree(vdm_run, tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    parts = [rows[-1][f"{name}_bpd"] for name in ("kl", "decoder", "prior")]
    np.testing.assert_allclose(rows[-1]["loss"], sum(parts), rtol=1e-5)
    bound_by_steps.run(run, "latest", ["30", "inf"], points=29, num_images=16)
    found = json.loads((run / "bound_by_steps.json").read_text())["rows"]
    # 29 evenly spaced points are the 29 KL terms of T = 30: the full bound, to the digits of another formula.
    test_set = data.load("digits", "test", vdm().data.data_dir)
    bound = full_bound(build.bound_settings(vdm()))
    model = devices.replicate(workdir.load(run).model)
    full = bound(model, test_set, subset(len(test_set), 16)).image_bpd
    np.testing.assert_allclose(found[0]["test_bpd"], full.mean(), rtol=1e-3)
    assert found[1]["less_last"] == 0 and found[0]["test_bpd_stderr"] > 0
    assert "| inf |" in capsys.readouterr().out
    # A clip to a box around x_0 brings no x̂_0 farther from it.
    bound_by_steps.run(run, "latest", ["30", "inf"], points=29, num_images=16, clip_x0=False)
    unclipped = json.loads((run / "bound_by_steps_unclipped.json").read_text())["rows"]
    assert all(row["test_bpd"] > clipped["test_bpd"] for row, clipped in zip(unclipped, found, strict=True))
    assert "x̂_0 is not clipped" in capsys.readouterr().out


@pytest.mark.parametrize(("points", "num_images", "words"), [(0, 16, "--points=0"), (5, 1, "--num_images=1 must")])
def test_numbers_that_leave_nothing_to_average_are_refused(points, num_images, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        bound_by_steps.run(tmp_path, "latest", ["inf"], points, num_images)


def test_a_network_that_knows_t_alone_is_refused(straight):
    with pytest.raises(ValueError, match="model.conditioning='t' works only for its own T; this needs gamma"):
        bound_by_steps.run(straight, "latest", ["6", "inf"], points=5, num_images=16)
