"""ReplayBuffer against a naive one that stores every stacked observation twice."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

import sac_ae as script  # test_shared.py: the text is the same in every script
import slac

K, A, SHAPE = 3, 2, (3, 4, 4)
SPEC = script.EnvSpec(SHAPE, A, 5)
LENGTHS = [5, 1, 9, 2, 13, 7, 4]  # 41 transitions in 48 rows


def make(folder, capacity, rows=100):
    args = SimpleNamespace(replay_capacity=capacity, device="cpu", replay_device="auto")
    return script.ReplayBuffer(folder, rows, args, SPEC)


def fill(folder, capacity=1000, rows=100):
    """A buffer; per row t the naive transition (obs, action, reward, discount, next_obs); and the
    rows of each episode."""
    rng = np.random.default_rng(0)
    buffer = make(folder, capacity, rows)
    naive, episodes = {}, []
    for length in LENGTHS:
        stack = [rng.integers(0, 256, SHAPE, dtype=np.uint8)] * K
        state = np.zeros(5)
        buffer.add(script.Step(stack[-1], state, np.zeros(A), 0.0, 1.0, True, False, 0))
        first = buffer.row - 1
        for t in range(length):
            image = rng.integers(0, 256, SHAPE, dtype=np.uint8)
            action = np.float32(rng.random(A))
            reward, discount = rng.normal(), float(t < length - 1)
            obs, next_obs = np.concatenate(stack), np.concatenate([*stack[1:], image])
            naive[buffer.row - 1] = (obs, action, reward, discount, next_obs)
            stack = [*stack[1:], image]
            last = t == length - 1
            buffer.add(script.Step(image, state, action, reward, discount, False, last, 1))
        episodes.append(range(first, buffer.row))
    return buffer, naive, episodes


def test_transitions_equal_the_naive_buffers(tmp_path, monkeypatch):
    buffer, naive, _ = fill(tmp_path)
    rows = np.array(list(naive))
    monkeypatch.setattr(buffer, "draw", lambda *_, **__: rows)
    agent = SimpleNamespace(args=SimpleNamespace(batch_size=len(rows), frame_stack=K))
    batch = script.Agent.sample(agent, buffer, None)
    assert batch["obs"].dtype == torch.uint8 and batch["obs"].shape == (len(rows), 3 * K, 4, 4)
    for i, t in enumerate(rows):
        obs, action, reward, discount, next_obs = naive[t]
        assert np.array_equal(batch["obs"][i], obs)
        assert np.array_equal(batch["next_obs"][i], next_obs)
        assert np.array_equal(batch["action"][i], action)
        assert batch["reward"][i].item() == np.float32(reward)
        assert batch["discount"][i].item() == discount


@pytest.mark.parametrize("capacity", [1000, 30])
@pytest.mark.parametrize("length, tail", [(2, 2), (4, 4), (8, 8), (8, 2), (5, 1)])
def test_draws_are_uniform_over_exactly_the_valid_rows(tmp_path, capacity, length, tail):
    """No row before the last `capacity`, no window whose tail crosses an episode."""
    buffer, _, episodes = fill(tmp_path, capacity)
    oldest = max(buffer.row - capacity, 0)
    ends = [t for e in episodes for t in e if t - tail + 1 in e]  # of the last rows
    valid = [t - length + 1 for t in ends if t - length + 1 >= oldest]
    drawn = buffer.draw(np.random.default_rng(0), 200 * len(valid), length, tail)
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == valid
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_too_long_sequences_are_an_error(tmp_path):
    buffer, _, _ = fill(tmp_path)
    with pytest.raises(ValueError, match="15 rows"):
        buffer.draw(np.random.default_rng(0), 8, 15, 15)


@pytest.mark.parametrize("tail", [5, 2])
def test_sequences(tmp_path, tail):
    buffer, naive, episodes = fill(tmp_path)
    batch = slac.sequences(buffer, np.random.default_rng(1), 64, 5, tail)
    assert batch["obs"].shape == (64, 5, *SHAPE) and batch["action"].shape == (64, 5, A)
    images = {t + 1: naive[t][4][-3:] for t in naive}
    images |= {e[0]: naive[e[0]][0][-3:] for e in episodes}
    row_of = {image.tobytes(): row for row, image in images.items()}
    starts, crossing = {e[0] for e in episodes}, 0
    for i in range(64):
        rows = [row_of[image.numpy().tobytes()] for image in batch["obs"][i]]
        assert rows == list(range(rows[0], rows[0] + 5))
        assert any(rows[-tail] in e and rows[-1] in e for e in episodes)
        assert batch["is_first"][i].tolist() == [row in starts for row in rows]
        crossing += any(row in starts for row in rows[1:])
        for j, row in enumerate(rows):  # row t holds what arriving there brought
            action, reward = (0, 0) if row in starts else naive[row - 1][1:3]
            assert (batch["action"][i, j].numpy() == action).all()
            assert batch["reward"][i, j].item() == np.float32(reward)
    assert (crossing > 0) == (tail < 5)


def test_the_files_are_the_buffer(tmp_path):
    """Another process that opens them has the rows, and more rows make the files grow."""
    buffer, _, _ = fill(tmp_path, rows=20)
    assert buffer.row == 48 and buffer.rows > 40
    again = make(tmp_path, 1000, rows=60)
    for name, column in buffer.columns.items():
        assert torch.equal(column[:48], again.columns[name][:48])


def test_an_image_is_kept_once(tmp_path):
    """84 x 84 x 3 bytes and less than 150 for all the rest: design, section 6."""
    args = SimpleNamespace(replay_capacity=1000, device="cpu", replay_device="auto")
    script.ReplayBuffer(tmp_path, 100, args, script.EnvSpec((3, 84, 84), 6, 17))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size <= 100 * (84 * 84 * 3 + 150)
