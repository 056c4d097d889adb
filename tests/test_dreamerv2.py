"""DreamerV2's model, distributions, returns, losses and switches for data efficiency, against
closed forms, scipy and loops. "Code" is https://github.com/danijar/dreamerv2."""

import functools
import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import TRAINS, noise_step, tiny_agent
from torch.distributions import Categorical, Normal, kl_divergence

import dreamerv2 as script


def make_agent(flags="", updates=0):
    """A small agent, and a batch: two sequences of six images. z, h, features: 12, 8, 20."""
    _, agent, buffer, rng = tiny_agent("dreamerv2", flags)
    agent.updates = updates
    return agent, agent.sample(buffer, rng)


def moved(agent, step):
    """Parts of the agent that step() changes."""
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    step()
    after = agent.state_dict().items()
    return {name.split(".")[0] for name, value in after if not torch.equal(value, before[name])}


def test_parameter_counts_are_the_published_ones():
    """Code: dmc_vision in configs.yaml. The decoder is that of its own layers, although the first
    one is a matrix product."""
    agent = script.Agent(script.Args(device="cpu"), script.EnvSpec((3, 64, 64), 6, 17))
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in agent.named_modules()}
    assert counts["encoder"] == 1_551_312 and counts["decoder"] == 9_886_611
    assert counts["rssm"] == 1_247_248 and counts["actor"] == 976_012
    assert counts["rssm.gru"] + counts["rssm.gru_norm"] == 241_800
    assert counts["reward_head"] == counts["critic"] == 971_601 and counts[""] == 16_575_986
    features = torch.randn(2, 1224)
    image = agent.decoder.net(agent.decoder.fc(features)[..., None, None])
    assert image.shape == (2, 3, 64, 64)
    torch.testing.assert_close(agent.decoder(features), image)


def test_weights_start_as_keras_does():
    """Glorot's uniform within sqrt(6 / (fan in + fan out)), zero biases; LayerNorm 1 and 0."""
    for layer in make_agent()[0].modules():
        if isinstance(layer, torch.nn.LayerNorm):
            assert (layer.weight == 1).all() and layer.eps == 1e-3
        elif hasattr(layer, "weight"):
            bound = math.sqrt(6 / (math.prod(layer.weight.shape[2:]) * sum(layer.weight.shape[:2])))
            assert 0.8 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6)
        assert not hasattr(layer, "bias") or (layer.bias == 0).all()


def test_the_published_numbers_are_the_defaults():
    """Code: dmc_vision in configs.yaml; one update per five steps, after 100."""
    wanted = {
        "warmup_steps": 1000, "pretrain_updates": 100, "updates_per_step": 0.2, "batch_size": 16,
        "sequence_length": 50, "image_size": 64, "replay_capacity": 2_000_000, "depth": 48,
        "decoder_kernels": (5, 5, 6, 6), "categoricals": 32, "classes": 32, "deter_dim": 200,
        "hidden_dim": 200, "head_dim": 400, "head_layers": 4, "horizon": 15, "gamma": 0.99,
        "return_lambda": 0.95, "kl_scale": 1.0, "kl_balance": 0.8, "free_nats": 1.0,
        "entropy_weight": 1e-4, "target_every_updates": 100, "discount_head": False,
        "action_repeat": 2, "reset": "none", "shift": 0, "mask_ratio": 0.0, "spr_weight": 0.0,
    }  # fmt: skip
    assert {name: getattr(script.Args(), name) for name in wanted} == wanted
    steps = [999, 1000, 1004, 1005, 1010, 500_000]
    assert [script.updates_due(script.Args(), s) for s in steps] == [0, 100, 100, 101, 102, 99_900]


