"""Every test here runs under strict dtype promotion: a float32 that slips into bfloat16 arithmetic is an error.

optax's Adam and its kin multiply a float with an int32 step count, which strict promotion refuses. Tests that call them
say `@pytest.mark.standard_promotion` (or `pytestmark = pytest.mark.standard_promotion` for a whole file).
"""

from pathlib import Path

import jax
import pytest

collect_ignore = ["fixtures"]  # reference data, and scripts that made it with other libraries


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Surrounds a test and its fixtures, whatever their scope; pytest asks it of the package's doctests, too."""
    here = item.path.is_relative_to(Path(__file__).parent)
    promotion = "standard" if item.get_closest_marker("standard_promotion") or not here else "strict"
    with jax.numpy_dtype_promotion(promotion):
        return (yield)
