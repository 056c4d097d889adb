"""Sixty bugs that the tests should catch, and how many they do catch:

    python tests/mutations.py            by the default tests
    python tests/mutations.py --deep     by those and the deep ones

Each bug is planted in all scripts that have its place, in a copy of the repository; then the test
files beside it are run until one test fails. Prints the bugs that nobody noticed.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAC = "sac_ae sac_gaara"
BUGS = [  # test files, what stands there, the bug
    # losses
    (f"{SAC} slac", "value = q - self.log_alpha.exp()", "value = q + self.log_alpha.exp()"),
    (f"{SAC} slac", "self.args.gamma * discount * value", "self.args.gamma * value"),
    (SAC, "F.mse_loss(q2, target)  # [SAC+AE", "F.mse_loss(q1, target)  # [SAC+AE"),
    (f"{SAC} slac", "q = torch.min(*self.target_critic(", "q = torch.max(*self.target_critic("),
    (f"{SAC} slac", "q = torch.min(*self.critic(", "q = torch.max(*self.critic("),
    (f"{SAC} slac", "(alpha * log_prob - q).mean(), log", "(alpha * log_prob + q).mean(), log"),
    (f"{SAC} slac pearl_pixels", "target_entropy = -self", "target_entropy = self"),
    (SAC, "penalty = 0.5 * z.square()", "penalty = z.square()"),
    (SAC, "(images // 8 + torch", "(images // 16 + torch"),
    (f"{SAC} pearl_pixels", "log_prob - torch.log(F", "log_prob + torch.log(F"),
    (f"{SAC} pearl_pixels", "noise.square() - log_std -", "noise.square() + log_std -"),
    (SAC, "-10 + 6 * (torch", "-10 + 5 * (torch"),
    ("sac_gaara", "z_a @ self.similarity @ z_p.T", "z_a @ z_p.T"),
    ("sac_gaara", "cross_entropy(logits, torch", "cross_entropy(logits.T, torch"),
    ("sac_gaara", "self.args.contrast_weight - self", "self.args.contrast_weight + self"),
    ("slac", "kl = kl * ~started", "kl = kl * started"),
    ("slac", "(nll * ~is_first[:, 1:, None])", "nll"),
    ("slac", "0.5 / variance * error", "1.0 / variance * error"),
    ("slac", "(z[:, :-1], action[:, 1:], z[:, 1:])", "(z[:, :-1], action[:, :-1], z[:, 1:])"),
    ("dreamerv2", "balance * to_prior.clamp", "(1 - balance) * to_prior.clamp"),
    ("dreamerv2", "categorical_kl(post.detach(), prior)", "categorical_kl(post, prior)"),
    ("dreamerv2", "-(weights[:-2] * objective)", "-(weights[1:-1] * objective)"),
    ("dreamerv2", "objective = returns[1:] +", "objective = returns[:-1] +"),
    ("dreamerv2", "target = self.args.gamma * discount", "target = discount"),
    ("dreamerv2", "((1 - lambda_) * v + lambda_ *", "(lambda_ * v + (1 - lambda_) *"),
    ("dreamerv2", "clip_grad_norm_(parameters, 100.0)", "clip_grad_norm_(parameters, 1000.0)"),
    ("dreamerv2", "torch.sigmoid(update - 1)", "torch.sigmoid(update)"),
    ("pearl_pixels", "mu.square() - 1 - var.log()).sum()", "mu.square() - 1 - var.log()).mean()"),
    ("pearl_pixels", "mse_loss(value, q - log_prob)", "mse_loss(value, q + log_prob)"),
    ("pearl_pixels", "self.args.reward_scale * reward", "reward"),
    ("pearl_pixels", "return var * (mu * precision).sum(1), var", "return mu.mean(1), var"),
    # gradients
    (SAC, "adam([*moved_by_critic, *self", "adam([*self"),
    (SAC, 'optimizers["encoder"], optimizers["decoder"])', 'optimizers["decoder"])'),
    (f"{SAC} slac", "t.lerp_(p, tau)", "t.lerp_(p, 1 - tau)"),
    (SAC, "self.target_encoder, args.encoder_tau", "self.target_encoder, args.critic_tau"),
    ("dreamerv2", "self.actor(features.detach())", "self.actor(features)"),
    ("dreamerv2", "(hard + (probs - probs.detach()))", "hard"),
    ("pearl_pixels", "x_for_q = x.detach()  # only", "x_for_q = x  # only"),
    ("pearl_pixels", "x.detach() + args.rl_weight * (x - x.detach())", "1.0 * x"),
    # cadence
    (SAC, "self.args.pretrain_updates + 1\n", "self.args.pretrain_updates\n"),
    (SAC, "since <= 0 or since % every", "since % every"),
    ("slac", "self.updates >= self.args.pretrain", "self.updates > self.args.pretrain"),
    ("dreamerv2", "(args.behavior_every_updates * args.target", "(args.target"),
    ("run", "* since) if since >= 0", "* since) if since > 0"),
    # crops, stacks and windows
    ("sac_gaara", "windows[:, :, room // 2, room // 2]", "windows[:, :, room // 2, 0]"),
    ("sac_gaara", "rng.integers(0, room + 1,", "rng.integers(0, room,"),
    ("dreamerv2", "(2, len(obs), 1), device", "(2, 1, 1), device"),
    ("buffer", "self.row - length + 1, count)", "self.row - length, count)"),
    ("buffer", "oldest = max(0, self.row - self.capacity)", "oldest = 0"),
    ("buffer", 'window, buffer.files["start"][rows][:, None])', "window, 0)"),
    ("buffer", "(name, rows + 1) for name", "(name, rows) for name"),
    ("sac_ae", "torch.cat(images, 1)  #", "torch.cat(images[::-1], 1)  #"),
    ("dreamerv2", 'batch["is_first"][:, 0] = True', "pass"),
    # seams between episodes, and the environment
    ("buffer", "self.row if step.first else", "self.row if not self.row else"),
    ("env", "sum(time_step.reward for time_step in time_steps)", "time_steps[-1].reward"),
    ("env", "and not time_steps[-1].last()", ""),
    # resume
    ("run", '"update", progress.updates)', '"update", int(1000 * time.time()))'),
    ("run", 'optimizer.load_state_dict(payload["optimizers"][name])', "pass"),
    ("run", "buffer.row = progress.row", "pass"),
    ("run", "progress.frames += step.frames", "progress.frames += args.action_repeat"),
]  # fmt: skip


def caught(files, right, wrong, deep):
    """Whether one of these test files fails with the bug."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
        planted = 0
        for path in copy.glob("*.py"):
            text = path.read_text()
            planted += text.count(right)
            path.write_text(text.replace(right, wrong))
        if not planted:
            sys.exit(f"error: no script has {right!r}")
        words = ["-m", "pytest", "-q", "-x", *(f"tests/test_{name}.py" for name in files.split())]
        words += ["-m", "deep or not deep and not slow"] * deep
        process = subprocess.run([sys.executable, *words], cwd=copy, capture_output=True)
        return process.returncode == 1  # 1: a test failed; 2 and more: pytest itself could not run


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deep", action="store_true")
    args = parser.parse_args()
    missed = [bug for bug in BUGS if not caught(*bug, args.deep)]
    for files, right, wrong in missed:
        print(f"not noticed by {files}: {right!r} -> {wrong!r}")
    print(f"{len(BUGS) - len(missed)} of {len(BUGS)} bugs are caught")


if __name__ == "__main__":
    main()
