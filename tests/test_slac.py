"""SLAC's model, losses, alignment, resets and gradients, against closed forms and brute force."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAINS, tiny_args
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

import slac as script

LATENTS = {  # the fact sheet's table: all variants of the latent model
    "slac": {},
    "partial": {"z2": "deterministic"},
    "deterministic": {"z1": "deterministic", "z2": "deterministic"},
    "vae": {"temporal": False},
    "simple vae": {"z2": "none", "temporal": False},
    "simple filter": {"z2": "none"},
    "rssm": {"z2": "recurrent"},
}


def make_agent(seed=0, action_dim=2, size=16, **changes):
    """A small agent: two conv layers, sequences of 5 frames."""
    small = {"device": "cpu", "image_size": size, "channels": (4, 8), "feature_dim": 8,
             "z1_dim": 4, "z2_dim": 6, "hidden_dim": 16, "actions": 4, "model_batch_size": 3,
             "sac_batch_size": 5, "pretrain_updates": 0}
    torch.manual_seed(seed)
    args = script.Args(**{**small, **changes})
    return script.Agent(args, script.EnvSpec((3, size, size), torch.uint8, action_dim))


def published(action_dim=6, **changes):
    args = script.Args(device="cpu", **changes)
    return script.Agent(args, script.EnvSpec((3, 64, 64), torch.uint8, action_dim))


def count(module):
    return sum(p.numel() for p in module.parameters())


def fill(size=16, rows=60, episode=15, action_dim=2, seed=0):
    """A replay buffer with episodes of smooth noise."""
    spec = script.EnvSpec((3, size, size), torch.uint8, action_dim)
    rng = np.random.default_rng(seed)
    buffer = script.ReplayBuffer(rows, spec, "cpu")
    for t in range(rows):
        image = rng.integers(0, 256, (3, size // 4, size // 4), dtype=np.uint8)
        image, first = image.repeat(4, 1).repeat(4, 2), t % episode == 0
        action, reward = rng.uniform(-1, 1, action_dim) * (not first), rng.random() * (not first)
        buffer.add(script.Step(image, None, action, reward, 1.0, first, False))
    return buffer


def make_batch(agent, seed=0):
    return agent.sample(fill(agent.args.image_size), np.random.default_rng(seed))


def inputs(agent, B=3, T=5, seed=0):
    """Features, actions, is_first (never) and noise for LatentModel.filter."""
    g, args = torch.Generator().manual_seed(seed), agent.args
    noise = torch.randn(B, T, agent.model.z_dim, generator=g) * agent.model.noisy
    return (torch.randn(B, T, args.feature_dim, generator=g),
            torch.rand(B, T, agent.action_dim, generator=g) * 2 - 1,
            torch.zeros(B, T, dtype=torch.bool), noise)


# ---- architecture ----


@pytest.mark.parametrize("A", [1, 2, 6])
def test_parameter_counts(A):
    agent = published(A)
    m = agent.model
    assert count(m.encoder) == 1_438_784 and count(m.decoder) == 1_569_603
    assert count(m.z2_first) == 205_824 and count(m.prior) == 148_032 + 256 * A
    assert count(m.z2_next) == 271_360 + 256 * A and count(m.q_first) == 148_032
    assert count(m.q_next) == 213_568 + 256 * A and count(m.reward_head) == 214_018 + 256 * A
    assert count(m) == 4_209_221 + 1024 * A
    assert count(agent.critic.q1) == count(agent.critic.q2) == 140_033 + 256 * A
    assert count(agent.actor) == 590_336 + 2306 * A


def test_shapes_and_sizes_of_the_layers():
    agent = published(2)
    sizes, images = [], torch.rand(2, 3, 64, 64)
    for layer in agent.model.encoder:
        layer.register_forward_hook(lambda m, x, y: sizes.append(y.shape[-1]))
    assert agent.model.encoder(images).shape == (2, 256)
    assert sizes[::2][:5] == [32, 16, 8, 4, 1]
    assert agent.model.decoder(torch.rand(2, 288)).shape == images.shape
    assert agent.critic.q1[0].in_features == 288 + 2
    assert agent.actor.trunk[0].in_features == 2048 + 7 * 2
    slopes = {m.negative_slope for m in agent.model.modules() if isinstance(m, torch.nn.LeakyReLU)}
    assert slopes == {0.2}
    assert not any(isinstance(m, torch.nn.LeakyReLU) for m in agent.actor.modules())
    assert isinstance(agent.model.decoder[-1], torch.nn.LeakyReLU)  # D6


@pytest.mark.parametrize("size, channels", [(32, (4, 4, 8)), (64, (4, 4, 4, 4, 8)), (48, (2, 2))])
def test_other_sizes(size, channels):
    agent = make_agent(size=size, channels=channels)
    f = agent.model.encoder(torch.rand(2, 3, size, size))
    assert f.shape == (2, 8)
    assert agent.model.decoder(torch.rand(2, 10)).shape == (2, 3, size, size)


def test_init_is_xaviers():
    agent = published(2)
    for m in agent.modules():
        if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            fan_in, fan_out = torch.nn.init._calculate_fan_in_and_fan_out(m.weight)
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert m.bias.abs().max() == 0 and m.weight.abs().max() <= bound
            assert m.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
    assert agent.log_alpha.item() == 0
    group = {n: o.param_groups[0] for n, o in agent.optimizers.items()}
    assert {n: g["lr"] for n, g in group.items()} == {
        "model": 1e-4, "critic": 3e-4, "actor": 3e-4, "alpha": 3e-4}
    assert all((g["betas"], g["eps"], g["weight_decay"]) == ((0.9, 0.999), 1e-8, 0)
               for g in group.values())


def test_the_default_schedule():
    """10,000 random frames are 2,500 steps and ten episodes of cheetah-run at action repeat 4."""
    args = script.Args()
    for repeat, steps in ((4, 2500), (1, 10_000), (3, 3334)):
        args.action_repeat, args.warmup_steps = repeat, 0
        script.check_algorithm(args)
        assert args.warmup_steps == steps
    assert (args.pretrain_updates, args.updates_per_step, args.actions) == (50_000, 1.0, 8)
    assert (args.model_batch_size, args.sac_batch_size, args.replay_capacity) == (32, 256, 100_000)
    assert (args.gamma, args.critic_tau, args.decoder_variance) == (0.99, 0.005, 0.1)
    assert script.ACTION_REPEAT["finger-spin"] == 1 and script.ACTION_REPEAT["walker-walk"] == 2


# ---- losses ----


def test_gaussians_are_positive_and_their_heads_split_right():
    head = make_agent().model.q_first
    mean, std = head(torch.randn(500, 8) * 30)
    assert std.min() >= 1e-5 and mean.shape == std.shape == (500, 4)
    for p in head.parameters():
        p.data.zero_()
    mean, std = head(torch.zeros(1, 8))
    assert mean.abs().max() == 0 and std[0, 0].item() == pytest.approx(0.6931572, abs=1e-6)


def test_kl_is_the_closed_form():
    g = torch.Generator().manual_seed(0)
    q_mean, p_mean = torch.randn(2, 7, 9, 32, generator=g)
    q_std, p_std = torch.rand(2, 7, 9, 32, generator=g) + 0.1
    q, p, never = (q_mean, q_std), (p_mean, p_std), torch.zeros(7, 9, dtype=torch.bool)
    exact = kl_divergence(Normal(*q), Normal(*p)).sum((1, 2)).mean()
    agent = make_agent()
    assert agent.kl_loss(q, p, never).item() == pytest.approx(exact.item(), rel=1e-5)
    assert agent.kl_loss(q, q, never).item() == pytest.approx(0, abs=1e-4)
    unit = torch.zeros(1, 1, 32), torch.ones(1, 1, 32)
    first = agent.kl_loss((unit[0], 0.6931572 * unit[1]), unit, never[:1, :1])
    assert first.item() == pytest.approx(3.4154, abs=1e-3)


def test_deterministic_kl_is_the_squared_distance_and_skips_starts():
    agent = make_agent(z1="deterministic", z2="deterministic")
    q, p = torch.randn(2, 3, 5, 4)
    started = torch.zeros(3, 5, dtype=torch.bool)
    started[:, 0] = started[1, 3] = True
    loss = agent.kl_loss((q, torch.ones_like(q)), (p, torch.ones_like(p)), started)
    expected = sum(0.5 * ((q[b, t] - p[b, t]) ** 2).sum().item()
                   for b in range(3) for t in range(5) if not started[b, t]) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_image_loss_constants(monkeypatch):
    """-25,696.495 for nine perfect frames; an error e everywhere adds 9 * 12288 e^2 / 0.2; a mean
    over the batch, a sum over time."""
    agent = published(2)
    images, z = torch.rand(2 * 9, 3, 64, 64), torch.zeros(2, 9, 288)
    monkeypatch.setattr(agent.model.decoder, "forward", lambda z: images)
    perfect = agent.image_loss(z, images).item()
    assert perfect == pytest.approx(-25_696.495, abs=0.01)
    monkeypatch.setattr(agent.model.decoder, "forward", lambda z: images + 0.1)
    worse = agent.image_loss(z, images).item()
    assert worse - perfect == pytest.approx(9 * 12288 * 0.01 / 0.2, rel=1e-3)
    nll = -Normal(images + 0.1, math.sqrt(0.1)).log_prob(images).sum() / 2
    assert worse == pytest.approx(nll.item(), rel=1e-4)


def test_reward_loss_and_its_mask(monkeypatch):
    agent = make_agent()
    g = torch.Generator().manual_seed(0)
    mean, std = torch.randn(3, 4, 1, generator=g), torch.rand(3, 4, 1, generator=g) + 0.2
    reward, z = torch.randn(3, 5, 1, generator=g), torch.randn(3, 5, 10, generator=g)
    action = torch.rand(3, 5, 2, generator=g)
    asked = []
    monkeypatch.setattr(agent.model.reward_head, "forward",
                        lambda *x: asked.append(x) or (mean, std))
    is_first = torch.zeros(3, 5, dtype=torch.bool)
    loss, mean_std = agent.reward_loss(z, action, reward, is_first)
    assert mean_std.item() == pytest.approx(std.mean().item())
    nll = -Normal(mean, std).log_prob(reward[:, 1:])
    assert loss.item() == pytest.approx(nll.sum().item() / 3, rel=1e-5)
    before, led, after = asked[0]
    assert torch.equal(before, z[:, :-1]) and torch.equal(after, z[:, 1:])
    assert torch.equal(led, action[:, 1:])
    is_first[1, 2] = is_first[0, 0] = True  # the first frame of a sequence has no step before it
    masked, _ = agent.reward_loss(z, action, reward, is_first)
    assert (loss - masked).item() == pytest.approx(nll[1, 1].item() / 3, rel=1e-4)


def test_the_reward_floor_is_the_rewards_alone():
    agent = make_agent(reward_std_floor=0.5)
    assert agent.model.reward_head(*(torch.randn(9, d) * 50 for d in (10, 2, 10)))[1].min() >= 0.5
    assert agent.model.q_first(torch.randn(99, 8) * 50)[1].min() < 0.5


def test_log_prob_is_the_squashed_gaussians():
    torch.manual_seed(0)
    mu, log_std = torch.randn(2000, 6).double(), torch.full((2000, 6), -1.0).double()
    action, log_prob = script.tanh_gaussian(mu, log_std)
    base = Independent(Normal(mu, log_std.exp()), 1)
    inside = action.abs().max(-1).values < 0.999
    exact = TransformedDistribution(base, TanhTransform()).log_prob(action)
    assert (log_prob[:, 0] - exact)[inside].abs().max() < 1e-4 and inside.sum() > 500
    far = script.tanh_gaussian(torch.full((1, 1), 15.0), torch.full((1, 1), -20.0))[1]
    assert math.isfinite(far.item())


def test_td_target_and_critic_loss(monkeypatch):
    """y = 1 + 0.99 (10 + 1 * 2) = 12.88; Q1 = Q2 = y + 1 costs 0.5 * 2. At discount 0 y = 1."""
    agent = make_agent(init_temperature=1.0)
    log_prob = torch.full((4, 1), -2.0)
    monkeypatch.setattr(script, "tanh_gaussian", lambda *_: (torch.zeros(4, 2), log_prob))
    agent.target_critic.forward = lambda z, a: (torch.full((4, 1), 10.0), torch.full((4, 1), 12.0))
    seen, history = torch.zeros(4, 10), torch.zeros(4, 4 * 8 + 3 * 2)
    for discount, y in ((1.0, 12.88), (0.0, 1.0)):
        agent.critic.forward = lambda z, a, y=y: (torch.full((4, 1), y + 1),) * 2
        loss = agent.critic_loss(seen, torch.zeros(4, 2), torch.ones(4, 1),
                                 torch.full((4, 1), discount), seen, history)
        assert loss.item() == pytest.approx(1.0, abs=1e-4)


def test_actor_loss_takes_the_smaller_q(monkeypatch):
    """mean(1 * log pi - min Q) with log pi = -2 and Q = 3, 5 is -5."""
    agent = make_agent(init_temperature=1.0)
    log_prob = torch.full((4, 1), -2.0)
    monkeypatch.setattr(script, "tanh_gaussian", lambda *_: (torch.zeros(4, 2), log_prob))
    agent.critic.forward = lambda z, a: (torch.full((4, 1), 5.0), torch.full((4, 1), 3.0))
    loss, _ = agent.actor_loss(torch.zeros(4, 4 * 8 + 3 * 2), torch.zeros(4, 10))
    assert loss.item() == pytest.approx(-5.0)


def test_log_std_is_clipped():
    actor = make_agent().actor
    actor.trunk[-1].weight.data.zero_()
    for bias, log_std in ((100.0, 2.0), (-100.0, -20.0), (0.5, 0.5)):
        actor.trunk[-1].bias.data.fill_(bias)
        mu, out = actor(torch.zeros(1, 4 * 8 + 3 * 2))
        assert (mu == bias).all() and (out == log_std).all()


def test_the_kl_moves_posterior_and_prior():
    q = [torch.randn(2, 3, 4, requires_grad=True), torch.rand(2, 3, 4).add(0.5).requires_grad_()]
    p = [torch.randn(2, 3, 4, requires_grad=True), torch.rand(2, 3, 4).add(0.5).requires_grad_()]
    make_agent().kl_loss(q, p, torch.zeros(2, 3, dtype=torch.bool)).backward()
    assert all(x.grad.abs().min() > 0 for x in (*q, *p))


def test_alpha_moves_towards_the_target_entropy():
    agent = make_agent(action_dim=2)
    for log_prob, sign in ((3.0, 1), (1.0, -1)):  # entropy -3 is below the target of -2, -1 above
        before = agent.log_alpha.item()
        script.minimize(agent.alpha_loss(torch.full((4, 1), log_prob)), agent.optimizers["alpha"])
        assert (agent.log_alpha.item() - before) * sign > 0
    agent = make_agent(action_dim=2, init_temperature=math.e)
    assert agent.alpha_loss(torch.full((4, 1), 3.0)).item() == pytest.approx(-1.0, rel=1e-5)


# ---- the latent model along sequences ----


def step_by_step(model, features, action, is_first, noise):
    """z by the equations, one sequence and one frame after the other."""
    z1_dim, out = model.z_dims[0], []
    for b in range(len(features)):
        z = None
        for t in range(features.shape[1]):
            e1, e2 = noise[b, t, :z1_dim], noise[b, t, z1_dim:]
            if t == 0 or is_first[b, t] or not model.temporal:
                mean, std = model.q_first(features[b, t])
                z1 = mean + std * e1
                if model.gru is not None:
                    z2 = torch.zeros(model.z_dims[1])
                elif model.z2_first is not None:
                    mean, std = model.z2_first(z1)
                    z2 = mean + std * e2
            else:
                old1, old2 = z[:z1_dim], z[z1_dim:]
                if model.gru is not None:
                    z2 = model.gru(torch.cat([old1, action[b, t]]), old2)
                    context = z2
                else:
                    past = old1 if model.z2_first is None else old2
                    context = torch.cat([past, action[b, t]])
                mean, std = model.q_next(torch.cat([features[b, t], context]))
                z1 = mean + std * e1
                if model.z2_next is not None:
                    mean, std = model.z2_next(torch.cat([z1, context]))
                    z2 = mean + std * e2
            z = z1 if model.z_dims[1] == 0 else torch.cat([z1, z2])
            out.append(z)
    return torch.stack(out).unflatten(0, features.shape[:2])


@pytest.mark.parametrize("latent", LATENTS)
def test_filter_is_the_loop_over_frames_and_sequences(latent):
    agent = make_agent(**LATENTS[latent])
    features, action, is_first, noise = inputs(agent)
    is_first[1, 3] = is_first[2, 0] = is_first[2, 1] = True
    z, q, p, started = agent.model.filter(features, action, is_first, noise)
    torch.testing.assert_close(z, step_by_step(agent.model, features, action, is_first, noise))
    expected = is_first.clone()
    expected[:, 0] = True
    if not agent.args.temporal:
        expected[:] = True
    assert torch.equal(started, expected)
    for b in range(3):
        for t in range(5):
            if expected[b, t]:  # posterior of the image alone, prior N(0, I)
                assert p[0][b, t].abs().max() == 0 and (p[1][b, t] == 1).all()
                torch.testing.assert_close(q[0][b, t], agent.model.q_first(features[b, t])[0])
            else:
                context = agent.model.context(z[b : b + 1, t - 1], action[b : b + 1, t])
                torch.testing.assert_close(p[0][b, t], agent.model.prior(context)[0][0])
                wanted = agent.model.q_next(features[b : b + 1, t], context)
                torch.testing.assert_close(q[0][b, t], wanted[0][0])
                torch.testing.assert_close(q[1][b, t], wanted[1][0])


@pytest.mark.parametrize("latent", LATENTS)
def test_imagine_is_the_prior_step_by_step(latent):
    agent = make_agent(**LATENTS[latent])
    features, action, is_first, noise = inputs(agent)
    model = agent.model
    z = model.filter(features, action, is_first, noise)[0][:, 0]
    out = model.imagine(z, action, noise)
    n = model.z_dims[0]
    for t in range(5):
        context = model.context(z, action[:, t]) if model.temporal else None
        mean, std = model.prior(context) if model.temporal else (0.0, 1.0)
        z1 = mean + std * noise[:, t, :n]
        if model.gru is not None:
            z = torch.cat([z1, context], -1)
        elif model.z2_first is None:
            z = z1
        else:
            mean, std = model.z2_next(z1, context) if model.temporal else model.z2_first(z1)
            z = torch.cat([z1, mean + std * noise[:, t, n:]], -1)
        torch.testing.assert_close(out[:, t], z)


@pytest.mark.parametrize("latent", LATENTS)
def test_causality_under_frozen_noise(latent):
    agent = make_agent(**LATENTS[latent])
    features, action, is_first, noise = inputs(agent)
    z, q, p, _ = agent.model.filter(features, action, is_first, noise)
    seen = features.clone()
    seen[:, 2] += 1
    new = agent.model.filter(seen, action, is_first, noise)
    later = 5 if agent.args.temporal else 3
    changed = [not torch.equal(z[:, t], new[0][:, t]) for t in range(5)]
    assert changed == [2 <= t < later for t in range(5)]
    assert torch.equal(p[0][:, :3], new[2][0][:, :3])  # the prior at t has not seen frame t
    led = action.clone()
    led[:, 2] += 1  # the action that leads to frame 2
    new = agent.model.filter(features, led, is_first, noise)
    changed = [not torch.equal(z[:, t], new[0][:, t]) for t in range(5)]
    assert changed == [t >= 2 and agent.args.temporal for t in range(5)]


def test_the_prior_sees_z2_and_the_action_only():
    model = make_agent().model
    z, action = torch.randn(1, 10), torch.randn(1, 2)
    other = z.clone()
    other[:, :4] += 1  # another z1
    assert torch.equal(model.context(z, action), model.context(other, action))
    other = z.clone()
    other[:, 4:] += 1
    assert not torch.equal(model.context(z, action), model.context(other, action))


def test_a_reset_forgets_what_was_before():
    """A sequence with a start at t = 2 ends like the one that begins there, and so do histories."""
    agent = make_agent()
    features, action, is_first, noise = inputs(agent)
    is_first[:, 2] = True
    action[:, 2] = 0  # as in the replay buffer
    z = agent.model.filter(features, action, is_first, noise)[0]
    cut = agent.model.filter(features[:, 2:], action[:, 2:], is_first[:, 2:], noise[:, 2:])[0]
    torch.testing.assert_close(z[:, 2:], cut)
    now, following = agent.histories(features, action, is_first).unbind(1)
    f, zero = features, torch.zeros(3, 2)
    torch.testing.assert_close(now, torch.cat(
        [f[:, 2], f[:, 2], f[:, 2], f[:, 3], zero, zero, action[:, 3]], 1))
    torch.testing.assert_close(following, torch.cat(
        [f[:, 2], f[:, 2], f[:, 3], f[:, 4], zero, action[:, 3], action[:, 4]], 1))


def test_histories_without_a_reset():
    agent = make_agent()
    f, a, is_first, _ = inputs(agent)
    now, following = agent.histories(f, a, is_first).unbind(1)
    assert torch.equal(now, torch.cat([f[:, 0], f[:, 1], f[:, 2], f[:, 3],
                                       a[:, 1], a[:, 2], a[:, 3]], 1))
    assert torch.equal(following, torch.cat([f[:, 1], f[:, 2], f[:, 3], f[:, 4],
                                             a[:, 2], a[:, 3], a[:, 4]], 1))


def test_latent_noise_is_gaussian():
    """Kurtosis 3, not a uniform's 1.8; and zero where z is deterministic."""
    noise = make_agent().model.noise(4000, 5)
    assert noise.mean().abs() < 0.02 and noise.std().item() == pytest.approx(1, rel=0.02)
    assert (noise**4).mean().item() == pytest.approx(3, rel=0.05)
    features, action, is_first, noise = inputs(make_agent(), B=2000)
    agent = make_agent()
    z, q, *_ = agent.model.filter(features, action, is_first, noise)
    standard = (z[..., :4] - q[0]) / q[1]
    assert (standard**4).mean().item() == pytest.approx(3, rel=0.1)
    half = make_agent(z2="deterministic").model.noise(10)
    assert half[:, :4].abs().min() > 0 and half[:, 4:].abs().max() == 0


