"""What sac_gaara.py adds to sac_ae.py: crops, the contrastive loss and its gradients, annealing."""

import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TRAINS, sac_steps, tiny_args
from scipy import stats

import sac_ae
import sac_gaara as script

SIZE = 24  # of the image; the networks see 20


def make_agent(seed=0, action_dim=2, obs_shape=(3, SIZE, SIZE), module=script, **changes):
    """A small agent; published sizes where `changes` say so."""
    small = {"device": "cpu", "filters": 4, "conv_strides": (2, 2), "hidden_dim": 16,
             "pretrain_updates": 0, "batch_size": 8, "image_size": obs_shape[-1]}
    if module is script:
        small["crop_size"] = 20
    torch.manual_seed(seed)
    dtype = torch.uint8 if len(obs_shape) == 3 else torch.float32
    args = module.Args(**{**small, **changes})
    return module.Agent(args, module.EnvSpec(obs_shape, dtype, action_dim))


def fill(size=SIZE, rows=60, seed=0):
    """A replay buffer with three episodes of smooth noise."""
    spec, rng = script.EnvSpec((3, size, size), torch.uint8, 2), np.random.default_rng(seed)
    buffer = script.ReplayBuffer(rows, spec, "cpu")
    for t in range(rows):
        image = rng.integers(0, 256, (3, size // 4, size // 4), dtype=np.uint8)
        image = image.repeat(4, 1).repeat(4, 2)
        action = rng.uniform(-1, 1, 2) * (t % 20 > 0)
        buffer.add(script.Step(image, None, action, rng.random(), 1.0, t % 20 == 0, t % 20 == 19))
    return buffer


def make_batch(agent, seed=0):
    return agent.sample(fill(), np.random.default_rng(seed))


def seen(obs):
    """The Step of an observation, as far as acting needs it."""
    return script.Step(obs, None, None, 0.0, 1.0, True, False)


# ---- crops ----


def test_crop_is_one_window_for_all_channels():
    """The pixels are their own indices, so that the window can be read off every channel."""
    index = torch.arange(100 * 100).reshape(1, 1, 100, 100).expand(600, 9, 100, 100)
    out = script.crop(index, 84, np.random.default_rng(0))
    assert out.shape == (600, 9, 84, 84)
    first = out[:, :, 0, 0]
    assert (first == first[:, :1]).all()
    top, left = first[:, 0] // 100, first[:, 0] % 100
    for i in (0, 7, 599):
        window = index[i, :, top[i] : top[i] + 84, left[i] : left[i] + 84]
        assert torch.equal(out[i], window)


def test_random_crops_take_all_offsets_alike():
    """17 x 17 offsets: each axis uniform, both independent (chi-squared)."""
    index = torch.arange(20 * 20).reshape(1, 1, 20, 20).expand(20_000, 1, 20, 20)
    corner = script.crop(index, 4, np.random.default_rng(1))[:, 0, 0, 0].numpy()
    table = np.zeros((17, 17), int)
    np.add.at(table, (corner // 20, corner % 20), 1)
    assert (table > 0).all()
    assert stats.chisquare(table.ravel()).pvalue > 1e-3
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_centre_crop():
    images = torch.randint(0, 256, (2, 9, 100, 100), dtype=torch.uint8)
    out = script.crop(images, 84)
    assert out.dtype == torch.uint8 and torch.equal(out, images[:, :, 8:92, 8:92])
    for rng in (None, np.random.default_rng(0)):
        assert torch.equal(script.crop(images, 100, rng), images)
        assert script.crop(images, 84, rng).dtype == torch.uint8
    states = torch.rand(5, 7)
    assert script.crop(states, 84) is states


def test_sample_crops_what_the_release_says():
    """Centre for obs and next_obs, random for the positive; the first releases: random for all."""
    buffer = fill()
    whole = buffer.transitions(np.random.default_rng(3), 8, 3)
    batch = make_agent().sample(buffer, np.random.default_rng(3))
    for key in ("obs", "next_obs"):
        assert torch.equal(batch[key], whole[key][:, :, 2:22, 2:22])
    assert batch["positive"].shape == batch["obs"].shape

    def offset(cropped, image):
        found = [(y, x) for y in range(5) for x in range(5)
                 if torch.equal(cropped, image[:, y : y + 20, x : x + 20])]
        assert found  # a window of the same stack, one for all channels
        return found[0]

    kinds = {"positive": "obs", "obs": "obs", "next_obs": "next_obs"}
    random = make_agent(obs_crop="random").sample(buffer, np.random.default_rng(3))
    offsets = {k: [offset(c, w) for c, w in zip(random[k], whole[source], strict=True)]
               for k, source in kinds.items()}
    assert len({tuple(o) for o in offsets.values()}) == 3  # drawn independently
    assert all(len(set(o)) > 3 for o in offsets.values())
    assert {k: v.shape for k, v in batch.items()} == {k: v.shape for k, v in random.items()}
    assert "positive" not in make_agent(contrast="none").sample(buffer, np.random.default_rng(3))


def test_acting_sees_the_centre():
    agent = make_agent()
    for p in agent.encoder.convs.parameters():  # at first they would only look at every 4th pixel
        torch.nn.init.normal_(p, 0, 0.3)
    image = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE), dtype=np.uint8)
    action, carry = agent.act(seen(image), None, explore=False)
    assert carry.shape == (1, 9, SIZE, SIZE)
    obs = carry[..., 2:22, 2:22].float() / 255
    expected = torch.tanh(agent.actor(agent.encoder.convs(obs))[0])[0]
    torch.testing.assert_close(action, expected)
    corner = carry[..., :20, :20].float() / 255
    assert (action - torch.tanh(agent.actor(agent.encoder.convs(corner))[0])[0]).abs().max() > 1e-3


@pytest.mark.parametrize("positive_encoder", ["target", "online"])
def test_the_online_encoder_never_sees_a_random_crop(positive_encoder):
    """Release 3: only the target encoder sees it. With online positives, the check must fail."""
    agent, seen = make_agent(positive_encoder=positive_encoder), []
    agent.encoder.convs.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    batch = make_batch(agent)
    agent.updates = 1
    agent.update(batch)
    allowed = [script.preprocess(batch[key]) for key in ("obs", "next_obs")]
    strangers = [x for x in seen if not any(torch.equal(x, a) for a in allowed)]
    assert len(strangers) == (0 if positive_encoder == "target" else 1)


# ---- the contrastive loss ----


def brute_force(z_a, W, z_p):
    """InfoNCE by loops: minus the mean log share of the own positive."""
    loss, n = 0.0, len(z_a)
    for i in range(n):
        scores = [sum(z_a[i][j] * W[j][k] * z_p[m][k] for j in range(len(W)) for k in range(len(W)))
                  for m in range(n)]
        loss -= scores[i] - max(scores) - math.log(sum(math.exp(s - max(scores)) for s in scores))
    return loss / n


def loss_of(agent, z_a, z_p):
    """contrastive_loss with these latents."""
    agent.encoder.head.forward = lambda h: z_a
    agent.target_encoder.forward = lambda obs: z_p
    return agent.contrastive_loss(z_a, torch.zeros(len(z_p), 9, 20, 20, dtype=torch.uint8))


def test_infonce_is_the_brute_force_one():
    agent, g = make_agent(latent_dim=5), torch.Generator().manual_seed(0)
    z_a, z_p = torch.randn(2, 7, 5, generator=g)
    W = agent.similarity.detach()
    loss = loss_of(agent, z_a, z_p)
    assert loss.item() == pytest.approx(brute_force(z_a.tolist(), W.tolist(), z_p.tolist()), 1e-5)
    swapped = brute_force(z_p.tolist(), W.tolist(), z_a.tolist())
    assert abs(loss.item() - swapped) > 1e-2  # W is not symmetric: the order counts
    order = torch.randperm(7, generator=g)
    assert loss_of(agent, z_a[order], z_p[order]).item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("batch, value", [(128, 4.8520), (512, 6.2383)])
def test_infonce_closed_forms(batch, value):
    """ln B where nothing tells the positives apart; 0 where everything does."""
    agent, z = make_agent(), torch.rand(batch, 50)
    same = torch.ones(batch, 50)
    assert loss_of(agent, z, same).item() == pytest.approx(value, abs=1e-4)
    agent.similarity.data.zero_()
    assert loss_of(agent, z, z).item() == pytest.approx(value, abs=1e-4)
    agent.similarity.data = 1e4 * torch.eye(50)
    assert loss_of(agent, torch.eye(50), torch.eye(50)).item() == pytest.approx(0, abs=1e-6)


def test_infonce_gradient_of_the_similarity():
    """(1 / B) z_a^T (softmax - I) z_p."""
    agent = make_agent()
    z_a, z_p = torch.rand(2, 16, 50)
    loss_of(agent, z_a, z_p).backward()
    softmax = torch.softmax(z_a @ agent.similarity.detach() @ z_p.T, 1)
    expected = z_a.T @ (softmax - torch.eye(16)) @ z_p / 16
    torch.testing.assert_close(agent.similarity.grad, expected, rtol=1e-4, atol=1e-6)


def test_discriminator_loss():
    """Mean squared difference of what the decoder makes of both crops."""
    agent = make_agent(contrast="discriminator")
    batch = make_batch(agent)
    obs, positive = script.preprocess(batch["obs"]), script.preprocess(batch["positive"])
    loss = agent.contrastive_loss(agent.encoder.convs(obs), batch["positive"])
    anchor_image = agent.decoder(agent.encoder(obs))
    positive_image = agent.decoder(agent.target_encoder(positive))
    assert loss.item() == pytest.approx(F.mse_loss(anchor_image, positive_image).item(), rel=1e-5)
    assert loss.item() > 0
    assert agent.contrastive_loss(agent.encoder.convs(obs), batch["obs"]).item() < 1e-12


def test_the_default_is_the_final_release():
    args = script.Args()
    assert (args.image_size, args.crop_size, args.replay_capacity) == (100, 84, 700_000)
    assert (args.obs_crop, args.contrast, args.contrast_step) == ("centre", "infonce", "separate")
    assert (args.positive_encoder, args.anneal, args.reconstruction) == ("target", "loss", "ae")
    assert (args.contrast_weight, args.contrast_floor, args.contrast_decay) == (1.0, 0.5, 1e-6)
    assert args.train_similarity and args.latent_tanh


def test_similarity_init_and_parameter_count():
    sizes = {name: getattr(script.Args(), name)
             for name in ("filters", "conv_strides", "hidden_dim", "crop_size")}
    agent = make_agent(action_dim=6, obs_shape=(3, 100, 100), **sizes)
    W = agent.similarity.detach()
    assert W.shape == (50, 50) and W.min() >= 0 and W.max() < 1
    assert W.mean().item() == pytest.approx(0.5, abs=0.03)
    assert W.var().item() == pytest.approx(1 / 12, rel=0.1)
    trainable = sum(p.numel() for p in agent.parameters() if p.requires_grad)
    assert trainable == 9_312_324 + 2_500
    group = agent.optimizers["contrastive"].param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.999), 1e-8)
    assert group["weight_decay"] == 0
    other = make_agent(encoder_lr=3e-4).optimizers["contrastive"].param_groups[0]
    assert other["lr"] == 3e-4
    assert sum(p.numel() for p in group["params"]) == 1_990_518 + 2_500
    assert agent.encoder(torch.rand(2, 9, 84, 84)).shape == (2, 50)


