"""What sac_gaara.py adds to sac_ae.py, against brute force, closed forms and sac_ae.py itself.
"Code" is GAARA's, sac_cae.py of https://github.com/Otsuts/SAC-GAARA."""

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import TRAINS, noise_step, tiny_agent

import sac_ae
import sac_gaara as script


def make_agent(flags="", updates=11):
    """A small agent (24 pixels, crops of 20) whose next update moves everything, and a batch."""
    _, agent, buffer, rng = tiny_agent("sac_gaara", flags)
    agent.updates = updates
    return agent, agent.sample(buffer, rng)


def test_a_crop_is_one_window_for_all_channels_and_all_windows_are_equally_likely():
    """Pixels are their own indices, so that a crop's corner tells its place: 0 to 16 twice (D8)."""
    index = torch.arange(20 * 20).reshape(1, 1, 20, 20).expand(20_000, 3, 20, 20)
    out = script.crop(index, 4, np.random.default_rng(1))
    corner = out[:, :1, :1, :1]
    assert torch.equal(out, corner + index[:, :, :4, :4])
    top, left = corner.flatten() // 20, corner.flatten() % 20
    assert scipy.stats.chisquare(np.bincount(17 * top + left, minlength=17 * 17)).pvalue > 1e-3
    assert torch.equal(script.crop(index, 4), index[:, :, 8:12, 8:12])  # the centre