def test_the_gru():
    """Code: GRUCell with norm: one LayerNorm, a reset of the whole candidate, update bias -1."""
    rssm = make_agent()[0].rssm
    x, h = torch.randn(4, 8), torch.randn(4, 8)
    parts = rssm.gru(torch.cat([F.elu(x), h], -1))
    parts = (parts - parts.mean(-1, keepdim=True)) / (parts.var(-1, False, True) + 1e-3).sqrt()
    reset, candidate, update = parts.chunk(3, -1)
    u = torch.sigmoid(update - 1)
    expected = u * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - u) * h
    torch.testing.assert_close(rssm.cell(x, h), expected)


def test_observe_is_a_loop_over_single_steps():
    """Where an episode starts, the state before and the action that is stored there are zeros."""
    agent, _ = make_agent()
    rssm = agent.rssm
    e, action, noise = torch.randn(3, 6, agent.encoder.dim), torch.rand(3, 6, 2), rssm.noise(3, 6)
    is_first = torch.arange(6).expand(3, 6) == 0
    is_first[1, 3] = True
    z, h, post, prior = rssm.observe(e, action, is_first, noise)
    zt, ht = torch.zeros(3, 12), torch.zeros(3, 8)
    for t in range(6):
        keep = ~is_first[:, t, None]
        ht = rssm.cell(rssm.gru_in(torch.cat([zt, action[:, t]], -1) * keep), ht * keep)
        logits = rssm.post_out(F.elu(rssm.post_in(torch.cat([ht, e[:, t]], -1))))
        torch.testing.assert_close(post[:, t].flatten(1), logits)
        zt = script.one_hot_sample(logits.view(3, 3, 4), noise[:, t])
        torch.testing.assert_close(torch.cat([z[:, t], h[:, t]], -1), torch.cat([zt, ht], -1))
        logits = rssm.prior_out(F.elu(rssm.prior_in(ht)))
        torch.testing.assert_close(prior[:, t].flatten(1), logits)


def test_one_hot_samples():
    """The value is one-hot, with softmax's frequencies, whatever torch.rand gives (0 is possible);
    the gradient is that of the probabilities."""
    logits, weight = torch.randn(3, 4, requires_grad=True), torch.randn(20_000, 3, 4)
    uniform = torch.rand(20_000, 3, 4)
    uniform[0] = 0.0
    sample = script.one_hot_sample(logits.expand(20_000, 3, 4), uniform).view(20_000, 3, 4)
    assert (sample.sort(-1).values - torch.tensor([0.0, 0, 0, 1])).abs().max() < 1e-6
    probabilities = torch.softmax(logits, -1)
    counts, expected = sample.round().sum(0).detach(), 20_000 * probabilities.detach()
    assert ((counts - expected).square() / expected).sum() < scipy.stats.chi2.isf(1e-3, 9)
    ours = torch.autograd.grad((sample * weight).sum(), logits)
    theirs = torch.autograd.grad((probabilities * weight).sum(), logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)


def truncnorm(loc, std):
    return scipy.stats.truncnorm((-1 - loc) / std, (1 - loc) / std, loc, std)


