"""OpenAI Gym's HalfCheetah, Walker2d, Hopper and Ant as dm_control environments, to see images:

    python slac.py --env-id benchmark/gym_tasks.py:half_cheetah --action-repeat 1
    python slac.py --env-id benchmark/gym_tasks.py:walker2d --action-repeat 4
    python slac.py --env-id benchmark/gym_tasks.py:hopper --action-repeat 2
    python slac.py --env-id benchmark/gym_tasks.py:ant --action-repeat 4

The SLAC paper has these repeats, and --warmup-steps 10000; studies.py has them as slac-gym.

Models are gymnasium's (benchmark/requirements.txt). Rewards and terminations are those of its -v4
tasks, which are the -v2 tasks of the SLAC paper, Ant without costs of contact. Episodes end for
good when a robot falls, with a discount of 0, or after 1000 control steps. The camera is "track".
"""

import collections
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
from dm_control import mujoco as dm_mujoco
from dm_control.rl import control
from dm_control.suite import base

MODELS = Path(gymnasium.__file__).parent / "envs/mujoco/assets"


class Physics(dm_mujoco.Physics):
    """Steps as gymnasium does. dm_control would then update positions of bodies, too, while Gym's
    rewards come from the positions before the last integration step."""

    def step(self, nstep=1):
        with self.check_invalid_state():
            mujoco.mj_step(self.model.ptr, self.data.ptr, nstep)
            mujoco.mj_rnePostConstraint(self.model.ptr, self.data.ptr)


class Locomotion(base.Task):
    """Reward: velocity to the front, a bonus for every step, a cost of large actions."""

    def __init__(self, random, noise, control_cost, bonus, hidden, falls):
        super().__init__(random)
        self.noise = noise  # draws the disturbances of positions and velocities at the start
        self.control_cost = control_cost
        self.bonus = bonus
        self.hidden = hidden  # so many first positions, those in the plane, are not observed
        self.falls = falls  # whether positions and velocities are those of a robot that fell

    def initialize_episode(self, physics):
        data = physics.data
        for values, noise in zip((data.qpos, data.qvel), self.noise, strict=True):
            values += noise(self.random, len(values))
        super().initialize_episode(physics)

    def x(self, physics):
        """Position to the front [m]: the torso's if it is free, else the first joint's."""
        free = physics.model.jnt_type[0] == mujoco.mjtJoint.mjJNT_FREE
        return physics.named.data.xpos["torso", "x"] if free else physics.data.qpos[0]

    def before_step(self, action, physics):
        super().before_step(action, physics)
        self.x_before = self.x(physics)

    def get_observation(self, physics):
        position = physics.data.qpos[self.hidden :].copy()
        return collections.OrderedDict(position=position, velocity=physics.data.qvel.copy())

    def get_reward(self, physics):
        velocity = (self.x(physics) - self.x_before) / self.control_timestep
        return velocity + self.bonus - self.control_cost * np.square(physics.data.ctrl).sum()

    def get_termination(self, physics):
        return 0.0 if self.falls(physics.data.qpos, physics.data.qvel) else None


def uniform(size):
    """Noise in [-size, size]."""
    return lambda random, n: random.uniform(-size, size, n)


def gaussian(size):
    """Noise with a standard deviation."""
    return lambda random, n: size * random.standard_normal(n)


def make(model, random, substeps, noise, **options):
    """The environment of a gymnasium model whose control step is so many simulation steps."""
    physics = Physics.from_xml_path(str(MODELS / model))
    task = Locomotion(random, noise, **options)
    task.control_timestep = substeps * physics.timestep()
    limit = 1000 * task.control_timestep
    return control.Environment(physics, task, limit, task.control_timestep)


def half_cheetah(random):
    """It never ends before its time."""
    noise = uniform(0.1), gaussian(0.1)
    options = {"control_cost": 0.1, "bonus": 0.0, "hidden": 1, "falls": lambda *_: False}
    return make("half_cheetah.xml", random, 5, noise, **options)


def walker2d(random):
    """It falls below 0.8 m, above 2 m, or when it leans by more than 1 rad."""

    def falls(position, _):
        return not (0.8 < position[1] < 2 and -1 < position[2] < 1)

    noise = uniform(0.005), uniform(0.005)
    options = {"control_cost": 1e-3, "bonus": 1.0, "hidden": 1, "falls": falls}
    return make("walker2d.xml", random, 4, noise, **options)


def hopper(random):
    """It falls below 0.7 m, when it leans by more than 0.2 rad, or when it flies apart."""

    def falls(position, velocity):
        state = np.concatenate([position, velocity])[2:]
        upright = position[1] > 0.7 and -0.2 < position[2] < 0.2
        return not (upright and (np.abs(state) < 100).all())

    noise = uniform(0.005), uniform(0.005)
    options = {"control_cost": 1e-3, "bonus": 1.0, "hidden": 1, "falls": falls}
    return make("hopper.xml", random, 4, noise, **options)


def ant(random):
    """It falls below 0.2 m or above 1 m."""

    def falls(position, velocity):
        finite = np.isfinite(position).all() and np.isfinite(velocity).all()
        return not (finite and 0.2 <= position[2] <= 1)

    noise = uniform(0.1), gaussian(0.1)
    options = {"control_cost": 0.5, "bonus": 1.0, "hidden": 2, "falls": falls}
    return make("ant.xml", random, 5, noise, **options)
