"""PixelEnv against dm_control itself."""

import numpy as np
import pytest
import torch
from dm_control import suite

pytestmark = pytest.mark.shared


def make(script, env_id, seed=3, repeat=4, size=84, render="exact", **kwargs):
    return script.PixelEnv(env_id, seed, repeat, size, render, **kwargs)


def actions(env, count, seed=0):
    rng = np.random.default_rng(seed)
    return torch.as_tensor(rng.uniform(-1, 1, (count, env.spec.action_dim)), dtype=torch.float32)


@pytest.mark.parametrize("env_id, camera", [("cheetah-run", 0), ("finger-spin", 0),
                                            ("quadruped-walk", 2)])
def test_exact_images_and_rewards_are_dm_controls(script, env_id, camera):
    env = make(script, env_id, video_size=96)
    raw = suite.load(*env_id.split("-"), {"random": np.random.RandomState(3)})
    spec = raw.action_spec()
    step, time_step = env.reset(), raw.reset()
    for action in actions(env, 3):
        low, high = spec.minimum, spec.maximum
        assert np.array_equal(step.obs, raw.physics.render(84, 84, camera_id=camera)
                              .transpose(2, 0, 1))
        assert step.obs.dtype == np.uint8 and step.obs.shape == (3, 84, 84)
        state = np.concatenate([np.ravel(v) for v in time_step.observation.values()])
        np.testing.assert_allclose(step.state, state, rtol=1e-6, atol=1e-9)
        step, reward = env.step(action), 0.0
        for _ in range(4):
            time_step = raw.step(low + (action.numpy().astype(float) + 1) / 2 * (high - low))
            reward += time_step.reward
        assert step.reward == pytest.approx(reward, abs=1e-9)
    assert np.array_equal(env.render(96), raw.physics.render(96, 96, camera_id=camera))


def test_images_are_copies(script):
    env = make(script, "cheetah-run", render="fast")
    first = env.reset().obs
    before = first.copy()
    second = env.step(actions(env, 1)[0]).obs
    assert np.array_equal(first, before) and not np.array_equal(first, second)


def test_fast_images_show_the_same_scene(script):
    exact, fast = (make(script, "cheetah-run", render=r).reset().obs for r in ("exact", "fast"))
    difference = np.abs(exact.astype(int) - fast).mean()
    assert 0 < difference < 10


@pytest.mark.parametrize("repeat, steps", [(4, 250), (3, 334), (1000, 1)])
def test_episode_length_and_end(script, repeat, steps):
    env = make(script, "cheetah-run", repeat=repeat, pixels=False)
    step, count = env.reset(), 0
    assert step.reward == 0 and step.discount == 1 and not step.last
    while not step.last:
        step, count = env.step(torch.zeros(6)), count + 1
    assert count == steps
    assert step.discount == 1  # a time limit is no end of the task
    with pytest.raises(AssertionError):
        env.step(torch.zeros(6))


def test_action_range(script):
    env = make(script, "quadruped-walk", pixels=False)
    spec = env.env.action_spec()
    env.reset()
    for sign, bound in ((-1.0, spec.minimum), (1.0, spec.maximum)):
        env.step(torch.full((12,), sign))
        np.testing.assert_allclose(env.env.physics.data.ctrl, bound)


def test_every_task_of_the_suite_runs(script):
    for domain, task in suite.ALL_TASKS:
        env = make(script, f"{domain}-{task}", pixels=False)
        step = env.reset()
        assert step.obs.shape == env.spec.obs_shape and step.obs.dtype == np.float32
        assert np.isfinite(env.step(actions(env, 1)[0]).reward)


def test_lqr_ends(script):
    env = make(script, "lqr-lqr_2_1", pixels=False, repeat=50)
    step, count = env.reset(), 0
    while not step.last:
        step, count = env.step(torch.ones(1)), count + 1
    assert count <= 20


@pytest.mark.parametrize("env_id", [
    "cheetah-run", "reacher-easy", "finger-turn_easy", "ball_in_cup-catch", "quadruped-fetch",
    "manipulator-bring_ball"])
@pytest.mark.parametrize("played", [0, 7])
def test_saved_state_is_exact(script, env_id, played):
    """Also in the middle of an episode, and after the first episode."""
    env, copy = make(script, env_id, pixels=False), make(script, env_id, seed=9, pixels=False)
    env.reset()
    env.step(actions(env, 1)[0])
    env.reset()
    for action in actions(env, played):
        step = env.step(action)
    again = copy.load_state_dict(env.state_dict())
    if played:
        assert np.array_equal(step.state, again.state) and step.reward == again.reward
    for action in actions(env, 20, seed=1):
        one, two = env.step(action), copy.step(action)
        assert np.array_equal(one.state, two.state) and one.reward == two.reward
    assert np.array_equal(env.reset().state, copy.reset().state)


def test_seed_decides_the_episodes(script):
    states = [make(script, "cheetah-run", seed, pixels=False).reset().state for seed in (1, 1, 2)]
    assert np.array_equal(states[0], states[1]) and not np.array_equal(states[0], states[2])


def test_an_action_on_another_device(script):
    """What a resumed CUDA run holds: a tensor that NumPy cannot read but tolist() can."""
    class Elsewhere:
        def tolist(self):
            return [0.5] * 6

        def __array__(self, *_, **__):
            raise TypeError("can't convert a tensor on another device")

    one, two = (make(script, "cheetah-run", pixels=False) for _ in range(2))
    one.reset(), two.reset()
    assert np.array_equal(one.step(Elsewhere()).state, two.step(torch.full((6,), 0.5)).state)