def test_contrast_overfits_a_batch():
    """200 steps on 32 images: far below ln 32, and nearly every anchor finds its positive."""
    agent = make_agent(filters=32, batch_size=32)
    batch = make_batch(agent)
    obs = script.preprocess(batch["obs"])

    def accuracy():
        logits = (agent.encoder(obs) @ agent.similarity
                  @ agent.target_encoder(script.preprocess(batch["positive"])).T)
        return (logits.argmax(1) == torch.arange(32)).float().mean().item()

    before = accuracy()
    for _ in range(200):
        loss = agent.contrastive_loss(agent.encoder.convs(obs), batch["positive"])
        script.minimize(loss, agent.optimizers["contrastive"])
    assert loss.item() < math.log(32) / 2 and accuracy() > max(0.6, before)


# ---- who trains what ----

PARTS = ["encoder.convs", "encoder.head", "actor", "critic", "decoder", "log_alpha",
         "target_encoder", "target_critic", "similarity"]
ENCODER = {"encoder.convs", "encoder.head"}
CONTRASTIVE = [
    ({}, TRAINS["sac_gaara"]["contrastive"]),
    ({"train_similarity": False}, ENCODER),
    ({"contrast": "discriminator"}, ENCODER),
    ({"positive_encoder": "online"}, ENCODER | {"similarity"}),
    ({"reconstruction": "none", "latent_tanh": False}, ENCODER | {"similarity"}),
]