@pytest.mark.parametrize(
    "loc, std", [(0.0, 1.1), (0.5, 0.4), (-0.9, 0.1), (0.99, 0.1), (0.0, 2.1), (0.3, 0.6)]
)
def test_the_truncated_normal(loc, std):
    """scipy's quantiles and entropy. The action's gradient is TensorFlow's: 1 and (a - loc) / std
    (D3); the entropy's is that of scipy's entropy, by finite differences."""
    uniform = (torch.arange(1000).double() + 0.5) / 1000
    inputs = [torch.full((1000,), v, dtype=torch.float64).requires_grad_() for v in (loc, std)]
    action, entropy = script.truncated_normal(*inputs, uniform)
    exact = truncnorm(loc, std)
    np.testing.assert_allclose(action.detach(), exact.ppf(uniform), rtol=0, atol=1e-4)
    assert entropy[0].item() == pytest.approx(exact.entropy(), abs=1e-4)
    gradients = torch.autograd.grad(action.sum(), inputs, retain_graph=True)
    torch.testing.assert_close(gradients[0], torch.ones(1000).double())
    torch.testing.assert_close(gradients[1], (action.detach() - loc) / std, rtol=0, atol=1e-4)
    gradients = torch.autograd.grad(entropy[0], inputs)
    d = 1e-3 * std
    for gradient, (dl, ds) in zip(gradients, ((d, 0), (0, d)), strict=True):
        up, down = truncnorm(loc + dl, std + ds), truncnorm(loc - dl, std - ds)
        slope = (up.entropy() - down.entropy()) / (2 * d)
        assert gradient[0].item() == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_the_truncated_normal_stays_finite_where_the_actor_can_go():
    """In float32 the inverse CDF would reach infinity there (D3). Code: loc = tanh(mean), std =
    2 sigmoid(std / 2) + 0.1, which is 0.1 to 2.1, and 1.1 at first."""
    actor = make_agent()[0].actor
    actor.trunk[-1].weight.data.zero_()
    for raw, std in ((-10, 0.113386), (0, 1.1), (10, 2.086614)):
        actor.trunk[-1].bias.data.fill_(raw)
        inputs = actor(torch.zeros(10**5, 20))
        assert inputs[1][0, 0].item() == pytest.approx(std, abs=1e-5)
        assert inputs[0][0, 0].item() == pytest.approx(math.tanh(raw), abs=1e-6)
        inputs = [torch.full((10**5,), v, requires_grad=True) for v in (math.tanh(raw / 2), 0.1)]
        action, entropy = script.truncated_normal(*inputs, torch.rand(10**5))
        (action.sum() + entropy.sum()).backward()
        assert action.abs().max() < 1 and all(v.grad.isfinite().all() for v in inputs)


def test_lambda_returns():
    """Golden values, and brute force: the lambda-weighted mean of all n-step returns."""
    reward, value = torch.tensor([1.0, 2, 3])[:, None], torch.tensor([20.0, 30, 40])[:, None]
    out = script.lambda_returns(reward, value, torch.full((3, 1), 0.99), 0.95)
    torch.testing.assert_close(out[:, 0], torch.tensor([42.949057, 43.5503, 42.6]))
    reward, value, discount = torch.randn(7, 3), torch.randn(7, 3), torch.rand(7, 3)
    out = script.lambda_returns(reward, value, discount, 0.7)

    def n_step(i, n):
        total = value[i + n - 1]
        for k in reversed(range(i, i + n)):
            total = reward[k] + discount[k] * total
        return total

    for i in range(7):
        brute = sum(0.3 * 0.7 ** (n - 1) * n_step(i, n) for n in range(1, 7 - i))
        torch.testing.assert_close(out[i], brute + 0.7 ** (6 - i) * n_step(i, 7 - i))


def test_kl_balance_and_free_nats():
    """[DreamerV2 KL] torch.distributions' KL; 0.8 of its gradient goes to the prior and 0.2 to the
    posterior; none where its mean over the batch, not each of it, is below the free nats."""
    logits = [3 * torch.randn(2, 5, 3, 4, requires_grad=True) for _ in range(2)]
    exact = kl_divergence(*(Categorical(logits=x) for x in logits)).sum(-1)
    plain = torch.autograd.grad(exact.mean(), logits)
    for free, share in ((0.0, 1.0), (0.9, 1.0), (1.1, 0.0)):
        agent, _ = make_agent(f"--free-nats {free * exact.mean().item()}")
        loss, kl = agent.kl_loss(*logits)
        assert kl.item() == pytest.approx(exact.mean().item(), rel=1e-5)
        assert loss.item() == pytest.approx(max(1, free) * kl.item(), rel=1e-5)
        post, prior = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(post, 0.2 * share * plain[0])
        torch.testing.assert_close(prior, 0.8 * share * plain[1])


