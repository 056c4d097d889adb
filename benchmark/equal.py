"""Our SAC+AE against the authors' code: same weights, batches and noise, so the same losses and
the same parameters after every update.

    python benchmark/equal.py DIR      # DIR: a checkout of github.com/denisyarats/pytorch_sac_ae

In double precision, as single precision lets Adam's first steps, which divide a gradient by its own
size, turn rounding errors of gradients near zero into steps. Exit status 1 above 1e-5.
"""

import importlib
import sys
import types
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sac_ae as script

ACTION_DIM, BATCH = 6, 128


class Log:
    """Their logger's interface; keeps the last value of everything."""

    def __init__(self):
        self.last = {}

    def log(self, key, value, step):
        self.last[key] = value.item() if hasattr(value, "item") else value

    def log_histogram(self, *_):
        pass

    log_param = log_image = log_histogram


def make_peer(folder):
    """Their agent with the arguments of their train.py, in double precision."""
    sys.modules["gym"] = types.SimpleNamespace(Wrapper=object)  # imported, but not needed here
    del sys.modules["sac_ae"]
    sys.path.insert(0, folder)
    module, utils = importlib.import_module("sac_ae"), importlib.import_module("utils")
    preprocess = utils.preprocess_obs
    utils.preprocess_obs = lambda obs: preprocess(obs.float()).double()  # it insists on float32
    torch.set_default_dtype(torch.float64)
    peer = module.SacAeAgent(
        (9, 84, 84), (ACTION_DIM,), torch.device("cpu"), hidden_dim=1024, init_temperature=0.1,
        alpha_lr=1e-4, alpha_beta=0.5, critic_tau=0.01, encoder_tau=0.05,
        decoder_latent_lambda=1e-6, decoder_weight_lambda=1e-7)
    return peer


def pairs(ours, peer):
    """{part: [(our module, their module)]} of all that has parameters."""
    def mlp(a, b):
        return [(a[i], b[i]) for i in (0, 2, 4)]

    def encoder(a, b):
        return ([(a.convs[2 * i], b.convs[i]) for i in range(4)],
                [(a.head.fc, b.fc), (a.head.norm, b.ln)])

    out = {}
    for name, a, q, b in (("", ours.encoder, ours.critic, peer.critic),
                          ("target ", ours.target_encoder, ours.target_critic, peer.critic_target)):
        out[name + "convs"], out[name + "head"] = encoder(a, b.encoder)
        out[name + "critic"] = mlp(q.q1, b.Q1.trunk) + mlp(q.q2, b.Q2.trunk)
    out["actor"] = [(ours.actor.head.fc, peer.actor.encoder.fc),
                    (ours.actor.head.norm, peer.actor.encoder.ln),
                    *mlp(ours.actor.trunk, peer.actor.trunk)]
    deconvs = [(ours.decoder.net[3 + 2 * i], peer.decoder.deconvs[i]) for i in range(4)]
    out["decoder"] = [(ours.decoder.net[0], peer.decoder.fc), *deconvs]
    return out


def make_batch(seed):
    """Coarse random images, actions and rewards."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (2, BATCH, 9, 12, 12), dtype=np.uint8).repeat(7, 3).repeat(7, 4)
    return {"obs": torch.as_tensor(images[0]), "next_obs": torch.as_tensor(images[1]),
            "action": torch.as_tensor(rng.uniform(-1, 1, (BATCH, ACTION_DIM))),
            "reward": torch.as_tensor(rng.uniform(0, 1, (BATCH, 1))),
            "discount": torch.ones(BATCH, 1)}


def noise(draw, counter):
    """Stands in for torch.randn_like and rand_like: the nth call gives the nth noise."""
    def like(x, dtype=None):
        counter[0] += 1
        return torch.as_tensor(draw(np.random.default_rng(counter[0]), tuple(x.shape)))
    return like


def main():
    peer, counter = make_peer(sys.argv[1]), [0]
    spec = script.EnvSpec((3, 84, 84), torch.uint8, ACTION_DIM)
    ours = script.Agent(script.Args(device="cpu", pretrain_updates=0), spec)
    for modules in pairs(ours, peer).values():
        for a, b in modules:
            a.load_state_dict(b.state_dict())
    script.preprocess = lambda obs: obs.double() / 255
    torch.randn_like = noise(lambda rng, shape: rng.standard_normal(shape), counter)
    torch.rand_like = noise(lambda rng, shape: rng.random(shape, np.float32).astype(float), counter)
    worst = 0.0
    for update in range(3):
        batch, log = make_batch(update), Log()
        theirs = (batch["obs"].double(), batch["action"], batch["reward"],
                  batch["next_obs"].double(), batch["discount"])
        counter[0] = 10 * update
        peer.update(types.SimpleNamespace(sample=lambda b=theirs: b), log, step=2)  # all parts due
        counter[0], ours.updates = 10 * update, 1
        metrics = ours.update(batch)
        names = {"loss/critic": "train_critic/loss", "loss/actor": "train_actor/loss",
                 "loss/alpha": "train_alpha/loss", "loss/reconstruction": "train_ae/ae_loss"}
        print(f"update {update + 1}")
        for a, b in names.items():
            one, two = metrics[a].item(), log.last[b]
            worst = max(worst, abs(one - two))
            print(f"    {a:22}{one:20.12f} {two:20.12f}   difference {abs(one - two):.1e}")
        for part, modules in pairs(ours, peer).items():
            both = [(p, q) for a, b in modules
                    for p, q in zip(a.parameters(), b.parameters(), strict=True)]
            difference = max((p - q).abs().max().item() for p, q in both)
            worst = max(worst, difference)
            print(f"    parameters of {part:15} largest difference {difference:.1e}")
        alphas = ours.log_alpha.item(), peer.log_alpha.item()
        worst = max(worst, abs(alphas[0] - alphas[1]))
    print(f"largest difference of all: {worst:.1e}")
    sys.exit(worst > 1e-5)


if __name__ == "__main__":
    main()
