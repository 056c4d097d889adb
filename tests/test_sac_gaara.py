"""What sac_gaara.py adds to sac_ae.py: crops, the contrastive loss and its gradients, annealing;
against brute force, closed forms and sac_ae.py itself. "Code" is GAARA's, sac_cae.py of
https://github.com/Otsuts/SAC-GAARA."""

import math

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


# ---- crops ----


def test_a_crop_is_one_window_for_all_channels():
    """The pixels are their own indices, so that the window can be read off every channel. All
    offsets from 0 to 16 occur (D8); the centre is 8 to 91 of 100."""
    index = torch.arange(100 * 100).reshape(1, 1, 100, 100).expand(600, 9, 100, 100)
    out = script.crop(index, 84, np.random.default_rng(0))
    first = out[:, :, 0, 0]
    assert out.shape == (600, 9, 84, 84) and (first == first[:, :1]).all()
    top, left = first[:, 0] // 100, first[:, 0] % 100
    assert set(top.tolist()) == set(left.tolist()) == set(range(17))
    for i in (0, 7, 599):
        window = index[i, :, top[i] : top[i] + 84, left[i] : left[i] + 84]
        assert torch.equal(out[i], window)
    assert torch.equal(script.crop(index, 84), index[..., 8:92, 8:92])
    images = torch.randint(0, 256, (2, 9, 84, 84), dtype=torch.uint8)
    whole = script.crop(images, 84, np.random.default_rng(0))
    assert whole.dtype == torch.uint8 and torch.equal(whole, images)


@pytest.mark.deep
def test_random_crops_take_all_offsets_alike():
    """17 x 17 offsets: each axis uniform, both independent (chi-squared)."""
    index = torch.arange(20 * 20).reshape(1, 1, 20, 20).expand(20_000, 1, 20, 20)
    corner = script.crop(index, 4, np.random.default_rng(1))[:, 0, 0, 0].numpy()
    table = np.zeros((17, 17), int)
    np.add.at(table, (corner // 20, corner % 20), 1)
    assert scipy.stats.chisquare(table.ravel()).pvalue > 1e-3
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("obs_crop", ["centre", "random"])
def test_samples_are_cropped_as_the_release_says(obs_crop):
    """Code: the last release crops obs and next_obs at the centre and the positive at random; the
    first ones crop all three at random, independently."""
    _, agent, buffer, _ = tiny_agent("sac_gaara", f"--obs-crop {obs_crop} --batch-size 16")
    whole = sac_ae.Agent.sample(agent, buffer, np.random.default_rng(3))
    batch = agent.sample(buffer, np.random.default_rng(3))
    places = {}
    for name in ("obs", "next_obs", "positive"):
        places[name] = []
        for cropped, image in zip(batch[name], whole[name.replace("positive", "obs")], strict=True):
            windows = image.unfold(1, 20, 1).unfold(2, 20, 1).permute(1, 2, 0, 3, 4)
            places[name] += (windows == cropped).flatten(2).all(-1).nonzero().tolist()
    assert all(len(found) == 16 for found in places.values())
    centred = {name for name, found in places.items() if found == [[2, 2]] * 16}
    assert centred == ({"obs", "next_obs"} if obs_crop == "centre" else set())
    different = len({str(found) for found in places.values()})
    assert different == (2 if obs_crop == "centre" else 3)


def test_acting_sees_the_centre():
    agent, _ = make_agent()
    step = noise_step(script, agent.spec, np.random.default_rng(0), True)
    action, _ = agent.act(step, None, explore=False)
    centre = torch.as_tensor(step.obs)[:, 2:22, 2:22].repeat(3, 1, 1)[None]
    mu, _ = agent.actor(agent.encoder.convs(centre / 255))
    torch.testing.assert_close(action, torch.tanh(mu)[0])


@pytest.mark.parametrize("positive_encoder, strangers", [("target", 0), ("online", 1)])
def test_the_online_encoder_never_sees_a_random_crop(positive_encoder, strangers):
    """Code: positives go through the target encoder; so do they with --positive-encoder target."""
    agent, batch = make_agent(f"--positive-encoder {positive_encoder}")
    seen = []
    agent.encoder.convs.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    agent.update(batch)
    centred = [batch["obs"] / 255, batch["next_obs"] / 255]
    assert sum(not any(torch.equal(x, c) for c in centred) for x in seen) == strangers


# ---- the contrastive loss ----


def test_infonce_is_the_brute_force_one():
    """[GAARA (2), (6)] minus the mean log share of each anchor's own positive; W is not symmetric,
    and anchors come first (D10)."""

    def brute_force(z_a, W, z_p):
        loss = 0.0
        for i in range(len(z_a)):
            scores = [(z_a[i][:, None] * W * z_p[j]).sum().item() for j in range(len(z_p))]
            loss -= math.log(math.exp(scores[i]) / sum(map(math.exp, scores))) / len(z_a)
        return loss

    agent, _ = make_agent("--latent-dim 5")
    z_a, z_p = torch.randn(2, 7, 5)
    W = agent.similarity.detach()
    loss = agent.contrastive_loss(z_a, z_p).item()
    assert loss == pytest.approx(brute_force(z_a, W, z_p), rel=1e-5)
    assert abs(loss - brute_force(z_p, W, z_a)) > 1e-2


def test_infonce_has_its_closed_forms():
    """ln B where nothing tells the positives apart; 0 where everything does. The gradient of W is
    (1 / B) z_a^T (softmax - I) z_p."""
    agent, _ = make_agent()
    z_a, z_p = torch.rand(2, 16, 50)
    agent.contrastive_loss(z_a, z_p).backward()
    softmax = torch.softmax(z_a @ agent.similarity.detach() @ z_p.T, 1)
    gradient = z_a.T @ (softmax - torch.eye(16)) @ z_p / 16
    torch.testing.assert_close(agent.similarity.grad, gradient, rtol=1e-4, atol=1e-6)
    for batch, value in ((128, 4.8520), (512, 6.2383)):
        loss = agent.contrastive_loss(torch.rand(batch, 50), torch.ones(batch, 50))
        assert loss.item() == pytest.approx(value, abs=1e-4)
    agent.similarity.data = 1e4 * torch.eye(50)
    loss = agent.contrastive_loss(torch.eye(50), torch.eye(50))
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_discriminator_loss():
    """[GAARA (11)] mean squared difference of what the decoder makes of both crops."""
    agent, _ = make_agent("--contrast discriminator")
    z_a, z_p = torch.rand(2, 4, 50)
    expected = (agent.decoder(z_a) - agent.decoder(z_p)).square().mean()
    torch.testing.assert_close(agent.contrastive_loss(z_a, z_p), expected)


def test_the_default_is_the_last_release():
    """Code: train.py and sac_cae.py; W is uniform in [0, 1) and has the encoder's Adam."""
    wanted = {
        "image_size": 100, "crop_size": 84, "replay_capacity": 700_000, "action_repeat": 4,
        "obs_crop": "centre", "contrast": "infonce", "contrast_step": "separate", "anneal": "loss",
        "positive_encoder": "target", "contrast_weight": 1.0, "contrast_floor": 0.5,
        "contrast_decay": 1e-6, "train_similarity": True, "latent_tanh": True,
    }  # fmt: skip
    assert {name: getattr(script.Args(), name) for name in wanted} == wanted
    agent, _ = make_agent("--encoder-lr 3e-4")
    W = agent.similarity.detach()
    assert W.shape == (50, 50) and W.min() >= 0 and W.max() < 1
    assert W.mean().item() == pytest.approx(0.5, abs=0.03)
    group = agent.optimizers["contrastive"].param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.9, 0.999), 0)