@pytest.mark.parametrize("latent", LATENTS)
def test_deterministic_parts_have_no_spread(latent):
    agent = make_agent(**LATENTS[latent])
    kinds = agent.args.z1, agent.args.z2
    for head, kind in ((agent.model.q_next, kinds[0]), (agent.model.prior, kinds[0]),
                       (agent.model.z2_next, kinds[1])):
        if head is not None:
            width = head.net[-1].out_features
            dims = agent.args.z2_dim if head is agent.model.z2_next else agent.args.z1_dim
            assert width == dims * (1 if kind == "deterministic" else 2)
    assert agent.model.z_dim == (4 if kinds[1] == "none" else 10)


# ---- replay, acting ----


class Counting:
    """Steps whose image, action and reward are their own number."""

    def __init__(self, episode=12, size=16):
        self.t, self.episode, self.size = 0, episode, size

    def __call__(self):
        t, first = self.t, self.t % self.episode == 0
        self.t += 1
        image = np.full((3, self.size, self.size), t, np.uint8)
        action = np.zeros(2, np.float32) if first else np.float32([t, -t])
        return script.Step(image, None, action, 0.0 if first else float(t), 1.0, first, False)


def test_alignment_with_a_counting_environment(monkeypatch):
    """Frames i..i+4, the actions and rewards that led to them; SAC gets the last two."""
    agent, step = make_agent(), Counting(episode=50)
    buffer = script.ReplayBuffer(60, script.EnvSpec((3, 16, 16), torch.uint8, 2), "cpu")
    for _ in range(50):
        buffer.add(step())
    batch = agent.sample(buffer, np.random.default_rng(0))["sac"]
    frames = batch["obs"][:, :, 0, 0, 0].long()
    i = frames[:, :1]
    assert torch.equal(frames, i + torch.arange(5))
    assert torch.equal(batch["action"][:, 1:, 0].long(), frames[:, 1:])
    assert torch.equal(batch["reward"][:, 1:, 0].long(), frames[:, 1:])
    asked = {}
    monkeypatch.setattr(agent, "critic_loss", lambda *x: asked.update(critic=x) or torch.zeros(1))
    monkeypatch.setattr(agent, "actor_loss",
                        lambda *x: asked.update(actor=x) or (torch.zeros(1), torch.zeros(5, 1)))
    monkeypatch.setattr(script, "minimize", lambda *_: None)
    z = torch.arange(5.0)[None, :, None].expand(5, 5, 10)
    monkeypatch.setattr(agent.model, "filter", lambda f, a, first, noise: (z[: len(f)], None))
    monkeypatch.setattr(agent, "model_losses", lambda **_: ({"loss/image": torch.zeros(1)},
                                                            torch.zeros(1)))
    monkeypatch.setattr(agent.model, "encode", lambda obs: obs[:, :, 0, 0, :1].float().expand(
        -1, -1, 8))
    agent.update({"model": batch, "sac": batch})
    seen, action, reward, discount, next_seen, next_history = asked["critic"]
    assert (seen == 3).all() and (next_seen == 4).all()  # z of the last two frames
    assert torch.equal(action[:, 0].long(), frames[:, 4]) and torch.equal(
        reward[:, 0].long(), frames[:, 4])
    history, seen = asked["actor"]
    assert (seen == 3).all()
    assert torch.equal(history[:, ::8][:, :4].long(), frames[:, :4])  # features of frames 0..3
    assert torch.equal(history[:, 32::2].long(), frames[:, 1:4])  # the actions between
    assert torch.equal(next_history[:, ::8][:, :4].long(), frames[:, 1:])
    assert torch.equal(next_history[:, 32::2].long(), frames[:, 2:])


