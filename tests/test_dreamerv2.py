"""DreamerV2's model, returns, distributions, updates, switches, against closed forms and loops."""

import copy
import math
import shlex
import subprocess
import sys

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
import torch.nn.functional as F
import tyro
from conftest import ROOT, TINY, TRAINS, run, summary, tiny_args
from test_run import assert_same, train

import dreamerv2 as script


def make_agent(seed=0, action_dim=2, **changes):
    """A small agent: two conv layers, 13 x 13 images, sequences of 6 frames."""
    small = {"device": "cpu", "image_size": 13, "decoder_kernels": (5, 5), "depth": 2,
             "categoricals": 3, "classes": 4, "deter_dim": 5, "hidden_dim": 6, "head_dim": 7,
             "head_layers": 2, "batch_size": 3, "sequence_length": 6, "horizon": 4}
    torch.manual_seed(seed)
    args = script.Args(**{**small, **changes})
    size = args.image_size
    return script.Agent(args, script.EnvSpec((3, size, size), torch.uint8, action_dim))


def count(*modules):
    return sum(p.numel() for m in modules for p in m.parameters())


def fill(size=13, rows=60, episode=20, action_dim=2, seed=0):
    """A replay buffer with episodes of noise."""
    spec = script.EnvSpec((3, size, size), torch.uint8, action_dim)
    buffer, rng = script.ReplayBuffer(rows, spec, "cpu"), np.random.default_rng(seed)
    for t in range(rows):
        image, first = rng.integers(0, 256, spec.obs_shape, dtype=np.uint8), t % episode == 0
        action, reward = rng.uniform(-1, 1, action_dim) * (not first), rng.random() * (not first)
        buffer.add(script.Step(image, None, np.float32(action), reward, 1.0, first, False))
    return buffer


def make_batch(agent, seed=0):
    return agent.sample(fill(agent.args.image_size), np.random.default_rng(seed))


@pytest.mark.parametrize("A, rssm, actor, everything", [
    (6, 1_247_248, 976_012, 16_575_986), (1, 1_246_248, 972_002, 16_570_976)])
def test_parameter_counts(A, rssm, actor, everything):
    spec = script.EnvSpec((3, 64, 64), torch.uint8, A)
    agent = script.Agent(script.Args(device="cpu"), spec)
    assert count(agent.encoder) == 1_551_312 and count(agent.decoder) == 9_886_611
    assert count(agent.rssm) == rssm and count(agent.actor) == actor
    assert count(agent.reward_head) == count(agent.critic) == count(agent.target_critic) == 971_601
    assert count(agent) == everything
    convs = [count(m) for m in agent.encoder.net if isinstance(m, torch.nn.Conv2d)]
    assert convs == [2_352, 73_824, 295_104, 1_180_032]
    r = agent.rssm
    assert (count(r.gru_in), count(r.gru, r.gru_norm)) == (205_000 + 200 * A, 241_800)
    assert (count(r.prior_in), count(r.prior_out)) == (40_200, 205_824)
    assert (count(r.post_in), count(r.post_out)) == (347_400, 205_824)
    assert count(agent.decoder.fc) == 1_881_600
    deconvs = [count(m) for m in agent.decoder.net if isinstance(m, torch.nn.ConvTranspose2d)]
    assert deconvs == [7_372_992, 460_896, 165_936, 5_187]


def test_lambda_returns():
    """Golden values, and brute force: the lambda-weighted mean of all n-step returns."""
    reward, value = torch.tensor([1.0, 2, 3])[:, None], torch.tensor([10.0, 20, 30, 40])[:, None]
    golden = {0.95: [42.949057, 43.5503, 42.6], 0.0: [20.8, 31.7, 42.6],
              1.0: [44.7323, 44.1740, 42.6]}
    for lambda_, returns in golden.items():
        out = script.lambda_returns(reward, value[1:], torch.full((3, 1), 0.99), lambda_)
        torch.testing.assert_close(out[:, 0], torch.tensor(returns), rtol=1e-5, atol=1e-4)
    g = torch.Generator().manual_seed(0)
    reward, value = torch.randn(7, 3, generator=g), torch.randn(8, 3, generator=g)
    discount = torch.rand(7, 3, generator=g)  # not constant, as with a discount head
    out = script.lambda_returns(reward, value[1:], discount, 0.7)
    for i in range(7):
        def n_step(n, i=i):
            scale = [discount[i : i + k].prod(0) for k in range(n + 1)]
            return sum(scale[k] * reward[i + k] for k in range(n)) + scale[n] * value[i + n]

        last = 7 - i
        brute = sum(0.3 * 0.7 ** (n - 1) * n_step(n) for n in range(1, last))
        torch.testing.assert_close(out[i], brute + 0.7 ** (last - 1) * n_step(last))


def test_kl_balance_and_free_nats():
    agent, g = make_agent(free_nats=0.0), torch.Generator().manual_seed(0)
    post, prior = (3 * torch.randn(2, 5, 3, 4, generator=g) for _ in range(2))

    def gradients(loss):
        a, b = post.clone().requires_grad_(), prior.clone().requires_grad_()
        value = loss(a, b)
        value.backward()
        return value.item(), a.grad, b.grad

    plain = gradients(lambda a, b: script.categorical_kl(a, b).mean())
    ours = gradients(lambda a, b: agent.kl_loss(a, b)[0])
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)
    torch.testing.assert_close(ours[1], 0.2 * plain[1])
    torch.testing.assert_close(ours[2], 0.8 * plain[2])
    exact = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x)
                                                for x in (post, prior))).sum(-1).mean()
    assert plain[0] == pytest.approx(exact.item(), rel=1e-5)
    assert agent.kl_loss(post, prior)[1].item() == pytest.approx(plain[0], rel=1e-6)
    generous = make_agent(free_nats=plain[0] + 0.1)
    below = gradients(lambda a, b: generous.kl_loss(a, b)[0])
    assert below[0] == pytest.approx(plain[0] + 0.1)
    assert below[1].abs().max() == 0 and below[2].abs().max() == 0
    agent = make_agent(free_nats=0.9 * plain[0])
    mean = gradients(lambda a, b: agent.kl_loss(a, b)[0])  # of the mean, not of each
    assert mean[0] == pytest.approx(plain[0], rel=1e-6)


def test_straight_through():
    g = torch.Generator().manual_seed(0)
    logits, weight = torch.randn(5, 3, 4, generator=g), torch.randn(5, 3, 4, generator=g)
    grads = []
    for f in (lambda x: script.one_hot_sample(x, torch.rand(5, 3, 4)),
              lambda x: torch.softmax(x, -1)):
        x = logits.clone().requires_grad_()
        (f(x).reshape(weight.shape) * weight).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)
    sample = script.one_hot_sample(logits, torch.rand(5, 3, 4)).view(5, 3, 4)
    assert (sample.sum(-1) - 1).abs().max() < 1e-6 and ((sample > 0.5).sum(-1) == 1).all()


def test_one_hot_samples_have_the_right_frequencies():
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    uniform = torch.rand(40_000, 1, 4)
    uniform[0] = 0.0  # the edge of torch.rand
    sample = script.one_hot_sample(logits.expand(40_000, 1, 4), uniform)
    counts = sample.round().sum(0).numpy()
    expected = torch.softmax(logits, 0).numpy() * 40_000
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3


