"""SAC+AE's networks, losses, gradients and cadence, against closed forms, PyTorch's distributions
and published numbers. "Code" is https://github.com/denisyarats/pytorch_sac_ae."""

import math

import numpy as np
import pytest
import torch
from conftest import TRAINS, noise_step, tiny_agent, tiny_args
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

import sac_ae as script


def make_agent(flags="", updates=0):
    """A small agent, and a batch of noise."""
    _, agent, buffer, rng = tiny_agent("sac_ae", flags)
    agent.updates = updates
    return agent, agent.sample(buffer, rng)


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_parameter_counts_are_the_published_ones(monkeypatch):
    """Code: encoder.py, decoder.py, sac_ae.py; the actor's without the convs that it shares."""
    monkeypatch.setattr(script, "weight_init", lambda module: None)  # it takes seconds
    rows = [(6, 4_208_504, 3_074_274), (2, 4_200_312, 3_066_074), (1, 4_198_264, 3_064_024)]
    for action_dim, critic, actor in rows:
        agent = script.Agent(script.Args(device="cpu"), script.EnvSpec((3, 84, 84), action_dim, 17))
        assert count(agent.encoder.convs) == 30_368 and count(agent.encoder.head) == 1_960_150
        assert count(agent.encoder, agent.critic) == critic
        assert count(agent.actor) == actor and count(agent.decoder) == 2_029_545


def test_convs_have_the_published_sizes_and_the_decoder_ends_at_the_images():
    """Code: OUT_DIM, 35 for 84 pixels; deconvs mirror the convs, with output padding."""
    assert script.conv_sizes(84, (2, 1, 1, 1)) == [84, 41, 39, 37, 35]
    for size in range(15, 22):
        for strides in ((2, 2), (2, 1, 2), (3, 2)):
            args = tiny_args(script, conv_strides=strides)
            obs = torch.rand(2, 9, size, size)
            z = script.Encoder(obs.shape[1:], args, stochastic=False)(obs)
            assert z.shape == (2, 50) and z.abs().max() < 1
            assert script.Decoder(obs.shape[1:], 50, args)(z).shape == obs.shape


def test_weights_start_orthogonal_and_convs_delta_orthogonal():
    """Code: weight_init; of a conv only the centre tap, with gain sqrt 2."""
    agent, _ = make_agent()
    layers = [m for m in agent.modules() if hasattr(m, "weight") and m.weight.ndim > 1]
    assert len(layers) == 2 * 3 + 3 + 4 + 2 * 6  # encoders, decoder, actor, Qs and their targets
    for layer in layers:
        weight, square = layer.weight.detach(), 1.0
        if weight.ndim == 4:
            weight, square = weight[:, :, 1, 1], 2.0
            assert layer.weight.count_nonzero() == weight.count_nonzero()
        short = weight if weight.shape[0] <= weight.shape[1] else weight.T
        gram = square * torch.eye(len(short))
        torch.testing.assert_close(short @ short.T, gram, rtol=0, atol=1e-4)
        assert layer.bias.count_nonzero() == 0


def test_log_prob_is_the_squashed_gaussians():
    """torch.distributions, where the code's 1e-6 in the logarithm does not show."""
    assert script.bounded_log_std(torch.tensor([0.0, -99, 99])).tolist() == [-4, -10, 2]
    mu, log_std = torch.randn(2000, 6).clamp(-1, 1), torch.full((2000, 6), -1.0)
    action, log_prob = script.tanh_gaussian(mu, log_std)
    base = Independent(Normal(mu.double(), log_std.double().exp()), 1)
    exact = TransformedDistribution(base, TanhTransform()).log_prob(action.double())
    assert (log_prob[:, 0] - exact)[action.abs().amax(-1) < math.tanh(3)].abs().max() < 1e-3


def column(value):
    return torch.full((4, 1), float(value))


def test_critic_loss_and_its_target(monkeypatch):
    """[SAC+AE J(Q)] y = 1 + 0.99 (min(10, 12) + 0.1 * 2) = 11.098, or 1 where the discount is 0;
    Q1 = y + 1 and Q2 = y + 2 cost 1 + 4."""
    agent, batch = make_agent()
    obs, action = batch["obs"] / 255, batch["action"]
    monkeypatch.setattr(script, "tanh_gaussian", lambda *_: (action, column(-2)))
    agent.target_critic.forward = lambda z, a: (column(10), column(12))
    for discount, y in ((1, 11.098), (0, 1.0)):
        agent.critic.forward = lambda z, a, y=y: (column(y + 1), column(y + 2))
        loss = agent.critic_loss(obs, action, column(1), column(discount), obs)
        assert loss.item() == pytest.approx(5, abs=1e-4)


