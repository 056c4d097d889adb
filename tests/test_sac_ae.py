"""SAC+AE's networks, losses, gradients and cadence, against closed forms and the fact sheet."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TRAINS, sac_steps
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import sac_ae as script

PIXELS = (3, 84, 84)


def make_agent(seed=0, action_dim=2, obs_shape=(3, 24, 24), **changes):
    """A small agent; published sizes where `changes` say so."""
    small = {"device": "cpu", "filters": 4, "conv_strides": (2, 2), "hidden_dim": 16,
             "latent_dim": 50, "pretrain_updates": 0, "image_size": obs_shape[-1]}
    torch.manual_seed(seed)
    dtype = torch.uint8 if len(obs_shape) == 3 else torch.float32
    args = script.Args(**{**small, **changes})
    return script.Agent(args, script.EnvSpec(obs_shape, dtype, action_dim))


def published(action_dim=6, **changes):
    names = "filters", "conv_strides", "hidden_dim", "latent_dim"
    sizes = {name: getattr(script.Args(), name) for name in names}
    return make_agent(0, action_dim, changes.pop("obs_shape", PIXELS), **{**sizes, **changes})


def make_batch(agent, size=4, seed=0, obs_shape=(3, 24, 24)):
    g = torch.Generator().manual_seed(seed)
    shape = (size, agent.args.frame_stack * obs_shape[0], *obs_shape[1:])
    images = torch.randint(0, 256, (2, *shape), generator=g, dtype=torch.uint8)
    if len(obs_shape) == 1:
        images = images / 255
    return {"obs": images[0], "next_obs": images[1], "discount": torch.ones(size, 1),
            "action": torch.rand(size, agent.action_dim, generator=g) * 2 - 1,
            "reward": torch.rand(size, 1, generator=g)}


def seen(obs):
    """The Step of an observation, as far as acting needs it."""
    return script.Step(obs, None, None, 0.0, 1.0, True, False)


def count(*modules):
    return sum(p.numel() for m in modules for p in m.parameters())


# ---- architecture ----


@pytest.mark.parametrize("action_dim, critic, actor", [
    (6, 4_208_504, 3_074_274), (2, 4_200_312, 3_066_074), (1, 4_198_264, 3_064_024)])
def test_parameter_counts(action_dim, critic, actor):
    agent = published(action_dim)
    assert count(agent.encoder.convs) == 30_368
    assert count(agent.encoder.head.fc) == 1_960_050 and count(agent.encoder.head.norm) == 100
    assert count(agent.encoder, agent.critic) == critic
    assert count(agent.actor) == actor
    assert count(agent.decoder) == 2_029_545
    if action_dim == 6:
        trainable = sum(p.numel() for p in agent.parameters() if p.requires_grad)
        assert trainable == 9_312_324
        assert count(agent.critic.q1) == 1_108_993
        vae = published(6, reconstruction="vae")
        assert count(vae.encoder) - count(agent.encoder) == 1_960_050


@pytest.mark.parametrize("size, convs", [(84, [84, 41, 39, 37, 35]), (64, [64, 31, 29, 27, 25]),
                                         (100, [100, 49, 47, 45, 43])])
def test_shapes(size, convs):
    assert script.conv_sizes(size, (2, 1, 1, 1)) == convs
    agent = published(2, obs_shape=(3, size, size))
    obs = torch.rand(2, 9, size, size)
    h = agent.encoder.convs(obs)
    z = agent.encoder.head(h)
    assert h.shape == (2, 32 * convs[-1] ** 2) and z.shape == (2, 50) and z.abs().max() < 1
    assert agent.decoder(z).shape == obs.shape
    q1, q2 = agent.critic(z, torch.zeros(2, 2))
    assert q1.shape == q2.shape == (2, 1) and not torch.equal(q1, q2)


@pytest.mark.parametrize("size", range(13, 60))
@pytest.mark.parametrize("strides", [(2, 2), (2, 1, 2), (3, 2)])
def test_the_decoder_ends_at_the_image_size(size, strides):
    if script.conv_sizes(size, strides)[-1] < 1:
        pytest.skip("too small")
    agent = make_agent(obs_shape=(3, size, size), conv_strides=strides)
    obs = torch.rand(1, 9, size, size)
    assert agent.decoder(agent.encoder(obs)).shape == obs.shape


def test_the_actor_has_its_own_head_and_no_convs():
    agent = make_agent()
    own = {id(p) for p in agent.actor.parameters()}
    assert own.isdisjoint(id(p) for p in agent.encoder.parameters())
    assert agent.actor.head.fc.weight.shape == agent.encoder.head.fc.weight.shape
    assert not torch.equal(agent.actor.head.fc.weight, agent.encoder.head.fc.weight)


def test_init():
    agent = published(6)
    kinds = torch.nn.Conv2d, torch.nn.ConvTranspose2d
    convs = [m for m in agent.modules() if isinstance(m, kinds)]
    assert len(convs) == 12  # encoder, target encoder, decoder
    norms = []
    for conv in convs:
        weight, bias = conv.weight.detach().clone(), conv.bias
        centre = weight[:, :, 1, 1].clone()
        weight[:, :, 1, 1] = 0
        assert weight.abs().max() == 0 and bias.abs().max() == 0
        gram = centre.T @ centre if centre.shape[0] >= centre.shape[1] else centre @ centre.T
        torch.testing.assert_close(gram, 2 * torch.eye(len(gram)), atol=1e-4, rtol=0)
        norms.append(round(centre.square().sum().item()))
    assert norms.count(18) == 3 and norms.count(64) == 9
    for linear in (m for m in agent.modules() if isinstance(m, torch.nn.Linear)):
        w = linear.weight.detach()
        gram = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
        torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-3, rtol=0)
        assert linear.bias.abs().max() == 0
    for p, t in zip(agent.encoder.parameters(), agent.target_encoder.parameters(), strict=True):
        assert torch.equal(p, t) and p is not t
    assert agent.log_alpha.exp().item() == pytest.approx(0.1)


def test_log_std_bounds():
    x = torch.tensor([0.0, -math.inf, math.inf])
    assert script.bounded_log_std(x).tolist() == [-4.0, -10.0, 2.0]


# ---- losses ----


def test_log_prob_is_the_squashed_gaussians():
    torch.manual_seed(0)
    mu, log_std = torch.randn(2000, 6).clamp(-1, 1), torch.full((2000, 6), -1.0)
    action, log_prob = script.tanh_gaussian(mu, log_std)
    inside = action.abs().max(-1).values < math.tanh(3)
    base = Independent(Normal(mu.double(), log_std.double().exp()), 1)
    exact = TransformedDistribution(base, TanhTransform()).log_prob(action.double())
    error = (log_prob[:, 0] - exact)[inside]
    assert inside.sum() > 1500 and error.abs().max() < 1e-3


def test_image_target():
    agent = make_agent()
    grey = torch.arange(256, dtype=torch.uint8)
    torch.manual_seed(0)
    one, two = agent.image_target(grey), agent.image_target(grey)
    assert not torch.equal(one, two)
    floor = ((one + 0.5) * 32).floor() / 32 - 0.5  # without the noise
    assert floor[[0, 7, 8, 255]].tolist() == [-0.5, -0.5, -0.46875, 0.46875]
    assert len(floor.unique()) == 32 and one.min() >= -0.5 and one.max() < 0.5
    noise = agent.image_target(torch.zeros(10**6, dtype=torch.uint8)) + 0.5
    assert noise.min() >= 0 and noise.max() < 1 / 32
    assert noise.mean().item() == pytest.approx(1 / 64, rel=1e-2)
    assert noise.var().item() == pytest.approx(1 / (12 * 32**2), rel=1e-2)


def test_td_target_and_critic_loss(monkeypatch):
    """y = 1 + 0.99 (10 + 0.1 * 2) = 11.098; with discount 0, y = 1; Q1 = Q2 = y + 1 costs 2."""
    agent = make_agent(gamma=0.99, init_temperature=0.1)
    log_prob, obs = torch.full((4, 1), -2.0), torch.rand(4, 9, 24, 24)
    monkeypatch.setattr(script, "tanh_gaussian", lambda *_: (torch.zeros(4, 2), log_prob))
    agent.target_critic.forward = lambda z, a: (torch.full((4, 1), 10.0), torch.full((4, 1), 12.0))
    for discount, y in ((1.0, 11.098), (0.0, 1.0)):
        agent.critic.forward = lambda z, a, y=y: (torch.full((4, 1), y + 1),) * 2
        loss = agent.critic_loss(obs, torch.zeros(4, 2), torch.ones(4, 1),
                                 torch.full((4, 1), discount), obs)
        assert loss.item() == pytest.approx(2.0, abs=1e-4)


def test_actor_loss(monkeypatch):
    """mean(0.1 * log pi - min Q) with log pi = -2 and Q = 3, 5 is -3.2."""
    agent = make_agent(init_temperature=0.1)
    monkeypatch.setattr(script, "tanh_gaussian",
                        lambda *_: (torch.zeros(4, 2), torch.full((4, 1), -2.0)))
    agent.critic.forward = lambda z, a: (torch.full((4, 1), 3.0), torch.full((4, 1), 5.0))
    loss, log_prob = agent.actor_loss(agent.encoder.convs(torch.rand(4, 9, 24, 24)))
    assert loss.item() == pytest.approx(-3.2) and log_prob.shape == (4, 1)


def test_alpha_loss():
    """0.1 * (2 + 6) = 0.8 = its own gradient in log alpha; Adam's first step is alpha_lr."""
    agent = make_agent(action_dim=6)
    loss = agent.alpha_loss(torch.full((4, 1), -2.0))
    assert loss.item() == pytest.approx(0.8, rel=1e-5)
    before = agent.log_alpha.item()
    script.minimize(loss, agent.optimizers["alpha"])
    assert agent.log_alpha.grad.item() == pytest.approx(0.8, rel=1e-5)
    assert agent.log_alpha.item() - before == pytest.approx(-1e-4, rel=5e-3)