@pytest.mark.parametrize("loc, std, entropy, mean", [
    (0, 1.1, 0.685978, 0), (0.5, 0.4, 0.262498, 0.418459), (-0.9, 0.1, -1.2002, -0.87124),
    (0.99, 0.1, -1.536918, 0.916467), (0, 2.1, 0.692584, 0)])
def test_truncated_normal(loc, std, entropy, mean):
    exact = scipy.stats.truncnorm((-1 - loc) / std, (1 - loc) / std, loc, std)
    torch.manual_seed(0)
    x, h = script.truncated_normal(torch.full((100_000,), float(loc)),
                                   torch.full((100_000,), float(std)), torch.rand(100_000))
    assert h[0].item() == pytest.approx(entropy, abs=1e-4)
    assert h[0].item() == pytest.approx(exact.entropy(), abs=1e-4)
    assert x.mean().item() == pytest.approx(mean, abs=5e-3) and x.abs().max() < 1
    assert scipy.stats.kstest(x.numpy(), exact.cdf).pvalue > 1e-3


def test_truncated_normal_has_finite_gradients_in_the_corner():
    for corner in (-0.9999, 0.9999):
        loc = torch.full((10**6,), corner, requires_grad=True)
        std = torch.full((10**6,), 0.1, requires_grad=True)
        x, entropy = script.truncated_normal(loc, std, torch.rand(10**6))
        (x.sum() + entropy.sum()).backward()
        assert x.isfinite().all() and loc.grad.isfinite().all() and std.grad.isfinite().all()


def test_truncated_normals_gradients_are_the_derivatives_of_its_mean():
    uniform = (torch.arange(200_000) + 0.5).double() / 200_000
    loc, std = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.3, 0.6))
    script.truncated_normal(loc, std, uniform)[0].mean().backward()

    def mean(m, s):
        return scipy.stats.truncnorm((-1 - m) / s, (1 - m) / s, m, s).mean()

    assert loc.grad.item() == pytest.approx((mean(0.301, 0.6) - mean(0.299, 0.6)) / 0.002, rel=1e-3)
    assert std.grad.item() == pytest.approx((mean(0.3, 0.601) - mean(0.3, 0.599)) / 0.002, rel=1e-3)


def test_truncated_normals_entropy_has_gradients_too():
    loc, std = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.3, 0.6))
    script.truncated_normal(loc, std, torch.tensor(0.5))[1].backward()

    def entropy(m, s):
        return scipy.stats.truncnorm((-1 - m) / s, (1 - m) / s, m, s).entropy()

    slopes = ((entropy(0.301, 0.6) - entropy(0.299, 0.6)) / 0.002,
              (entropy(0.3, 0.601) - entropy(0.3, 0.599)) / 0.002)
    assert loc.grad.item() == pytest.approx(slopes[0], rel=1e-3)
    assert std.grad.item() == pytest.approx(slopes[1], rel=1e-3)


def test_the_actors_standard_deviation():
    actor = make_agent().actor
    for p in actor.parameters():
        p.data.zero_()
    for raw, std in ((-10, 0.113386), (0, 1.1), (10, 2.086614)):
        actor.trunk[-1].bias.data.fill_(raw)
        mean, out = actor(torch.zeros(1, 17))
        assert out[0, 0].item() == pytest.approx(std, abs=1e-5)
        assert mean[0, 0].item() == pytest.approx(math.tanh(raw), abs=1e-6)


def test_the_gru():
    rssm, g = make_agent().rssm, torch.Generator().manual_seed(0)
    x, h = torch.randn(4, 6, generator=g), torch.randn(4, 5, generator=g)
    parts = rssm.gru(torch.cat([F.elu(x), h], -1))
    parts = (parts - parts.mean(-1, keepdim=True)) / (parts.var(-1, False, True) + 1e-3).sqrt()
    reset, candidate, update = parts[:, :5], parts[:, 5:10], parts[:, 10:]
    u = torch.sigmoid(update - 1)
    expected = u * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - u) * h
    torch.testing.assert_close(rssm.cell(x, h), expected)
    rssm.gru.weight.data.zero_()
    torch.testing.assert_close(rssm.cell(x, h), (1 - torch.sigmoid(torch.tensor(-1.0))) * h)


def test_init_is_glorots():
    """Uniform within sqrt(6 / (fan_in + fan_out)), zero biases; LayerNorm 1 and 0."""
    agent = script.Agent(script.Args(device="cpu"), script.EnvSpec((3, 64, 64), torch.uint8, 6))
    layers = [m for m in agent.modules() if hasattr(m, "weight")]
    assert len(layers) == 4 + 7 + 5 + 5 * 4  # encoder, RSSM, decoder, heads
    for layer in layers:
        assert (layer.bias == 0).all()
        if isinstance(layer, torch.nn.LayerNorm):
            assert (layer.weight == 1).all() and layer.eps == 1e-3
            continue
        taps = math.prod(layer.weight.shape[2:])
        bound = math.sqrt(6 / (taps * sum(layer.weight.shape[:2])))
        top = layer.weight.abs().max().item()
        assert 0.98 * bound < top <= bound * (1 + 1e-6)
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_sizes_of_the_conv_layers():
    agent = script.Agent(script.Args(device="cpu"), script.EnvSpec((3, 64, 64), torch.uint8, 1))
    x, sides = torch.zeros(1, 3, 64, 64), []
    for layer in agent.encoder.net:
        x = layer(x)
        if isinstance(layer, torch.nn.Conv2d):
            sides.append(x.shape[-1])
    assert sides == [31, 14, 6, 2] and x.shape == (1, 1536)
    x, sides = torch.randn(2, 1224), []
    y = agent.decoder.fc(x).view(2, 1536, 1, 1)  # no ELU here
    for layer in agent.decoder.net:
        y = layer(y)
        if isinstance(layer, torch.nn.ConvTranspose2d):
            sides.append(y.shape[-1])
    assert sides == [5, 13, 30, 64]
    torch.testing.assert_close(agent.decoder(x), y)
    assert isinstance(agent.decoder.net[-1], torch.nn.ConvTranspose2d)  # ends without ELU
    elus = [m for m in agent.modules() if isinstance(m, torch.nn.ELU)]
    assert len(elus) == 4 + 3 + 4 * 4  # encoder, decoder, four heads


def observe(agent, e, action, is_first, uniform):
    return agent.rssm.observe(e, action, is_first, uniform)


def inputs(agent, B=3, T=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(B, T, agent.encoder.dim, generator=g),
            torch.rand(B, T, agent.action_dim, generator=g) * 2 - 1,
            torch.zeros(B, T, dtype=torch.bool), torch.rand(B, T, *agent.rssm.shape, generator=g))