def moved(agent, step):
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    step()
    changed = {k for k, v in agent.state_dict().items() if not torch.equal(v, before[k])}
    return {part for part in PARTS if any(k.startswith(part) for k in changed)}


@pytest.mark.parametrize("changes, expected", CONTRASTIVE)
def test_who_the_contrastive_loss_trains(changes, expected):
    agent = make_agent(**changes)
    batch = make_batch(agent)
    for _ in range(2):
        agent.update(batch)  # the weights at first are too symmetric

    def step():
        h = agent.encoder.convs(script.preprocess(batch["obs"]))
        loss = agent.contrastive_loss(h, batch["positive"])
        script.minimize(loss, agent.optimizers["contrastive"])

    assert moved(agent, step) == expected


@pytest.mark.parametrize("train_similarity", [True, False])
def test_a_joint_step_trains_similarity_or_not(train_similarity):
    agent = make_agent(contrast_step="joint", train_similarity=train_similarity)
    assert "contrastive" not in agent.optimizers
    parts = moved(agent, lambda: agent.update(make_batch(agent)))
    assert ("similarity" in parts) == train_similarity and parts >= ENCODER | {"decoder"}


def test_release_1_leaves_similarity_and_the_decoders_gradient_alone():
    """The contrastive term of the joint loss has no gradient in the decoder."""
    gradients = []
    for weight in (2e-8, 1.0):
        agent = make_agent(contrast_step="joint", train_similarity=False, contrast_weight=weight)
        before = agent.similarity.clone()
        torch.manual_seed(1)
        agent.update(make_batch(agent))
        gradients.append([p.grad.clone() for p in agent.decoder.parameters()])
        assert torch.equal(agent.similarity, before)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert any(g.abs().max() > 0 for g in gradients[0])