def test_image_and_reward_loss_are_gaussians():
    """[DreamerV2 image], summed over pixels: perfect images cost 11291.917. [DreamerV2 reward]."""
    agent, images = make_agent()[0], torch.rand(6, 3, 64, 64) - 0.5
    assert agent.image_loss(images, images).item() == pytest.approx(11291.917, abs=1e-2)
    exact = -Normal(images + 0.1, 1).log_prob(images).sum() / 6
    torch.testing.assert_close(agent.image_loss(images + 0.1, images), exact)
    reward = torch.rand(2, 3, 1)
    exact = -Normal(reward + 0.3, 1).log_prob(reward).mean()
    torch.testing.assert_close(agent.reward_loss(reward + 0.3, reward), exact)


def test_actor_and_critic_loss(monkeypatch):
    """[DreamerV2 actor] action i is weighed by what came before state i, and its first return is
    that of state i + 1. [DreamerV2 critic]"""
    agent, _ = make_agent("--entropy-weight 0.3")
    returns, entropies, weights = torch.randn(4, 5), torch.randn(4, 5), torch.rand(5, 5)
    terms = [weights[i] * (returns[i + 1] + 0.3 * entropies[i]) for i in (0, 1, 2)]
    loss = agent.actor_loss(returns, entropies, weights)
    torch.testing.assert_close(loss, -torch.stack(terms).mean())
    value = torch.randn(4, 5, 1)
    monkeypatch.setattr(agent.critic, "forward", lambda f: value[: len(f)])
    loss = agent.critic_loss(torch.randn(5, 5, 20), returns, weights)
    terms = [-weights[i] * Normal(value[i, :, 0], 1).log_prob(returns[i]) for i in range(4)]
    torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_a_states_return_begins_with_its_own_reward():
    """R_i has reward i, discount i and the target critic's value i + 1 (the code's convention)."""
    agent, _ = make_agent("--return-lambda 0.6")
    features, discount = torch.randn(5, 2, 20), torch.rand(5, 2)
    agent.target_critic[-1].bias.data += 1  # no longer the critic
    reward = agent.reward_head(features).squeeze(-1)
    value = agent.target_critic(features).squeeze(-1)
    expected = script.lambda_returns(reward[:4], value[1:], discount[:4], 0.6)
    torch.testing.assert_close(agent.returns(features, discount), expected)


def test_constant_and_learned_discounts(monkeypatch):
    """Weights are products of the discounts before. With the head the first discount is known, and
    nothing after a terminal counts. [DreamerV2 discount] has gamma * discount as its target."""
    agent, _ = make_agent("--gamma 0.9")
    features, first = torch.randn(5, 6, 20), torch.tensor([1.0, 1, 1, 0, 1, 1])
    discount, weights = agent.discounts(features, first)
    assert (discount == 0.9).all()
    torch.testing.assert_close(weights, (0.9 ** torch.arange(5))[:, None].expand(5, 6))
    agent, _ = make_agent("--gamma 0.9 --discount-head")
    logit = torch.randn(5, 6, 1, requires_grad=True)
    monkeypatch.setattr(agent.discount_head, "forward", lambda f: logit[-len(f) :])
    discount, weights = agent.discounts(features, first)
    torch.testing.assert_close(discount[0], 0.9 * first)
    torch.testing.assert_close(discount[1:], torch.sigmoid(logit[1:, :, 0]))
    for i in range(5):
        torch.testing.assert_close(weights[i], discount[:i].prod(0))
    assert not weights.requires_grad and discount.requires_grad and (weights[1:, 3] == 0).all()
    target, p = 0.9 * first.expand(5, 6)[..., None], torch.sigmoid(logit)
    brute = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    torch.testing.assert_close(agent.discount_loss(logit, target / 0.9), brute)