def test_observe_is_the_loop_over_steps():
    agent = make_agent()
    e, action, is_first, uniform = inputs(agent)
    is_first[:, 0] = is_first[1, 3] = True
    z, h, post, prior = observe(agent, e, action, is_first, uniform)
    rssm = agent.rssm
    for b in range(3):
        zb, hb = torch.zeros(1, 12), torch.zeros(1, 5)
        for t in range(6):
            a = action[b : b + 1, t]
            if is_first[b, t]:
                zb, hb, a = torch.zeros(1, 12), torch.zeros(1, 5), torch.zeros(1, 2)
            x = (rssm.gru_in(torch.cat([zb, a], -1)))
            hb = rssm.cell(x, hb)
            logits = rssm.post_out(F.elu(rssm.post_in(torch.cat([hb, e[b : b + 1, t]], -1))))
            torch.testing.assert_close(post[b, t], logits.view(3, 4))
            zb = script.one_hot_sample(logits.view(1, 3, 4), uniform[b : b + 1, t])
            torch.testing.assert_close(h[b, t], hb[0])
            torch.testing.assert_close(z[b, t], zb[0])
            wanted = rssm.prior_out(F.elu(rssm.prior_in(hb)))
            torch.testing.assert_close(prior[b, t], wanted.view(3, 4))


def test_a_start_forgets_everything_before():
    agent = make_agent()
    e, action, is_first, uniform = inputs(agent)
    is_first[:, 3] = True
    z, h, *_ = observe(agent, e, action, is_first, uniform)
    other, led = e.clone(), action.clone()
    other[:, :3] += 1
    led[:, :4] += 1  # the action stored at a start counts for nothing
    again = observe(agent, other, led, is_first, uniform)
    assert torch.equal(z[:, 3:], again[0][:, 3:]) and torch.equal(h[:, 3:], again[1][:, 3:])
    assert not torch.equal(h[:, :3], again[1][:, :3])


def test_image_and_reward_loss_constants():
    agent, images = make_agent(), torch.rand(6, 3, 64, 64) - 0.5
    assert agent.image_loss(images, images).item() == pytest.approx(11291.917, abs=1e-2)
    more = agent.image_loss(images + 0.1, images).item() - 11291.917
    assert more == pytest.approx(0.5 * 12288 * 0.01, rel=1e-3)
    reward = torch.rand(2, 3, 1)
    exact = -torch.distributions.Normal(reward + 0.3, 1).log_prob(reward).mean()
    assert agent.reward_loss(reward + 0.3, reward).item() == pytest.approx(exact.item(), rel=1e-5)


def test_actor_and_critic_losses_by_loops(monkeypatch):
    agent, g = make_agent(entropy_weight=0.3), torch.Generator().manual_seed(0)
    returns, entropies = torch.randn(4, 5, generator=g), torch.randn(4, 5, generator=g)
    weights = torch.rand(5, 5, generator=g)
    loss = agent.actor_loss(returns, entropies, weights)
    brute = -sum(weights[i, n] * (returns[i + 1, n] + 0.3 * entropies[i, n])
                 for i in range(3) for n in range(5)) / 15
    assert loss.item() == pytest.approx(brute.item(), rel=1e-5)
    features, value = torch.randn(5, 5, 17), torch.randn(4, 5, 1, generator=g)
    monkeypatch.setattr(agent.critic, "forward", lambda f: value)
    loss = agent.critic_loss(features, returns, weights)
    brute = sum(weights[i, n] * (0.5 * (value[i, n, 0] - returns[i, n]) ** 2 + 0.918939)
                for i in range(4) for n in range(5)) / 20
    assert loss.item() == pytest.approx(brute.item(), rel=1e-5)


def test_returns_belong_to_the_state_that_the_reward_comes_with(monkeypatch):
    """R_i from reward i, discount i and value i + 1; reward and value of the other end unused."""
    agent = make_agent(return_lambda=0.6)
    features = torch.arange(5.0)[:, None, None].expand(5, 2, 17)
    monkeypatch.setattr(agent.reward_head, "forward", lambda f: 10 + f[..., :1])
    monkeypatch.setattr(agent.target_critic, "forward", lambda f: 100 * f[..., :1])
    discount = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9])[:, None].expand(5, 2)
    expected = 400.0
    for i in (3, 2, 1, 0):
        expected = 10 + i + discount[i, 0] * (0.4 * 100 * (i + 1) + 0.6 * expected)
        out = agent.returns(features, discount)[i]
        torch.testing.assert_close(out, expected.expand(2))


def test_constant_and_learned_discounts(monkeypatch):
    agent = make_agent(gamma=0.9)
    features, first = torch.randn(5, 6, 17), torch.tensor([1.0, 1, 1, 0, 1, 1])
    discount, weights = agent.discounts(features, first)
    assert (discount == 0.9).all()
    for i in range(5):
        torch.testing.assert_close(weights[i], torch.full((6,), 0.9**i))
    agent = make_agent(gamma=0.9, discount_head=True)
    logit = torch.randn(5, 6, 1).requires_grad_()
    monkeypatch.setattr(agent.discount_head, "forward", lambda f: logit[-len(f) :])
    discount, weights = agent.discounts(features, first)
    torch.testing.assert_close(discount[0], 0.9 * first)  # is known
    torch.testing.assert_close(discount[1:], torch.sigmoid(logit[1:, :, 0]))
    for i in range(5):
        torch.testing.assert_close(weights[i], discount[:i].prod(0))
    assert weights.requires_grad is False and discount.requires_grad
    assert (weights[1:, 3] == 0).all()  # nothing after a terminal counts
    target = 0.9 * torch.tensor([1.0, 0, 1, 1, 1, 0]).expand(5, 6)[..., None]
    p = torch.sigmoid(logit)
    brute = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    torch.testing.assert_close(agent.discount_loss(logit, target / 0.9), brute)


def test_imagination_is_actor_and_prior_in_turns(monkeypatch):
    agent, g = make_agent(), torch.Generator().manual_seed(0)
    z, h = torch.randn(5, 12, generator=g), torch.randn(5, 5, generator=g)
    noise, uniform = torch.rand(4, 5, 3, 4, generator=g), torch.rand(4, 5, 2, generator=g)
    monkeypatch.setattr(agent.rssm, "noise", lambda *shape: noise)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: uniform)
    features, entropies = agent.imagine(z, h)
    assert features.shape == (5, 5, 17) and entropies.shape == (4, 5)
    for t in range(4):
        torch.testing.assert_close(features[t], torch.cat([z, h], -1))
        loc, std = agent.actor(features[t])
        action, entropy = script.truncated_normal(loc, std, uniform[t])
        torch.testing.assert_close(entropies[t], entropy.sum(-1))
        h = agent.rssm.cell(agent.rssm.gru_in(torch.cat([z, action], -1)), h)
        z = script.one_hot_sample(agent.rssm.prior(h), noise[t])
    torch.testing.assert_close(features[4], torch.cat([z, h], -1))


