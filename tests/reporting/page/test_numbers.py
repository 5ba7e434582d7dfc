"""The numbers of a run as tables."""

from diffusion.reporting.page import numbers


def test_metrics_of_real_images_are_not_in_the_samples_column():
    scores = {"kid": 0.5, "kid_std": 0.25, "num_samples": 9}
    for ending in numbers.COMPARED:
        scores |= {f"kid{ending}": 0.5, f"kid_std{ending}": 0.25}
    table, *_ = numbers.quality(scores)
    assert table.count("<tr>") == 2, "a head and one metric"
    for name in ("test split", "training split", "validation split"):
        assert f">{name}</th>" in table