def test_imagination_is_actor_and_prior_in_turns(monkeypatch):
    """The actor sees detached features: J(pi) reaches earlier actions through the model alone."""
    agent, _ = make_agent()
    z, h, noise, uniform = torch.randn(5, 12), torch.randn(5, 8), torch.rand(3, 5, 3, 4), []
    monkeypatch.setattr(agent.rssm, "noise", lambda *shape: noise)
    draw, forward, seen = script.truncated_normal, agent.actor.forward, []
    monkeypatch.setattr(script, "truncated_normal", lambda *x: uniform.append(x[2]) or draw(*x))
    monkeypatch.setattr(agent.actor, "forward", lambda f: seen.append(f) or forward(f))
    features, entropies = agent.imagine(z, h)
    assert not any(f.requires_grad for f in seen) and features[-1].requires_grad
    for t in range(3):
        torch.testing.assert_close(features[t], torch.cat([z, h], -1))
        action, entropy = draw(*forward(features[t]), uniform[t])
        torch.testing.assert_close(entropies[t], entropy.sum(-1))
        h = agent.rssm.cell(agent.rssm.gru_in(torch.cat([z, action], -1)), h)
        z = script.one_hot_sample(agent.rssm.prior(h), noise[t])
    torch.testing.assert_close(features[3], torch.cat([z, h], -1))


def test_the_actors_gradient_is_the_derivative_through_the_model(monkeypatch):
    """Finite differences of each action's effect on all later returns; with z the probabilities,
    as straight-through gradients have it."""
    agent, _ = make_agent("--entropy-weight 0")
    agent, rssm = agent.double(), agent.rssm
    raw = torch.randn(3, 2, 2, dtype=torch.float64) / 2
    z, h = torch.rand(2, 12, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)

    def mean_step(z, h, action, noise):
        h = rssm.cell(rssm.gru_in(torch.cat([z, action], -1)), h)
        return torch.softmax(rssm.prior(h), -1).flatten(1), h

    def loss(actions):
        given = iter(actions)
        monkeypatch.setattr(script, "truncated_normal", lambda *_: (next(given), torch.zeros(2, 2)))
        features, entropies = agent.imagine(z, h)
        discount, weights = agent.discounts(features, torch.ones(2))
        return agent.actor_loss(agent.returns(features, discount), entropies, weights)

    monkeypatch.setattr(rssm, "imagine_step", mean_step)
    actions = raw.clone().requires_grad_()
    loss(actions).backward()
    assert actions.grad.flatten(1).abs().amax(1).min() > 0  # the last one by the last value
    for index in np.ndindex(3, 2, 2):
        step = torch.zeros_like(raw)
        step[index] = 1e-5
        slope = (loss(raw + step) - loss(raw - step)).item() / 2e-5
        assert actions.grad[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-9)


ALL = "--infonce-weight 2 --spr-weight 3 --mask-ratio 0.5 --shift 2 --discount-head"
MODEL = TRAINS["dreamerv2"]["KL + image + reward"]
EXTRA = {"discount_head", "projection", "similarity", "predictor", "masked_decoder",
         "masked_reward_head"}  # fmt: skip
TARGETS = {"target_critic", "target_encoder", "target_projection"}


@pytest.mark.parametrize("flags, model", [("", MODEL), (ALL, MODEL | EXTRA)])
def test_who_trains_what_and_in_which_order(flags, model):
    """The README's table: what each optimizer's step moves. By default there is nothing else.
    Imagination comes between the model's step and the actor's, in the code as here."""
    agent, batch = make_agent("--weight-decay 0 " + flags)
    steps, imagine = {}, agent.imagine
    for name, optimizer in agent.optimizers.items():
        step = optimizer.step
        optimizer.step = lambda name=name, step=step: steps.update({name: moved(agent, step)})
    agent.imagine = lambda *inputs: steps.update(imagine=set()) or imagine(*inputs)
    everything = moved(agent, functools.partial(agent.update, batch))
    assert list(steps) == ["model", "imagine", "actor", "critic"]
    assert [*steps.values()] == [model, set(), {"actor"}, {"critic"}]
    targets = TARGETS if flags else {"target_critic"}
    assert everything == model | {"actor", "critic"} | targets == set(agent._modules)


