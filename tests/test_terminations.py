"""Tasks that end before their time, as Gym's walkers do when they fall: the last row of an episode
has a discount of 0."""

import importlib
import tempfile

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_args


def fallen(name, flags):
    """An agent, a buffer with episodes of a pole that soon leans too far, and random numbers."""
    module = importlib.import_module(name)
    task = f"--env-id {ROOT}/tests/own_tasks.py:falling --action-repeat 2"
    args = tiny_args(module, f"{task} {flags}")
    env = module.PixelEnv(args)
    torch.manual_seed(0)
    agent = module.Agent(args, env.spec)
    buffer = module.ReplayBuffer(tempfile.mkdtemp(), 500, args, env.spec)
    rng = np.random.default_rng(0)
    for episode in range(15):
        step = env.reset(episode)
        buffer.add(step)
        while not step.last:
            step = env.step(rng.uniform(-1, 1, 1))
            buffer.add(step)
    return agent, buffer, rng


@pytest.mark.parametrize(
    "name, flags", [("sac_ae", "--batch-size 64"), ("sac_gaara", "--batch-size 64"),
                    ("slac", "--sac-batch-size 64 --pretrain-updates 0")],
)  # fmt: skip
def test_targets_bootstrap_everywhere_but_at_a_termination(name, flags, monkeypatch):
    agent, buffer, rng = fallen(name, flags)
    targets = []
    mse_loss = torch.nn.functional.mse_loss

    def remember(value, target):
        targets.append(target)
        return mse_loss(value, target)

    monkeypatch.setattr(torch.nn.functional, "mse_loss", remember)
    batch = agent.sample(buffer, rng)
    agent.update(batch)
    transitions = batch.get("sac", batch)
    reward, discount = transitions["reward"], transitions["discount"]
    if name == "slac":  # a window's last row is where its last transition arrives
        reward, discount = reward[:, -1], discount[:, -1]
    ended = discount == 0
    assert 0 < ended.sum() < 32
    for target in targets[:2]:  # of both Qs
        assert ((target == reward) == ended).all()


def test_slacs_reward_loss_keeps_the_step_that_ends_an_episode():
    """slac.pytorch leaves it out, the authors' code does not."""
    agent, buffer, rng = fallen("slac", "--model-batch-size 64")
    batch = agent.sample(buffer, rng)["model"]
    batch["reward"].requires_grad_()
    agent.model_losses(**batch)[0]["loss/reward"].backward()
    learned = batch["reward"].grad[:, 1:] != 0
    assert (batch["discount"][:, 1:] == 0).any() and batch["is_first"][:, 1:].any()
    assert torch.equal(learned[..., 0], ~batch["is_first"][:, 1:])


def test_dreamers_discount_head_learns_where_episodes_end():
    """From sequences of which every other one ends in a termination, as these are rare."""
    agent, buffer, rng = fallen("dreamerv2", "--discount-head --batch-size 1000 --model-lr 1e-2")
    batch = agent.sample(buffer, rng)
    ends = (batch["discount"] == 0).flatten(1).any(1)
    chosen = torch.cat([ends.nonzero()[:8, 0], (~ends).nonzero()[:8, 0]])
    assert len(chosen) == 16
    batch = {name: column[chosen] for name, column in batch.items()}
    for _ in range(300):
        agent.update_model(batch, due=True)
    with torch.no_grad():
        z, h, _ = agent.update_model(batch, due=False)
        predicted = torch.sigmoid(agent.discount_head(torch.cat([z, h], -1)))
    ended = batch["discount"] == 0
    assert predicted[ended].mean() < 0.3 < 0.9 < predicted[~ended].mean()
