"""SAC+AE's losses, gradients and cadence, against closed forms, torch.distributions and published
numbers. "Code" is https://github.com/denisyarats/pytorch_sac_ae."""

import numpy as np
import pytest
import torch
from conftest import TRAINS, noise_step, tiny_agent, tiny_args
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

import sac_ae as script
import slac


def make_agent(flags="", updates=0):
    """A small agent, and a batch of noise."""
    _, agent, buffer, rng = tiny_agent("sac_ae", flags)
    agent.updates = updates
    return agent, agent.sample(buffer, rng)


@pytest.mark.deep
def test_networks_have_the_published_sizes():
    """Code: encoder.py, decoder.py, sac_ae.py; the actor's without the convs that it shares. The
    decoder ends at the images whatever their size is."""
    agent = script.Agent(script.Args(device="cpu"), script.EnvSpec((3, 84, 84), 6, 17))
    parts = [agent.encoder.convs, agent.encoder.head, agent.critic, agent.actor, agent.decoder]
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counts == [30_368, 1_960_150, 2_217_986, 3_074_274, 2_029_545]
    for size in range(15, 19):
        args, obs = tiny_args(script, conv_strides=(3, 2)), torch.rand(2, 9, size, size)
        z = script.Encoder(obs.shape[1:], args, stochastic=False)(obs)
        assert script.Decoder(obs.shape[1:], 50, args)(z).shape == obs.shape


@pytest.mark.deep
def test_weights_and_optimizers_start_as_published():
    """Code: weight_init, orthogonal; of a conv only the centre tap, with gain sqrt 2; train.py."""
    agent, _ = make_agent()
    for layer in agent.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            weight, square = layer.weight.detach(), 1.0
            if weight.ndim == 4:
                weight, square = weight[:, :, 1, 1], 2.0
                assert layer.weight.count_nonzero() == weight.count_nonzero()
            short = weight if weight.shape[0] <= weight.shape[1] else weight.T
            torch.testing.assert_close(short @ short.T, square * torch.eye(len(short)))
            assert layer.bias.count_nonzero() == 0
    for name, optimizer in agent.optimizers.items():
        group = optimizer.param_groups[0]
        assert group["lr"] == (1e-4 if name == "alpha" else 1e-3) and group["eps"] == 1e-8
        assert group["betas"] == ((0.5 if name == "alpha" else 0.9), 0.999)
        assert group["weight_decay"] == (1e-7 if name == "decoder" else 0)


@pytest.mark.parametrize("module, tolerance", [(script, 1e-3), (slac, 1e-9)])
def test_log_prob_is_the_squashed_gaussians(module, tolerance):
    """torch.distributions. SAC+AE's code adds 1e-6 in the logarithm, and bounds log sigma."""
    assert script.bounded_log_std(torch.tensor([0.0, -99, 99])).tolist() == [-4, -10, 2]
    mu, log_std = torch.randn(2000, 6).double(), torch.full((2000, 6), -1.0).double()
    action, log_prob = module.tanh_gaussian(mu, log_std)
    base = Independent(Normal(mu, log_std.exp()), 1)
    exact = TransformedDistribution(base, TanhTransform()).log_prob(action)
    inside = action.abs().amax(-1) < np.tanh(3)
    assert (log_prob[:, 0] - exact)[inside].abs().max() < tolerance
    far = module.tanh_gaussian(torch.full((1, 1), 15.0), torch.full((1, 1), -20.0))[1]
    assert inside.sum() > 500 and far.isfinite()


def test_critic_actor_and_alpha_loss(monkeypatch):
    """[SAC+AE J(Q)] y = 1 + 0.99 (min(10, 12) + 0.1 * 2) = 11.098, or 1 where the discount is 0;
    Q1 = y + 1 and Q2 = y + 2 cost 1 + 4. [SAC+AE J(pi)] mean(0.1 log pi - min Q) with log pi = -2
    and Q = 5, 3 is -3.2. [SAC+AE J(alpha)] 0.1 (2 + A) = 0.4 is its own gradient in log alpha."""
    agent, batch = make_agent()
    obs, action, one = batch["obs"] / 255, batch["action"], torch.ones(4, 1)
    monkeypatch.setattr(script, "tanh_gaussian", lambda *_: (action, -2 * one))
    agent.target_critic.forward = lambda z, a: (10 * one, 12 * one)
    for discount, y in ((1, 11.098), (0, 1.0)):
        agent.critic.forward = lambda z, a, y=y: (y + one, y + 2 * one)
        loss = agent.critic_loss(obs, action, one, discount * one, obs)
        assert loss.item() == pytest.approx(5, abs=1e-4)
    agent.critic.forward = lambda z, a: (5 * one, 3 * one)
    loss, log_prob = agent.actor_loss(agent.encoder.convs(obs))
    assert loss.item() == pytest.approx(-3.2) and torch.equal(log_prob, -2 * one)
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
    assert torch.equal(((target + 0.5) * 32).floor() / 32 - 0.5, level)
    agent.encoder.head.with_kl = lambda h: (torch.ones(500, 50), 0.0)
    agent.decoder.forward = lambda z: level + 1 / 64 + 1 / 32
    loss = agent.reconstruction_loss(None, images)
    assert loss.item() == pytest.approx(25e-3 + 1 / (12 * 32**2) + 1 / 32**2, rel=1e-3)


