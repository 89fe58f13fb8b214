"""A few dozen of the random optimizers that .ci/sanitize makes thousands of."""

import pytest
from fuzz import failure


@pytest.mark.parametrize("seed", range(0, 60, 10))
def test_random_optimizers_keep_every_promise(seed):
    for i in range(seed, seed + 10):
        text, run, _ = failure(i)
        assert not text, f"seed {i}: {text}\n" + "\n".join(run.log)