def test_sequences_may_begin_in_the_episode_before_but_end_in_a_step():
    agent, buffer = make_agent(sac_batch_size=400), fill()
    batch = agent.sample(buffer, np.random.default_rng(0))["sac"]
    assert batch["is_first"][:, 1:4].any() and not batch["is_first"][:, 4].any()
    assert (batch["reward"][batch["is_first"]] == 0).all()
    assert (batch["action"][batch["is_first"]] == 0).all()


@pytest.mark.parametrize("actor_input", ["history", "latent"])
def test_acting_sees_what_training_sees(actor_input):
    """The same window, from act and from the replay buffer: the same actor input. At an episode's
    start: copies of the first frame, no actions."""
    agent, step, carry = make_agent(actor_input=actor_input), Counting(), None
    agent.model.noise = lambda *shape: torch.zeros(*shape, 10)
    buffer = script.ReplayBuffer(60, script.EnvSpec((3, 16, 16), torch.uint8, 2), "cpu")
    seen = []
    agent.actor.register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))
    for _t in range(30):
        new = step()
        buffer.add(new)
        if new.first:
            carry = None
        action, carry = agent.act(new, carry, explore=True)
        assert action.shape == (2,) and action.abs().max() <= 1
    rows = np.arange(30 - 5 + 1)[:, None] + np.arange(5)
    is_first = torch.as_tensor(buffer.start[rows] == rows)
    both = agent.see(buffer.gather("obs", rows), buffer.gather("action", rows), is_first,
                     {actor_input})[actor_input]
    for i in range(len(rows)):
        if is_first[i, 4]:  # never drawn: the last two frames are of one episode
            continue
        torch.testing.assert_close(both[i, 0], seen[i + 3], rtol=1e-4, atol=1e-5)
        if actor_input == "history":  # a latent has been filtered for one frame more than in acting
            torch.testing.assert_close(both[i, 1], seen[i + 4], rtol=1e-4, atol=1e-5)
    if actor_input == "history":
        assert torch.equal(seen[12][:8], seen[12][24:32]) and seen[12][32:].abs().max() == 0


