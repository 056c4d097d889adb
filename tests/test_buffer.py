"""ReplayBuffer against a naive one that stores every stacked observation twice."""

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

pytestmark = pytest.mark.shared
K, A, SHAPE = 3, 2, (3, 4, 4)


def fill(script, capacity, lengths, seed=0):
    """A buffer, and per row t the naive transition (obs, action, reward, discount, next_obs)."""
    rng = np.random.default_rng(seed)
    buffer = script.ReplayBuffer(capacity, script.EnvSpec(SHAPE, torch.uint8, A), "cpu")
    naive, episodes = {}, []
    for length in lengths:
        stack = [rng.integers(0, 256, SHAPE, dtype=np.uint8)] * K
        buffer.add(script.Step(stack[-1], None, np.zeros(A), 0.0, 1.0, True, False))
        first = buffer.row - 1
        for t in range(length):
            image = rng.integers(0, 256, SHAPE, dtype=np.uint8)
            action = torch.as_tensor(rng.random(A), dtype=torch.float32)
            reward, discount = rng.normal(), float(t < length - 1)
            naive[buffer.row - 1] = (np.concatenate(stack), action, reward, discount,
                                     np.concatenate([*stack[1:], image]))
            stack = [*stack[1:], image]
            buffer.add(script.Step(image, None, action, reward, discount, False, t == length - 1))
        episodes.append(range(first, buffer.row))
    return buffer, naive, episodes


LENGTHS = [5, 1, 9, 2, 13, 7, 4]  # 41 transitions in 48 rows


@pytest.mark.parametrize("capacity", [100, 48, 30, 17])
def test_transitions_equal_the_naive_buffers(script, capacity, monkeypatch):
    buffer, naive, _ = fill(script, capacity, LENGTHS)
    oldest = buffer.row - capacity
    rows = np.array([t for t in naive if t >= max(oldest + K - 1, 0) or oldest <= 0 <= t])
    monkeypatch.setattr(buffer, "draw", lambda *_, **__: rows)
    batch = buffer.transitions(None, len(rows), K)
    assert batch["obs"].dtype == torch.uint8 and batch["obs"].shape == (len(rows), 3 * K, 4, 4)
    for i, t in enumerate(rows):
        obs, action, reward, discount, next_obs = naive[t]
        assert np.array_equal(batch["obs"][i], obs)
        assert np.array_equal(batch["next_obs"][i], next_obs)
        assert torch.equal(batch["action"][i], action)
        assert batch["reward"][i].item() == np.float32(reward)
        assert batch["discount"][i].item() == discount


@pytest.mark.parametrize("capacity", [100, 30])
@pytest.mark.parametrize("length, together", [(2, 2), (4, 4), (8, 8), (8, 2), (5, 1)])
def test_draws_are_uniform_over_exactly_the_valid_rows(script, capacity, length, together):
    buffer, _, episodes = fill(script, capacity, LENGTHS)
    first = max(buffer.row - capacity, 0) + 1
    ends = [t for e in episodes for t in e if t - together + 1 in e]  # of the last rows
    valid = [t - length + 1 for t in ends if t - length + 1 >= first]
    drawn = buffer.draw(np.random.default_rng(0), 200 * len(valid), first, length, together)
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == valid
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("capacity", [100, 30])
def test_transitions_are_drawn_from_where_stacks_are_whole(script, capacity, monkeypatch):
    buffer, naive, _ = fill(script, capacity, LENGTHS)
    oldest, asked, draw = buffer.row - capacity, [], buffer.draw
    monkeypatch.setattr(buffer, "draw", lambda rng, *rest, **windows: (
        asked.append((*rest, windows)) or draw(rng, *rest, **windows)))
    buffer.transitions(np.random.default_rng(0), 8, K)
    assert asked == [(8, oldest + K - 1 if oldest > 0 else 0, {"length": 2, "together": 2})]


