"""The auditor: its sums equal known ones, every control fails, and the program on its page runs as printed."""

import contextlib
import io
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import likelihood, reverse, schedules
from experiments import audit, audit_bounds, audit_controls, audit_quadrature, audit_samples, audit_spaces
from experiments.audit_spaces import Space

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "audit.md").read_text()
PLANE, LINE = Space(2, 4), Space(1, 5)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Fewer points than the study takes."""
    monkeypatch.setattr(audit_quadrature, "GRIDS", {1: (33, 0.375), 2: (17, 0.7)})


def test_the_quadrature_is_the_mean_of_the_library_s_estimates():
    schedule, keys = schedules.cosine(4), jax.random.split(jax.random.key(0), 5 * 2000)
    model = LINE.model("v", "fixed_large", "network", schedule)
    x0 = jnp.repeat(LINE.images, 2000, axis=0)
    terms, _ = jax.jit(lambda x0: likelihood.vlb_terms_bpd(model.denoise, model.p, schedule, x0, keys, 5))(x0)
    prior = jax.vmap(lambda image: likelihood.prior_bpd(schedule, image))(LINE.images)
    samples = np.asarray(terms.sum(axis=1), np.float64).reshape(5, 2000)
    error = np.abs(audit.bound_bits(model, LINE.images) - np.float64(prior) - samples.mean(axis=1))
    assert (error < 5 * samples.std(axis=1) / 2000**0.5).all()


def test_the_sum_of_a_code_is_known():
    def as_numbers(images):
        return jnp.full(len(images), np.log2(16))

    assert abs(audit.excess(as_numbers, PLANE)) < 1e-6
    assert audit.excess(lambda images: as_numbers(images) - 1, PLANE) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="not the bits of 16 images"):
        audit.excess(lambda images: images, PLANE)


def test_every_control_fails_and_what_is_beside_it_passes():
    networks = {"exact": PLANE.exact()}
    rows = [*audit_controls.rows(PLANE), *audit_bounds.labels(PLANE)]
    rows += audit_samples.dequantized(PLANE, "exact", networks["exact"])
    assert [row for row in rows if not row.is_as_expected] == []
    failed = {row.what for row in rows if row.kind == "control"}
    assert len(failed) == 6 and len(rows) - len(failed) == 10
    clamp = next(row for row in rows if "ho2020" in row.what)
    # Of 4 values the two beside the mean have all the mass, so two of each pixel's are raised to 1e-12.
    assert clamp.total - 1 == pytest.approx(4e-12, rel=0.01)


@pytest.mark.slow
def test_bounds_pass_in_discrete_and_continuous_time():
    networks = {"exact": LINE.exact(), "random": audit_spaces.random_network(1)}
    chosen = dict(list(audit_bounds.variants().items())[::5])
    rows = [*audit_bounds.discrete(LINE, networks, 4, chosen, only=("cosine",))]
    rows += audit_bounds.continuous(LINE, networks, num_steps=3)
    assert len(rows) > 20 and all(row.is_code for row in rows)
    # Where the denoiser is exact and steps are small, little is lost: so small an excess would be seen.
    assert max(row.total for row in rows if row.what == "bound, T → ∞" and row.network == "exact") > 0.98


def test_weights_sum_to_one_and_files_are_codes():
    schedule, p = schedules.cosine(3), reverse.make("x0", "learned")
    rows = list(audit_samples.importance(LINE, "exact", LINE.exact(), p, schedule, 1024))
    rows.append(audit_samples.codec(LINE, "exact", LINE.exact(), "network", copies=128, num_steps=3))
    assert all(row.is_code for row in rows)
    assert rows[0].total < rows[1].total < rows[2].total < rows[3].total + rows[3].error
    assert rows[3].exactly and rows[3].error < 0.05


def test_a_network_learns_in_seconds():
    """The bound of the trained network is nearer to the entropy than that of the network before."""
    schedule = schedules.cosine(4)
    chosen = {"x0, learned": audit_quadrature.Variant(reverse.make("x0", "learned"))}
    networks = {"random": audit_spaces.random_network(1), "trained": audit_spaces.trained_network(LINE, 200)}
    random, trained = audit_bounds.discrete(LINE, networks, schedule.num_steps, chosen, only=("cosine",))
    assert LINE.entropy_bits < trained.mean_bits < random.mean_bits


def test_the_report_names_what_is_wrong():
    row = audit_bounds.Row("bound", "a bound", "2 × 3", "exact", "name", 1.5, 1e-4, 3.0, 1e-4, 3.1)
    text = audit.report([row, row._replace(total=0.9, mean_bits=3.2)], seconds=1.0)
    assert "2 bounds and 0 controls, 1 of them with an unexpected result" in text
    assert "| bound | a bound | 2 | +0.5000 ± 1e-04 | -0.1000 | **no** |" in text


def test_the_page_s_program_prints_what_the_page_says():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "docs/audit.md", "exec"), {})
    said = [float(number) for number in re.findall(r"# prints ([+-][\d.]+)", code)]
    assert len(said) == 2 and said[0] < 0 < said[1]
    np.testing.assert_allclose([float(line) for line in printed.getvalue().split()], said, atol=5e-3)