def test_evaluation_samples_as_published():
    nothing, black = np.zeros(2, np.float32), np.zeros((3, 16, 16), np.uint8)
    image = script.Step(black, None, nothing, 0.0, 1.0, True, False)
    for policy, same in (("sample", False), ("mean", True)):
        agent = make_agent(eval_policy=policy)
        actions = [agent.act(image, None, explore=False)[0] for _ in range(2)]
        assert torch.equal(*actions) == same
        assert not torch.equal(*[agent.act(image, None, explore=True)[0] for _ in range(2)])


def test_memory_of_100_000_frames():
    spec = script.EnvSpec((3, 64, 64), torch.uint8, 6)
    assert 100_000 * script.ReplayBuffer.row_bytes(spec) <= 1.3e9


# ---- who trains what, update ----


def moved(agent, step):
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    step()
    changed = {k for k, v in agent.state_dict().items() if not torch.equal(v, before[k])}
    return {k.split(".")[0] for k in changed}, changed


def test_who_trains_what():
    agent = make_agent()
    batch = make_batch(agent)
    sac = {k: batch["sac"][k] for k in ("obs", "action", "is_first")}

    def model():
        losses, _ = agent.model_losses(**batch["model"])
        script.minimize(sum(losses.values()), agent.optimizers["model"])

    def critic():
        seen = agent.see(**sac, kinds={"history", "latent"})  # with a graph, on purpose
        z, h = seen["latent"], seen["history"]
        loss = agent.critic_loss(z[:, 0], batch["sac"]["action"][:, -1],
                                 batch["sac"]["reward"][:, -1], torch.ones(5, 1), z[:, 1], h[:, 1])
        script.minimize(loss, agent.optimizers["critic"])

    def actor():
        seen = agent.see(**sac, kinds={"history", "latent"})
        loss, _ = agent.actor_loss(seen["history"][:, 0], seen["latent"][:, 0])
        script.minimize(loss, agent.optimizers["actor"])

    trains = TRAINS["slac"]
    some, changed = moved(agent, model)
    assert some == trains["KL + image + reward"]
    assert changed == {k for k in agent.state_dict() if k.startswith("model.")}  # every tensor
    assert moved(agent, critic)[0] == trains["critic"]
    assert moved(agent, actor)[0] == trains["actor"]
    assert moved(agent, lambda: script.minimize(
        agent.alpha_loss(torch.ones(3, 1)), agent.optimizers["alpha"]))[0] == trains["alpha"]