def test_the_actors_gradient_is_the_derivative_through_the_model(monkeypatch):
    """Against finite differences, with z the probabilities and actions that do not look back: each
    action's own effect on all later returns, through the model, the reward and the target."""
    agent = make_agent(entropy_weight=0.0).double()
    rssm, raw = agent.rssm, torch.randn(4, 3, 2, dtype=torch.float64) / 2

    def mean_step(z, h, action, noise):
        h = rssm.cell(rssm.gru_in(torch.cat([z, action], -1)), h)
        return torch.softmax(rssm.prior(h), -1).flatten(1), h

    monkeypatch.setattr(rssm, "imagine_step", mean_step)
    z, h = torch.rand(3, 12, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)

    def loss(actions):
        queue = list(actions)
        given = lambda *_: (queue.pop(0), torch.zeros(3, 2))  # noqa: E731
        monkeypatch.setattr(script, "truncated_normal", given)
        features, entropies = agent.imagine(z, h)
        discount, weights = agent.discounts(features, torch.ones(3))
        return agent.actor_loss(agent.returns(features, discount), entropies, weights)

    actions = raw.clone().requires_grad_()
    loss(actions).backward()
    assert actions.grad[:3].abs().min() > 0 and actions.grad[3].abs().max() > 0  # by the last value
    for index in np.ndindex(4, 3, 2):
        up, down = raw.clone(), raw.clone()
        up[index] += 1e-5
        down[index] -= 1e-5
        slope = (loss(up) - loss(down)).item() / 2e-5
        assert actions.grad[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_the_actor_does_not_look_back(monkeypatch):
    """J(pi) reaches earlier actions through the model alone, not through what the actor sees."""
    agent = make_agent()
    seen = []
    forward = agent.actor.forward
    monkeypatch.setattr(agent.actor, "forward", lambda f: (seen.append(f), forward(f))[1])
    agent.imagine(torch.rand(3, 12), torch.rand(3, 5))
    assert len(seen) == 4 and not any(f.requires_grad for f in seen)


def moved(agent, step):
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    step()
    changed = {k for k, v in agent.state_dict().items() if not torch.equal(v, before[k])}
    return {k.split(".")[0] for k in changed}


ALL = {"infonce_weight": 1.0, "spr_weight": 1.0, "mask_ratio": 0.5, "shift": 2,
       "discount_head": True}
TRAINS = TRAINS["dreamerv2"]
MODEL = TRAINS["KL + image + reward"]
EXTRA = {"discount_head", "projection", "similarity", "predictor", "masked_decoder",
         "masked_reward_head"}


@pytest.mark.parametrize("changes, model", [({}, MODEL), (ALL, MODEL | EXTRA)])
def test_who_trains_what(changes, model):
    """update() in slow motion: what each optimizer's step moves."""
    agent, steps = make_agent(weight_decay=0.0, free_nats=0.0, **changes), {}
    for name, optimizer in agent.optimizers.items():
        step = optimizer.step
        optimizer.step = lambda name=name, step=step: steps.update({name: moved(agent, step)})
    copied = moved(agent, lambda: agent.update(make_batch(agent)))
    assert steps == {"model": model, "actor": TRAINS["actor"], "critic": TRAINS["critic"]}
    targets = {"target_critic"} | ({"target_encoder", "target_projection"} if changes else set())
    assert copied == model | {"actor", "critic"} | targets


def test_behavior_learns_in_the_new_model_from_states_of_the_old(monkeypatch):
    """Order of an update: model step, imagination, actor, critic, copy."""
    agent, order = make_agent(), []
    weight = agent.rssm.gru.weight
    before = weight.detach().clone()
    for name in ("observe", "imagine_step"):
        method = getattr(agent.rssm, name)
        monkeypatch.setattr(agent.rssm, name, lambda *x, name=name, method=method: (
            order.append((name, torch.equal(weight, before))), method(*x))[1])
    for name, optimizer in agent.optimizers.items():
        step = optimizer.step
        optimizer.step = lambda name=name, step=step: (order.append(name), step())
    agent.update(make_batch(agent))
    assert order == [("observe", True), "model", *[("imagine_step", False)] * 4, "actor", "critic"]


def test_gradients_are_clipped_by_their_norm():
    p, q = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    for scale, norm in ((1e4, 100.0), (1.0, 5**0.5)):
        before = torch.cat([p, q]).detach()
        script.minimize(scale * (p.sum() + q.sum()), torch.optim.SGD([p, q], 1.0))
        step = torch.cat([p, q]).detach() - before
        assert step.norm().item() == pytest.approx(norm, rel=1e-4)


def test_the_target_is_copied_after_updates_1_101_201():
    agent, copies = make_agent(), []
    for update in range(203):
        old = agent.target_critic[0].weight.clone()
        agent.update(make_batch(agent))
        if not torch.equal(old, agent.target_critic[0].weight):
            copies.append(update + 1)
            assert torch.equal(agent.critic[0].weight, agent.target_critic[0].weight)
    assert copies == [1, 101, 201]


def test_weights_decay_by_a_millionth_whatever_the_learning_rate():
    agent = make_agent()
    rates = {}
    for name, optimizer in agent.optimizers.items():
        group = optimizer.param_groups[0]
        rates[name] = group["lr"]
        assert group["eps"] == 1e-5 and group["betas"] == (0.9, 0.999), name
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
        before = [p.detach().clone() for p in group["params"]]
        optimizer.step()
        for p, old in zip(group["params"], before, strict=True):  # biases and LayerNorm too
            torch.testing.assert_close(p.detach(), old * (1 - 1e-6), rtol=1e-7, atol=0)
    assert rates == {"model": 3e-4, "actor": 8e-5, "critic": 8e-5}


def episode(rng, T=6):
    """Steps of an episode of noise."""
    for t in range(T):
        image = rng.integers(0, 256, (3, 13, 13), dtype=np.uint8)
        action = np.float32(rng.uniform(-1, 1, 2) * (t > 0))
        yield script.Step(image, None, action, 0.0, 1.0, t == 0, False)


def test_acting_and_training_see_the_same():
    """act's state along an episode is observe's, with the same noise; the evaluated action is the
    mean's tanh."""
    agent, steps = make_agent(), list(episode(np.random.default_rng(0)))
    carry, hs, uniform = None, [], []
    for t, step in enumerate(steps):
        torch.manual_seed(t)
        action, carry = agent.act(step, carry, explore=False)
        hs.append(carry["h"])
        raw = agent.actor.trunk(torch.cat([carry["z"], carry["h"]], -1))[0, :2]
        torch.testing.assert_close(action, torch.tanh(raw).detach())
        torch.manual_seed(t)
        uniform.append(torch.rand(1, 1, 3, 4))
    obs, action = (torch.as_tensor(np.stack([s[i] for s in steps]))[None] for i in (0, 2))
    images, _, e = agent.encode(obs, agent.encoder)
    torch.testing.assert_close(images, obs[0] / 255 - 0.5)  # as the decoder's target
    is_first = torch.arange(6)[None] == 0
    h = observe(agent, e, action, is_first, torch.cat(uniform, 1))[1]
    torch.testing.assert_close(torch.cat(hs), h[0], rtol=1e-4, atol=1e-5)


def test_exploration_draws_from_the_truncated_normal(monkeypatch):
    agent, step = make_agent(), next(episode(np.random.default_rng(0)))
    constant = torch.full((1, 2), 0.9), torch.full((1, 2), 0.4)
    monkeypatch.setattr(agent.actor, "forward", lambda f: constant)
    draws = torch.stack([agent.act(step, None, explore=True)[0] for _ in range(2000)])
    exact = scipy.stats.truncnorm(-1.9 / 0.4, 0.1 / 0.4, 0.9, 0.4)
    assert scipy.stats.kstest(draws.flatten().numpy(), exact.cdf).pvalue > 1e-3


def test_alignment_with_an_environment_that_shows_its_last_action():
    """Row t's image, action and reward are one step's; sequences never cross an episode, their
    starts are uniform, and the first row is marked as a start."""
    agent, rng = make_agent(sequence_length=6, batch_size=4000), np.random.default_rng(0)
    buffer = script.ReplayBuffer(100, script.EnvSpec((3, 13, 13), torch.uint8, 2), "cpu")
    for row in range(60):
        level = row % 20  # three episodes of 20 rows
        image = np.full((3, 13, 13), 10 * level + row // 20, np.uint8)
        action = np.float32([level / 20, 0])
        buffer.add(script.Step(image, None, action, float(level), 1.0, level == 0, False))
    batch = agent.sample(buffer, rng)
    level, which = batch["obs"][..., 0, 0, 0] // 10, batch["obs"][..., 0, 0, 0] % 10
    torch.testing.assert_close(batch["action"][..., 0], level / 20)
    torch.testing.assert_close(batch["reward"][..., 0], level.float())
    assert (level.diff(dim=1) == 1).all() and (which == which[:, :1]).all()
    assert batch["is_first"][:, 0].all() and not batch["is_first"][:, 1:].any()
    counts = np.bincount(level[:, 0].numpy() + 15 * which[:, 0].numpy(), minlength=45)
    assert len(counts) == 45 and scipy.stats.chisquare(counts).pvalue > 1e-3


def test_kl_is_clamped_after_the_mean():
    """KLs of 0.1 and 1.2 have a mean of 0.65; clamped to 0.6 before, it would be 0.9."""
    agent = make_agent()

    def post(kl):  # of two classes against uniform ones
        p = scipy.optimize.brentq(lambda p: p * np.log(2 * p) + (1 - p) * np.log(2 - 2 * p) - kl,
                                  0.5 + 1e-9, 1 - 1e-12)
        return [np.log(p), np.log(1 - p)]

    logits = torch.tensor([[[post(0.1 / 2)] * 2, [post(0.6)] * 2]], dtype=torch.float32)
    kl = script.categorical_kl(logits, torch.zeros_like(logits))
    torch.testing.assert_close(kl, torch.tensor([[0.1, 1.2]]), rtol=1e-4, atol=1e-5)
    agent.args.free_nats = 0.6
    kl = agent.kl_loss(logits, torch.zeros_like(logits))[0]
    assert kl.item() == pytest.approx(0.65, rel=1e-4)


# ---- data efficiency ---------------------------------------------------------------------------


def test_everything_is_off_by_default():
    agent = make_agent()
    assert set(agent._modules) == MODEL | {"actor", "critic", "target_critic"}
    metrics = agent.update(make_batch(agent))
    losses = {f"loss/{name}" for name in ("kl", "image", "reward", "actor", "critic")}
    assert set(metrics) == losses | {"stat/kl", "stat/entropy", "stat/imagined_return"}
    args = script.Args()
    assert args.reset == "none" and args.shift == 0 and agent.resets_due(10**9) == 0


@pytest.mark.parametrize("model, behavior", [(2, 1), (1, 3)])
def test_replay_ratios_apart(model, behavior):
    agent = make_agent(model_every_updates=model, behavior_every_updates=behavior,
                       target_every_updates=2)
    for update in range(8):
        before = agent.target_critic[0].weight.clone()
        parts = moved(agent, lambda: agent.update(make_batch(agent)))
        assert ("rssm" in parts) == (update % model == 0)
        assert ("actor" in parts) == ("critic" in parts) == (update % behavior == 0)
        copied = update % behavior == 0 and update // behavior % 2 == 0
        assert copied == (not torch.equal(before, agent.target_critic[0].weight))


def test_random_shift_is_one_replicated_crop_per_sequence():
    g = torch.Generator().manual_seed(0)
    obs = torch.randint(0, 256, (300, 2, 3, 9, 9), generator=g, dtype=torch.uint8)
    out = script.random_shift(obs, 2)
    assert out.dtype == torch.uint8 and out.shape == obs.shape
    padded = F.pad(obs.float().flatten(1, 2), (2, 2, 2, 2), mode="replicate").byte()
    seen = []
    for b in range(300):
        fits = [(y, x) for y in range(5) for x in range(5) if torch.equal(
            padded[b, :, y : y + 9, x : x + 9], out[b].flatten(0, 1))]
        assert len(fits) == 1
        seen.append(5 * fits[0][0] + fits[0][1])
    assert scipy.stats.chisquare(np.bincount(seen, minlength=25)).pvalue > 1e-3
    assert script.random_shift(obs, 0) is obs


def test_a_shift_moves_input_and_target_alike(monkeypatch):
    """The decoder is to give the moved images, as the encoder saw them."""
    agent, calls = make_agent(shift=2), []
    shift, image_loss = script.random_shift, agent.image_loss
    monkeypatch.setattr(script, "random_shift", lambda *x: (calls.append(shift(*x)), calls[-1])[1])
    monkeypatch.setattr(agent, "image_loss", lambda m, i: (calls.append(i), image_loss(m, i))[1])
    batch = make_batch(agent)
    agent.update(batch)
    torch.testing.assert_close(calls[1], calls[0].flatten(0, 1) / 255 - 0.5)
    assert not torch.equal(calls[0], batch["obs"])


def test_infonce_by_loops():
    """Own key against those of other sequences, and of its own but for the three nearest."""
    agent, g = make_agent(infonce_weight=1.0), torch.Generator().manual_seed(0)
    e, keys = torch.randn(2, 6, agent.encoder.dim, generator=g), torch.randn(2, 6, 128, generator=g)
    query = agent.similarity(agent.projection(e))
    brute = 0.0
    for b in range(2):
        for t in range(6):
            others = [keys[c, s] for c in range(2) for s in range(6)
                      if c != b or s == t or abs(s - t) > 3]
            scores = torch.stack([(query[b, t] * key).sum() for key in others])
            brute -= (query[b, t] * keys[b, t]).sum() - torch.logsumexp(scores, 0)
    torch.testing.assert_close(agent.contrastive_loss(e, keys), brute / 12)
    same = agent.contrastive_loss(e, torch.zeros_like(keys))
    allowed = [6 + sum(s == t or abs(s - t) > 3 for s in range(6)) for t in range(6)]
    assert same.item() == pytest.approx(np.mean(np.log(allowed)), rel=1e-5)


def test_spr_by_loops(monkeypatch):
    agent, g = make_agent(spr_weight=1.0), torch.Generator().manual_seed(0)
    z, h = torch.rand(2, 6, 12, generator=g), torch.randn(2, 6, 5, generator=g)
    action, keys = torch.rand(2, 6, 2, generator=g), torch.randn(2, 6, 128, generator=g)
    monkeypatch.setattr(agent.rssm, "noise", lambda *shape: torch.full((*shape, 3, 4), 0.5))
    brute = 0.0
    for k in (1, 2, 3, 4, 5):
        errors = []
        for b in range(2):
            for t in range(6 - k):
                zt, ht = z[b, t], h[b, t]
                for j in range(1, k + 1):
                    zt, ht = agent.rssm.imagine_step(
                        zt, ht, action[b, t + j], torch.full((3, 4), 0.5))
                predicted = agent.projection(agent.predictor(torch.cat([zt, ht])))
                errors.append((F.normalize(predicted, dim=0)
                               - F.normalize(keys[b, t + k], dim=0)).square().sum())
        brute += sum(errors) / len(errors) / 5
    torch.testing.assert_close(agent.spr_loss(z, h, action, keys), brute)
    monkeypatch.setattr(agent.projection, "forward", lambda f: 3 * keys[:, -f.shape[1] :])
    assert agent.spr_loss(z, h, action, keys).abs().item() < 1e-5  # 0 at best


def test_the_target_encoder_follows_slowly_and_sees_other_shifts(monkeypatch):
    agent, seen = make_agent(spr_weight=1.0, encoder_tau=0.3), []
    old = copy.deepcopy(agent.target_encoder)
    forward = agent.target_encoder.forward
    monkeypatch.setattr(agent.target_encoder, "forward", lambda x: (seen.append(x), forward(x))[1])
    batch = make_batch(agent)
    projection = agent.target_projection.weight.clone()
    agent.update(batch)
    torch.testing.assert_close(agent.target_projection.weight,
                               0.3 * agent.projection.weight.detach() + 0.7 * projection)
    assert not torch.equal(agent.projection.weight, projection)  # SPR alone trains it
    for p, q, target in zip(agent.encoder.parameters(), old.parameters(),
                            agent.target_encoder.parameters(), strict=True):
        torch.testing.assert_close(target, 0.3 * p.detach() + 0.7 * q)
        assert target.grad is None
    whole = batch["obs"].flatten(0, 1) / 255 - 0.5
    assert len(seen) == 1 and not torch.equal(seen[0], whole)


def test_masking_hides_cells_of_the_feature_map_in_a_second_reconstruction_only():
    sizes = {"image_size": 64, "decoder_kernels": (5, 5, 6, 6)}
    images, reward = torch.rand(4, 3, 64, 64) - 0.5, torch.rand(4, 1)
    losses = {}
    for ratio in (1e-9, 0.5, 1.0):
        agent, maps = make_agent(mask_ratio=ratio, **sizes), []
        whole, e = agent.encoder(images)
        agent.encoder.net[4].register_forward_hook(lambda m, x, y, maps=maps: maps.append(x[0]))
        losses[ratio] = agent.masked_loss(whole, images, reward).item()
        hidden = (maps[0] == 0).all(1)  # (4, 14, 14)
        assert hidden.float().mean().item() == pytest.approx(ratio, abs=0.08)
        if ratio == 0.5:
            assert (hidden[0] != hidden[1]).any()  # each image's own
        if ratio == 1e-9:
            plain = (agent.image_loss(agent.masked_decoder(e), images)
                     + agent.reward_loss(agent.masked_reward_head(e), reward)).item()
    assert losses[1e-9] == pytest.approx(plain, rel=1e-5)
    with_it, without = (make_agent(mask_ratio=r) for r in (0.5, 0.0))
    for name, value in without.state_dict().items():
        with_it.state_dict()[name].copy_(value)
    metrics = []
    for agent in (with_it, without):
        torch.manual_seed(0)
        metrics.append(agent.update(make_batch(agent)))
    assert metrics[0]["loss/image"] == metrics[1]["loss/image"]  # sees everything


def test_losses_are_made_of_the_right_things(monkeypatch):
    """Each loss of model_losses against its own formula written out: value, and gradient into
    everything that the model made of the batch."""
    agent, batch = make_agent(free_nats=0.0, **ALL), None
    batch = make_batch(agent)
    batch["discount"][0, 3] = 0.0
    noise = torch.rand(3, 6, 3, 4)
    monkeypatch.setattr(agent.rssm, "noise", lambda *shape: torch.full((*shape, 3, 4), 0.5))
    monkeypatch.setattr(script, "random_shift", lambda obs, pixels: obs)
    images, maps, e = agent.encode(batch["obs"], agent.encoder)
    z, h, post, prior = agent.rssm.observe(e, batch["action"], batch["is_first"], noise)
    made = images, maps, e, z, h, post, prior
    torch.manual_seed(7)
    losses = agent.model_losses(batch, *made)
    features = torch.cat([z, h], -1)
    keys = agent.target_projection(agent.target_encoder(images)[1]).unflatten(0, (3, 6)).detach()
    torch.manual_seed(7)
    expected = {
        "loss/kl": 0.8 * script.categorical_kl(post.detach(), prior).mean()
        + 0.2 * script.categorical_kl(post, prior.detach()).mean(),
        "loss/image": 0.5 * (agent.decoder(features.flatten(0, 1)) - images).square().sum() / 18
        + 0.918939 * 507,
        "loss/reward": 0.918939
        + 0.5 * (agent.reward_head(features) - batch["reward"]).square().mean(),
        "loss/discount": F.binary_cross_entropy_with_logits(
            agent.discount_head(features), 0.99 * batch["discount"]),
        "loss/contrastive": agent.contrastive_loss(e, keys),
        "loss/spr": agent.spr_loss(z, h, batch["action"], keys),
        "loss/masked": agent.masked_loss(maps, images, batch["reward"].view(18, 1)),
    }
    assert set(losses) == {*expected, "stat/kl"}
    sources = [maps, e, z, h, post, prior]
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-5)
        ours, theirs = (torch.autograd.grad(x, sources, allow_unused=True, retain_graph=True)
                        for x in (losses[name], value))
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None), name
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    reached = {name: torch.autograd.grad(losses[name], maps, retain_graph=True,
                                         allow_unused=True)[0] for name in expected}
    assert all(g is not None and g.abs().max() > 0 for g in reached.values())  # the encoder