def test_optimizers_clip_gradients_and_decay_weights_as_the_code_does():
    """Code: Optimizer: a norm of 100; var *= 1 - 1e-6, whatever the rate is; eps 1e-5."""
    p = torch.nn.Parameter(torch.zeros(5))
    script.minimize(1e4 * p.sum(), torch.optim.SGD([p], 1.0))
    assert p.norm().item() == pytest.approx(100, rel=1e-4)
    agent, _ = make_agent()
    for name, optimizer in agent.optimizers.items():
        group = optimizer.param_groups[0]
        assert group["lr"] == (3e-4 if name == "model" else 8e-5)
        assert group["eps"] == 1e-5 and group["betas"] == (0.9, 0.999)
        before = [p.detach().clone() for p in group["params"]]
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p, old in zip(group["params"], before, strict=True):  # biases and LayerNorm too
            torch.testing.assert_close(p.detach(), old * (1 - 1e-6), rtol=1e-7, atol=0)


def test_cadence():
    """Code: the target is copied after updates 1, 101, 201, ...; of the critic's own updates."""
    agent, _ = make_agent()
    copies = []
    for agent.updates in range(300):
        reset, model, behavior, target = agent.cadence()
        assert (reset, model, behavior) == (False, True, True)
        copies += [agent.updates + 1] * target
    assert copies == [1, 101, 201]
    agent, _ = make_agent("--behavior-every-updates 2 --target-every-updates 3")
    due = []
    for agent.updates in range(14):
        due += [agent.updates] * agent.cadence().target
    assert due == [0, 6, 12]  # every third update of the critic
    for updates in range(6):
        agent, batch = make_agent("--model-every-updates 2 --target-every-updates 3", updates)
        parts = moved(agent, functools.partial(agent.update, batch))
        assert ("rssm" in parts) == (updates % 2 == 0) and {"actor", "critic"} <= parts
        assert ("target_critic" in parts) == (updates % 3 == 0)
    agent, batch = make_agent("--behavior-every-updates 3", 1)
    assert moved(agent, functools.partial(agent.update, batch)) == MODEL


def test_acting_and_training_see_the_same():
    """act()'s states along an episode are observe()'s, with the same noise; without exploration the
    action is the mean's tanh. A batch's sequences begin anew."""
    _, agent, buffer, rng = tiny_agent("dreamerv2")
    carry, h, noise = None, [], []
    for row in range(40, 46):
        step = noise_step(script, agent.spec, rng, row == 40)
        step = step._replace(obs=buffer.files["obs"][row], action=buffer.files["action"][row])
        torch.manual_seed(row)
        noise.append(agent.rssm.noise(1, 1))
        torch.manual_seed(row)
        action, carry = agent.act(step, carry, explore=False)
        h.append(carry["h"])
        raw = agent.actor.trunk(torch.cat([carry["z"], carry["h"]], -1))[0, :2]
        torch.testing.assert_close(action, torch.tanh(raw))
    rows = np.arange(40, 46)[None]
    images, _, e = agent.encode(buffer.gather("obs", rows), agent.encoder)
    torch.testing.assert_close(images, buffer.columns["obs"][40:46] / 255 - 0.5)
    inputs = e, buffer.gather("action", rows), torch.as_tensor(rows == 40), torch.cat(noise, 1)
    torch.testing.assert_close(torch.cat(h), agent.rssm.observe(*inputs)[1][0])
    is_first = agent.sample(buffer, rng)["is_first"]
    assert is_first[:, 0].all() and not is_first[:, 1:].any()