def test_the_burst_trains_the_model_alone_then_all_at_once():
    agent = make_agent(pretrain_updates=3)
    for update in range(6):
        batch = make_batch(agent, update)
        assert ("sac" in batch) == (update >= 3)
        parts, _ = moved(agent, lambda b=batch: agent.update(b))
        everything = {"model", "critic", "actor", "log_alpha", "target_critic"}
        assert parts == ({"model"} if update < 3 else everything)
    assert agent.updates == 6


def test_the_schedule_of_a_run(tmp_path):
    """60 random steps, 10 updates of the model alone, then 3 joint updates per step."""
    kinds, update = [], script.Agent.update
    try:
        script.Agent.update = lambda self, batch: (kinds.append("sac" in batch),
                                                   update(self, batch))[1]
        args = tiny_args(script, updates_per_step=3.0, total_frames=2000)
        numbers = script.train(args, tmp_path, type("Never", (), {"signal": 0}))
    finally:
        script.Agent.update = update
    assert numbers["updates"] == len(kinds) == 10 + 3 * (100 - 1 - 60)
    assert kinds == [False] * 10 + [True] * (len(kinds) - 10)


def test_a_terminal_stops_the_bootstrap_and_a_time_limit_does_not():
    """The critic's step in update() depends on gamma only where the discount is 1."""
    def stepped(discount, gamma):
        agent = make_agent(gamma=gamma)
        batch = make_batch(agent)
        batch["sac"]["discount"] = torch.full_like(batch["sac"]["discount"], discount)
        torch.manual_seed(0)
        return agent.update(batch)["loss/critic"].item()

    assert stepped(0.0, 0.99) == stepped(0.0, 0.5) and stepped(1.0, 0.99) != stepped(1.0, 0.5)


