"""One of our scripts against its authors' code: same weights, frames, crop offsets and noise, so
the same losses and the same parameters after every update.

    python benchmark/equal.py DIR [flags of our script]    # DIR: a checkout, see authors.py

    python benchmark/equal.py pytorch_sac_ae
    python benchmark/equal.py SAC-GAARA
    python benchmark/equal.py SAC-GAARA-4fe3771 --obs-crop random --contrast-step joint \\
        --no-train-similarity --contrast-weight 1e-2
    python benchmark/equal.py curl --reconstruction none --no-latent-tanh --contrast-floor 1 \
        --obs-crop random
    python benchmark/equal.py slac.pytorch    # see slac_differences() for what is levelled first
    python benchmark/equal.py dreamer-torch   # the model's updates; returns of imagined states,
                                              # and their gradient in the actor
    python benchmark/equal.py oyster          # PEARL from states
    python benchmark/equal.py dreamerv2       # the authors' TensorFlow code; equal_tf.py tells
    python benchmark/equal.py slac            # what it needs

In double precision, as single precision lets Adam's first steps, which divide a gradient by its own
size, turn rounding errors of gradients near zero into steps. Exit status 1 above 1e-9 (slac: 1e-5,
as theirs adds 1e-8 to standard deviations).
"""

import importlib
import os
import sys
import types
from pathlib import Path

os.environ["PYTORCH_JIT"] = "0"  # slac.pytorch's scripted functions would draw their own noise

import authors
import equal_loop
import equal_tf
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
FLAGS = {  # with which both do the same; with updates of a first burst all is due at every update
    "sac_ae": "--pretrain-updates 9",
    "sac_gaara": "--pretrain-updates 9",
    "slac": "--pretrain-updates 0",
    "dreamerv2": "--weight-decay 0 --free-nats 0",
    "pearl_pixels": "--obs-mode state --meta-batch 4 --batch-size 64",
}


def parameters(modules):
    """Largest difference of the parameters of [(our module, their module)]."""
    both = [zip(a.parameters(), b.parameters(), strict=True) for a, b in modules]
    return max((p - q).abs().max().item() for pairs in both for p, q in pairs)


class Reordered:
    """Their linear layer, whose inputs (dim 1) or outputs (dim 0) are the pixels of feature maps,
    in our order: ours has the channels last, theirs first. Inputs before the pixels stay."""

    def __init__(self, layer, channels, dim=1, before=0):
        size = layer.weight.shape[dim] - before
        pixels = torch.arange(size).view(channels, -1).T.flatten()
        self.order = torch.cat([torch.arange(before), before + pixels])
        self.layer = layer
        self.dim = dim

    def state_dict(self):
        bias = self.layer.bias if self.dim else self.layer.bias[self.order]
        return {"weight": self.layer.weight.index_select(self.dim, self.order), "bias": bias}

    def parameters(self):
        return self.state_dict().values()


def pairs(ours, peer):
    """{part: [(our module, their module)]} of all that has parameters."""

    def mlp(a, b):
        return [(a[i], b[i]) for i in (0, 2, 4)]

    def encoder(a, b):
        return (
            [(a.convs[2 * i], b.convs[i]) for i in range(4)],
            [(a.head.fc, Reordered(b.fc, 32)), (a.head.norm, b.ln)],
        )

    out = {}
    for name, a, q, b in (
        ("", ours.encoder, ours.critic, peer.critic),
        ("target ", ours.target_encoder, ours.target_critic, peer.critic_target),
    ):
        out[name + "convs"], out[name + "head"] = encoder(a, b.encoder)
        out[name + "critic"] = mlp(q.q1, b.Q1.trunk) + mlp(q.q2, b.Q2.trunk)
    out["actor"] = [
        (ours.actor.head.fc, Reordered(peer.actor.encoder.fc, 32)),
        (ours.actor.head.norm, peer.actor.encoder.ln),
        *mlp(ours.actor.trunk, peer.actor.trunk),
    ]
    if ours.decoder is not None:
        deconvs = [(ours.decoder[4 + 2 * i], peer.decoder.deconvs[i]) for i in range(4)]
        out["decoder"] = [(ours.decoder[0], Reordered(peer.decoder.fc, 32, dim=0)), *deconvs]
    return out