def test_actor_and_alpha_loss(monkeypatch):
    """[SAC+AE J(pi)] mean(0.1 log pi - min Q) with log pi = -2 and Q = 5, 3 is -3.2.
    [SAC+AE J(alpha)] 0.1 (2 + A) = 0.4 is its own gradient in log alpha."""
    agent, batch = make_agent()
    monkeypatch.setattr(script, "tanh_gaussian", lambda *_: (batch["action"], column(-2)))
    agent.critic.forward = lambda z, a: (column(5), column(3))
    loss, log_prob = agent.actor_loss(agent.encoder.convs(batch["obs"] / 255))
    assert loss.item() == pytest.approx(-3.2) and torch.equal(log_prob, column(-2))
    loss = agent.alpha_loss(log_prob)
    loss.backward()
    assert loss.item() == agent.log_alpha.grad.item() == pytest.approx(0.4)


def test_reconstruction_loss_and_its_target():
    """[SAC+AE J(RAE)] The target has 32 grey levels and noise of one level, which costs
    1 / (12 * 32^2); an error of one level costs 1 / 32^2; 0.5 |z|^2 is 25 for 50 ones."""
    agent, _ = make_agent("--latent-weight 1e-3")
    images = torch.arange(256, dtype=torch.uint8).expand(500, 9, 256)
    target = agent.image_target(images)
    level = (images // 8) / 32 - 0.5
    assert target.min() >= -0.5 and target.max() < 0.5
    assert torch.equal(((target + 0.5) * 32).floor() / 32 - 0.5, level)
    agent.encoder.head.with_kl = lambda h: (torch.ones(500, 50), 0.0)
    agent.decoder.forward = lambda z: level + 1 / 64 + 1 / 32
    loss = agent.reconstruction_loss(None, images)
    assert loss.item() == pytest.approx(25e-3 + 1 / (12 * 32**2) + 1 / 32**2, rel=1e-3)


def test_the_vaes_kl_and_noise():
    """torch.distributions' KL to N(0, I), summed over z; z is a sample of q(z | o)."""
    head = make_agent("--reconstruction vae")[0].encoder.head
    h = torch.randn(3000, head.fc.in_features)
    q = Normal(torch.tanh(head.norm(head.fc(h))), script.bounded_log_std(head.log_std(h)).exp())
    z, kl = head.with_kl(h)
    torch.testing.assert_close(kl, kl_divergence(q, Normal(0.0, 1.0)).sum(-1).mean())
    standard = (z - q.mean) / q.stddev
    assert standard.mean().abs() < 0.02 and standard.std().item() == pytest.approx(1, rel=0.02)


PARTS = ["encoder.convs", "encoder.head", "actor.head", "actor.trunk", "critic", "decoder",
         "log_alpha", "target_encoder", "target_critic"]  # fmt: skip
VARIANTS = {
    "default": "",
    "vae": "--reconstruction vae",
    "freeze": "--freeze-encoder",
    "actor": "--actor-trains-encoder",
}


@pytest.mark.parametrize("loss", TRAINS["sac_ae"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_who_trains_what(loss, variant):
    """The README's table. Nothing is detached here: the optimizers alone decide what moves."""
    expected = TRAINS["sac_ae"][loss]
    if (variant, loss) == ("freeze", "critic"):
        expected = {"critic"}
    if (variant, loss) == ("actor", "actor"):
        expected = expected | {"encoder.convs"}
    agent, batch = make_agent(VARIANTS[variant])
    obs, columns = batch["obs"] / 255, [batch[key] for key in ("action", "reward", "discount")]
    h = agent.encoder.convs(obs)
    losses = {
        "critic": lambda: agent.critic_loss(obs, *columns, batch["next_obs"] / 255),
        "actor": lambda: agent.actor_loss(h)[0],
        "alpha": lambda: agent.alpha_loss(agent.actor_loss(h)[1]),
        "reconstruction": lambda: agent.reconstruction_loss(h, batch["obs"]),
    }
    names = ("encoder", "decoder") if loss == "reconstruction" else (loss,)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    script.minimize(losses[loss](), *(agent.optimizers[name] for name in names))
    moved = {k for k, value in agent.state_dict().items() if not torch.equal(value, before[k])}
    assert {part for part in PARTS if any(k.startswith(part) for k in moved)} == expected


def test_minimize_leaves_other_gradients_alone_and_soft_update_is_polyaks_rule():
    a, b = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    script.minimize((a * b).sum(), torch.optim.SGD([a], 0.5))
    assert a.item() == 0.5 and b.grad is None
    net, target = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.1 * net.weight + 0.9 * target.weight
    script.soft_update(net, target, 0.1)
    torch.testing.assert_close(target.weight, expected)


def test_optimizers_are_the_published_ones():
    """Code: train.py. The decoder's decay is Adam's, which adds it to the gradient: at a gradient
    of zero and a weight of 0.1, g = 1e-8 and the first step is lr g / (g + 1e-8) = lr / 2."""
    agent, _ = make_agent()
    for name, optimizer in agent.optimizers.items():
        g = optimizer.param_groups[0]
        assert g["lr"] == (1e-4 if name == "alpha" else 1e-3) and g["eps"] == 1e-8
        assert g["betas"] == ((0.5 if name == "alpha" else 0.9), 0.999)
        assert g["weight_decay"] == (1e-7 if name == "decoder" else 0)
    for p in agent.decoder.parameters():
        p.data.fill_(0.1)
        p.grad = torch.zeros_like(p)
    agent.optimizers["decoder"].step()
    for p in agent.decoder.parameters():
        assert (p - 0.1).mean().item() == pytest.approx(-1e-3 / 2, rel=5e-3)


def test_cadence_is_the_authors():
    """Code: train.py makes the first 1000 updates at step 1000, and update u >= 1000 at step
    u + 1; actor and targets move where step % 2 == 0, the decoder where step % 10 == 0."""
    agent, _ = make_agent("--pretrain-updates 1000 --decoder-every-updates 10")
    for updates in (0, 1, 998, 999, 1000, 1001, 1002, 1008, 1009, 5000):
        agent.updates = updates
        step = 1000 if updates < 1000 else updates + 1
        assert agent.cadence() == (step % 2 == 0, step % 10 == 0, step % 2 == 0)


@pytest.mark.parametrize("updates", [10, 11])
def test_update_is_the_five_losses_one_after_the_other(updates):
    """The code's order. Here each loss makes a pass of its own; update() shares one (D2)."""
    ours, batch = make_agent(updates=updates)
    plain, _ = make_agent(updates=updates)
    torch.manual_seed(5)
    metrics = ours.update(batch)
    assert ("loss/actor" in metrics) == (updates == 11)  # the second after a burst of 10

    torch.manual_seed(5)
    opt, columns = plain.optimizers, [batch[name] for name in ("action", "reward", "discount")]
    obs, next_obs = batch["obs"] / 255, batch["next_obs"] / 255
    script.minimize(plain.critic_loss(obs, *columns, next_obs), opt["critic"])
    if updates == 11:
        loss, log_prob = plain.actor_loss(plain.encoder.convs(obs).detach())
        script.minimize(loss, opt["actor"])
        script.minimize(plain.alpha_loss(log_prob), opt["alpha"])
        script.soft_update(plain.critic, plain.target_critic, 0.01)
        script.soft_update(plain.encoder, plain.target_encoder, 0.05)
    loss = plain.reconstruction_loss(plain.encoder.convs(obs), batch["obs"])
    script.minimize(loss, opt["encoder"], opt["decoder"])
    for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


STATE = "--obs state --reconstruction none --frame-stack 1"


@pytest.mark.parametrize("flags", [*VARIANTS.values(), "--reconstruction none", STATE])
def test_every_variant_updates(flags):
    """From states it is plain SAC: there is no encoder."""
    agent, batch = make_agent(flags)
    metrics = agent.update(batch)
    assert all(v.isfinite() and v.ndim == 0 and not v.requires_grad for v in metrics.values())
    assert ("loss/reconstruction" in metrics) == ("none" not in flags)
    assert (count(agent.encoder) == 0) == (flags == STATE)


def test_acting_stacks_three_images_and_is_deterministic_without_exploration():
    """Before an episode's first image the stack repeats it; the newest image comes last."""
    agent, _ = make_agent()
    step, carry = noise_step(script, agent.spec, np.random.default_rng(0), True), None
    for i in range(4):
        step = step._replace(obs=np.full((3, 24, 24), i, np.uint8))
        action, carry = agent.act(step, carry, explore=False)
        assert carry[0, ::3, 0, 0].tolist() == [max(0, i - 2), max(0, i - 1), i]
    mu, _ = agent.actor(agent.encoder.convs(carry / 255))
    torch.testing.assert_close(action, torch.tanh(mu)[0])
    assert not torch.equal(agent.act(step, carry, explore=True)[0], action)