def test_targets_follow_by_polyaks_rule():
    agent = make_agent(critic_tau=0.005)
    old = [t.clone() for t in agent.target_critic.parameters()]
    agent.update(make_batch(agent))
    for t, o, p in zip(agent.target_critic.parameters(), old, agent.critic.parameters(),
                       strict=True):
        torch.testing.assert_close(t, 0.995 * o + 0.005 * p, rtol=1e-5, atol=1e-7)
        assert not t.requires_grad


def test_update_is_the_losses_one_after_the_other():
    """Model first, then critic, then actor and temperature: with the new model and critic."""
    ours, plain = make_agent(), make_agent()
    batch, opt = make_batch(ours), plain.optimizers
    torch.manual_seed(5)
    ours.update(batch)
    torch.manual_seed(5)
    script.minimize(sum(plain.model_losses(**batch["model"])[0].values()), opt["model"])
    sac = batch["sac"]
    with torch.no_grad():
        features = plain.model.encode(sac["obs"])
        h = plain.histories(features, sac["action"], sac["is_first"])
        z = plain.model.filter(features, sac["action"], sac["is_first"], plain.model.noise(5, 5))[0]
    loss = plain.critic_loss(z[:, 3], sac["action"][:, 4], sac["reward"][:, 4],
                             sac["discount"][:, 4], z[:, 4], h[:, 1])
    script.minimize(loss, opt["critic"])
    loss, log_prob = plain.actor_loss(h[:, 0], z[:, 3])
    script.minimize(loss, opt["actor"])
    script.minimize(plain.alpha_loss(log_prob), opt["alpha"])
    script.soft_update(plain.critic, plain.target_critic, 0.005)
    for (key, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7, msg=key)


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("kinds", [("history", "latent"), ("latent", "history"),
                                   ("latent", "latent"), ("history", "history")])