def make_batch(seed, size):
    """Coarse random images of a side in pixels, actions and rewards."""
    rng, batch = np.random.default_rng(seed), authors.BATCH
    images = rng.integers(0, 256, (2, batch, 9, 25, 25), dtype=np.uint8).repeat(4, 3).repeat(4, 4)
    obs, next_obs = torch.as_tensor(images[..., :size, :size])
    return {
        "obs": obs,
        "next_obs": next_obs,
        "discount": torch.ones(batch, 1),
        "action": torch.as_tensor(rng.uniform(-1, 1, (batch, authors.ACTION_DIM))),
        "reward": torch.as_tensor(rng.uniform(0, 1, (batch, 1))),
    }


class Offsets:
    """Stands in for the random generators of both croppers: `current` decides what they draw."""

    def __init__(self):
        self.current = self.calls = 0

    def integers(self, low, high, size):
        """Ours: rows and columns at once."""
        return np.random.default_rng(self.current).integers(0, 16, size)

    def randint(self, low, high=None, size=None):
        """Theirs: rows, then columns."""
        self.calls += 1
        both = self.integers(0, 16, (2, size))
        return both[(self.calls - 1) % 2]


def crops(script, utils, args, whole):
    """(our batch, theirs) of a batch of whole images, each by its own cropper."""
    offsets, ours, theirs = Offsets(), dict(whole), dict(whole)
    np.random.randint = offsets.randint
    for key, source in (("obs", "obs"), ("next_obs", "next_obs"), ("positive", "obs")):
        offsets.current += 1
        random = key == "positive" or args.obs_crop == "random"
        ours[key] = script.crop(whole[source], args.crop_size, offsets if random else None)
        crop = utils.random_crop if random else getattr(utils, "center_crop", None)
        theirs[key] = torch.as_tensor(crop(whole[source].numpy(), args.crop_size).copy())
    return ours, theirs


def their_buffer(batch):
    """Stands in for their replay buffer: gives this batch."""
    obs, next_obs = batch["obs"].double(), batch["next_obs"].double()
    plain = obs, batch["action"], batch["reward"], next_obs, batch["discount"]
    crops = {
        "obs_anchor": obs,
        "obs_pos": batch.get("positive", obs).double(),
        "time_anchor": None,
        "time_pos": None,
    }
    return types.SimpleNamespace(sample=lambda: plain, sample_cpc=lambda: (*plain, crops))


def noise(draw, counter):
    """Stands in for torch.randn_like and rand_like: the nth call gives the nth noise."""

    def like(x, dtype=None):
        counter[0] += 1
        return torch.as_tensor(draw(np.random.default_rng(counter[0]), tuple(x.shape)))

    return like