def test_curl_has_no_tanh():
    """CURL's encoder.py: the LayerNorm is last."""
    agent, _ = make_agent("--reconstruction none --no-latent-tanh")
    z = agent.encoder(torch.rand(8, 9, 20, 20))
    assert z.abs().max() > 1 and z.mean(1).abs().max() < 1e-5
    assert agent.actor.head(torch.rand(8, agent.encoder.head.fc.in_features)).abs().max() > 1


# ---- who trains what ----

ENCODER = {"encoder.convs", "encoder.head"}


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", TRAINS["sac_gaara"]["contrastive"]),
        ("--no-train-similarity", ENCODER),
        ("--contrast discriminator", ENCODER),
        ("--positive-encoder online", ENCODER | {"similarity"}),
        ("--contrast-step joint", ENCODER | {"similarity", "decoder"}),
        ("--contrast-step joint --no-train-similarity", ENCODER | {"decoder"}),
    ],
)
def test_who_the_contrastive_step_trains(flags, expected):
    """The README's table; a joint step has the reconstruction's optimizers (release 1)."""
    agent, batch = make_agent(flags)
    names = ["contrastive"] if "contrastive" in agent.optimizers else ["encoder", "decoder"]
    z_a = agent.encoder(batch["obs"] / 255)
    loss = agent.contrastive_loss(z_a, agent.encode_positive(batch["positive"]))
    loss = loss + agent.decoder(z_a).square().mean() * (len(names) == 2)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    script.minimize(loss, *(agent.optimizers[name] for name in names))
    moved = {k for k, value in agent.state_dict().items() if not torch.equal(value, before[k])}
    parts = {".".join(k.split(".")[: 1 + k.startswith("encoder")]) for k in moved}
    assert parts == expected


# ---- annealing ----


