"""PixelEnv against dm_control itself."""

from types import SimpleNamespace

import numpy as np
import pytest
from dm_control import suite

import sac_ae as script  # test_shared.py: the text is the same in every script


def make(env_id, repeat=4, size=84, render="exact", **options):
    args = SimpleNamespace(
        env_id=env_id, action_repeat=repeat, image_size=size, render=render, obs="pixels", seed=1
    )
    return script.PixelEnv(args, **options)


def actions(env, count):
    return np.float32(np.random.default_rng(0).uniform(-1, 1, (count, env.spec.action_dim)))


@pytest.mark.parametrize("env_id, camera", [("finger-spin", 0), ("quadruped-walk", 2)])
def test_exact_images_and_rewards_are_dm_controls(env_id, camera):
    """Rewards are summed over the repeats. Actions from -1 to 1 are the actuators' ranges."""
    env = make(env_id, largest_image=96)
    raw = suite.load(*env_id.split("-"), {"random": np.random.RandomState(3)})
    low, high = raw.action_spec().minimum, raw.action_spec().maximum
    steps, time_step = [env.reset(3)], raw.reset()
    for action in actions(env, 3):
        image = raw.physics.render(84, 84, camera_id=camera)
        assert np.array_equal(steps[-1].obs, image.transpose(2, 0, 1))
        state = np.concatenate([np.ravel(v) for v in time_step.observation.values()])
        np.testing.assert_allclose(steps[-1].state, state, rtol=1e-6, atol=1e-9)
        steps.append(env.step(action))
        reward = 0.0
        for _ in range(4):
            time_step = raw.step(low + (action.astype(float) + 1) / 2 * (high - low))
            reward += time_step.reward
        assert steps[-1].reward == pytest.approx(reward, abs=1e-9)
    assert np.array_equal(env.render(96), raw.physics.render(96, 96, camera_id=camera))
    assert not np.array_equal(steps[0].obs, steps[1].obs)  # no array is used again
    fast = make(env_id, render="fast").reset(3).obs
    assert 0 < np.abs(fast.astype(int) - steps[0].obs).mean() < 10


@pytest.mark.parametrize("repeat, steps, last", [(4, 250, 4), (3, 334, 1), (1500, 1, 1000)])
def test_frames_are_counted_as_simulated(repeat, steps, last):
    """1000 in an episode, also where the repeat does not divide it."""
    env = make("cheetah-run", repeat, pixels=False)
    episode = [env.reset(0)]
    assert episode[0].first and episode[0].reward == episode[0].frames == 0
    while not episode[-1].last:
        episode.append(env.step(np.zeros(6)))
    assert len(episode) == steps + 1 and episode[-1].frames == last
    assert sum(step.frames for step in episode) == 1000
    assert episode[-1].discount == 1  # a time limit is no end of the task


@pytest.mark.deep
def test_an_own_environment_may_end_for_good():
    """The discount is 0 then, at whichever of the repeated frames it ends."""
    env = make("tests/own_tasks.py:falling", pixels=False)
    step = env.reset(0)
    while not step.last:
        assert step.discount == 1
        step = env.step(np.ones(1))
    assert step.discount == 0


@pytest.mark.deep
def test_an_episode_follows_from_its_seed():
    """Whatever was played before, as a resumed run needs it."""
    one, two = (make("manipulator-bring_ball", pixels=False) for _ in range(2))
    one.reset(9)
    one.step(actions(one, 1)[0])
    for env in (one, two):
        env.episode = [env.reset(5).state, *(env.step(a).state for a in actions(env, 20))]
    assert np.array_equal(one.episode, two.episode)
    assert not np.array_equal(one.reset(5).state, one.reset(6).state)


@pytest.mark.deep
def test_every_task_of_the_suite_runs():
    for domain, task in suite.ALL_TASKS:
        env = make(f"{domain}-{task}", pixels=False)
        assert env.reset(0).obs.shape == env.spec.obs_shape
        assert np.isfinite(env.step(actions(env, 1)[0]).reward)


@pytest.mark.deep
def test_an_own_environment_that_builds_its_physics_anew():
    """dm_control's composer does at every reset; a camera of the old physics would be useless."""
    env = make("own_tasks:reach", size=32, render="fast")  # from a module
    first, again = env.reset(0).obs, env.reset(1).obs
    assert first.std() > 5 and again.std() > 5 and not np.array_equal(first, again)