def sac(script, folder, args):
    """Prints and gives the differences of sac_ae.py or sac_gaara.py and their peers over three
    updates."""
    module, utils = authors.load(folder)
    if hasattr(utils, "preprocess_obs"):  # it insists on float32
        original = utils.preprocess_obs
        utils.preprocess_obs = lambda obs: original(obs.float()).double()
    torch.set_default_dtype(torch.float64)
    peer = authors.make_agent(module, folder, "cpu", getattr(args, "contrast_weight", 0.0))
    if authors.which(folder) == "curl_sac.py":
        peer.encoder_optimizer.step = lambda: None
        print("without the authors' second step of the encoder on the same gradient")
    size = args.image_size
    ours = script.Agent(args, script.EnvSpec((3, size, size), authors.ACTION_DIM, 1))
    counter, differences = [0], []
    for modules in pairs(ours, peer).values():
        for a, b in modules:
            a.load_state_dict(b.state_dict())
    similarity = getattr(ours, "similarity", None)
    their_W = getattr(peer, "Comparison", getattr(peer, "CURL", None))
    contrastive = []
    if similarity is not None:
        similarity.data.copy_(their_W.W.data)
        peer.cross_entropy_loss.register_forward_hook(lambda *x: contrastive.append(x[2]))
    script.preprocess = lambda obs: obs.double() / 255
    torch.randn_like = noise(lambda rng, shape: rng.standard_normal(shape), counter)
    torch.rand_like = noise(lambda rng, shape: rng.random(shape, np.float32).astype(float), counter)
    for update in range(3):
        ours.updates = update
        batch, log = make_batch(update, size), authors.Log()
        their_batch = batch
        if hasattr(script, "crop"):
            batch, their_batch = crops(script, utils, args, batch)
            batch["weight"] = torch.tensor(ours.annealed_weight())
        counter[0] = 10 * update
        peer.update(their_buffer(their_batch), log, step=0)  # all is due, CURL's logging too
        counter[0] = 10 * update
        metrics = ours.update(batch)
        names = {
            "loss/critic": "train_critic/loss",
            "loss/actor": "train_actor/loss",
            "loss/alpha": "train_alpha/loss",
            "loss/reconstruction": "train_ae/ae_loss",
        }
        theirs = {a: log.last[b] for a, b in names.items() if b in log.last}
        if similarity is not None:
            theirs["loss/contrastive"] = contrastive[-1]
            if args.contrast_step == "joint":  # theirs logs the sum
                weighted = ours.annealed_weight() * contrastive[-1]
                theirs["loss/reconstruction"] = theirs["loss/reconstruction"] - weighted
        print(f"update {update + 1}")
        for key, value in theirs.items():
            one, two = metrics[key].item(), value.item()
            differences.append(abs(one - two))
            print(f"    {key:22}{one:20.12f} {two:20.12f}   difference {abs(one - two):.1e}")
        found = {part: parameters(modules) for part, modules in pairs(ours, peer).items()}
        if similarity is not None:
            found["similarity"] = (similarity - their_W.W).abs().max().item()
        found["log alpha"] = (ours.log_alpha - peer.log_alpha).abs().item()
        for part, difference in found.items():
            differences.append(difference)
            print(f"    parameters of {part:15} largest difference {difference:.1e}")
    return differences


def slac_differences(script, sac):
    """Levels what is meant to differ: slac.pytorch's critic loss lacks the 0.5 of the authors' and
    its log-probability has 1e-6 under the logarithm. (Its windows never hold an episode's first
    frames, where acting pads with black images; its reward loss leaves out terminal steps. Neither
    occurs in these batches.)"""
    ours = script.Agent.critic_loss
    script.Agent.critic_loss = lambda *x: 2 * ours(*x)
    sac.reparameterize = script.tanh_gaussian


def slac_pairs(ours, peer):
    """{part: [(our module, their module)]}, as pairs()."""
    a, b = ours.model, peer.latent
    mlps = {
        "q_first": (a.q_first.net, b.z1_posterior_init.net),
        "q_next": (a.q_next.net, b.z1_posterior.net),
        "prior": (a.prior.net, b.z1_prior.net),
        "z2_first": (a.z2_first.net, b.z2_prior_init.net),
        "z2_next": (a.z2_next.net, b.z2_prior.net),
        "reward": (a.reward_head.net, b.reward.net),
        "actor": (ours.actor.trunk, peer.actor.net),
    }
    for name, one, two in (
        ("critic", ours.critic, peer.critic),
        ("target critic", ours.target_critic, peer.critic_target),
    ):
        mlps[name + " 1"], mlps[name + " 2"] = (one.q1, two.net1), (one.q2, two.net2)
    convs = {"encoder": (a.encoder, b.encoder), "decoder": (a.decoder, b.decoder)}
    kinds = torch.nn.Conv2d, torch.nn.ConvTranspose2d
    return {n: [(one[i], two[i]) for i in (0, 2, 4)] for n, (one, two) in mlps.items()} | {
        n: list(
            zip(*([m for m in net.modules() if isinstance(m, kinds)] for net in both), strict=True)
        )
        for n, both in convs.items()
    }


