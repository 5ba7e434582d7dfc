"""The table of the study of learned schedules: intervals over seeds, and differences within a seed."""

from experiments import learned_schedule as study


def row(arm, seed, bpd):
    numbers = {"validation_bpd": bpd, "test_bpd": 2 * bpd, "loss_variance": 10 * bpd, "kl_loss_variance": bpd / 10}
    return {"arm": arm, "seed": seed, **numbers}


def table(by_arm):
    """The cells of each schedule."""
    rows = [row(arm, seed, bpd) for arm, by_seed in zip(study.ARMS, by_arm, strict=True) for seed, bpd in by_seed]
    setting = {"T": 20, "train_steps": 600, "validation_images": 130, "test_images": 299, "start": "cosine"}
    text = study.markdown(rows, setting)
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return text, {name: cells for name, *cells in lines[2:]}


def test_differences_are_of_the_same_seed_and_intervals_students():
    fixed = [(0, 2.0), (1, 3.0), (2, 4.0)]
    text, cells = table([fixed, [(2, 3.9), (0, 1.7), (1, 2.8)], [(seed, bpd - 0.5) for seed, bpd in fixed]])
    assert cells["learned by the bound"][3].startswith("-0.4000 ± ")
    half_width = 4.30265 / 3**0.5  # Student's quantile of three values; their standard deviation is 1
    assert cells["fixed"][:2] == [f"3.0000 ± {half_width:.4f}", "–"]
    assert cells["learned by the bound"][1] == f"-0.2000 ± {0.1 * half_width:.4f}"
    assert cells["learned by the variance"][1] == "-0.5000 (all 3 equal)"
    assert "mean ± 95% interval (Student's t, n = 3 seeds)" in text


def test_one_seed_has_no_interval():
    text, cells = table([[(0, 2.0)], [(0, 1.5)], [(0, 1.0)]])
    assert cells["learned by the bound"][:2] == ["1.5000", "-0.5000"] and "±" not in text
    assert "one seed, no interval" in text