def test_reconstruction_loss(monkeypatch):
    """Error, 0.5 |z|^2 = 25 for z of 50 ones, by their weights; the noise alone costs 8.14e-5."""
    agent = make_agent(latent_weight=1e-3)
    images = torch.zeros(64, 9, 24, 24, dtype=torch.uint8)
    h = agent.encoder.convs(script.preprocess(images))
    agent.encoder.head.forward = lambda h: torch.ones(len(h), 50)
    agent.decoder.forward = lambda z: torch.full((len(z), 9, 24, 24), -0.5 + 1 / 64)
    loss = agent.reconstruction_loss(h, images)
    noise = 1 / (12 * 32**2)
    assert loss.item() == pytest.approx(25e-3 + noise, rel=1e-3)
    agent.decoder.forward = lambda z: torch.full((len(z), 9, 24, 24), 0.5 + 1 / 64)
    loss = agent.reconstruction_loss(h, images)
    assert loss.item() == pytest.approx(1 + 25e-3 + noise, rel=1e-3)


def test_vae_kl_and_noise(monkeypatch):
    agent = make_agent(reconstruction="vae")
    head, h = agent.encoder.head, torch.zeros(7, agent.encoder.head.fc.in_features)
    for mu, log_std, kl in ((0.0, 0.0, 0.0), (1.0, 0.0, 25.0), (0.3, -1.0, None)):
        gaussian = torch.full((7, 50), mu), torch.full((7, 50), log_std)
        monkeypatch.setattr(head, "gaussian", lambda h, g=gaussian: g)
        ours = head.kl(h).item()
        exact = torch.distributions.kl_divergence(Normal(mu, math.exp(log_std)), Normal(0.0, 1.0))
        assert ours == pytest.approx(50 * exact.item(), abs=1e-4)
        assert kl is None or ours == pytest.approx(kl, abs=1e-5)
    torch.manual_seed(0)
    z = torch.stack([head(h) for _ in range(300)])
    assert z.mean().item() == pytest.approx(0.3, abs=5e-3)
    assert z.std().item() == pytest.approx(math.exp(-1), rel=1e-2)
    assert make_agent().encoder.head.kl(h).item() == 0


