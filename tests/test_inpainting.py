"""examples/inpainting.py: known pixels stay, the others come near the posterior if steps are repeated."""

import jax
import numpy as np

from examples import inpainting


def test_the_posterior_is_that_of_conditioning_by_precision():
    """The covariance of some coordinates given the others is the inverse of their block of the precision."""
    precision = np.linalg.inv(inpainting.COVARIANCE)
    block = precision[~inpainting.KNOWN][:, ~inpainting.KNOWN]
    mean, covariance = inpainting.exact_posterior()
    np.testing.assert_allclose(covariance, np.linalg.inv(block), rtol=1e-9)
    beside = precision[~inpainting.KNOWN][:, inpainting.KNOWN] @ inpainting.GIVEN[inpainting.KNOWN]
    np.testing.assert_allclose(mean, -np.linalg.solve(block, beside), rtol=1e-9)


def test_repeated_steps_come_near_the_posterior_and_putting_back_does_not():
    """Of 200 samples: standard errors up to 0.06 of the means and of 5% of the deviations."""
    mean, covariance = inpainting.exact_posterior()
    keys = jax.random.split(jax.random.key(0), 200)
    once, repeated = (np.asarray(inpainting.drawn(keys, times)) for times in (1, 8))
    for x in (once, repeated):
        np.testing.assert_array_equal(x[:, inpainting.KNOWN], np.float32([inpainting.GIVEN[inpainting.KNOWN]] * 200))
    assert (once.mean(axis=0)[4:] < mean - 0.25).all()
    np.testing.assert_allclose(repeated.mean(axis=0)[4:], mean, atol=0.25)
    np.testing.assert_allclose(repeated.std(axis=0)[4:], np.sqrt(np.diag(covariance)), rtol=0.2)