@pytest.mark.parametrize("way", [0, 1])
def test_gradients_go_back_through_time_by_z_and_by_h(way):
    """From the last state to the first, three steps before, each way on its own."""
    agent = make_agent()
    e, action, is_first, uniform = inputs(agent, T=3)
    start = [torch.rand(3, 12), torch.randn(3, 5)]
    start[way].requires_grad_()
    h = agent.rssm.observe(e, action, is_first, uniform, *start)[1]
    assert torch.autograd.grad(h[:, -1].sum(), start[way])[0].abs().max() > 0


def test_the_entropy_moves_the_actor():
    agent = make_agent(entropy_weight=0.5)
    for net in (agent.reward_head, agent.target_critic):
        for p in net.parameters():
            p.data.zero_()
    features, entropies = agent.imagine(torch.rand(3, 12), torch.randn(3, 5))
    discount, weights = agent.discounts(features, torch.ones(3))
    parameters = [*agent.actor.parameters()]
    loss = agent.actor_loss(agent.returns(features, discount), entropies, weights)
    brute = -0.5 * (weights[:3] * entropies[:3]).mean()
    for a, b in zip(*(torch.autograd.grad(x, parameters, retain_graph=True)
                      for x in (loss, brute)), strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 0


def test_the_published_numbers_are_the_defaults():
    wanted = {  # dmc_vision in the authors' configs.yaml
        "warmup_steps": 1000, "pretrain_updates": 100, "updates_per_step": 0.2, "batch_size": 16,
        "sequence_length": 50, "image_size": 64, "replay_capacity": 2_000_000, "depth": 48,
        "decoder_kernels": (5, 5, 6, 6), "categoricals": 32, "classes": 32, "deter_dim": 200,
        "hidden_dim": 200, "head_dim": 400, "head_layers": 4, "horizon": 15, "gamma": 0.99,
        "return_lambda": 0.95, "kl_scale": 1.0, "kl_balance": 0.8, "free_nats": 1.0,
        "entropy_weight": 1e-4, "model_lr": 3e-4, "actor_lr": 8e-5, "critic_lr": 8e-5,
        "weight_decay": 1e-6, "target_every_updates": 100, "discount_head": False}
    assert {name: getattr(script.Args(), name) for name in wanted} == wanted
    assert script.ACTION_REPEAT == {}  # so 2 for every task
    args = script.Args()
    assert [script.updates_due(args, step) for step in (999, 1000, 1004, 1005, 1010, 500_000)] == [
        0, 100, 100, 101, 102, 99_900]


def test_a_terminal_start_has_no_future(monkeypatch):
    agent, seen = make_agent(discount_head=True), []
    discounts = agent.discounts
    monkeypatch.setattr(agent, "discounts", lambda f, first: (seen.append(first),
                                                              discounts(f, first))[1])
    batch = make_batch(agent)
    batch["discount"][1, 5] = 0.0
    agent.update(batch)
    assert torch.equal(seen[0].view(3, 6), batch["discount"][..., 0])


def test_only_an_optimizers_own_parameters_get_gradients():
    agent = make_agent()
    z, h, _ = agent.update_model(make_batch(agent), True)
    before = {n: p.grad.clone() for n, p in agent.named_parameters() if p.grad is not None}
    assert not any(n.startswith(("actor", "critic")) for n in before)
    agent.update_behavior(z.detach().flatten(0, 1), h.detach().flatten(0, 1), torch.ones(18), True)
    for name, p in agent.named_parameters():
        if name in before:
            assert torch.equal(p.grad, before[name]), name  # also of the model's, after J(pi)


def test_weights_of_the_auxiliary_losses(monkeypatch):
    """J(M) is the weighted sum; the logged losses are without their weights."""
    agent = make_agent(infonce_weight=2.0, spr_weight=3.0, kl_scale=5.0,
                       mask_ratio=0.5, discount_head=True)
    totals, minimize = [], script.minimize
    monkeypatch.setattr(script, "minimize", lambda loss, *o: (totals.append(loss.item()),
                                                              minimize(loss, *o))[1])
    m = agent.update(make_batch(agent))
    total = (m["loss/image"] + m["loss/reward"] + 5 * m["loss/kl"] + 2 * m["loss/contrastive"]
             + 3 * m["loss/spr"] + m["loss/masked"] + m["loss/discount"])
    assert totals[0] == pytest.approx(total.item(), rel=1e-5)


TRANSITION = {f"rssm.{n}" for n in ("gru_in", "gru", "gru_norm", "prior_in", "prior_out")}
RESETS = {  # what each may touch: prefixes of names in state_dict
    "transition": TRANSITION,
    "actor-critic": {"actor.", "critic.", "target_critic."},
    "all": {f"{name}." for name in MODEL | EXTRA | {"actor", "critic", "target_critic",
                                                   "target_encoder", "target_projection"}},
}


@pytest.mark.parametrize("kind", RESETS)
def test_a_reset_touches_exactly_what_it_says(kind):
    agent = make_agent(reset=kind, **ALL)
    for _ in range(3):
        agent.update(make_batch(agent))
    with torch.no_grad():  # biases away from the zero that a fresh one has
        for p in agent.parameters():
            p.add_(0.1)
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    names = {id(p): name for name, p in agent.named_parameters()}
    agent.reset()
    changed = {k for k, v in agent.state_dict().items() if not torch.equal(v, before[k])}
    expected = {k for k in before if k.startswith(tuple(RESETS[kind]))}
    assert changed == expected | {"reset_count"}
    kept = {names[id(p)] for o in agent.optimizers.values() for p, moments in o.state.items()
            if any(moment.any() for moment in moments.values())}
    assert kept == {n for n in names.values() if not n.startswith("target_")} - expected
    if kind != "transition":
        assert torch.equal(agent.critic[0].weight, agent.target_critic[0].weight)
    agent.update(make_batch(agent))  # goes on


def test_a_reset_shrinks_and_perturbs():
    """theta <- (1 - alpha) theta + alpha fresh; alpha = 1: nothing of the old is left."""
    agent = make_agent(reset="transition", reset_alpha=0.8)
    old = {n: p.detach().clone() for n, p in agent.rssm.gru.named_parameters()}
    norm = agent.rssm.gru_norm
    norm.weight.data.fill_(3.0)
    agent.reset()
    fresh = (agent.rssm.gru.weight - 0.2 * old["weight"]) / 0.8
    bound = math.sqrt(6 / sum(fresh.shape))
    assert fresh.abs().max() <= bound * (1 + 1e-5) and fresh.std() > 0.4 * bound
    torch.testing.assert_close(norm.weight.detach(), torch.full((15,), 0.2 * 3 + 0.8))
    agents = [make_agent(seed, reset="all", reset_alpha=1.0) for seed in (1, 2)]
    for agent in agents:
        torch.manual_seed(5)
        agent.reset()
    for a, b in zip(agents[0].parameters(), agents[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("every, extra, pretrain", [(7, 3, 4), (5, 0, 5), (4, 9, 0)])
def test_resets_come_on_time_and_are_followed_by_catch_up_updates(every, extra, pretrain):
    """By simulation: after each `every` ordinary updates a reset and `extra` updates more."""
    agent = make_agent(reset="actor-critic", reset_every_updates=every, catch_up_updates=extra,
                       pretrain_updates=pretrain, updates_per_step=0.7, warmup_steps=10)
    ordinary, total, at = 0, 0, []
    for step in range(60):
        due = pretrain + int(0.7 * (step - 10)) if step >= 10 else 0
        while ordinary < due:
            ordinary, total = ordinary + 1, total + 1
            if ordinary % every == 0:
                at.append(total)
                total += extra
        assert script.updates_due(agent.args, step) == total
    resets = [n for n in range(total) if agent.resets_due(n) > agent.resets_due(n - 1)]
    assert resets == [n for n in at if n < total] and len(resets) > 2
    agent.reset, calls = lambda: calls.append(agent.updates), []
    batch = make_batch(agent)
    for _ in range(min(total, 20)):
        agent.update(batch)
    assert calls == [n for n in resets if n < 20]


@pytest.mark.parametrize("extra", [0, 2])
def test_a_reset_makes_acting_start_anew(extra):
    agent = make_agent(reset="transition", reset_every_updates=3, catch_up_updates=extra)
    steps, batch = list(episode(np.random.default_rng(0), 3)), make_batch(agent)

    def act(step, carry):
        torch.manual_seed(0)
        return agent.act(step, carry, explore=False)[1]

    for _ in range(3):
        agent.update(batch)
    carry = act(steps[0], None)  # the reset comes with the next update
    assert not torch.equal(act(steps[1], carry)["h"], act(steps[1], None)["h"])
    agent.update(batch)
    assert agent.resets_due(agent.updates - 1) == 1
    new = act(steps[1], carry)
    assert torch.equal(new["h"], act(steps[1], None)["h"])
    assert not torch.equal(act(steps[2], new)["h"], act(steps[2], None)["h"])  # goes on from there


@pytest.mark.parametrize("after", [130, 145])  # looks at the signal: steps and updates
def test_a_run_resumes_across_a_reset(tmp_path, after):
    """Stopped before the first catch-up updates, and in their middle."""
    changes = {"reset": "all", "reset_every_updates": 40, "catch_up_updates": 15, **ALL}
    undisturbed = train(script, tmp_path / "one", **changes)[1]
    assert undisturbed["updates"] == 149 + 3 * 15
    run_dir = tmp_path / "two"
    _, stopped = train(script, run_dir, after, **changes)
    assert stopped["updates"] in (range(20, 40) if after == 130 else range(41, 55))
    _, resumed = train(script, run_dir, payload=stopped, **changes)
    assert_same(undisturbed, resumed)


# ---- pictures, learning, README ----------------------------------------------------------------


def test_the_open_loop_strip(monkeypatch):
    """Truth; the model, which sees five images and then the actions alone; the error."""
    agent = make_agent(sequence_length=8)
    buffer = fill()
    torch.manual_seed(0)
    images = agent.images(buffer, np.random.default_rng(3))
    strip = images["open_loop"]
    assert strip.shape == (39, 8 * 13, 3) and strip.dtype == np.uint8
    obs = buffer.sequences(np.random.default_rng(3), 1, 8, 8)["obs"][0]
    truth = obs.permute(2, 0, 3, 1).flatten(1, 2).numpy()
    assert np.array_equal(strip[:13], truth)
    film = images["film"]  # the same over time
    assert film.shape == (8, 52, 3 * 52, 3)
    for t in range(8):
        assert np.array_equal(np.hstack(np.split(strip[:, 13 * t : 13 * t + 13], 3)),
                              film[t, ::4, ::4])
    model, error = strip[13:26].astype(float), strip[26:].astype(float)
    assert np.abs((model - truth + 255) / 2 - error).max() <= 1
    sequences = buffer.sequences

    def changed(key, rows, value):
        """The strip where a column of those rows is another."""
        def other(*x):
            batch = sequences(*x)
            batch[key][:, rows] = value
            return batch

        monkeypatch.setattr(buffer, "sequences", other)
        torch.manual_seed(0)
        return agent.images(buffer, np.random.default_rng(3))["open_loop"]

    black = changed("obs", slice(5, 8), 0)  # the model does not see these
    assert np.array_equal(black[13:26], strip[13:26]) and (black[:13, 5 * 13 :] == 0).all()
    assert not np.array_equal(changed("obs", slice(0, 5), 255)[13:26], strip[13:26])
    moved = changed("action", slice(5, 8), 1)
    assert np.array_equal(moved[13:26, : 5 * 13], strip[13:26, : 5 * 13])
    assert not np.array_equal(moved[13:26, 5 * 13 :], strip[13:26, 5 * 13 :])
    last = changed("action", slice(7, 8), 50)  # the action that leads to the last image
    assert np.array_equal(last[13:26, : 7 * 13], strip[13:26, : 7 * 13])
    assert not np.array_equal(last[13:26, 7 * 13 :], strip[13:26, 7 * 13 :])
    assert agent.images(fill(rows=7), np.random.default_rng(3)) == {}  # too early


def test_a_static_toy_task_is_solved():
    """One image, reward -(a - 0.5)^2 of the action that led there: the mean action goes to 0.5."""
    agent = make_agent(action_dim=1, gamma=0.5, model_lr=3e-3, actor_lr=3e-3, critic_lr=3e-3,
                       entropy_weight=0.0, free_nats=0.0, batch_size=16, deter_dim=16,
                       hidden_dim=16, head_dim=32)
    rng = np.random.default_rng(0)
    buffer = script.ReplayBuffer(1000, script.EnvSpec((3, 13, 13), torch.uint8, 1), "cpu")
    for t in range(1000):
        action, first = rng.uniform(-1, 1, 1), t % 100 == 0
        reward = 0.0 if first else -3 * (action[0] - 0.5) ** 2
        image = np.full((3, 13, 13), 99, np.uint8)
        buffer.add(script.Step(image, None, np.float32(action * (not first)), reward, 1.0, first,
                               False))
    for _ in range(700):
        agent.update(agent.sample(buffer, rng))
    step = script.Step(image, None, np.zeros(1, np.float32), 0.0, 1.0, True, False)
    assert agent.act(step, None, explore=False)[0].item() == pytest.approx(0.5, abs=0.2)


def test_the_studies_are_accepted():
    """Every command line of the README's table, and of benchmark/studies.py, whose parts are each
    left out once."""
    text = (ROOT / "benchmark" / "README.md").read_text().split("## DreamerV2")[1].split("\n## ")[0]
    rows = [row.split("|")[2] for row in text.splitlines() if row.startswith("| ") and "--" in row]
    lines = [flags for row in rows for flags in row.split("`")[1::2]]
    assert len(rows) == 8 and len(lines) > 8
    study = subprocess.run([sys.executable, ROOT / "benchmark" / "studies.py",
                            "dreamerv2-efficiency"], capture_output=True, text=True, check=True)
    commands = [line.partition("  # ") for line in study.stdout.splitlines()]
    named = {name: command.split("dreamerv2.py ")[1] for command, _, name in commands}
    parts = [name.removesuffix(" alone") for name in named if name.endswith(" alone")]
    assert set(named) == {"none", "all", *(f"all but {p}" for p in parts),
                          *(f"{p} alone" for p in parts)} and len(parts) == 6

    def changed(flags):
        args = tyro.cli(script.Args, args=shlex.split(flags))
        args.action_repeat = 2
        script.check_algorithm(args)
        return {k for k, v in vars(args).items() if v != vars(script.Args())[k]}

    for flags in lines:
        assert changed(flags)
    for part in parts:
        alone, rest = changed(named[f"{part} alone"]), changed(named[f"all but {part}"])
        assert alone - changed(named["none"]) == changed(named["all"]) - rest != set()


def test_a_tiny_run_with_everything_on(tmp_path):
    flags = ("--reset all --reset-every-updates 60 --catch-up-updates 5 --shift 1 --mask-ratio 0.5 "
             "--infonce-weight 1 --spr-weight 1 --discount-head "
             "--model-every-updates 2")
    numbers = summary(run("dreamerv2", f"{TINY['dreamerv2']} {flags} --runs-dir {tmp_path}"))
    assert numbers["updates"] == script.updates_due(
        tiny_args(script, reset="all", reset_every_updates=60, catch_up_updates=5), 199)