# ---- annealing ----


def test_annealing_at_given_updates():
    agent = make_agent()
    for updates, weight in ((0, 1.0), (360_000, 0.64), (500_000, 0.5), (900_000, 0.5)):
        agent.updates = updates
        assert agent.annealed_weight() == pytest.approx(weight, abs=1e-12)
    agent = make_agent(contrast_floor=1.0)
    agent.updates = 10**6
    assert agent.annealed_weight() == 1.0
    agent = make_agent(contrast_weight=2e-8)  # below the floor from the start: stays, as published
    assert agent.annealed_weight() == 2e-8


def test_annealing_is_the_authors_subtraction():
    """Theirs: after each update subtract 1e-6 while above the floor. At most one step too far."""
    agent, theirs = make_agent(contrast_decay=1e-4), 1.0
    for updates in range(6000):
        agent.updates = updates
        error = agent.annealed_weight() - theirs
        assert abs(error) <= 1e-9 or theirs < 0.5 and error <= 1.01e-4
        theirs -= 1e-4 if theirs > 0.5 else 0


class Run:
    """Stands in for Interrupt; stops when it is looked at for the `after`th time."""

    def __init__(self, after):
        self.looks, self.after = 0, after

    @property
    def signal(self):
        self.looks += 1
        return 2 if self.looks >= self.after else 0


def test_annealing_goes_on_after_a_resume(tmp_path):
    """Logged weights are the function of the logged update counter, before and after."""
    args = tiny_args(script, contrast_decay=2e-3, total_frames=4000)
    script.train(args, tmp_path, Run(100))
    payload = script.read_checkpoint(tmp_path, "resume", "cpu")
    assert 0 < payload["updates"] < 100
    script.train(args, tmp_path, Run(10**9), payload)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["stat/contrast_weight"]]
    weights = [float(r["stat/contrast_weight"]) for r in rows]
    wanted = [max(0.5, 1 - 2e-3 * (int(r["updates"]) - 1)) for r in rows]
    assert weights == pytest.approx(wanted, abs=1e-6) and len(set(weights)) > 2


def contrastive_step(weight, eps=1e-8, seed=0, **changes):
    """How the encoder and W move in the first update's contrastive step: (encoder vector, W)."""
    agent = make_agent(contrast_weight=weight, contrast_floor=weight, **changes)
    optimizer = agent.optimizers.get("contrastive", agent.optimizers["encoder"])
    optimizer.param_groups[0]["eps"] = eps
    batch, parts, original = make_batch(agent, seed), [], script.minimize

    def vector():
        return torch.cat([p.detach().flatten() for p in agent.encoder.parameters()])

    def watched(loss, *optimizers):
        before = vector(), agent.similarity.detach().clone()
        original(loss, *optimizers)
        if optimizer in optimizers:
            parts.append((vector() - before[0], agent.similarity.detach() - before[1]))

    script.minimize = watched
    try:
        agent.update(batch)
    finally:
        script.minimize = original
    (step,) = parts
    return step


def relative(a, b):
    return ((a - b).norm() / a.norm()).item()