def slac(script, folder, args):
    """Prints and gives the differences of slac.py and slac.pytorch over two joint updates."""
    module, _ = authors.load(folder)
    torch.set_default_dtype(torch.float64)
    peer, A = authors.make_agent(module, folder, "cpu"), authors.ACTION_DIM
    slac_differences(script, importlib.import_module("slac.network.sac"))
    ours = script.Agent(args, script.EnvSpec((3, 64, 64), A, 1))
    for modules in slac_pairs(ours, peer).values():
        for a, b in modules:
            a.load_state_dict(b.state_dict())
    script.preprocess = lambda obs: obs.double() / 255
    queue, differences, parts = [], [], {}
    torch.randn = lambda *shape, **_: queue.pop(0).reshape(shape)
    torch.randn_like = lambda x: queue.pop(0).reshape(x.shape)
    losses = peer.latent.calculate_loss
    peer.latent.calculate_loss = lambda *x: parts.setdefault("parts", losses(*x))
    for update in range(2):
        rng, batch, theirs, noise, log = np.random.default_rng(update), {}, {}, {}, authors.Log()
        for name, size in (("model", 32), ("sac", 256)):
            images = rng.integers(0, 256, (size, 9, 3, 8, 8), dtype=np.uint8)
            obs = torch.as_tensor(images.repeat(8, 3).repeat(8, 4))
            action = torch.as_tensor(rng.uniform(-1, 1, (size, 9, A)))
            reward = torch.as_tensor(rng.uniform(0, 4, (size, 9, 1)))
            batch[name] = {
                "obs": obs,
                "action": action,
                "reward": reward,
                "discount": torch.ones(size, 9, 1),
                "is_first": torch.zeros(size, 9, dtype=torch.bool),
            }
            theirs[name] = obs.double() / 255, action[:, 1:], reward[:, 1:], torch.zeros(size, 8, 1)
            noise[name] = torch.as_tensor(rng.standard_normal((size, 9, 288)))
        both = [torch.as_tensor(rng.standard_normal((256, A))) for _ in range(2)]
        peer.buffer.sample_latent = lambda _, b=theirs: b["model"]
        peer.buffer.sample_sac = lambda _, b=theirs: (
            *b["sac"][:2],
            b["sac"][2][:, -1],
            b["sac"][3][:, -1],
        )
        for name in ("model", "sac"):
            for t in range(9):  # z1 and z2, frame after frame
                queue += noise[name][:, t].split([32, 256], -1)
        queue += both
        parts.clear()
        peer.learning_steps_latent = peer.learning_steps_sac = 999  # it logs every 1000th
        peer.update_latent(log)
        peer.update_sac(log)
        queue += [noise["model"], noise["sac"], *both]
        metrics = ours.update(batch)
        assert not queue
        values = dict(zip(("loss/kl", "loss/image", "loss/reward"), parts["parts"], strict=True))
        values |= {
            f"loss/{k}": torch.tensor(log.last[f"loss/{k}"]) for k in ("critic", "actor", "alpha")
        }
        print(f"update {update + 1}")
        for key, value in values.items():
            one, two = metrics[key].item(), value.item()
            differences.append(abs(one - two) / max(1, abs(two)))
            print(f"    {key:22}{one:20.10f} {two:20.10f}   relative {differences[-1]:.1e}")
        for part, modules in slac_pairs(ours, peer).items():
            differences.append(parameters(modules))
            print(f"    parameters of {part:15} largest difference {differences[-1]:.1e}")
        differences.append((ours.log_alpha - peer.log_alpha).abs().item())
    return differences