def test_the_weight_is_the_authors_subtraction():
    """Code: after each update, lambda -= 1e-6 while it is above 0.5; here at most one step less."""
    agent, _ = make_agent()
    for updates, weight in ((0, 1.0), (360_000, 0.64), (500_000, 0.5), (900_000, 0.5)):
        agent.updates = updates
        assert agent.annealed_weight() == pytest.approx(weight, abs=1e-12)
    agent, _ = make_agent("--contrast-decay 1e-4")
    theirs = 1.0
    for agent.updates in range(6000):
        assert 0 <= agent.annealed_weight() - theirs + 1e-9 <= (theirs < 0.5) * 1e-4 + 2e-9
        theirs -= 1e-4 if theirs > 0.5 else 0
    agent, _ = make_agent("--contrast-weight 2e-8")  # below the floor from the start: stays
    assert agent.annealed_weight() == 2e-8


def test_annealing_scales_the_loss_or_the_learning_rate():
    """[GAARA (9)], and --anneal lr (D9)."""
    flags = "--contrast-decay 0.05 --contrast-floor 0.6 --encoder-lr 3e-4 --anneal lr"
    for updates, weight in ((0, 1.0), (3, 0.85), (100, 0.6)):
        agent, batch = make_agent(flags, updates)
        metrics = agent.update(batch)
        assert metrics["stat/contrast_weight"].item() == pytest.approx(weight)
        rate = agent.optimizers["contrastive"].param_groups[0]["lr"]
        assert float(rate) == pytest.approx(weight * 3e-4)


@pytest.mark.deep
def test_the_published_annealing_changes_nothing():
    """D9: with an Adam of its own the weight cancels, but for Adam's epsilon. In a joint loss it
    counts where both gradients are of one size, near 1e-3; at 1 the contrastive one is larger."""

    def step(weight, joint=False):
        agent, batch = make_agent("--contrast-step joint" if joint else "")
        h = agent.encoder.convs(batch["obs"] / 255)
        z_p = agent.encode_positive(batch["positive"])
        loss = weight * agent.contrastive_loss(agent.encoder.head(h), z_p)
        if joint:
            loss = loss + agent.reconstruction_loss(h, batch["obs"])
        optimizer = agent.optimizers["encoder" if joint else "contrastive"]
        before = torch.cat([p.detach().flatten() for p in agent.encoder.parameters()])
        script.minimize(loss, optimizer)
        return torch.cat([p.detach().flatten() for p in agent.encoder.parameters()]) - before

    def relative(a, b):
        return ((a - b).norm() / a.norm()).item()

    assert relative(step(1.0), step(0.5)) < 0.03
    large = relative(step(1.0, joint=True), step(0.5, joint=True))
    small = relative(step(1e-3, joint=True), step(5e-4, joint=True))
    assert small > 0.1 and large < small / 3


# ---- update ----


def test_without_contrast_it_is_sac_ae():
    """The same weights, batches and noise: the same parameters, bit for bit, after five updates."""
    agents = []
    for name, flags in (("sac_ae", ""), ("sac_gaara", "--contrast none --crop-size 24")):
        _, agent, buffer, rng = tiny_agent(name, flags)
        torch.manual_seed(7)
        for agent.updates in range(8, 13):  # across the end of the burst
            agent.update(agent.sample(buffer, rng))
        agents.append(agent.state_dict())
    one, two = agents
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--contrast-step joint",
        "--decoder-every-updates 100",
        "--reconstruction none --obs-crop random",
        "--contrast discriminator",
        "--positive-encoder online",
    ],
)
def test_update_is_sac_aes_and_then_the_contrastive_step(flags):
    """Code: the contrastive step comes last, on a pass of its own, and does not wait for the
    decoder's (D12); the joint one [GAARA (10)] takes the place of the reconstruction's."""
    flags += " --contrast-decay 0.01"  # 0.89 at update 11
    (ours, batch), (plain, _) = make_agent(flags), make_agent(flags)
    torch.manual_seed(5)
    metrics = ours.update(batch)
    assert "loss/contrastive" in metrics

    torch.manual_seed(5)
    joint, due = plain.args.contrast_step == "joint", plain.cadence()
    plain.cadence = lambda: due._replace(decoder=due.decoder and not joint)
    sac_ae.Agent.update(plain, batch)
    h = plain.encoder.convs(batch["obs"] / 255)
    reconstruction = plain.reconstruction_loss(h, batch["obs"]) if joint else 0.0
    positive = plain.encode_positive(batch["positive"])
    loss = reconstruction + 0.89 * plain.contrastive_loss(plain.encoder.head(h), positive)
    names = ("encoder", "decoder") if joint else ("contrastive",)
    script.minimize(loss, *(plain.optimizers[name] for name in names))
    for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)
