"""SLAC's model, losses, windows and gradients, against closed forms, torch.distributions and loops
over single images. "Code" is https://github.com/alexlee-gk/slac."""

import numpy as np
import pytest
import torch
from conftest import TRAINS, noise_step, tiny_agent
from torch.distributions import Normal, kl_divergence

import slac as script


def make_agent(flags="", updates=3):
    """A small agent, at update 3 just after the first burst; and a batch: sequences of 4 images."""
    _, agent, buffer, rng = tiny_agent("slac", f"--pretrain-updates 3 {flags}")
    agent.updates = updates
    return agent, agent.sample(buffer, rng)


@pytest.mark.deep
def test_sizes_and_starts_are_the_published_ones():
    """Code: model_distribution_network.py, actor_distribution_network.py, critic_network.py.
    Xavier's bound sqrt(6 / (fan in + fan out)), zero biases; Adam's rates of the paper."""
    agent = script.Agent(script.Args(device="cpu"), script.EnvSpec((3, 64, 64), 6, 17))
    m = agent.model
    parts = [m.encoder, m.decoder, m.q_first, m.q_next, m.prior, m.z2_first, m.z2_next]
    parts += [m.reward_head, agent.critic.q1, agent.critic.q2, agent.actor]
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [
        1_438_784, 1_569_603, 148_032, 215_104, 149_568, 205_824, 272_896, 215_554, 141_569,
        141_569, 604_172,
    ]  # fmt: skip
    assert script.Args(action_repeat=3).warmup_steps == 3334  # 10,000 frames (D7)
    for layer in agent.modules():
        if hasattr(layer, "weight"):
            taps = layer.weight[0, 0].numel()
            bound = (6 / (taps * sum(layer.weight.shape[:2]))) ** 0.5
            assert layer.bias.count_nonzero() == 0
            assert 0.8 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6)
    for name, optimizer in agent.optimizers.items():
        group = optimizer.param_groups[0]
        assert group["lr"] == (1e-4 if name == "model" else 3e-4)
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0)


@pytest.mark.deep
def test_gaussians_are_softplus_gaussians_with_a_floor():
    """Code: std = softplus + 1e-5; --reward-std-floor is the rewards' alone. The logarithm of the
    actor's is clipped."""
    agent, _ = make_agent("--reward-std-floor 0.5")
    model = agent.model
    f = torch.randn(500, 8) * 30
    mean, std = model.q_first(f)
    raw_mean, raw_std = model.q_first.net(f).chunk(2, -1)
    torch.testing.assert_close(mean, raw_mean)
    torch.testing.assert_close(std, torch.log1p(raw_std.double().exp()).float() + 1e-5)
    assert model.reward_head(*(torch.randn(99, d) * 50 for d in (12, 2, 12)))[1].min() >= 0.5
    log_std = agent.actor(1e4 * torch.randn(500, 28))[1]
    assert log_std.min() == -20 and log_std.max() == 2


@pytest.mark.parametrize("flags", ["", "--z1 deterministic --z2 deterministic", "--no-temporal"])
def test_model_losses_are_loops_over_single_images(flags):
    """[SLAC J(M)] of the paper and its ablations, summed over time. An episode's start has no
    reward and, where z1 is deterministic, no KL (D11)."""
    agent, batch = make_agent(f"--model-batch-size 8 {flags}")
    m, batch = agent.model, batch["model"] | {"is_first": torch.rand(8, 4) < 0.4}
    torch.manual_seed(5)
    losses = agent.model_losses(**batch)[0]
    torch.manual_seed(5)
    noise = torch.randn(8, 4, 12) * ("deterministic" not in flags)
    features, z = m.encode(batch["obs"]), None
    kl = image = reward = 0.0
    for b, t in np.ndindex(8, 4):
        f, a = features[b, t], batch["action"][b, t]
        starts = t == 0 or batch["is_first"][b, t] or "--no-temporal" in flags
        if starts:
            q, p = m.q_first(f), (torch.zeros(4), torch.ones(4))
        else:
            q, p = m.q_next(f, z[4:], a), m.prior(z[4:], a)
        z1 = q[0] + q[1] * noise[b, t, :4]
        mean, std = m.z2_first(z1) if starts else m.z2_next(z1, z[4:], a)
        before, z = z, torch.cat([z1, mean + std * noise[b, t, 4:]])
        if not (starts and "--z1 deterministic" in flags):
            kl += kl_divergence(Normal(*q), Normal(*p)).sum()
        image -= Normal(m.decoder(z[None]), 0.1**0.5).log_prob(batch["obs"][b, t] / 255).sum()
        if t > 0 and not batch["is_first"][b, t]:
            reward -= Normal(*m.reward_head(before, a, z)).log_prob(batch["reward"][b, t]).sum()
    expected = {"loss/kl": kl / 8, "loss/image": image / 8, "loss/reward": reward / 8}
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    (sum(losses.values()) - sum(expected.values())).backward()  # the gradients are equal, too
    assert all(p.grad is None or p.grad.abs().max() < 5e-3 for p in m.parameters())