@pytest.mark.parametrize("seed", range(3))
def test_the_published_annealing_changes_nothing(seed):
    """One step from equal states at weight 1 and 0.5: with an Adam of its own the loss' scale
    cancels but for Adam's epsilon. Scaling the learning rate halves the step. In a joint loss the
    weight counts where the two gradients are of one size; at 1, InfoNCE's is much larger."""
    one, half = (contrastive_step(weight, 1e-30, seed) for weight in (1.0, 0.5))
    assert relative(one[0], half[0]) < 1e-6 and relative(one[1], half[1]) < 1e-6
    one, half = (contrastive_step(weight, seed=seed) for weight in (1.0, 0.5))
    assert relative(one[0], half[0]) < 0.03 and relative(one[1], half[1]) < 0.01
    half = contrastive_step(0.5, seed=seed, anneal="lr")
    assert relative(one[0], 2 * half[0]) < 1e-3 and relative(one[1], 2 * half[1]) < 1e-3
    large, small = (relative(contrastive_step(weight, seed=seed, contrast_step="joint")[0],
                             contrastive_step(weight / 2, seed=seed, contrast_step="joint")[0])
                    for weight in (1.0, 1e-3))
    assert small > 0.1 and large < small / 3


def test_the_annealed_learning_rate_follows_the_weight():
    agent = make_agent(anneal="lr", contrast_decay=0.05, contrast_floor=0.6, encoder_lr=3e-4)
    rates = []
    for i in range(10):
        agent.update(make_batch(agent, i))
        rates.append(agent.optimizers["contrastive"].param_groups[0]["lr"] / 3e-4)
    assert rates == pytest.approx([max(0.6, 1 - 0.05 * i) for i in range(10)])


def test_the_contrastive_step_does_not_wait_for_the_decoders():
    agent = make_agent(decoder_every_updates=3)
    metrics = [agent.update(make_batch(agent, i)) for i in range(6)]
    assert ["loss/reconstruction" in m for m in metrics] == [False, False, True] * 2
    assert all("loss/contrastive" in m for m in metrics)  # D11


def test_training_hardly_notices_the_published_weight():
    """Ten updates at weight 1 and at 0.06: InfoNCE agrees to a percent. With --anneal lr it does
    not."""
    def losses(**changes):
        agent = make_agent(contrast_floor=0.06, **changes)
        return np.array([agent.update(make_batch(agent, i))["loss/contrastive"].item()
                         for i in range(10)])

    one = losses(contrast_decay=0.0)
    assert np.abs(one - losses(contrast_weight=0.06)).max() < 0.01 * one.max()
    assert np.abs(one - losses(contrast_weight=0.06, anneal="lr")).max() > 0.1 * one.max()


# ---- update ----


def test_without_contrast_it_is_sac_ae():
    """Same weights, batches and noise: the same parameters, bit for bit, after five updates."""
    ours = make_agent(contrast="none", crop_size=SIZE)
    theirs = make_agent(module=sac_ae)
    for agent in (ours, theirs):
        torch.manual_seed(7)
        for i in range(5):
            agent.update(agent.sample(fill(), np.random.default_rng(i)))
    pairs = zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True)
    for (key, a), (other, b) in pairs:
        assert key == other and torch.equal(a, b), key


def test_a_whole_run_without_contrast_is_sac_aes(tmp_path):
    """As --contrast none on uncropped images is SAC+AE."""
    rows = []
    for module, changes in ((sac_ae, {}), (script, {"contrast": "none", "crop_size": 24})):
        folder = tmp_path / module.__name__
        folder.mkdir()
        args = tiny_args(module, total_frames=2000, **changes)
        module.train(args, folder, Run(10**9))
        with open(folder / "metrics.csv", newline="") as file:
            rows.append([{**row, "time/wall_s": ""} for row in csv.DictReader(file)])
    assert rows[0] == rows[1] and rows[0][-1]["loss/reconstruction"]


def plain_update(agent, batch):
    """update() without shared passes, in the published order."""
    args, opt = agent.args, agent.optimizers
    obs = sac_steps(script, agent, batch)

    def contrast():
        net = agent.encoder if args.positive_encoder == "online" else agent.target_encoder
        z_a, z_p = agent.encoder(obs), net(script.preprocess(batch["positive"]))
        if args.contrast == "discriminator":
            return F.mse_loss(agent.decoder(z_a), agent.decoder(z_p))
        return F.cross_entropy(z_a @ agent.similarity @ z_p.T, torch.arange(len(z_a)))

    if agent.decoder is not None:
        loss = agent.reconstruction_loss(agent.encoder.convs(obs), batch["obs"])
        if args.contrast_step == "joint":
            loss = loss + contrast() * agent.annealed_weight()
        script.minimize(loss, opt["encoder"], opt["decoder"])
    if args.contrast_step == "separate":
        script.minimize(contrast() * agent.annealed_weight(), opt["contrastive"])