@pytest.mark.parametrize("obs_crop", ["centre", "random"])
def test_samples_are_cropped_as_the_release_says(obs_crop):
    """Code: the last release crops obs and next_obs at the centre and the positive at random; the
    first ones crop all three at random, independently."""
    _, agent, buffer, _ = tiny_agent("sac_gaara", f"--obs-crop {obs_crop}")
    batch = agent.sample(buffer, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    whole = sac_ae.Agent.sample(agent, buffer, rng)
    assert torch.equal(batch["positive"], script.crop(whole["obs"], 20, rng))
    for name in ("obs", "next_obs"):
        expected = script.crop(whole[name], 20, rng if obs_crop == "random" else None)
        assert torch.equal(batch[name], expected)


def test_infonce_is_the_brute_force_one():
    """[GAARA (2), (6)] minus the mean log share of each anchor's own positive; W is not symmetric,
    and anchors come first (D10)."""
    agent, _ = make_agent("--latent-dim 5")
    z_a, z_p = torch.randn(2, 7, 5)
    expected = 0.0
    for i in range(7):
        scores = torch.stack([z_a[i] @ agent.similarity @ z_p[j] for j in range(7)])
        expected -= torch.log_softmax(scores, 0)[i] / 7
    torch.testing.assert_close(agent.contrastive_loss(z_a, z_p), expected)


@pytest.mark.deep
def test_discriminator_curls_encoder_and_acting_at_the_centre():
    """[GAARA (11)] The mean squared difference of what the decoder makes of both crops. In CURL's
    encoder.py the LayerNorm is last. Acting sees the centre."""
    agent, _ = make_agent("--contrast discriminator --no-latent-tanh")
    z_a, z_p = torch.rand(2, 4, 50)
    expected = (agent.decoder(z_a) - agent.decoder(z_p)).square().mean()
    torch.testing.assert_close(agent.contrastive_loss(z_a, z_p), expected)
    z = agent.encoder(torch.rand(8, 9, 20, 20))
    assert z.abs().max() > 1 and z.mean(1).abs().max() < 1e-5
    assert agent.actor.head(torch.rand(8, agent.encoder.head.fc.in_features)).abs().max() > 1
    step = noise_step(script, agent.spec, np.random.default_rng(0), True)
    centre = torch.as_tensor(step.obs)[:, 2:22, 2:22].repeat(3, 1, 1)[None]
    mu, _ = agent.actor(agent.encoder.convs(centre / 255))
    torch.testing.assert_close(agent.act(step, None)[0], torch.tanh(mu)[0])


@pytest.mark.deep
def test_similarity_starts_uniform_and_the_weight_is_the_authors_subtraction():
    """Code: W is in [0, 1); after each update, lambda -= 1e-6 while it is above 0.5. --anneal lr
    gives this weight to the learning rate (D9)."""
    agent, _ = make_agent()
    assert scipy.stats.kstest(agent.similarity.detach().flatten(), "uniform").pvalue > 1e-3
    for agent.updates, weight in ((0, 1.0), (360_000, 0.64), (500_000, 0.5), (900_000, 0.5)):
        assert agent.annealed_weight() == pytest.approx(weight, abs=1e-12)
    agent, _ = make_agent("--contrast-weight 2e-8", 900_000)  # below the floor from the start
    assert agent.annealed_weight() == 2e-8
    agent, batch = make_agent("--anneal lr --contrast-decay 0.05 --encoder-lr 3e-4", 3)
    agent.update(batch)
    rate = agent.optimizers["contrastive"].param_groups[0]["lr"]
    assert float(rate) == pytest.approx(0.85 * 3e-4)


@pytest.mark.deep
def test_the_published_annealing_changes_nothing():
    """D9: with an Adam of its own the weight cancels, but for Adam's epsilon. In a joint loss it
    counts where both gradients are of one size, near 1e-3; at 1 the contrastive one is larger."""

    def change_if_halved(weight, joint=False):
        steps = []
        for factor in (weight, weight / 2):
            agent, batch = make_agent("--contrast-step joint" if joint else "")
            h = agent.encoder.convs(batch["obs"] / 255)
            z_p = agent.encode_positive(batch["positive"])
            loss = factor * agent.contrastive_loss(agent.encoder.head(h), z_p)
            if joint:
                loss = loss + agent.reconstruction_loss(h, batch["obs"])
            before = torch.cat([p.detach().flatten() for p in agent.encoder.parameters()])
            script.minimize(loss, agent.optimizers["encoder" if joint else "contrastive"])
            after = torch.cat([p.detach().flatten() for p in agent.encoder.parameters()])
            steps.append(after - before)
        return (steps[0] - steps[1]).norm() / steps[0].norm()

    assert change_if_halved(1.0) < 0.03
    large, small = change_if_halved(1.0, joint=True), change_if_halved(1e-3, joint=True)
    assert small > 0.1 and large < small / 3


def test_without_contrast_it_is_sac_ae():
    """The same weights, batches and noise: the same parameters, bit for bit, after five updates."""
    states = []
    for name, flags in (("sac_ae", ""), ("sac_gaara", "--contrast none --crop-size 24")):
        _, agent, buffer, rng = tiny_agent(name, flags)
        torch.manual_seed(7)
        for agent.updates in range(8, 13):  # across the end of the burst
            agent.update(agent.sample(buffer, rng))
        states.append(agent.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize(
    "flags, trained",
    [
        ("", TRAINS["sac_gaara"]["contrastive"]),
        ("--no-train-similarity", {"encoder"}),
        ("--contrast discriminator --decoder-every-updates 100", {"encoder"}),
        ("--reconstruction none --positive-encoder online", {"encoder", "similarity"}),
        ("--contrast-step joint", {"encoder", "similarity", "decoder"}),
    ],
)
def test_update_is_sac_aes_and_then_the_contrastive_step(flags, trained):
    """Code: the contrastive step comes last, on a pass of its own, and does not wait for the
    decoder's (D12); the joint one [GAARA (10)] takes the place of the reconstruction's."""
    flags += " --contrast-decay 0.01"
    (ours, batch), (plain, _) = make_agent(flags), make_agent(flags)
    assert batch["weight"].item() == pytest.approx(0.89)  # at update 11
    torch.manual_seed(5)
    ours.update(batch)
    torch.manual_seed(5)
    if "joint" in flags:
        plain.args.decoder_every_updates = 100  # the joint step takes its place
    sac_ae.Agent.update(plain, batch)
    h = plain.encoder.convs(batch["obs"] / 255)
    encoder = plain.encoder if "online" in flags else plain.target_encoder
    loss = plain.contrastive_loss(plain.encoder.head(h), encoder(batch["positive"] / 255))
    loss, names = 0.89 * loss, ["contrastive"]
    if "joint" in flags:
        loss = loss + plain.reconstruction_loss(h, batch["obs"])
        names = ["encoder", "decoder"]
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    script.minimize(loss, *(plain.optimizers[name] for name in names))
    after = plain.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if name.startswith(tuple(trained))}
    torch.testing.assert_close(ours.state_dict(), after, rtol=1e-5, atol=1e-7)