def test_kl_weight_is_beta_one_at_full_size():
    assert script.Args().kl_weight == pytest.approx(1 / (0.5 * 9 * 84 * 84), rel=1e-3)


# ---- who trains what ----

TRAINS = TRAINS["sac_ae"]
PARTS = ["encoder.convs", "encoder.head", "actor.head", "actor.trunk", "critic", "decoder",
         "log_alpha", "target_encoder", "target_critic"]
VARIANTS = {
    "default": {},
    "vae": {"reconstruction": "vae"},
    "freeze": {"freeze_encoder": True},
    "actor": {"actor_trains_encoder": True},
}


def moved(agent, step):
    """Parts with a tensor that changes in step(), and the parts all of whose tensors do."""
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    step()
    changed = {k for k, v in agent.state_dict().items() if not torch.equal(v, before[k])}
    some = {part for part in PARTS if any(k.startswith(part) for k in changed)}
    whole = {part for part in PARTS if all(k in changed for k in before if k.startswith(part))}
    return some, whole


def loss_step(agent, name):
    """One gradient step on one loss, in the way update() takes it."""
    batch = make_batch(agent)
    obs, next_obs = script.preprocess(batch["obs"]), script.preprocess(batch["next_obs"])
    h = agent.encoder.convs(obs)
    if name == "critic":
        loss = agent.critic_loss(obs, batch["action"], batch["reward"], batch["discount"], next_obs)
    elif name == "actor":
        loss = agent.actor_loss(h)[0]
    elif name == "alpha":
        loss = agent.alpha_loss(agent.actor_loss(h)[1])
    else:
        loss = agent.reconstruction_loss(h, batch["obs"])
    names = ("encoder", "decoder") if name == "reconstruction" else (name,)
    script.minimize(loss, *(agent.optimizers[n] for n in names))


