"""benchmark/gym_tasks.py against gymnasium's own environments."""

import numpy as np
import pytest
from conftest import ROOT

gymnasium = pytest.importorskip("gymnasium")
NAMES = {"half_cheetah": "HalfCheetah", "walker2d": "Walker2d", "hopper": "Hopper", "ant": "Ant"}


@pytest.mark.deep
@pytest.mark.parametrize("name", NAMES)
def test_rewards_terminations_and_positions_are_gymnasiums(name):
    """For 1000 random steps from equal states; after a termination, from another equal state."""
    import runpy

    ours = runpy.run_path(ROOT / "benchmark/gym_tasks.py")[name](np.random.RandomState(0))
    theirs = gymnasium.make(f"{NAMES[name]}-v4").unwrapped
    rng = np.random.default_rng(0)
    ended = 0
    time_step = None
    for _ in range(1000):
        if time_step is None or time_step.last():
            time_step = ours.reset()
            theirs.reset(seed=0)
            theirs.set_state(ours.physics.data.qpos.copy(), ours.physics.data.qvel.copy())
        action = rng.uniform(-1, 1, ours.action_spec().shape)
        time_step = ours.step(action)
        _, reward, terminated, *_ = theirs.step(action)
        assert time_step.reward == pytest.approx(reward, abs=1e-9)
        assert (time_step.discount == 0) == terminated
        np.testing.assert_allclose(ours.physics.data.qpos, theirs.data.qpos, atol=1e-9)
        np.testing.assert_allclose(ours.physics.data.qvel, theirs.data.qvel, atol=1e-9)
        ended += terminated
    assert (ended > 0) == (name != "half_cheetah")
    assert ours.action_spec().shape == theirs.action_space.shape
    seen = np.concatenate([np.ravel(v) for v in time_step.observation.values()])
    assert seen.shape == theirs.observation_space.shape
