"""Every test here runs under strict dtype promotion: a float32 that slips into bfloat16 arithmetic is an error.

optax's Adam and its kin multiply a float with an int32 step count, which strict promotion refuses. Tests that call them
say `@pytest.mark.standard_promotion` (or `pytestmark = pytest.mark.standard_promotion` for a whole file).
"""

import jax
import pytest

collect_ignore = ["fixtures"]  # reference data, and scripts that made it with other libraries


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Surrounds a test and its fixtures, whatever their scope."""
    promotion = "standard" if item.get_closest_marker("standard_promotion") else "strict"
    with jax.numpy_dtype_promotion(promotion):
        return (yield)
