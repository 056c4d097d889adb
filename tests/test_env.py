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


def actions(env, count, seed=0):
    return np.float32(np.random.default_rng(seed).uniform(-1, 1, (count, env.spec.action_dim)))


@pytest.mark.parametrize(
    "env_id, camera", [("cheetah-run", 0), ("finger-spin", 0), ("quadruped-walk", 2)]
)
def test_exact_images_and_rewards_are_dm_controls(env_id, camera):
    env = make(env_id, largest_image=96)
    raw = suite.load(*env_id.split("-"), {"random": np.random.RandomState(3)})
    low, high = raw.action_spec().minimum, raw.action_spec().maximum
    step, time_step = env.reset(3), raw.reset()
    for action in actions(env, 3):
        image = raw.physics.render(84, 84, camera_id=camera)
        assert np.array_equal(step.obs, image.transpose(2, 0, 1)) and step.obs.dtype == np.uint8
        state = np.concatenate([np.ravel(v) for v in time_step.observation.values()])
        np.testing.assert_allclose(step.state, state, rtol=1e-6, atol=1e-9)
        step, reward = env.step(action), 0.0
        for _ in range(4):
            time_step = raw.step(low + (action.astype(float) + 1) / 2 * (high - low))
            reward += time_step.reward
        assert step.reward == pytest.approx(reward, abs=1e-9)
    assert np.array_equal(env.render(96), raw.physics.render(96, 96, camera_id=camera))


def test_images_are_copies():
    env = make("cheetah-run", render="fast")
    first = env.reset(0).obs
    before = first.copy()
    second = env.step(actions(env, 1)[0]).obs
    assert np.array_equal(first, before) and not np.array_equal(first, second)


def test_fast_images_show_the_same_scene():
    exact, fast = (make("cheetah-run", render=r).reset(0).obs for r in ("exact", "fast"))
    difference = np.abs(exact.astype(int) - fast).mean()
    assert 0 < difference < 10


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


def test_action_range():
    env = make("quadruped-walk", pixels=False)
    bounds = env.env.action_spec()
    env.reset(0)
    for sign, bound in ((-1.0, bounds.minimum), (1.0, bounds.maximum)):
        env.step(np.full(12, sign))
        np.testing.assert_allclose(env.env.physics.data.ctrl, bound)


@pytest.mark.parametrize("env_id", ["cheetah-run", "finger-turn_easy", "manipulator-bring_ball"])
def test_an_episode_follows_from_its_seed(env_id):
    """Whatever was played before, as a resumed run needs it."""
    one, two = make(env_id, pixels=False), make(env_id, pixels=False)
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
        step = env.reset(0)
        assert step.obs.shape == env.spec.obs_shape and step.obs.dtype == np.float32
        assert np.isfinite(env.step(actions(env, 1)[0]).reward)


@pytest.mark.deep
def test_lqr_ends_and_is_the_same_task_each_time():
    """Its stiffness is drawn when the task is made."""
    env, again = (make("lqr-lqr_2_1", pixels=False, repeat=50) for _ in range(2))
    assert np.array_equal(
        env.env.physics.model.jnt_stiffness, again.env.physics.model.jnt_stiffness
    )
    step, count = env.reset(0), 0
    while not step.last:
        step, count = env.step(np.ones(1)), count + 1
    assert count <= 20


def test_an_own_environment_that_builds_its_physics_anew():
    """dm_control's composer does at every reset; a camera of the old physics would be useless."""
    env = make("tests/own_tasks.py:reach", size=32, render="fast")
    first = env.reset(0).obs.copy()
    env.step(np.zeros(env.spec.action_dim))
    again = env.reset(1).obs
    assert first.std() > 5 and again.std() > 5 and not np.array_equal(first, again)
    for sign, bound in ((-1.0, env.low), (1.0, env.high)):
        env.step(np.full(env.spec.action_dim, sign))
        np.testing.assert_allclose(env.env.physics.control(), bound, atol=1e-9)


def test_an_own_environment_may_end_for_good():
    """The discount is 0 then, at whichever of the repeated frames it ends."""
    env = make("tests/own_tasks.py:falling", pixels=False)
    step, frames = env.reset(0), 0
    while not step.last:
        assert step.discount == 1
        step = env.step(np.ones(1))
        frames += step.frames
    assert step.discount == 0 and frames < 200
    same = make("own_tasks:falling", pixels=False)  # as a module
    assert np.array_equal(same.reset(3).state, env.reset(3).state)