def test_random_shift_is_one_replicated_crop_per_sequence():
    """DrQ's shift of up to two pixels, all 25 of them; the same for all images of a sequence."""
    obs = torch.randint(0, 256, (300, 2, 3, 9, 9), dtype=torch.uint8)
    out = script.random_shift(obs, 2)
    padded = F.pad(obs.float().flatten(1, 2), (2, 2, 2, 2), mode="replicate").byte()
    windows = padded.unfold(2, 9, 1).unfold(3, 9, 1).permute(0, 2, 3, 1, 4, 5)
    fits = (windows == out.flatten(1, 2)[:, None, None]).flatten(3).all(-1)  # (300, 5, 5)
    assert (fits.sum((1, 2)) == 1).all() and fits.any(0).all()
    assert script.random_shift(obs, 0) is obs


@pytest.mark.deep
def test_infonce_by_loops():
    """[CURL InfoNCE] The own key against those of other sequences, and of its own sequence but for
    the three nearest on each side."""
    agent, _ = make_agent("--infonce-weight 1")
    e, keys = torch.randn(2, 6, agent.encoder.dim), torch.randn(2, 6, 128)
    query = agent.similarity(agent.projection(e))
    brute = 0.0
    for b, t in np.ndindex(2, 6):
        others = [keys[c, s] for c, s in np.ndindex(2, 6) if c != b or s == t or abs(s - t) > 3]
        scores = torch.stack([query[b, t] @ key for key in others])
        brute -= (query[b, t] @ keys[b, t] - torch.logsumexp(scores, 0)) / 12
    torch.testing.assert_close(agent.contrastive_loss(e, keys), brute)


@pytest.mark.deep
def test_spr_by_loops(monkeypatch):
    """[SPR loss] Squared distance of normalised vectors, which is 2 - 2 cosine, one to five steps
    ahead by the real actions."""
    agent, _ = make_agent("--spr-weight 1")
    z, h, action, keys = (torch.randn(2, 6, n) for n in (12, 8, 2, 128))
    noise = torch.full((3, 4), 0.5)
    monkeypatch.setattr(agent.rssm, "noise", lambda *shape: noise.expand(*shape, 3, 4))
    brute = 0.0
    for k in (1, 2, 3, 4, 5):
        for b, t in np.ndindex(2, 6 - k):
            zt, ht = z[b, t], h[b, t]
            for j in range(1, k + 1):
                zt, ht = agent.rssm.imagine_step(zt, ht, action[b, t + j], noise)
            predicted = agent.projection(agent.predictor(torch.cat([zt, ht])))
            error = F.normalize(predicted, dim=0) - F.normalize(keys[b, t + k], dim=0)
            brute += error.square().sum() / (2 * (6 - k) * 5)
    torch.testing.assert_close(agent.spr_loss(z, h, action, keys), brute)