@pytest.mark.deep
def test_the_vaes_kl_and_noise():
    """torch.distributions' KL to N(0, I), summed over z; z is a sample of q(z | o)."""
    head = make_agent("--reconstruction vae")[0].encoder.head
    h = torch.randn(3000, head.fc.in_features)
    q = Normal(torch.tanh(head.norm(head.fc(h))), script.bounded_log_std(head.log_std(h)).exp())
    z, kl = head.with_kl(h)
    torch.testing.assert_close(kl, kl_divergence(q, Normal(0.0, 1.0)).sum(-1).mean())
    standard = (z - q.mean) / q.stddev
    assert standard.mean().abs() < 0.02 and standard.std().item() == pytest.approx(1, rel=0.02)


def test_cadence_is_the_authors():
    """Code: train.py makes the first 1000 updates at step 1000, and update u >= 1000 at step
    u + 1; actor and targets move where step % 2 == 0, the decoder where step % 10 == 0."""
    agent, _ = make_agent("--pretrain-updates 1000 --decoder-every-updates 10")
    for agent.updates in (0, 1, 998, 999, 1000, 1001, 1002, 1008, 1009, 5000):
        step = 1000 if agent.updates < 1000 else agent.updates + 1
        assert agent.cadence() == (step % 2 == 0, step % 10 == 0, step % 2 == 0)


@pytest.mark.parametrize("updates", [10, 11])
@pytest.mark.parametrize(
    "flags",
    ["", "--reconstruction vae", "--reconstruction none", "--freeze-encoder",
     "--actor-trains-encoder", "--obs state --reconstruction none --frame-stack 1"],
)  # fmt: skip
def test_update_is_the_five_losses_one_after_the_other(flags, updates):
    """The code's order, and who trains what. Actor, alpha and targets wait at update 10. Here each
    loss has a pass of its own (D2) and nothing is detached: optimizers alone decide what moves."""
    (ours, batch), (plain, _) = make_agent(flags, updates), make_agent(flags, updates)
    torch.manual_seed(5)
    ours.update(batch)
    trains = dict(TRAINS["sac_ae"])
    if flags == "--freeze-encoder":
        trains["critic"] = {"critic"}
    if flags == "--actor-trains-encoder":
        trains["actor"] = trains["actor"] | {"encoder.convs"}

    def step(name, loss, *optimizers):
        before = {key: value.clone() for key, value in plain.state_dict().items()}
        script.minimize(loss, *(plain.optimizers[o] for o in optimizers))
        after = plain.state_dict()
        moved = {key for key in after if not torch.equal(after[key], before[key])}
        assert moved == {key for key in after if key.startswith(tuple(trains[name]))}

    torch.manual_seed(5)
    columns = [batch[name] for name in ("action", "reward", "discount")]
    scale = 1 if "state" in flags else 255
    obs, next_obs = batch["obs"] / scale, batch["next_obs"] / scale
    step("critic", plain.critic_loss(obs, *columns, next_obs), "critic")
    if updates == 11:
        loss, log_prob = plain.actor_loss(plain.encoder.convs(obs))
        step("actor", loss, "actor")
        step("alpha", plain.alpha_loss(log_prob), "alpha")
        for name, tau in (("critic", 0.01), ("encoder", 0.05)):
            net, target = plain.get_submodule(name), plain.get_submodule(f"target_{name}")
            for p, t in zip(net.parameters(), target.parameters(), strict=True):
                t.data = tau * p.data + (1 - tau) * t.data
    if "none" not in flags:
        loss = plain.reconstruction_loss(plain.encoder.convs(obs), batch["obs"])
        step("reconstruction", loss, "encoder", "decoder")
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-7)


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
