"""Environments for --env-id tests/own_tasks.py:function, good ones and bad ones."""

import numpy as np
from dm_control import manipulation, suite
from dm_control.rl import control
from dm_control.suite import cartpole
from dm_env import specs


def reach(random):
    """Of dm_control's composer, which builds its physics anew at every reset."""
    return manipulation.load("reach_site_features", seed=random)


class Falling(cartpole.Balance):
    """Ends for good when the pole leans by more than 0.2 rad."""

    def get_termination(self, physics):
        leans = physics.pole_angle_cosine().min() < np.cos(0.2)
        return 0.0 if leans else None


def falling(random):
    """Its episodes end after some 30 frames, with a discount of 0."""
    physics = cartpole.Physics.from_xml_string(*cartpole.get_model_and_assets())
    task = Falling(swing_up=False, sparse=False, random=random)
    return control.Environment(physics, task, time_limit=5)


def without_physics(random):
    return suite.load("cartpole", "balance").task


def without_bounds(random):
    env = suite.load("cartpole", "balance")
    env.action_spec = lambda: specs.Array((1,), float)
    return env