def test_every_variant_updates_and_draws(latent, kinds):
    agent = make_agent(actor_input=kinds[0], critic_input=kinds[1], **LATENTS[latent])
    for i in range(2):
        metrics = agent.update(make_batch(agent, i))
    assert all(math.isfinite(v) and v.ndim == 0 and not v.requires_grad for v in metrics.values())
    strip = agent.images(fill(), np.random.default_rng(0))["sequence"]
    assert strip.shape == (4 * 16, 5 * 16, 3) and strip.dtype == np.uint8


def test_the_strip_shows_truth_posterior_and_both_rollouts():
    agent, buffer = make_agent(), fill()
    strip = agent.images(buffer, np.random.default_rng(0))["sequence"]
    batch = buffer.sequences(np.random.default_rng(0), 64, 5, 2)
    obs = batch["obs"][~batch["is_first"][:, 1:].any(1)][0]
    for t in range(5):
        assert np.array_equal(strip[:16, 16 * t : 16 * (t + 1)], obs[t].permute(1, 2, 0).numpy())
    cells = strip.reshape(4, 16, 5, 16, 3).transpose(0, 2, 1, 3, 4)
    assert np.array_equal(cells[1, 0], cells[2, 0])  # both know the first frame
    assert not np.array_equal(cells[1, 0], cells[3, 0])


def frames_of(env_id, steps, size=32):
    """A buffer with real frames under random actions."""
    env, rng = script.PixelEnv(env_id, 1, 4, size, "fast"), np.random.default_rng(0)
    buffer, step = script.ReplayBuffer(steps + 10, env.spec, "cpu"), env.reset()
    for _ in range(steps):
        buffer.add(step)
        action = torch.as_tensor(rng.uniform(-1, 1, env.spec.action_dim))
        step = env.reset() if step.last else env.step(action)
    return buffer, env.spec


