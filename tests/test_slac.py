"""SLAC's model, losses, windows and gradients, against closed forms, torch.distributions and loops
over single images. "Code" is https://github.com/alexlee-gk/slac."""

import functools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import TRAINS, noise_step, tiny_agent, tiny_args
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

import slac as script

LATENTS = {  # the models of the paper's ablation, and PlaNet's
    "slac": "",
    "partial": "--z2 deterministic",
    "deterministic": "--z1 deterministic --z2 deterministic",
    "vae": "--no-temporal",
    "simple vae": "--z2 none --no-temporal",
    "simple filter": "--z2 none",
    "rssm": "--z2 recurrent",
}


def make_agent(flags=""):
    """A small agent whose next update moves everything, and a batch: sequences of 4 images."""
    _, agent, buffer, rng = tiny_agent("slac", f"--pretrain-updates 0 {flags}")
    return agent, agent.sample(buffer, rng)


def published(action_dim):
    return script.Agent(script.Args(device="cpu"), script.EnvSpec((3, 64, 64), action_dim, 17))


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize("A", [1, 6])
def test_parameter_counts_are_the_published_ones(A):
    """Code: model_distribution_network.py, actor_distribution_network.py, critic_network.py."""
    agent = published(A)
    m = agent.model
    assert count(m.encoder) == 1_438_784 and count(m.decoder) == 1_569_603
    assert count(m.z2_first) == 205_824 and count(m.prior) == 148_032 + 256 * A
    assert count(m.z2_next) == 271_360 + 256 * A and count(m.q_first) == 148_032
    assert count(m.q_next) == 213_568 + 256 * A and count(m.reward_head) == 214_018 + 256 * A
    assert count(agent.critic.q1) == count(agent.critic.q2) == 140_033 + 256 * A
    assert count(agent.actor) == 590_336 + 2306 * A


def test_convs_halve_the_image_and_the_decoder_gives_it_back():
    """Code: 32, 16, 8, 4, 1 of 64 pixels; leaky ReLUs of 0.2, one after the decoder, too (D6)."""
    for size, channels in ((64, (4, 4, 4, 4)), (32, (4, 4, 8)), (48, (2, 2))):
        args = tiny_args(script, channels=channels)
        encoder = script.Encoder((3, size, size), args)
        decoder = script.Decoder((3, size, size), 10, args)
        x, sides = torch.rand(2, 3, size, size), []
        for layer in encoder:
            x = layer(x)
            sides.append(x.shape[-1])
        assert sides[:-1:2] == [*(size // 2**i for i in range(1, len(channels) + 1)), 1]
        assert x.shape == (2, 8)
        assert decoder(torch.rand(2, 10)).shape == (2, 3, size, size)
        slopes = {layer.negative_slope for layer in [*encoder][1:-1:2] + [*decoder][2::2]}
        assert slopes == {0.2}


def test_weights_and_optimizers_start_as_published():
    """Xavier's bound sqrt(6 / (fan in + fan out)), zero biases; Adam's rates of the paper."""
    agent, _ = make_agent()
    for layer in agent.modules():
        if hasattr(layer, "weight"):
            taps = math.prod(layer.weight.shape[2:])
            bound = math.sqrt(6 / (taps * sum(layer.weight.shape[:2])))
            assert layer.bias.count_nonzero() == 0
            assert 0.8 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6)
    assert agent.log_alpha.item() == 0
    for name, optimizer in agent.optimizers.items():
        group = optimizer.param_groups[0]
        assert group["lr"] == (1e-4 if name == "model" else 3e-4)
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0)


def test_the_published_numbers_are_the_defaults():
    """10,000 random frames, whatever the action repeat is (D7); code: slac.gin, train_eval.py."""
    for repeat, steps in ((4, 2500), (1, 10_000), (3, 3334)):
        assert script.Args(action_repeat=repeat).warmup_steps == steps
    wanted = {
        "pretrain_updates": 50_000, "updates_per_step": 1.0, "model_batch_size": 32,
        "sac_batch_size": 256, "replay_capacity": 100_000, "actions": 8, "z1_dim": 32,
        "z2_dim": 256, "gamma": 0.99, "critic_tau": 0.005, "decoder_variance": 0.1,
    }  # fmt: skip
    assert {name: getattr(script.Args(), name) for name in wanted} == wanted
    assert script.Args(z2="none").z1_dim == 256