def test_critic_actor_and_alpha_loss(monkeypatch):
    """[SLAC J(Q)] y = 1 + 0.99 (min(10, 12) + 1 * 2) = 12.88, or 1 where the discount is 0; half of
    1 + 4 where Q1 = y + 1 and Q2 = y + 2. [SLAC J(pi)] log pi - min Q with log pi = -2 and Q = 5, 3
    is -5. [SLAC J(alpha)] log alpha (-log pi + A), of the logarithm, as in the code."""
    agent, _ = make_agent()
    one = torch.ones(4, 1)
    monkeypatch.setattr(script, "tanh_gaussian", lambda *_: (torch.zeros(4, 2), -2 * one))
    agent.actor.forward = lambda seen: (seen, seen)
    agent.target_critic.forward = lambda z, a: (10 * one, 12 * one)
    for discount, y in ((1, 12.88), (0, 1.0)):
        agent.critic.forward = lambda z, a, y=y: (y + one, y + 2 * one)
        loss = agent.critic_loss(None, None, one, discount * one, None, one)
        assert loss.item() == pytest.approx(2.5, abs=1e-4)
    agent.critic.forward = lambda z, a: (5 * one, 3 * one)
    loss, log_prob = agent.actor_loss(one, None)
    assert loss.item() == pytest.approx(-5)
    agent.alpha_loss(log_prob).backward()
    assert agent.log_alpha.grad.item() == pytest.approx(4)


def test_histories_are_features_and_the_actions_between_them():
    """Windows of three images. Before an episode's first image (row 1 of the second sequence) there
    is that image again, without actions."""
    f0, f1, f2, f3 = f = torch.randn(4, 8)
    _, a1, a2, a3 = a = torch.rand(4, 2)
    whole = [f0, f1, f2, a1, a2], [f1, f2, f3, a2, a3]
    begun = [f1, f1, f2, 0 * a1, a2], [f1, f2, f3, a2, a3]
    is_first = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    out = make_agent()[0].histories(f.expand(2, 4, 8), a.expand(2, 4, 2), is_first)
    expected = [torch.cat(window) for window in (*whole, *begun)]
    assert torch.equal(out.flatten(0, 1), torch.stack(expected))