def dreamer_pairs(ours, model, behavior):
    """{part: [(our module, their module)]}, as pairs()."""
    a, b = ours.rssm, model.dynamics
    nets = {
        "encoder": (ours.encoder.net, model.encoder.layers),
        "decoder": (ours.decoder.net, model.heads["image"]._cnnt_layers),
        "reward": (ours.reward_head, model.heads["reward"]._mean_layers),
        "target critic": (ours.target_critic, behavior._slow_value._mean_layers),
        "actor": (ours.actor.trunk, [*behavior.actor._pre_layers, behavior.actor._dist_layer]),
    }
    out = {
        name: list(zip(*([m for m in net if hasattr(m, "weight")] for net in both), strict=True))
        for name, both in nets.items()
    }
    out["decoder"].append((ours.decoder.fc, model.heads["image"]._linear_layer))
    out["RSSM"] = [
        (a.gru_in, b._inp_layers[0]),
        (a.gru, b._cell._layer),
        (a.gru_norm, b._cell._norm),
        (a.prior_in, b._img_out_layers[0]),
        (a.prior_out, b._ims_stat_layer),
        (a.post_in, Reordered(b._obs_out_layers[0], 384, before=200)),
        (a.post_out, b._obs_stat_layer),
    ]
    return out


def dreamer(script, folder, args):
    """Prints and gives the differences of dreamerv2.py and dreamer-torch: two updates of the model,
    then returns of imagined states and their gradient in the actor."""
    print("set equal: no free nats, so that the KL has a gradient; no decay of weights, as theirs")
    print("never acts; the epsilon of LayerNorm; the order of the returns, as theirs come out last")
    print("one first; the noise of their actions, which are mean + deviation * noise, so that they")
    print("are ours, as their normal is not truncated. Left out: the actor's loss, in which they")
    print("take the return one step before, and the entropy of a normal that is not truncated.")
    module, tools = authors.load(folder)
    torch.set_default_dtype(torch.float64)
    model, behavior = authors.make_agent(module, folder, "cpu")
    model.dynamics._cell._norm.eps, model._config.kl_free = 1e-3, "0.0"
    ours = script.Agent(args, script.EnvSpec((3, 64, 64), authors.ACTION_DIM, 1))
    parts = dreamer_pairs(ours, model, behavior)
    for modules in parts.values():
        for a, b in modules:
            a.load_state_dict(b.state_dict())
    script.preprocess = lambda obs: obs.double() / 255
    queue, differences = [], []
    tools.OneHotDist.sample = lambda self, *_: script.one_hot_sample(
        self.logits, queue.pop(0)
    ).unflatten(-1, self.logits.shape[-2:])

    def show(key, one, two, scale=1.0):
        differences.append((one - two).abs().max().item() / scale)
        means = f"{one.double().mean().item():20.10f} {two.double().mean().item():20.10f}"
        print(f"    {key:28}{means}   difference {differences[-1]:.1e}")

    def flat(tensors):
        return torch.cat([tensor.flatten() for tensor in tensors])

    for update in range(2):
        data = authors.dreamer_batch(update)
        uniform = torch.as_tensor(np.random.default_rng(update).random((16, 50, 32, 32)))
        queue += [x for t in range(50) for x in (uniform[:, t], uniform[:, t])]  # prior, posterior
        model.preprocess = lambda data: {
            "image": torch.as_tensor(data["image"]).double() / 255 - 0.5,
            "action": torch.as_tensor(data["action"]).double(),
            "reward": torch.as_tensor(data["reward"]).double()[..., None],
        }
        start, _, logged = model._train(data)
        assert not queue
        batch = {
            "obs": torch.as_tensor(data["image"]).permute(0, 1, 4, 2, 3),
            "action": torch.as_tensor(data["action"]).double(),
            "reward": torch.as_tensor(data["reward"]).double()[..., None],
            "is_first": torch.arange(50).expand(16, 50) == 0,
            "discount": torch.ones(16, 50, 1),
        }
        ours.rssm.noise = lambda *shape, u=uniform: (
            u if shape == (16, 50) else torch.rand(*shape, 32, 32)
        )
        states, observe = [], ours.rssm.observe
        ours.rssm.observe = lambda *x, f=observe, s=states: (s.append(f(*x)), s[-1])[1]
        metrics = ours.update(batch)
        ours.rssm.observe = observe
        print(f"update {update + 1}")
        for key in ("image", "reward"):
            theirs = torch.as_tensor(logged[f"{key}_loss"])
            show(f"loss/{key}", metrics[f"loss/{key}"], theirs, scale=max(1.0, abs(theirs.item())))
        show("KL", metrics["stat/kl"], torch.as_tensor(logged["kl"]))
        show("posterior's logits", states[0][2], start["logit"])
        show("recurrent state", states[0][1], start["deter"])
        for part in ("encoder", "decoder", "reward", "RSSM"):
            sides = zip(*parts[part], strict=True)
            show(
                f"parameters of {part}",
                *(flat(p for m in s for p in m.parameters()) for s in sides),
            )
    for part in ("actor", "target critic"):
        for a, b in parts[part]:
            b.load_state_dict(a.state_dict())
    print("imagined by the same actor, 15 steps")
    noise = torch.as_tensor(np.random.default_rng(2).random((16, 800, 32, 32)))
    ours.rssm.noise = lambda *_: noise[:15]
    actions, truncated_normal = [], script.truncated_normal

    def remember(*inputs):
        action, entropy = truncated_normal(*inputs)
        actions.append(action.detach())
        return action, entropy

    def rsample(self, _):
        return self.loc + self.scale * ((actions.pop(0) - self.loc) / self.scale).detach()

    script.truncated_normal, tools.SafeTruncatedNormal.rsample = remember, rsample
    z, h, logits = (x.detach() for x in states[0][:3])
    features, _ = ours.imagine(z.flatten(0, 1), h.flatten(0, 1))
    discount, our_weights = ours.discounts(features, torch.ones(800))
    returns = ours.returns(features, discount)
    our_gradient = torch.autograd.grad(returns.sum(), ours.actor.parameters())
    queue += noise
    actions.append(actions[-1])  # theirs make one step more, of which nothing is used
    start = {"stoch": z.unflatten(-1, (32, 32)), "deter": h, "logit": logits}
    with tools.RequiresGrad(behavior.actor):
        theirs, *_ = behavior._imagine(start, behavior.actor, 16)
        reward = model.heads["reward"](theirs).mode()
        targets, weights = behavior._compute_target(theirs, None, None, reward, None, None, True)
        targets = torch.stack(targets, 1)[..., 0].flip(0)
        gradient = torch.autograd.grad(targets.sum(), behavior.actor.parameters())
    normal = behavior.actor(features[0])._dist.base_dist
    show("actor's mean", ours.actor(features[0])[0], normal.loc)
    show("actor's deviation", ours.actor(features[0])[1], normal.scale)
    show("states", features, theirs)
    show("weights", our_weights, weights[..., 0])
    show("returns", returns, targets)
    gradient = flat(gradient)
    show("gradient of their sum", flat(our_gradient), gradient, scale=gradient.abs().max().item())
    return differences