@pytest.mark.parametrize("changes", [
    {}, {"contrast_step": "joint"}, {"reconstruction": "none", "obs_crop": "random"},
    {"contrast": "discriminator"}, {"positive_encoder": "online"}, {"train_similarity": False}])
def test_update_is_the_losses_one_after_the_other(changes):
    ours, plain = make_agent(**changes), make_agent(**changes)
    batch = make_batch(ours)
    for agent in (ours, plain):
        agent.updates = 1
    torch.manual_seed(5)
    ours.update(batch)
    torch.manual_seed(5)
    plain_update(plain, batch)
    for (key, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7, msg=key)


@pytest.mark.parametrize("changes, actor_due, passes", [
    ({}, True, 4), ({}, False, 4), ({"contrast_step": "joint"}, True, 3),
    ({"reconstruction": "none"}, True, 3), ({"reconstruction": "none"}, False, 3)])
def test_no_pass_is_made_twice(changes, actor_due, passes):
    """Online convs per update: next_obs and obs of the critic; obs again after its step; and after
    the reconstruction's. The target convs: next_obs and the positive."""
    agent, counts = make_agent(**changes), {"encoder": 0, "target_encoder": 0}
    for name in counts:
        net = getattr(agent, name).convs
        net.register_forward_hook(lambda *_, n=name: counts.update({n: counts[n] + 1}))
    agent.updates = 1 if actor_due else 2
    assert agent.cadence()[0] == actor_due
    agent.update(make_batch(agent))
    assert counts == {"encoder": passes, "target_encoder": 2}


def test_curl_has_no_tanh():
    agent = make_agent(reconstruction="none", latent_tanh=False)
    z = agent.encoder(torch.rand(8, 9, 20, 20))
    assert z.abs().max() > 1
    torch.testing.assert_close(z.mean(1), torch.zeros(8), atol=1e-5, rtol=0)  # LayerNorm is last
    h = torch.rand(8, agent.encoder.head.fc.in_features)
    for head in (agent.actor.head, agent.target_encoder.head):
        assert head(h).abs().max() > 1
    assert make_agent().encoder(torch.rand(8, 9, 20, 20)).abs().max() < 1


def test_images_show_anchor_positive_and_reconstruction():
    agent, buffer = make_agent(), fill()
    image = agent.images(buffer, np.random.default_rng(0))["reconstruction"]
    assert image.shape == (3 * 20, 8 * 20, 3) and image.dtype == np.uint8
    batch = agent.sample(buffer, np.random.default_rng(0))
    for row, key in enumerate(("obs", "positive")):
        cell = image[row * 20 : (row + 1) * 20, 40:60].transpose(2, 0, 1)
        assert np.array_equal(cell, batch[key][2, -3:].numpy())
    agent = make_agent(contrast="none")
    assert agent.images(buffer, np.random.default_rng(0))["reconstruction"].shape[0] == 40


def test_state_without_contrast_is_plain_sac():
    agent = make_agent(obs_shape=(5,), obs="state", reconstruction="none", contrast="none",
                       frame_stack=1)
    assert agent.critic.q1[0].in_features == 5 + 2
    action, _ = agent.act(seen(np.ones(5, np.float32)), None, explore=True)
    assert action.shape == (2,)


def test_the_readmes_variants_are_accepted():
    import tyro

    text = (Path(script.__file__).parent / "benchmark" / "README.md").read_text()
    section = text.split("\n## SAC+GAARA")[1].split("\n## ")[0].replace("\\\n", " ")
    flags = re.findall(r"`((?:--[\w-]+[^`]*)+)`", section)
    lines = [f for f in flags if re.search(r"--(contrast|anneal|obs-crop|reconstruction)", f)]
    assert len(lines) >= 10
    for line in lines:
        args = tyro.cli(script.Args, args=line.split())
        script.check_algorithm(args)
        small = {"filters": 4, "conv_strides": (2, 2), "hidden_dim": 16, "device": "cpu",
                 "crop_size": 20, "batch_size": 8}
        agent = make_agent(**{**vars(args), **small})
        metrics = agent.update(make_batch(agent))
        assert all(math.isfinite(v) for v in metrics.values())