def test_the_model_learns_real_frames():
    """300 updates on 200 frames of walker-stand: the reconstruction beats the mean image, the
    posterior beats the rollout, and a rollout that knows the first frame one that knows nothing."""
    buffer, spec = frames_of("walker-stand", 200)
    torch.manual_seed(0)
    args = script.Args(**{**script.SMOKE, "device": "cpu", "model_lr": 2e-3,
                          "decoder_variance": 0.04, "pretrain_updates": 10**6})
    agent, rng, losses = script.Agent(args, spec), np.random.default_rng(0), []
    for _ in range(300):
        losses.append(agent.update(agent.sample(buffer, rng))["loss/image"].item())
    averages = np.array(losses).reshape(3, 100).mean(1)
    assert (np.diff(averages) < 0).all()
    batch = buffer.sequences(np.random.default_rng(1), 64, 5, 5)
    images = batch["obs"].float() / 255
    noise = agent.model.noise(64, 5)
    with torch.no_grad():
        features = agent.model.encode(batch["obs"])
        z = agent.model.filter(features, batch["action"], batch["is_first"], noise)[0]
        rollout = agent.model.imagine(z[:, 0], batch["action"][:, 1:], noise[:, 1:])
        nothing = agent.model.draw((0.0, 1.0), None, agent.model.noise(64))
        blind = agent.model.imagine(nothing, batch["action"][:, 1:], noise[:, 1:])

        def error(latents):
            decoded = agent.model.decoder(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
            return (decoded - images[:, -latents.shape[1] :]).square().mean().item()

        posterior, conditional, unconditional = error(z[:, 1:]), error(rollout), error(blind)
    mean_image = (images - images.mean((0, 1))).square().mean().item()
    assert posterior < mean_image and posterior < conditional < unconditional


def test_a_static_toy_task_is_solved():
    """Reward -(a - 0.5)^2 for a single image: the mean action goes to 0.5, alpha falls."""
    agent = make_agent(action_dim=1, gamma=0.0, critic_lr=1e-2, actor_lr=3e-3, alpha_lr=1e-2,
                       sac_batch_size=64, model_batch_size=1, init_temperature=0.1)
    spec, rng = script.EnvSpec((3, 16, 16), torch.uint8, 1), np.random.default_rng(0)
    buffer = script.ReplayBuffer(1000, spec, "cpu")
    for t in range(1000):
        action, first = rng.uniform(-1, 1, 1), t % 100 == 0
        reward = 0.0 if first else -((action[0] - 0.5) ** 2)
        buffer.add(script.Step(np.full((3, 16, 16), 99, np.uint8), None, action * (not first),
                               reward, 1.0, first, False))
    for _ in range(500):
        agent.update(agent.sample(buffer, rng))
    image, nothing = np.full((3, 16, 16), 99, np.uint8), np.zeros(1, np.float32)
    step = script.Step(image, None, nothing, 0.0, 1.0, True, False)
    agent.args.eval_policy = "mean"
    assert agent.act(step, None, explore=False)[0].item() == pytest.approx(0.5, abs=0.15)
    assert agent.log_alpha.exp() < 0.1


ROWS = {  # of the README's table: the latent model's switches that they stand for
    "SLAC, fully stochastic": "slac", "partially stochastic": "partial",
    "fully deterministic": "deterministic", "VAE, two latents, no time": "vae",
    "VAE, one latent, no time": "simple vae", "filter, one latent": "simple filter",
    "PlaNet's recurrent state": "rssm",
}


def test_the_readmes_variants_are_accepted():
    import tyro

    text = (Path(script.__file__).parent / "benchmark" / "README.md").read_text()
    section = text.split("\n## SLAC")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|") and "`--" in line]
    rows = {line.split("|")[1].strip(): line for line in lines}
    assert len(rows) >= 10
    for name, row in rows.items():
        for line in re.findall(r"`(--[^`]+)`", row):
            args = tyro.cli(script.Args, args=["--action-repeat", "4", *line.split()])
            script.check_algorithm(args)
            switches = LATENTS.get(ROWS.get(name), {})
            assert all(getattr(args, k) == v for k, v in switches.items()), name
            small = {"device": "cpu", "image_size": 16, "channels": (4, 8), "feature_dim": 8,
                     "z2_dim": 6, "hidden_dim": 16, "actions": 4, "model_batch_size": 3,
                     "sac_batch_size": 5, "pretrain_updates": 0}
            agent = make_agent(**{**vars(args), **small})
            assert agent.update(make_batch(agent))
    assert set(ROWS) - {"SLAC, fully stochastic"} <= set(rows)
    assert published(2, z2="none").model.z_dim == 256


def test_an_evaluation_may_choose_its_policy(tmp_path, monkeypatch):
    """--evaluate RUN_DIR --eval-policy mean plays the mean action of an agent trained without."""
    args = tiny_args(script, total_frames=1300, eval_episodes=1)
    script.train(args, tmp_path, type("Never", (), {"signal": 0}))
    policies, act = set(), script.Agent.act
    monkeypatch.setattr(script.Agent, "act", lambda self, *x, **y: (
        policies.add(self.args.eval_policy), act(self, *x, **y))[1])
    for policy in ("mean", "sample"):
        policies.clear()
        script.play(tiny_args(script, evaluate=str(tmp_path), eval_policy=policy, eval_episodes=1))
        assert policies == {policy}