def pearl(script, folder, args):
    """Prints and gives the differences of pearl_pixels.py --obs-mode state and oyster over three
    updates of 4 tasks with 64 transitions and a context of 100 each."""
    module, policies = authors.load(folder)
    torch.set_default_dtype(torch.float64)
    tasks, B, N, A = args.meta_batch, args.batch_size, args.context_size, authors.ACTION_DIM
    peer = authors.make_pearl(module, policies, tasks, B)
    ours = script.Agent(args, script.EnvSpec((17,), A, 17)).double()
    nets = {
        "q1": (ours.q1, peer.qf1),
        "q2": (ours.q2, peer.qf2),
        "V": (ours.v, peer.vf),
        "target V": (ours.target_v, peer.target_vf),
        "context encoder": (ours.context_encoder, peer.agent.context_encoder),
    }

    def layers(name):
        a, b = nets[name]
        return zip([a[i] for i in (0, 2, 4, 6)], [b.fc0, b.fc1, b.fc2, b.last_fc], strict=True)

    policy = peer.agent.policy
    hidden = [(ours.actor[0], policy.fc0), (ours.actor[2], policy.fc1), (ours.actor[4], policy.fc2)]
    both = policy.last_fc, policy.last_fc_log_std  # ours has them in one layer
    for a, b in [pair for name in nets for pair in layers(name)] + hidden:
        a.load_state_dict(b.state_dict())
    for part in ("weight", "bias"):
        getattr(ours.actor[6], part).data.copy_(torch.cat([getattr(b, part) for b in both]))
    differences, queue = [], []
    torch.randn_like = lambda x: queue.pop(0).reshape(x.shape)
    losses = {}
    for update in range(3):
        transitions, context = authors.pearl_batch(update, tasks, B, N)
        g = torch.Generator().manual_seed(100 + update)
        z_noise = torch.randn(tasks, 5, generator=g)
        a_noise = torch.randn(tasks * B, A, generator=g)
        agent = peer.agent

        def sample_z(agent=agent, z_noise=z_noise):
            agent.z = agent.z_means + agent.z_vars.sqrt() * z_noise

        def rsample(self, return_pretanh_value=False, a_noise=a_noise):
            u = self.normal_mean + self.normal_std * a_noise
            return torch.tanh(u), u

        agent.sample_z, policies.TanhNormal.rsample = sample_z, rsample
        peer.sample_sac = lambda _, t=transitions: t
        kl = agent.compute_kl_div
        agent.compute_kl_div = lambda kl=kl: losses.setdefault("loss/kl", kl())
        peer.vf_criterion = lambda a, b: losses.setdefault("loss/v", (a - b).square().mean())
        losses.clear()
        peer._take_step(range(tasks), torch.cat(context[:3], 2))
        agent.compute_kl_div = kl
        queue += [z_noise, a_noise]

        def columns(batch):
            state, action, reward, following, end = batch
            seen = {"obs": state, "state": state, "next_obs": following, "next_state": following}
            return {**seen, "action": action, "reward": reward, "discount": 1 - end}

        metrics = ours.update({"transitions": columns(transitions), "context": columns(context)})
        assert not queue
        print(f"update {update + 1}")
        for key, theirs in losses.items():
            one, two = metrics[key].item(), theirs.item()
            differences.append(abs(one - two))
            print(f"    {key:22}{one:20.12f} {two:20.12f}   difference {differences[-1]:.1e}")
        for name in nets:
            differences.append(parameters(layers(name)))
            print(f"    parameters of {name:16} largest difference {differences[-1]:.1e}")
        last = torch.cat([b.weight for b in both]) - ours.actor[6].weight
        differences.append(max(last.abs().max().item(), parameters(hidden)))
        print(f"    parameters of actor            largest difference {differences[-1]:.1e}")
    return differences


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder, flags = sys.argv[1], sys.argv[2:]
    name = authors.PEERS[authors.which(folder)][0]
    script = importlib.import_module(name)
    if authors.which(folder) in authors.TENSORFLOW:
        sys.exit(equal_tf.main(script, folder))
    args = tyro.cli(script.Args, args=["--device", "cpu", *flags, *FLAGS[name].split()])
    torch.manual_seed(0)
    compare = {"slac": slac, "dreamerv2": dreamer, "pearl_pixels": pearl}.get(name, sac)
    worst = np.max(compare(script, folder, args))  # NaN, if there is one
    print(f"largest difference of all: {worst:.1e}")
    loops = 0
    if authors.which(folder) in ("sac_ae.py", "sac_cae.py") and not flags:
        loops = equal_loop.main(script, *authors.load(folder))
    sys.exit(loops > 0 or not worst <= (1e-5 if name == "slac" else 1e-9))


if __name__ == "__main__":
    main()