def test_too_long_sequences_are_an_error(script):
    buffer, _, _ = fill(script, 100, LENGTHS)
    with pytest.raises(ValueError, match="15 rows"):
        buffer.draw(np.random.default_rng(0), 8, 0, 15, 15)


@pytest.mark.parametrize("capacity", [100, 30])
@pytest.mark.parametrize("together", [5, 2])
def test_sequences(script, capacity, together):
    buffer, naive, episodes = fill(script, capacity, LENGTHS)
    batch = buffer.sequences(np.random.default_rng(1), 64, 5, together)
    assert batch["obs"].shape == (64, 5, *SHAPE) and batch["action"].shape == (64, 5, A)
    images = {t + 1: naive[t][4][-3:] for t in naive} | {
        e[0]: naive[e[0]][0][-3:] for e in episodes}
    row_of = {image.tobytes(): row for row, image in images.items()}
    starts, crossing = {e[0] for e in episodes}, 0
    for i in range(64):
        rows = [row_of[image.numpy().tobytes()] for image in batch["obs"][i]]
        assert rows == list(range(rows[0], rows[0] + 5)) and rows[0] >= buffer.row - capacity
        assert any(rows[-together] in e and rows[-1] in e for e in episodes)
        assert batch["is_first"][i].tolist() == [row in starts for row in rows]
        crossing += any(row in starts for row in rows[1:])
        for j, row in enumerate(rows):  # row t holds what arriving there brought
            action, reward = (0, 0) if row in starts else naive[row - 1][1:3]
            assert (batch["action"][i, j] == action).all()
            assert batch["reward"][i, j].item() == np.float32(reward)
    assert (crossing > 0) == (together < 5)


def test_memory(script):
    spec = script.EnvSpec((3, 84, 84), torch.uint8, 6)
    buffer = script.ReplayBuffer(1000, spec, "cpu")
    taken = buffer.start.nbytes + sum(c.nbytes for c in buffer.columns.values())
    assert taken == 1000 * buffer.row_bytes(spec)
    assert buffer.row_bytes(spec) <= 21_300


@pytest.mark.parametrize("capacity", [100, 30])
def test_saved_in_parts_and_loaded(script, capacity, tmp_path):
    """Saved at rows 20, 20 again and 48: nothing new, and a part that wraps around."""
    buffer, _, _ = fill(script, capacity, LENGTHS[:3])
    buffer.save(tmp_path)
    buffer.save(tmp_path)
    whole, _, _ = fill(script, capacity, LENGTHS)
    whole.saved = buffer.saved
    whole.save(tmp_path)
    loaded = script.ReplayBuffer(capacity, script.EnvSpec(SHAPE, torch.uint8, A), "cpu")
    loaded.load(tmp_path, whole.row)
    assert loaded.row == loaded.saved == whole.row
    kept = np.arange(max(0, whole.row - capacity), whole.row)
    for column in whole.columns:
        assert torch.equal(loaded.gather(column, kept), whole.gather(column, kept))
    assert np.array_equal(loaded.start[kept % capacity], whole.start[kept % capacity])


def test_free_memory_is_below_the_machines(script):
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < script.free_memory("cpu") <= total


def resident():
    """Memory of this process that is in RAM [bytes]."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_grows_to_what_was_announced(script, tmp_path):
    """While it fills, after it has wrapped around, and when it is saved."""
    spec = script.EnvSpec((3, 84, 84), torch.uint8, 6)
    before, rows = resident(), 6000
    buffer = script.ReplayBuffer(rows, spec, "cpu")
    image = np.full((3, 84, 84), 7, np.uint8)
    for i in range(2 * rows):
        buffer.add(script.Step(image, None, np.zeros(6), 0.0, 1.0, i % 100 == 0, False))
    announced = rows * script.ReplayBuffer.row_bytes(spec)
    assert resident() - before < 1.1 * announced + 2**24
    buffer.saved = buffer.row - 3000
    buffer.save(tmp_path)
    assert resident() - before < 1.1 * announced + 2**26
    assert len(list(tmp_path.iterdir())) == 3
