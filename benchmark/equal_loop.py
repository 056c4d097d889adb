"""What equal.py does with the training loops of pytorch_sac_ae and SAC-GAARA: theirs and ours take
1250 steps, five episodes of cheetah-run, with the same actions. Then it compares which update was
made at which step, what it moved, and the transitions in the two replay buffers.

Both environments are our PixelEnv; theirs gets it in the place of dmc2gym.
"""

import contextlib
import importlib
import io
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

STEPS = 1250
SEED = 1


class Stub:
    """Stands in for what is not compared: a logger, a recorder of videos."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, _):
        return lambda *_, **__: None


class Env:
    """A PixelEnv as dmc2gym gives it. Episodes start, and actions are drawn, as in our loop."""

    def __init__(self, script, args):
        self.script = script
        self.env = script.PixelEnv(args)
        self.episode = self.step_number = 0
        one = np.ones(self.env.spec.action_dim)
        self.action_space = SimpleNamespace(low=-one, high=one, shape=one.shape, sample=self.draw)
        self.observation_space = SimpleNamespace(shape=self.env.spec.obs_shape, dtype=np.uint8)
        self._max_episode_steps = 1000 // args.action_repeat

    def draw(self):
        self.script.stream(SEED, "act", self.step_number)
        return (2 * torch.rand(self.env.spec.action_dim) - 1).numpy()

    def seed(self, _):
        pass

    def reset(self):
        rng = self.script.stream(SEED, "episode", self.episode)
        self.episode += 1
        return self.env.reset(rng.integers(2**32)).obs

    def step(self, action):
        self.step_number += 1
        step = self.env.step(action)
        return step.obs, step.reward, step.last, {}


def their_loop(script, module, utils, args):
    """[(step, what its update moved)], and the transitions {name: array}."""
    env = Env(script, args)
    sys.modules["dmc2gym"] = SimpleNamespace(make=lambda **_: env)
    sys.modules["logger"] = SimpleNamespace(Logger=Stub)
    sys.modules["video"] = SimpleNamespace(VideoRecorder=Stub)
    train = importlib.import_module("train")
    kind = next(getattr(module, n) for n in ("SacAeAgent", "SacCaeAgent") if hasattr(module, n))
    made, buffers = [], []

    def moves(name):
        def record(*inputs):
            made[-1][1].add(name)

        return record

    def make_agent(obs_shape, action_shape, args, device):
        agent = kind.__new__(kind)  # its update() is theirs, what it calls only takes note
        vars(agent).update(vars(args), decoder=Stub(), training=True, train=lambda *_: None)
        vars(agent).update(critic=Stub(), critic_target=Stub())
        for name in ("critic", "actor_and_alpha", "decoder"):
            setattr(agent, f"update_{name}", moves(name.partition("_")[0]))
        agent.sample_action = lambda _: env.draw()
        update = agent.update

        def counted(buffer, logger, step):
            made.append((step, set()))
            buffers[:] = [buffer]
            update(buffer, logger, step)

        agent.update = counted
        return agent

    utils.soft_update_params = moves("target")
    train.make_agent = make_agent
    words = f"--action_repeat 4 --num_train_steps {STEPS} --num_eval_episodes 0 --batch_size 1"
    words += f" --replay_buffer_capacity {STEPS}"
    argv = sys.argv
    with tempfile.TemporaryDirectory() as directory:
        sys.argv = ["train.py", *words.split(), "--work_dir", directory]
        with contextlib.redirect_stdout(io.StringIO()):
            train.main()
    sys.argv = argv
    buffer = buffers[0]
    names = {"obs": "obses", "next_obs": "next_obses", "action": "actions"}
    names |= {"reward": "rewards", "discount": "not_dones"}
    return made, {name: getattr(buffer, theirs) for name, theirs in names.items()}


def our_loop(script, args):
    """The same of our train()."""
    made, buffers = [], []
    original = script.Agent.sample

    def sample(self, buffer, rng):
        starts = buffer.files["start"][: buffer.row] == np.arange(buffer.row)
        buffers[:] = [buffer]
        made.append((buffer.row - starts.sum(), {"critic"}))

    def update(self, batch):
        due = self.cadence()._asdict()
        made[-1][1].update(name for name, is_due in due.items() if is_due)
        return {}

    def act(self, step, carry, explore):
        return 2 * torch.rand(self.spec.action_dim) - 1, None  # train() has made the key

    script.Agent.sample, script.Agent.update, script.Agent.act = sample, update, act
    script.Agent.images = lambda *_: {}
    script.evaluate = lambda *_, **__: (np.zeros(1), [])
    with tempfile.TemporaryDirectory() as directory:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            script.train(args, Path(directory), SimpleNamespace(signal=0))
        buffer = buffers[0]
        starts = buffer.files["start"][: buffer.row]
        rows = np.flatnonzero(starts[:-1] == starts[1:])
        buffer.draw = lambda *_, **__: rows
        whole = SimpleNamespace(frame_stack=args.frame_stack, batch_size=len(rows), contrast="none")
        vars(whole).update(obs_crop="centre", crop_size=args.image_size)
        batch = original(SimpleNamespace(args=whole), buffer, None)
        return made, {name: value.numpy().copy() for name, value in batch.items()}


def main(script, module, utils):
    """Prints the comparison of two loops. Gives the number of differences."""
    torch.set_default_dtype(torch.float32)
    args = script.Args(action_repeat=4, total_frames=4 * STEPS, seed=SEED)
    args.device, args.video, args.replay_capacity = "cpu", False, STEPS
    theirs, their_rows = their_loop(script, module, utils, args)
    ours, our_rows = our_loop(script, args)
    ours = [pair for pair in ours if pair[0] < STEPS]  # one more is made before the last evaluation
    print(f"the training loops over {STEPS} steps: {len(ours)} updates here, {len(theirs)} there")
    differences = abs(len(ours) - len(theirs))
    differences += sum(one != two for one, two in zip(ours, theirs, strict=False))
    print(f"    updates that differ in their step or in what they move: {differences}")
    for name, value in their_rows.items():
        different = int((value != our_rows[name]).reshape(len(value), -1).any(1).sum())
        differences += different
        print(f"    transitions that differ in {name:10}: {different} of {len(value)}")
    return differences