@pytest.mark.parametrize("loss", TRAINS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_who_trains_what(loss, variant):
    expected = set(TRAINS[loss])
    if variant == "freeze" and loss == "critic":
        expected = {"critic"}
    if variant == "actor" and loss == "actor":
        expected |= {"encoder.convs"}
    agent = make_agent(**VARIANTS[variant])
    for _ in range(2):  # delta-orthogonal weights pass no gradient to some taps at first
        loss_step(agent, loss)
    some, whole = moved(agent, lambda: loss_step(agent, loss))
    assert some == expected
    assert whole == expected or loss == "actor" or variant == "vae"


def test_minimize_leaves_other_gradients_alone():
    a, b = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    script.minimize((a * b).sum(), torch.optim.SGD([a], 0.5))
    assert a.item() == 0.5 and b.grad is None


def test_weight_decay_is_coupled_and_only_the_decoders():
    """With a zero loss gradient g = 1e-7 * 0.1 and Adam moves by lr * g / (g + 1e-8) = lr / 2."""
    agent = make_agent()
    groups = {n: o.param_groups[0]["weight_decay"] for n, o in agent.optimizers.items()}
    assert groups == {"critic": 0, "actor": 0, "alpha": 0, "encoder": 0, "decoder": 1e-7}
    for p in agent.decoder.parameters():
        p.data.fill_(0.1)
        p.grad = torch.zeros_like(p)
    agent.optimizers["decoder"].step()
    for p in agent.decoder.parameters():
        torch.testing.assert_close(p, torch.full_like(p, 0.1 - 1e-3 / 2), rtol=0, atol=2e-6)


def test_optimizers_are_the_published_ones():
    agent = published()
    group = {n: o.param_groups[0] for n, o in agent.optimizers.items()}
    assert {n: g["lr"] for n, g in group.items()} == {
        "critic": 1e-3, "actor": 1e-3, "alpha": 1e-4, "encoder": 1e-3, "decoder": 1e-3}
    assert {n: g["betas"] for n, g in group.items()} == {
        n: (0.5 if n == "alpha" else 0.9, 0.999) for n in group}
    assert all(g["eps"] == 1e-8 for g in group.values())


# ---- update ----


def test_cadence_after_the_burst():
    """In ten updates after the burst: critic and decoder 10, actor and targets 5; in it: always."""
    agent = make_agent(pretrain_updates=6)
    calls = dict.fromkeys(["critic_loss", "actor_loss", "alpha_loss", "reconstruction_loss"], 0)
    def counted(name, loss):
        def call(*tensors):
            calls[name] += 1
            return loss(*tensors)
        return call

    for name in calls:
        setattr(agent, name, counted(name, getattr(agent, name)))
    targets = 0
    for i in range(16):
        if i == 6:
            assert set(calls.values()) == {6} and targets == 6
        before = agent.target_critic.q1[0].weight.clone()
        agent.update(make_batch(agent, seed=i))
        targets += not torch.equal(before, agent.target_critic.q1[0].weight)
    assert calls == {"critic_loss": 16, "actor_loss": 11, "alpha_loss": 11,
                     "reconstruction_loss": 16}
    assert targets == 11 and agent.updates == 16


def test_the_actor_moves_at_even_steps_as_published():
    """Update u >= 1000 is made at step u + 1; theirs gates on step % 2 == 0."""
    agent = make_agent(pretrain_updates=1000, decoder_every_updates=10, target_every_updates=3)
    for updates in (0, 1, 998, 999, 1000, 1001, 1002, 5000):
        agent.updates = updates
        step = 1000 if updates < 1000 else updates + 1
        every_third = updates < 1000 or step % 3 == 1  # theirs counts from 1000
        assert agent.cadence() == (step % 2 == 0, step % 10 == 0, every_third)


@pytest.mark.parametrize("every", [1, 4])
def test_alternating_decoder(every):
    agent = make_agent(decoder_every_updates=every)
    present = ["loss/reconstruction" in agent.update(make_batch(agent)) for _ in range(8)]
    assert present == [(i + 1) % every == 0 for i in range(8)]


def test_targets_follow_slowly():
    agent = make_agent(target_every_updates=1)
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    encoder, critic = [], []
    original = script.soft_update
    try:
        script.soft_update = lambda net, target, tau: (
            (encoder if net is agent.encoder else critic).append(
                [p.clone() for p in net.parameters()]), original(net, target, tau))
        agent.update(make_batch(agent))
    finally:
        script.soft_update = original
    pairs = ("target_encoder", encoder[0], 0.05), ("target_critic", critic[0], 0.01)
    for name, net, tau in pairs:
        target = getattr(agent, name)
        for (key, t), p in zip(target.named_parameters(), net, strict=True):
            old = before[f"{name}.{key}"]
            torch.testing.assert_close(t, tau * p + (1 - tau) * old, rtol=1e-5, atol=1e-7)


def test_update_is_the_five_losses_one_after_the_other():
    """update() shares a conv pass (D2); done without sharing it must come out the same."""
    ours, plain = make_agent(), make_agent()
    batch, opt = make_batch(ours), plain.optimizers
    for agent in (ours, plain):
        agent.updates = 1
    torch.manual_seed(5)
    ours.update(batch)
    torch.manual_seed(5)
    obs = sac_steps(script, plain, batch)
    loss = plain.reconstruction_loss(plain.encoder.convs(obs), batch["obs"])
    script.minimize(loss, opt["encoder"], opt["decoder"])
    for (key, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("changes", [
    *VARIANTS.values(), {"reconstruction": "none"},
    {"reconstruction": "none", "frame_stack": 1, "obs": "state"}])
def test_every_variant_updates(changes):
    shape = (5,) if "obs" in changes else (3, 24, 24)
    agent = make_agent(obs_shape=shape, **changes)
    for i in range(4):
        metrics = agent.update(make_batch(agent, seed=i, obs_shape=shape))
    assert all(math.isfinite(v) and v.ndim == 0 and not v.requires_grad for v in metrics.values())
    decoder = "loss/reconstruction" in metrics
    assert decoder == (changes.get("reconstruction") != "none")


def test_state_agent_is_plain_sac():
    agent = make_agent(obs_shape=(5,), obs="state", reconstruction="none", frame_stack=1)
    assert count(agent.encoder) == 0 and agent.critic.q1[0].in_features == 5 + 2
    obs = torch.rand(3, 5)
    assert torch.equal(agent.encoder(script.preprocess(obs)), obs)


def test_act_stacks_and_stays_in_range():
    agent = make_agent()
    images = [np.full((3, 24, 24), i, np.uint8) for i in range(4)]
    action, carry = agent.act(seen(images[0]), None, explore=False)
    assert carry.shape == (1, 9, 24, 24) and action.shape == (2,) and action.abs().max() <= 1
    for image in images[1:]:
        action, carry = agent.act(seen(image), carry, explore=False)
    assert carry[0, :, 0, 0].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    again, _ = agent.act(seen(images[3]), torch.cat([carry[:, :3], carry[:, :6]], 1), explore=False)
    noisy = [agent.act(seen(images[3]), None, explore=True)[0] for _ in range(2)]
    assert not torch.equal(*noisy) and again.shape == (2,)


def test_autoencoder_overfits_eight_images():
    """300 updates on one batch: the error falls below a fifth of the images' variance."""
    agent = make_agent(filters=32)
    base = torch.rand(8, 9, 3, 3, generator=torch.Generator().manual_seed(0))
    images = (F.interpolate(base, 24, mode="bilinear") * 255).to(torch.uint8)
    obs = script.preprocess(images)
    for _ in range(300):
        loss = agent.reconstruction_loss(agent.encoder.convs(obs), images)
        script.minimize(loss, agent.optimizers["encoder"], agent.optimizers["decoder"])
    assert loss.item() < (obs - obs.mean(0)).square().mean().item() / 5


def test_losses_are_reproducible():
    runs = []
    for _ in range(2):
        agent = make_agent(seed=1)
        runs.append([agent.update(make_batch(agent, seed=i))["loss/critic"].item()
                     for i in range(50)])
    assert runs[0] == runs[1]


def test_the_readmes_variants_are_accepted():
    import tyro

    text = (Path(script.__file__).parent / "benchmark" / "README.md").read_text()
    text = text.split("\n## SAC+AE")[1].split("\n## ")[0].replace("\\\n", " ")
    flags = [f for f in re.findall(r"`(--[^`]+)`", text) if "reconstruction" in f or "every" in f]
    flags += re.findall(r"python sac_ae.py (--obs[^\n]+)\n", text)
    assert len(flags) >= 8
    for line in flags:
        args = tyro.cli(script.Args, args=line.split())
        script.check_algorithm(args)
        shape = (5,) if args.obs == "state" else (3, 24, 24)
        small = {"filters": 4, "conv_strides": (2, 2), "hidden_dim": 16, "device": "cpu"}
        changes = {**vars(args), **small, "obs_shape": shape}
        agent = make_agent(**changes)
        assert agent.update(make_batch(agent, obs_shape=shape))
