"""DreamerV2's model, losses, cadence and switches for data efficiency, against closed forms,
torch.distributions, scipy and loops. "Code" is https://github.com/danijar/dreamerv2."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TRAINS, noise_step, tiny_agent
from scipy.stats import truncnorm
from torch.distributions import Categorical, Normal, kl_divergence
from torch.testing import assert_close


def test_the_gru():
    """Code: GRUCell: one LayerNorm over all gates, a reset of the whole tanh, update bias -1."""
    rssm = tiny_agent("dreamerv2")[1].rssm
    x, h = torch.randn(2, 4, 8)
    gates = F.layer_norm(rssm.gru(torch.cat([F.elu(x), h], -1)), [24], eps=1e-3)
    reset, candidate, update = gates.chunk(3, -1)
    u = torch.sigmoid(update - 1)
    expected = u * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - u) * h
    assert_close(rssm.cell(x, h), expected)


def test_kl_balance_and_free_nats():
    """[DreamerV2 KL] 0.8 of its gradient goes to the prior and 0.2 to the posterior; none where its
    mean over the batch, not each of it, is below the free nats."""
    logits = torch.randn(2, 2, 5, 3, 4, requires_grad=True).unbind()
    exact = kl_divergence(*(Categorical(logits=x) for x in logits)).sum(-1).mean()
    to_post, to_prior = torch.autograd.grad(exact, logits)
    for free, share in ((0.0, 1.0), (0.9, 1.0), (1.1, 0.0)):
        agent = tiny_agent("dreamerv2", f"--free-nats {free * exact.item()}")[1]
        loss, kl = agent.kl_loss(*logits)
        assert_close((loss, kl), (max(1.0, free) * exact, exact))
        gradients = torch.autograd.grad(loss, logits)
        assert_close(gradients, (0.2 * share * to_post, 0.8 * share * to_prior))


def test_image_reward_and_discount_loss():
    """[DreamerV2 image], a sum over pixels; [DreamerV2 reward]; [DreamerV2 discount] of gamma d."""
    agent = tiny_agent("dreamerv2", "--gamma 0.9")[1]
    mean, value = torch.randn(2, 6, 3, 8, 8)
    log_prob = Normal(mean, 1).log_prob(value)
    assert_close(agent.image_loss(mean, value), -log_prob.sum() / 6)
    assert_close(agent.reward_loss(mean, value), -log_prob.mean())
    p, d = torch.rand(2, 5, 1)
    assert_close(agent.discount_loss(p.logit(), d), F.binary_cross_entropy(p, 0.9 * d))


def test_lambda_returns_actor_loss_and_critic_loss_by_loops():
    """[DreamerV2 actor], where return i + 1 judges action i, and [DreamerV2 critic]."""
    agent = tiny_agent("dreamerv2", "--gamma 0.9 --return-lambda 0.6 --entropy-weight 0.3")[1]
    agent.target_critic[-1].bias.data += 1  # its values are the critic's plus 1
    features, entropies = torch.randn(5, 2, 20), torch.randn(4, 2)
    reward, value = agent.reward_head(features)[..., 0], agent.target_critic(features)[..., 0]
    discount = torch.rand(5, 2)
    returns = agent.returns(features, discount)
    for i in range(4):
        rewards, product, expected = 0.0, 1.0, 0.0
        for n in range(i, 4):
            rewards = rewards + product * reward[n]  # a state's own reward comes first
            product = product * discount[n]
            share = 0.6 ** (n - i) * (0.4 if n < 3 else 1.0)  # the longest has the rest
            expected = expected + share * (rewards + product * value[n + 1])
        assert_close(returns[i], expected)
    weights = agent.discounts(features, torch.ones(2))[1]
    terms = [0.9**i * (returns[i + 1] + 0.3 * entropies[i]) for i in range(3)]
    assert_close(agent.actor_loss(returns, entropies, weights), -torch.stack(terms).mean())
    terms = [0.9**i * Normal(value[i] - 1, 1).log_prob(returns[i]) for i in range(4)]
    assert_close(agent.critic_loss(features, returns, weights), -torch.stack(terms).mean())


def test_who_trains_what(monkeypatch):
    """The README's table: what each step of an update moves, by gradients of a norm up to 100. The
    actor's goes through the model alone: it sees detached features, and z passes a gradient on."""
    script, agent, buffer, rng = tiny_agent("dreamerv2", "--kl-scale 1e6")
    steps, minimize = [], script.minimize

    def spy(loss, optimizer):
        before = {name: value.clone() for name, value in agent.state_dict().items()}
        minimize(loss, optimizer)
        after = agent.state_dict().items()
        moved = {name for name, value in after if not torch.equal(value, before[name])}
        steps.append({name.split(".")[0] for name in moved})

    monkeypatch.setattr(script, "minimize", spy)
    agent.update(agent.sample(buffer, rng))
    assert steps == list(TRAINS["dreamerv2"].values())
    gradients = [p.grad for p in agent.optimizers["model"].param_groups[0]["params"]]
    assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(100, rel=1e-4)
    h = torch.randn(2, 8, requires_grad=True)
    features, entropies = agent.imagine(torch.zeros(2, 12), h)
    assert torch.autograd.grad(entropies.sum(), h, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(features[1, 0, 0], h)[0].any()


def test_cadence():
    """Code: the target is copied at the critic's updates 1, 101, 201, ..."""
    _, agent, buffer, rng = tiny_agent("dreamerv2", "--behavior-every-updates 2")
    for agent.updates, copied in ((0, True), (1, True), (2, False), (100, False), (200, True)):
        agent.update(agent.sample(buffer, rng))
        assert torch.equal(agent.target_critic[0].weight, agent.critic[0].weight) == copied


def test_sequences_begin_anew_and_shift_as_a_whole():
    """The state before a sequence is zero; DrQ's crops of an image whose border is repeated."""
    script, agent, buffer, rng = tiny_agent("dreamerv2")
    is_first = agent.sample(buffer, rng)["is_first"]
    assert is_first[:, 0].all() and not is_first[:, 1:].any()
    image = torch.rand(3, 9, 9)
    first, second = script.random_shift(image.expand(300, 2, 3, 9, 9), 2).unbind(1)
    padded = F.pad(image, (2, 2, 2, 2), mode="replicate")
    crops = [padded[:, i : i + 9, j : j + 9] for i in range(5) for j in range(5)]
    assert torch.equal(first, second)
    assert torch.equal(first.unique(dim=0), torch.stack(crops).unique(dim=0))


@pytest.mark.deep
def test_size_and_weight_decay_are_the_published_ones():
    """Code: dmc_vision in configs.yaml. Weights decay by 1e-6, whatever the learning rate is."""
    script = tiny_agent("dreamerv2")[0]
    agent = script.Agent(script.Args(device="cpu"), script.EnvSpec((3, 64, 64), 6, 17))
    assert sum(p.numel() for p in agent.parameters()) == 16_575_986  # with the target critic
    for optimizer in agent.optimizers.values():
        group = optimizer.param_groups[0]
        assert group["lr"] * group["weight_decay"] == pytest.approx(1e-6)  # AdamW's decay


@pytest.mark.deep
def test_acting_and_training_filter_by_the_same_steps():
    """observe() and act(), by a loop. Where an episode starts, state and action before are zero."""
    script, agent, buffer, rng = tiny_agent("dreamerv2")
    batch, rssm, noise = agent.sample(buffer, rng), agent.rssm, agent.rssm.noise(2, 6)
    batch["is_first"][1, 3] = True
    action, is_first = batch["action"], batch["is_first"]
    e = agent.encode(batch["obs"], agent.encoder)[2]
    states = rssm.observe(e, action, is_first, noise)
    z, h = torch.zeros(2, 12), torch.zeros(2, 8)
    noises, carry = iter(noise[0]), None
    rssm.noise = lambda *shape: next(noises)[None, None]
    for t in range(6):
        keep = ~is_first[:, t, None]
        h = rssm.cell(rssm.gru_in(torch.cat([z, action[:, t]], -1) * keep), h * keep)
        post = rssm.post_out(F.elu(rssm.post_in(torch.cat([h, e[:, t]], -1)))).view(2, 3, 4)
        z = script.one_hot_sample(post, noise[:, t])
        assert_close([state[:, t] for state in states], [z, h, post, rssm.prior(h)])
        step = noise_step(script, agent.spec, rng, t == 0)
        step = step._replace(obs=batch["obs"][0, t].numpy(), action=action[0, t].numpy())
        chosen, carry = agent.act(step, carry)
        assert_close((carry["z"], carry["h"]), (z[:1], h[:1]))
        assert_close(chosen, agent.actor(torch.cat([z, h], -1))[0][0])  # the mean


@pytest.mark.deep
def test_one_hot_samples():
    """They have softmax's frequencies and gradient."""
    script, logits = tiny_agent("dreamerv2")[0], torch.randn(3, 4, requires_grad=True)
    uniform = torch.rand(20_000, 3, 4)
    sample = script.one_hot_sample(logits.expand(20_000, 3, 4), uniform).view(20_000, 3, 4)
    assert_close(sample.sort(-1).values, torch.eye(4)[3].expand(20_000, 3, 4))
    probabilities = torch.softmax(logits, -1)
    assert_close(sample.mean(0), probabilities, rtol=0, atol=0.02)
    ours = torch.autograd.grad(sample.mean(0)[1, 2], logits)
    assert_close(ours, torch.autograd.grad(probabilities[1, 2], logits))


@pytest.mark.deep
@pytest.mark.parametrize("raw", [-5.0, -0.3, 0.0, 0.5, 5.0])
def test_the_truncated_normal(raw):
    """scipy's quantiles and entropy; TensorFlow's gradient (D3), finite wherever the actor can go.
    Code: loc = tanh(mean), std = 2 sigmoid(std / 2) + 0.1."""
    script, agent, *_ = tiny_agent("dreamerv2")
    agent.actor.trunk[-1].weight.data.zero_()
    agent.actor.trunk[-1].bias.data = torch.tensor([raw, raw, 2 * raw, 2 * raw])
    loc, std = agent.actor(torch.zeros(1000, 20))
    mean = torch.full((1000, 2), raw)
    assert_close((loc, std), (mean.tanh(), 2 * mean.sigmoid() + 0.1))
    uniform = ((torch.arange(1000) + 0.5) / 1000)[:, None].expand(1000, 2)
    action, entropy = script.truncated_normal(loc, std, uniform)
    a, b = loc[0, 0].item(), std[0, 0].item()
    exact = truncnorm((-1 - a) / b, (1 - a) / b, a, b)
    assert_close(action, torch.tensor(exact.ppf(uniform)).float(), rtol=0, atol=1e-4)
    assert entropy[0, 0].item() == pytest.approx(exact.entropy(), abs=1e-4)
    gradients = torch.autograd.grad(action.sum(), (loc, std))
    assert_close(gradients, (torch.ones(1000, 2), (action - loc) / std), rtol=0, atol=1e-3)


@pytest.mark.deep
def test_the_models_loss_is_the_weighted_sum():
    """[DreamerV2 J(M)] with all switches: its value, and its gradient in all that it trains."""
    flags = "--kl-scale 5 --infonce-weight 2 --spr-weight 3 --mask-ratio 0.5 --discount-head"
    script, agent, buffer, rng = tiny_agent("dreamerv2", flags)
    batch = agent.sample(buffer, rng)
    action, reward, noise = batch["action"], batch["reward"], agent.rssm.noise(2, 6)
    images, maps, e = agent.encode(batch["obs"], agent.encoder)
    z, h, post, prior = agent.rssm.observe(e, action, batch["is_first"], noise)
    torch.manual_seed(7)
    loss = agent.model_loss(batch, images, maps, e, z, h, post, prior)[0]
    torch.manual_seed(7)
    features = torch.cat([z, h], -1)
    shifted = script.random_shift(batch["obs"], 4)  # the targets see other shifts
    keys = agent.target_projection(agent.encode(shifted, agent.target_encoder)[2])
    total = 5 * agent.kl_loss(post, prior)[0]
    total += agent.image_loss(agent.decoder(features.flatten(0, 1)), images)
    total += agent.reward_loss(agent.reward_head(features), reward)
    total += agent.discount_loss(agent.discount_head(features), batch["discount"])
    total += 2 * agent.contrastive_loss(e, keys) + 3 * agent.spr_loss(z, h, action, keys)
    total += agent.masked_loss(maps, images, reward.flatten(0, 1))
    assert_close(loss, total)
    trained = agent.optimizers["model"].param_groups[0]["params"]
    gradients = torch.autograd.grad(loss, trained, retain_graph=True)
    assert_close(gradients, torch.autograd.grad(total, trained), rtol=1e-4, atol=1e-5)


@pytest.mark.deep
def test_infonce_and_spr_by_loops():
    """[CURL InfoNCE] The own key against all but the three before and after it. [SPR loss] Squared
    distance of normalised vectors, one to five steps ahead by the real actions."""
    agent = tiny_agent("dreamerv2", "--infonce-weight 1 --spr-weight 1")[1]
    e, keys = torch.randn(2, 6, agent.encoder.dim), torch.randn(2, 6, 128)
    query, brute = agent.similarity(agent.projection(e)).flatten(0, 1), 0.0
    for i in range(12):
        others = [j for j in range(12) if i == j or i // 6 != j // 6 or abs(i - j) > 3]
        scores = keys.flatten(0, 1)[others] @ query[i]
        brute -= scores.log_softmax(0)[others.index(i)] / 12
    assert_close(agent.contrastive_loss(e, keys), brute)

    agent.rssm.noise = lambda *shape: torch.full((*shape, 3, 4), 0.5)
    noise, brute = agent.rssm.noise(2), 0.0
    z, h, action = (torch.randn(2, 6, n) for n in (12, 8, 2))
    for t in range(5):
        state = z[:, t], h[:, t]
        for k in range(1, 6 - t):
            state = agent.rssm.imagine_step(*state, action[:, t + k], noise)
            predicted = agent.projection(agent.predictor(torch.cat(state, -1)))
            error = F.normalize(predicted, dim=-1) - F.normalize(keys[:, t + k], dim=-1)
            brute += error.square().sum() / (2 * (6 - k) * 5)
    assert_close(agent.spr_loss(z, h, action, keys), brute)


@pytest.mark.deep
def test_imagination_and_learned_discounts_by_loops():
    """Actor and prior in turns. A state's weight is the product of the discounts before it."""
    script, agent, *_ = tiny_agent("dreamerv2", "--discount-head")
    agent.rssm.noise = lambda *shape: torch.full((*shape, 3, 4), 0.5)
    z, h, noise = torch.randn(2, 12), torch.randn(2, 8), agent.rssm.noise(2)
    torch.manual_seed(0)
    features = agent.imagine(z, h)[0]
    torch.manual_seed(0)
    for t, uniform in enumerate(torch.rand(3, 2, 2)):
        action = script.truncated_normal(*agent.actor(features[t]), uniform)[0]
        state = agent.rssm.imagine_step(*features[t].split([12, 8], -1), action, noise)
        assert_close(features[t + 1], torch.cat(state, -1))
    discount, weights = agent.discounts(features, torch.tensor([1.0, 0.0]))
    predicted = torch.sigmoid(agent.discount_head(features[1:]))[..., 0]
    assert_close(discount, torch.cat([torch.tensor([[0.99, 0.0]]), predicted]))
    assert_close(weights[1:], discount[:-1].cumprod(0))
    assert not weights.requires_grad and (weights[0] == 1).all()


@pytest.mark.deep
@pytest.mark.parametrize(
    "kind, parts", [("transition", ("rssm.gru", "rssm.prior")),
                    ("actor-critic", ("actor", "critic", "target_critic")), ("all", ("",))],
)  # fmt: skip
def test_resets(kind, parts):
    """theta <- 0.2 theta + 0.8 fresh, of exactly these weights and their targets; Adam's moments
    start anew. Two extra updates follow each reset."""
    flags = f"--reset {kind} --reset-every-updates 5 --catch-up-updates 2"
    script, agent, buffer, rng = tiny_agent("dreamerv2", flags)
    agent.update(agent.sample(buffer, rng))
    for p in agent.parameters():
        p.data += 10.0
    before = {name: value.clone() for name, value in agent.named_parameters()}
    agent.reset_weights()
    for name, p in agent.named_parameters():
        touched = name.startswith(parts)
        assert torch.equal(p, before[name]) == (not touched)
        fresh = (p - 0.2 * before[name]) / 0.8
        assert (fresh.abs().max() < 2) == touched  # before there was 10 everywhere
        for optimizer in agent.optimizers.values():
            if p in optimizer.state:
                assert any(moment.any() for moment in optimizer.state[p].values()) != touched
    step = noise_step(script, agent.spec, rng, False)
    stale = {"z": torch.ones(1, 12), "h": torch.ones(1, 8), "reset_count": agent.reset_count - 1}
    agent.rssm.noise = lambda *shape: torch.full((*shape, 3, 4), 0.5)
    states = [agent.act(step, carry)[1]["h"] for carry in (stale, None)]
    assert torch.equal(*states)  # after a reset acting begins with a state of zeros (D7)
    for agent.updates in range(20):
        assert agent.cadence().reset == (agent.updates in (5, 12, 19))
    assert [script.updates_due(agent.args, 60 + n) for n in (0, 4, 5)] == [14, 18, 21]
