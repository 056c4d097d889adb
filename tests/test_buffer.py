"""ReplayBuffer, and what the agents sample from it, against a plain list of steps."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

import sac_ae as script  # test_shared.py: the text is the same in every script
import slac


def fill(folder, capacity=1000):
    """A buffer that had to grow, the step of each of its 48 rows, and where its episode starts."""
    rng = np.random.default_rng(0)
    args = SimpleNamespace(replay_capacity=capacity, device="cpu", replay_device="auto")
    buffer = script.ReplayBuffer(folder, 20, args, script.EnvSpec((3, 4, 4), 2, 5))
    steps, starts = [], []
    for length in [5, 1, 9, 2, 13, 7, 4]:
        starts += [len(steps)] * (length + 1)
        for t in range(length + 1):
            image = rng.integers(0, 256, (3, 4, 4), dtype=np.uint8)
            arrival = np.float32(rng.random(2)), np.float32(rng.normal()), float(t < length)
            if t == 0:
                arrival = np.zeros(2), 0.0, 1.0
            steps.append(script.Step(image, np.zeros(5), *arrival, t == 0, t == length, 1))
            buffer.add(steps[-1])
    return buffer, steps, starts


def test_transitions_are_two_stacks_and_what_lies_between(tmp_path):
    """A stack has three images. Before an episode's first image it repeats that one."""
    buffer, steps, starts = fill(tmp_path)
    rows = buffer.draw(np.random.default_rng(3), 400, 2, 2)
    agent = SimpleNamespace(args=SimpleNamespace(batch_size=400, frame_stack=3))
    batch = script.Agent.sample(agent, buffer, np.random.default_rng(3))
    for i, t in enumerate(rows):
        for name, newest in (("obs", t), ("next_obs", t + 1)):
            stack = [max(row, starts[t]) for row in (newest - 2, newest - 1, newest)]
            assert np.array_equal(batch[name][i], np.concatenate([steps[s].obs for s in stack]))
        for name in ("action", "reward", "discount"):
            assert np.array_equal(batch[name][i].squeeze(), getattr(steps[t + 1], name))


@pytest.mark.parametrize("capacity", [1000, 30])
@pytest.mark.parametrize("length, tail", [(2, 2), (4, 4), (8, 8), (8, 2), (5, 1)])
def test_draws_are_uniform_over_exactly_the_valid_rows(tmp_path, capacity, length, tail):
    """No row before the last `capacity`, no window whose tail crosses an episode."""
    buffer, _, starts = fill(tmp_path, capacity)
    windows = [range(t, t + length) for t in range(max(48 - capacity, 0), 48 - length + 1)]
    valid = [window[0] for window in windows if starts[window[-tail]] == starts[window[-1]]]
    drawn = buffer.draw(np.random.default_rng(0), 200 * len(valid), length, tail)
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == valid
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("tail", [5, 2])
def test_sequences_are_steps_in_a_row(tmp_path, tail):
    buffer, steps, _ = fill(tmp_path)
    rows = buffer.draw(np.random.default_rng(1), 64, 5, tail)
    batch = slac.sequences(buffer, np.random.default_rng(1), 64, 5, tail)
    for i, j in np.ndindex(64, 5):
        step = steps[rows[i] + j]
        assert batch["is_first"][i, j] == step.first
        for name in ("obs", "action", "reward", "discount"):
            assert np.array_equal(batch[name][i, j].squeeze(), getattr(step, name))
    assert batch["is_first"][:, 1:].any() == (tail < 5)


@pytest.mark.deep
def test_too_long_sequences_are_an_error(tmp_path):
    buffer, *_ = fill(tmp_path)
    with pytest.raises(ValueError, match="15 rows"):
        buffer.draw(np.random.default_rng(0), 8, 15, 15)
