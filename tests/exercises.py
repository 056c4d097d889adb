"""Five bugs to find: python tests/exercises.py N FOLDER copies scripts and tests to a new folder
and plants bug N there. Do not read on before you have looked for it."""

import argparse
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXERCISES = {  # number: (text, what stands there instead, the test that fails with it)
    1: ('self.reconstruction_loss(h, batch["obs"])',
        'self.reconstruction_loss(h, batch["next_obs"])',
        "test_sac_ae.py::test_update_is_the_five_losses_one_after_the_other"),
    2: ("moved_by_actor = self.encoder.convs.parameters() if args.actor_trains_encoder else []",
        "moved_by_actor = self.encoder.convs.parameters() if args.actor_lr else []",
        "test_sac_ae.py::test_update_is_the_five_losses_one_after_the_other"),
    3: ("last - same_episode_tail + 1  # one episode", "last  # one episode",
        "test_buffer.py::test_draws_are_uniform_over_exactly_the_valid_rows[8-8-1000]"),
    4: ("kl = balance * to_prior.clamp(min=free) + (1 - balance) * to_post.clamp(min=free)",
        "kl = (1 - balance) * to_prior.clamp(min=free) + balance * to_post.clamp(min=free)",
        "test_dreamerv2.py::test_kl_balance_and_free_nats"),
    5: ("discount = 1.0 if time_step.discount is None else float(time_step.discount)",
        "discount = 0.0 if time_step.last() else 1.0",
        "test_env.py::test_frames_are_counted_as_simulated[4-250-4]"),
}  # fmt: skip


def plant(number, folder):
    """Copies the repository to a new folder and plants a bug in every script that has its place."""
    folder = Path(folder)
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
    right, wrong, _ = EXERCISES[number]
    for path in folder.glob("*.py"):
        path.write_text(path.read_text().replace(right, wrong))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", type=int, choices=EXERCISES)
    parser.add_argument("folder")
    args = parser.parse_args()
    plant(args.number, args.folder)
    print(f"one bug is in {args.folder}; python -m pytest there, or read")
