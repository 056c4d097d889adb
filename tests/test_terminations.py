"""Tasks may end before their time, as Gym's walkers do when they fall: then the last row of an
episode has a discount of 0."""

from unittest.mock import patch

import pytest
import torch
from conftest import tiny_agent


def fallen(name, flags):
    """An agent, and a batch from episodes that ended for good, with white images at last."""
    _, agent, buffer, rng = tiny_agent(name, flags)
    buffer.columns["discount"].fill_(1.0)
    buffer.columns["discount"][39::40] = 0.0
    buffer.columns["obs"][39::40] = 255
    return agent, agent.sample(buffer, rng)


@pytest.mark.parametrize("name", ["sac_ae", "sac_gaara", "slac"])
def test_targets_bootstrap_everywhere_but_at_a_termination(name):
    """Only there is a target of the Qs nothing but the reward."""
    size = "--sac-batch-size 400 --pretrain-updates 0" if name == "slac" else "--batch-size 400"
    agent, batch = fallen(name, size)
    with patch("torch.nn.functional.mse_loss", wraps=torch.nn.functional.mse_loss) as mse_loss:
        agent.update(batch)
    transitions = batch.get("sac", batch)
    reward = transitions["reward"].flatten(1)[:, -1:]  # of a window of SLAC's the last row
    ended = transitions["discount"].flatten(1)[:, -1:] == 0
    assert 0 < ended.sum() < 100
    for call in mse_loss.call_args_list[:2]:
        assert ((call.args[1] == reward) == ended).all()


@pytest.mark.deep
def test_slacs_reward_loss_keeps_the_step_that_ends_an_episode():
    """slac.pytorch leaves it out, the authors' code does not."""
    agent, batch = fallen("slac", "--model-batch-size 400")
    batch = batch["model"]
    batch["reward"].requires_grad_()
    agent.model_losses(**batch)[0]["loss/reward"].backward()
    learned = batch["reward"].grad[:, 1:, 0] != 0
    assert (batch["discount"][:, 1:] == 0).any() and batch["is_first"][:, 1:].any()
    assert torch.equal(learned, ~batch["is_first"][:, 1:])


@pytest.mark.deep
def test_dreamers_discount_head_learns_where_episodes_end():
    """From sixteen sequences, half of which end: they are rare in a batch."""
    agent, batch = fallen("dreamerv2", "--discount-head --batch-size 400 --model-lr 1e-2")
    ends = (batch["discount"] == 0).flatten(1).any(1)
    chosen = torch.cat([ends.nonzero()[:8, 0], (~ends).nonzero()[:8, 0]])
    batch = {name: column[chosen] for name, column in batch.items()}
    ended = batch["discount"] == 0
    assert ended.sum() == 8
    for _ in range(100):
        agent.update_model(batch, due=True)
    with torch.no_grad():
        z, h, _ = agent.update_model(batch, due=False)
        predicted = torch.sigmoid(agent.discount_head(torch.cat([z, h], -1)))
    assert predicted[ended].mean() < 0.3 < 0.9 < predicted[~ended].mean()