def test_gaussians_are_softplus_gaussians_with_a_floor():
    """Code: std = softplus + 1e-5; --reward-std-floor is the rewards' alone."""
    model = make_agent("--reward-std-floor 0.5")[0].model
    f = torch.randn(500, 8) * 30
    mean, std = model.q_first(f)
    raw_mean, raw_std = model.q_first.net(f).chunk(2, -1)
    torch.testing.assert_close(mean, raw_mean)
    torch.testing.assert_close(std, torch.log1p(raw_std.double().exp()).float() + 1e-5)
    assert model.reward_head(*(torch.randn(99, d) * 50 for d in (12, 2, 12)))[1].min() >= 0.5


def test_kl_is_the_closed_form():
    """[SLAC J(M): KL] torch.distributions' KL, summed over z1 and time; it moves q and p."""
    agent, _ = make_agent()
    q, p = ([torch.randn(3, 5, 4), torch.rand(3, 5, 4) + 0.1] for _ in range(2))
    parts = [x.requires_grad_() for x in (*q, *p)]
    loss = agent.kl_loss(q, p, torch.zeros(3, 5, dtype=torch.bool))
    exact = kl_divergence(Normal(*q), Normal(*p)).sum((1, 2)).mean()
    torch.testing.assert_close(loss, exact)
    for ours, theirs in zip(*(torch.autograd.grad(x, parts) for x in (loss, exact)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_kl_of_deterministic_latents_is_half_the_squared_distance():
    """Code: without the starts, whose prior is not learned (D11)."""
    agent, _ = make_agent("--z1 deterministic --z2 deterministic")
    q, p, one = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.ones(3, 5, 4)
    started = torch.rand(3, 5) < 0.4
    expected = 0.5 * (q - p).square()[~started].sum() / 3
    torch.testing.assert_close(agent.kl_loss((q, one), (p, one), started), expected)


def test_image_loss_is_a_gaussians(monkeypatch):
    """[SLAC J(M): x] variance 0.1, summed over time and pixels; nine perfect images of 64 pixels
    cost -25,696.495."""
    agent, _ = make_agent()
    images, z = torch.rand(2 * 9, 3, 64, 64), torch.zeros(2, 9, 12)
    for error in (0.0, 0.1):
        monkeypatch.setattr(agent.model.decoder, "forward", lambda z, e=error: images + e)
        loss = agent.image_loss(z, images).item()
        nll = -Normal(images + error, math.sqrt(0.1)).log_prob(images).double().sum() / 2
        assert loss == pytest.approx(nll.item(), rel=1e-4)
        assert error or loss == pytest.approx(-25_696.495, abs=0.01)


def test_reward_loss_is_a_gaussians_without_starts(monkeypatch):
    """[SLAC J(M): r] log p(r_t | z_t, a_t, z_t+1); where an episode starts there is no reward."""
    agent, _ = make_agent()
    mean, std = torch.randn(3, 4, 1), torch.rand(3, 4, 1) + 0.2
    z, action, reward = torch.randn(3, 5, 12), torch.rand(3, 5, 2), torch.randn(3, 5, 1)
    is_first = torch.rand(3, 5) < 0.3
    asked = []

    def head(*inputs):
        asked.extend(inputs)
        return mean, std

    monkeypatch.setattr(agent.model.reward_head, "forward", head)
    loss, mean_std = agent.reward_loss(z, action, reward, is_first)
    nll = -Normal(mean, std).log_prob(reward[:, 1:])
    torch.testing.assert_close(loss, nll[~is_first[:, 1:]].sum() / 3)
    assert mean_std == std.mean()
    for given, wanted in zip(asked, (z[:, :-1], action[:, 1:], z[:, 1:]), strict=True):
        assert torch.equal(given, wanted)


def test_log_prob_is_the_squashed_gaussians():
    """torch.distributions; finite far out, too. The deviation's logarithm is clipped."""
    mu, log_std = torch.randn(2000, 6).double(), torch.full((2000, 6), -1.0).double()
    action, log_prob = script.tanh_gaussian(mu, log_std)
    base = Independent(Normal(mu, log_std.exp()), 1)
    exact = TransformedDistribution(base, TanhTransform()).log_prob(action)
    inside = action.abs().amax(-1) < 0.999
    assert (log_prob[:, 0] - exact)[inside].abs().max() < 1e-4 and inside.sum() > 500
    far = script.tanh_gaussian(torch.full((1, 1), 15.0), torch.full((1, 1), -20.0))[1]
    assert far.isfinite()
    actor = script.Actor(5, 2, tiny_args(script))
    actor.trunk[-1].weight.data.zero_()
    actor.trunk[-1].bias.data = torch.tensor([100.0, -100, 100, -100])
    mu, log_std = actor(torch.zeros(1, 5))
    assert mu.tolist() == [[100, -100]] and log_std.tolist() == [[2, -20]]


def column(value):
    return torch.full((4, 1), float(value))


def test_critic_loss_and_its_target(monkeypatch):
    """[SLAC J(Q)] y = 1 + 0.99 (min(10, 12) + 1 * 2) = 12.88, or 1 where the discount is 0; half of
    1 + 4 where Q1 = y + 1 and Q2 = y + 2."""
    agent, _ = make_agent()
    monkeypatch.setattr(script, "tanh_gaussian", lambda *_: (torch.zeros(4, 2), column(-2)))
    agent.actor.forward = lambda seen: (seen, seen)
    agent.target_critic.forward = lambda z, a: (column(10), column(12))
    for discount, y in ((1, 12.88), (0, 1.0)):
        agent.critic.forward = lambda z, a, y=y: (column(y + 1), column(y + 2))
        loss = agent.critic_loss(None, None, column(1), column(discount), None, column(0))
        assert loss.item() == pytest.approx(2.5, abs=1e-4)


def test_actor_and_alpha_loss(monkeypatch):
    """[SLAC J(pi)] log pi - min Q with log pi = -2 and Q = 5, 3 is -5.
    [SLAC J(alpha)] log alpha (-log pi + A), of the logarithm, as in the code: gradient 2 + 2."""
    agent, _ = make_agent()
    monkeypatch.setattr(script, "tanh_gaussian", lambda *_: (torch.zeros(4, 2), column(-2)))
    agent.actor.forward = lambda seen: (seen, seen)
    agent.critic.forward = lambda z, a: (column(5), column(3))
    loss, log_prob = agent.actor_loss(column(0), None)
    assert loss.item() == pytest.approx(-5)
    agent.alpha_loss(log_prob).backward()
    assert agent.log_alpha.grad.item() == pytest.approx(4)


def by_loops(model, features, action, is_first, noise, blind):
    """z, and mean and std of q and p of z1 side by side, one sequence and one image at a time. If
    `blind`, z1 is drawn from the prior after the first image."""
    n = model.z_dims[0]
    z, out = None, []
    for b, t in np.ndindex(*is_first.shape):
        f, a, e1, e2 = features[b, t], action[b, t], noise[b, t, :n], noise[b, t, n:]
        starts = t == 0 or is_first[b, t] or not model.temporal
        if starts:
            q, p = model.q_first(f), (torch.zeros(n), torch.ones(n))
        else:
            z1, z2 = z[:n], z[n:]
            context = torch.cat([z2 if len(z2) else z1, a])
            if model.gru is not None:
                context = model.gru(torch.cat([z1, a]), z2)
            q, p = model.q_next(f, context), model.prior(context)
        mean, std = p if blind and t else q
        z1 = mean + std * e1
        z2 = torch.zeros_like(e2)
        if model.gru is not None and not starts:
            z2 = context
        if model.z2_next is not None:
            mean, std = model.z2_first(z1) if starts else model.z2_next(z1, context)
            z2 = mean + std * e2
        z = torch.cat([z1, z2])
        out.append(torch.cat([z, *q, *p]))
    return torch.stack(out).unflatten(0, is_first.shape)


@pytest.mark.parametrize("latent", LATENTS)
def test_filter_and_imagine_are_loops_over_single_images(latent):
    """The paper's p and q of z1 and z2, and its ablations'. KLs are to the prior that follows the
    posterior's z2. Deterministic parts have a std of 1 and no noise."""
    agent, _ = make_agent(LATENTS[latent])
    model = agent.model
    features, action = torch.randn(3, 5, 8), torch.rand(3, 5, 2)
    is_first = torch.zeros(3, 5, dtype=torch.bool)
    noise = model.noise(3, 5)
    z = by_loops(model, features, action, is_first, noise, True)[..., : model.z_dim]
    out = model.imagine(z[:, 0], action[:, 1:], noise[:, 1:])
    torch.testing.assert_close(out, z[:, 1:])

    is_first[1, 3] = is_first[2, 0] = is_first[2, 1] = True
    z, q, p, started = model.filter(features, action, is_first, noise)
    expected = by_loops(model, features, action, is_first, noise, False)
    torch.testing.assert_close(torch.cat([z, *q, *p], -1), expected)
    assert (started | (torch.arange(5) > 0)).all() and started[is_first].all()
    assert (q[1] == 1).all() == (agent.args.z1 == "deterministic")
    assert noise[..., :4].any() == (agent.args.z1 == "stochastic")
    assert noise[..., 4:].any() == (agent.args.z2 == "stochastic")


def test_latent_noise_is_gaussian():
    noise = make_agent()[0].model.noise(500, 5)
    assert scipy.stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3


def test_histories_are_features_and_the_actions_between_them():
    """Windows of three images. Before an episode's first image (row 1 of the second sequence) there
    is that image again, without actions."""
    agent, _ = make_agent()
    f, a, none = torch.randn(2, 4, 8), torch.rand(2, 4, 2), torch.zeros(2)
    is_first = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    out = agent.histories(f, a, is_first)
    expected = {
        (0, 0): [f[0, 0], f[0, 1], f[0, 2], a[0, 1], a[0, 2]],
        (0, 1): [f[0, 1], f[0, 2], f[0, 3], a[0, 2], a[0, 3]],
        (1, 0): [f[1, 1], f[1, 1], f[1, 2], none, a[1, 2]],
        (1, 1): [f[1, 1], f[1, 2], f[1, 3], a[1, 2], a[1, 3]],
    }
    for window, parts in expected.items():
        assert torch.equal(out[window], torch.cat(parts))


@pytest.mark.parametrize("kind", ["history", "latent"])
def test_acting_sees_what_training_sees(kind):
    """The windows of an episode's first twelve images, from act() and from the replay buffer. A
    latent has been filtered for one image more at the later end of a sequence."""
    _, agent, buffer, rng = tiny_agent("slac", f"--actor-input {kind}")
    agent.model.noise = lambda *shape: torch.zeros(*shape, 12)
    seen, carry = [], None
    agent.actor.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    for row in range(40, 52):
        step = noise_step(script, agent.spec, rng, row == 40)
        step = step._replace(obs=buffer.files["obs"][row], action=buffer.files["action"][row])
        _, carry = agent.act(step, carry, explore=True)
    rows = np.arange(41, 52)[:, None] + np.arange(-3, 1)
    is_first = torch.as_tensor(buffer.files["start"][rows] == rows)
    obs, action = buffer.gather("obs", rows), buffer.gather("action", rows)
    now, following = agent.features_for(obs, action, is_first, {kind})[kind].unbind(1)
    torch.testing.assert_close(now, torch.stack(seen[:-1]), rtol=1e-4, atol=1e-5)
    if kind == "history":
        torch.testing.assert_close(following, torch.stack(seen[1:]), rtol=1e-4, atol=1e-5)


def test_evaluation_samples_as_published():
    """Code: the evaluation's actions are sampled, too; --eval-policy mean has the mean."""
    for policy in ("sample", "mean"):
        _, agent, _, rng = tiny_agent("slac", f"--eval-policy {policy}")
        step = noise_step(script, agent.spec, rng, True)
        one, two = (agent.act(step, None, explore=False)[0] for _ in range(2))
        assert torch.equal(one, two) == (policy == "mean")


def moved(agent, step):
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    step()
    after = agent.state_dict().items()
    return {name.split(".")[0] for name, value in after if not torch.equal(value, before[name])}


def test_who_trains_what():
    """The README's table. Nothing is detached here: the optimizers alone decide what moves."""
    agent, batch = make_agent()
    sac = batch["sac"]
    seen = agent.features_for(sac["obs"], sac["action"], sac["is_first"], {"history", "latent"})
    h, next_h, z, next_z = (*seen["history"].unbind(1), *seen["latent"].unbind(1))
    arrival = [sac[name][:, -1] for name in ("action", "reward", "discount")]
    losses = {
        "model": lambda: sum(agent.model_losses(**batch["model"])[0].values()),
        "critic": lambda: agent.critic_loss(z, *arrival, next_z, next_h),
        "actor": lambda: agent.actor_loss(h, z)[0],
        "alpha": lambda: agent.alpha_loss(column(1)),
    }
    for (name, loss), parts in zip(losses.items(), TRAINS["slac"].values(), strict=True):
        step = functools.partial(script.minimize, loss(), agent.optimizers[name])
        assert moved(agent, step) == parts


def test_the_burst_trains_the_model_alone_and_then_everything():
    """The paper's 50,000 updates of the model come first (D7)."""
    _, agent, buffer, rng = tiny_agent("slac", "--pretrain-updates 3")
    for agent.updates in range(6):
        batch = agent.sample(buffer, rng)
        everything = {"model", "critic", "actor", "log_alpha", "target_critic"}
        parts = moved(agent, functools.partial(agent.update, batch))
        assert parts == (everything if agent.updates >= 3 else {"model"})
        assert agent.cadence() == (agent.updates >= 3,)


def test_sequences_end_in_a_step_but_may_begin_in_the_episode_before():
    """So windows of all ages occur, as where histories are kept while acting."""
    _, batch = make_agent("--sac-batch-size 300")
    is_first = batch["sac"]["is_first"]
    assert is_first[:, 1:-1].any() and not is_first[:, -1].any()


def test_update_is_the_losses_one_after_the_other():
    """The model's step, then critic, actor and temperature, on windows that end at images 2 and 3
    of 0 to 3, and the transition between those (D1, D2, D3)."""
    (ours, batch), (plain, _) = make_agent(), make_agent()
    torch.manual_seed(5)
    ours.update(batch)

    torch.manual_seed(5)
    opt, sac = plain.optimizers, batch["sac"]
    script.minimize(sum(plain.model_losses(**batch["model"])[0].values()), opt["model"])
    features = plain.model.encode(sac["obs"]).detach()
    h = plain.histories(features, sac["action"], sac["is_first"])
    noise = plain.model.noise(4, 4)
    z = plain.model.filter(features, sac["action"], sac["is_first"], noise)[0].detach()
    arrival = [sac[name][:, 3] for name in ("action", "reward", "discount")]
    script.minimize(plain.critic_loss(z[:, 2], *arrival, z[:, 3], h[:, 1]), opt["critic"])
    loss, log_prob = plain.actor_loss(h[:, 0], z[:, 2])
    script.minimize(loss, opt["actor"])
    script.minimize(plain.alpha_loss(log_prob), opt["alpha"])
    script.soft_update(plain.critic, plain.target_critic, 0.005)
    for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


INPUTS = ["--critic-input history", "--actor-input latent",
          "--actor-input latent --critic-input history"]  # fmt: skip


@pytest.mark.parametrize("flags", [*LATENTS.values(), *INPUTS])
def test_every_variant_updates_and_draws(flags):
    """The strip: truth; the posterior; the prior after the first image; and after none."""
    _, agent, buffer, rng = tiny_agent("slac", f"--pretrain-updates 0 {flags}")
    metrics = agent.update(agent.sample(buffer, rng))
    assert all(v.isfinite() and v.ndim == 0 and not v.requires_grad for v in metrics.values())
    strip = agent.images(buffer, np.random.default_rng(0))["sequence"]
    cells = strip.reshape(4, 16, 4, 16, 3).transpose(0, 2, 1, 3, 4)  # (4, T, H, W, C)
    truth = cells[0].transpose(0, 3, 1, 2)
    assert any(np.array_equal(truth, buffer.files["obs"][i : i + 4]) for i in range(156))
    assert np.array_equal(cells[1, 0], cells[2, 0])  # both know the first image