@pytest.mark.deep
def test_the_models_loss_is_the_weighted_sum():
    """[DreamerV2 J(M)] written out: its value, and its gradient in all that it trains. Keys come
    from the target encoder, of images with another shift."""
    agent, batch = make_agent("--kl-scale 5 " + ALL)
    batch["discount"][0, 3] = 0.0
    images, maps, e = agent.encode(batch["obs"], agent.encoder)
    noise = agent.rssm.noise(2, 6)
    z, h, post, prior = agent.rssm.observe(e, batch["action"], batch["is_first"], noise)
    torch.manual_seed(7)
    loss, metrics = agent.model_loss(batch, images, maps, e, z, h, post, prior)

    torch.manual_seed(7)
    features, reward = torch.cat([z, h], -1), batch["reward"]
    shifted = script.random_shift(batch["obs"], 4)
    keys = agent.target_projection(agent.encode(shifted, agent.target_encoder)[2])
    expected = {  # weight, value
        "loss/kl": (5, agent.kl_loss(post, prior)[0]),
        "loss/image": (1, agent.image_loss(agent.decoder(features.flatten(0, 1)), images)),
        "loss/reward": (1, agent.reward_loss(agent.reward_head(features), reward)),
        "loss/discount": (1, agent.discount_loss(agent.discount_head(features), batch["discount"])),
        "loss/contrastive": (2, agent.contrastive_loss(e, keys)),
        "loss/spr": (3, agent.spr_loss(z, h, batch["action"], keys)),
        "loss/masked": (1, agent.masked_loss(maps, images, reward.flatten(0, 1))),
    }
    assert metrics.keys() == {*expected, "stat/kl"}
    for name, (_, value) in expected.items():
        torch.testing.assert_close(metrics[name], value)
    total = sum(weight * value for weight, value in expected.values())
    parameters = agent.optimizers["model"].param_groups[0]["params"]
    ours, theirs = (torch.autograd.grad(x, parameters, retain_graph=True) for x in (loss, total))
    for a, b in zip([loss, *ours], [total, *theirs], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


RESETS = {  # what each may touch: prefixes of names in state_dict
    "transition": {f"rssm.{n}" for n in ("gru_in", "gru", "gru_norm", "prior_in", "prior_out")},
    "actor-critic": {"actor.", "critic.", "target_critic."},
    "all": {f"{name}." for name in MODEL | EXTRA | TARGETS | {"actor", "critic"}},
}


@pytest.mark.deep
@pytest.mark.parametrize("kind", RESETS)
def test_a_reset_touches_exactly_what_it_says(kind):
    """Weights, Adam's moments and targets; theta <- 0.2 theta + 0.8 fresh."""
    agent, batch = make_agent(f"--reset {kind} {ALL}")
    agent.update(batch)
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(10.0)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    names = {id(p): name for name, p in agent.named_parameters()}
    agent.reset_weights()
    after = agent.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    expected = {name for name in before if name.startswith(tuple(RESETS[kind]))}
    assert changed == expected | {"reset_count"}
    fresh = [(after[name] - 0.2 * before[name]) / 0.8 for name in expected]
    assert max(weights.abs().max() for weights in fresh) < 2  # before there was 10 everywhere
    kept = set()
    for optimizer in agent.optimizers.values():
        for p, moments in optimizer.state.items():
            kept |= {names[id(p)]} if any(moment.any() for moment in moments.values()) else set()
    assert kept == {name for name in names.values() if "target_" not in name} - expected
    if kind != "transition":
        assert torch.equal(agent.critic[0].weight, agent.target_critic[0].weight)


@pytest.mark.deep
@pytest.mark.parametrize("every, extra, pretrain", [(7, 3, 4), (5, 0, 5), (4, 9, 0)])
def test_resets_come_on_time_and_are_followed_by_catch_up_updates(every, extra, pretrain):
    """By simulation: after each `every` ordinary updates a reset and `extra` updates more."""
    flags = f"--reset-every-updates {every} --catch-up-updates {extra} --updates-per-step 0.7 "
    flags += f"--pretrain-updates {pretrain} --warmup-steps 10 --reset actor-critic"
    agent, _ = make_agent(flags)
    ordinary, total, at = 0, 0, []
    for step in range(60):
        due = pretrain + int(0.7 * (step - 10)) if step >= 10 else 0
        while ordinary < due:
            ordinary, total = ordinary + 1, total + 1
            if ordinary % every == 0:
                at.append(total)
                total += extra
        assert script.updates_due(agent.args, step) == total
    resets = []
    for agent.updates in range(total):
        resets += [agent.updates] * agent.cadence().reset
    assert resets == [n for n in at if n < total] and len(resets) > 2


@pytest.mark.deep
def test_a_reset_makes_acting_start_anew():
    """The state that was carried says nothing to new weights (D7)."""
    _, agent, _, rng = tiny_agent("dreamerv2", "--reset transition")
    steps = [noise_step(script, agent.spec, rng, t == 0) for t in range(3)]

    def act(step, carry):
        torch.manual_seed(0)
        return agent.act(step, carry, explore=False)[1]

    carry = act(steps[0], None)
    agent.reset_weights()
    new = act(steps[1], carry)
    assert torch.equal(new["h"], act(steps[1], None)["h"])
    assert not torch.equal(act(steps[2], new)["h"], act(steps[2], None)["h"])  # goes on from there