@pytest.mark.deep
@pytest.mark.parametrize("kind", ["history", "latent"])
def test_acting_sees_what_training_sees(kind):
    """The windows of an episode's first twelve images, from act() and from the replay buffer. A
    latent has been filtered for one image more at the later end of a sequence. Code: evaluations
    sample their actions, too."""
    _, agent, buffer, rng = tiny_agent("slac", f"--actor-input {kind}")
    agent.model.noise = lambda *shape: torch.zeros(*shape, 12)
    seen, carry = [], None
    agent.actor.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    for row in range(40, 52):
        step = noise_step(script, agent.spec, rng, row == 40)
        step = step._replace(obs=buffer.files["obs"][row], action=buffer.files["action"][row])
        _, carry = agent.act(step, carry, explore=True)
    assert not torch.equal(agent.act(step, carry)[0], agent.act(step, carry)[0])
    rows = np.arange(41, 52)[:, None] + np.arange(-3, 1)
    is_first = torch.as_tensor(buffer.files["start"][rows] == rows)
    obs, action = buffer.gather("obs", rows), buffer.gather("action", rows)
    now, following = agent.features_for(obs, action, is_first, {kind})[kind].unbind(1)
    torch.testing.assert_close(now, torch.stack(seen[:11]), rtol=1e-4, atol=1e-5)
    if kind == "history":
        torch.testing.assert_close(following, torch.stack(seen[1:12]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("updates", [2, 3])
def test_update_is_the_losses_one_after_the_other(updates):
    """The model's step, which is alone in the first burst (D7); then critic, actor and temperature,
    on windows that end at images 2 and 3 of 0 to 3, and the transition between those (D1, D2, D3).
    Nothing is detached here: optimizers alone decide what moves."""
    (ours, batch), (plain, _) = make_agent(updates=updates), make_agent(updates=updates)
    torch.manual_seed(5)
    ours.update(batch)

    def step(name, loss, optimizer=None):
        before = {key: value.clone() for key, value in plain.state_dict().items()}
        script.minimize(loss, plain.optimizers[optimizer or name])
        after = plain.state_dict()
        moved = {key for key in after if not torch.equal(after[key], before[key])}
        assert {key.split(".")[0] for key in moved} == TRAINS["slac"][name]

    torch.manual_seed(5)
    step("KL + image + reward", sum(plain.model_losses(**batch["model"])[0].values()), "model")
    if updates == 3:
        sac = batch["sac"]
        features = plain.model.encode(sac["obs"])
        h = plain.histories(features, sac["action"], sac["is_first"])
        noise = plain.model.noise(4, 4)
        z = plain.model.filter(features, sac["action"], sac["is_first"], noise)[0]
        arrival = [sac[name][:, 3] for name in ("action", "reward", "discount")]
        step("critic", plain.critic_loss(z[:, 2], *arrival, z[:, 3], h[:, 1]))
        loss, log_prob = plain.actor_loss(h[:, 0], z[:, 2])
        step("actor", loss)
        step("alpha", plain.alpha_loss(log_prob))
        for p, t in zip(plain.critic.parameters(), plain.target_critic.parameters(), strict=True):
            t.data = 0.005 * p.data + 0.995 * t.data
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-7)


@pytest.mark.deep
@pytest.mark.parametrize("flags", ["--z2 none --critic-input history", "--z2 recurrent"])
def test_the_simple_filter_and_the_rssm(flags):
    """What p and q of z1 know of the past: z1 and the action, or PlaNet's recurrent state. The
    picture shows the truth; the posterior; the prior after the first image; and after none."""
    _, agent, buffer, rng = tiny_agent("slac", f"--pretrain-updates 0 {flags}")
    assert all(value.isfinite() for value in agent.update(agent.sample(buffer, rng)).values())
    m = agent.model
    features, action, noise = torch.randn(3, 5, 8), torch.rand(3, 5, 2), m.noise(3, 5)
    z, q, p, _ = m.filter(features, action, torch.zeros(3, 5, dtype=torch.bool), noise)
    past, a, e = z[:, :-1].flatten(0, 1), action[:, 1:].flatten(0, 1), noise[:, 1:].flatten(0, 1)
    known = torch.cat([past, a], -1)
    if "recurrent" in flags:
        known = m.gru(torch.cat([past[:, :4], a], -1), past[:, 4:])
        torch.testing.assert_close(z[:, 1:, 4:].flatten(0, 1), known)
    mean, std = m.prior(known)
    expected = [mean, std, *m.q_next(features[:, 1:].flatten(0, 1), known)]
    torch.testing.assert_close([x[:, 1:].flatten(0, 1) for x in (*p, *q)], expected)
    imagined = m.imagine(past, a[:, None], e[:, None])[:, 0, :4]
    torch.testing.assert_close(imagined, mean + std * e[:, :4])

    strip = agent.images(buffer, np.random.default_rng(0))["sequence"]
    truth, posterior, prior, _ = strip.reshape(4, 16, 4, 16, 3).swapaxes(1, 2)  # (T, H, W, C)
    truth = truth.transpose(0, 3, 1, 2)
    assert any(np.array_equal(truth, buffer.files["obs"][i : i + 4]) for i in range(156))
    assert np.array_equal(posterior[0], prior[0])  # both know the first image
