"""PEARL's posterior, losses, tasks, trajectories and modes, against closed forms, loops and
positions of the simulator. "Code" is https://github.com/katerakelly/oyster."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, TRAINS, metrics, noise_step, run_here, tiny_agent, tiny_args
from torch.distributions import Normal, TanhTransform, TransformedDistribution, kl_divergence
from torch.testing import assert_close

import pearl_pixels as script

MODES = ["state", "cnn-test", "cnn", "cnn-rl", "ae", "critic"]


def test_product_of_gaussians_by_integration():
    """[PEARL product] of seven densities on a grid. The prior is none of them."""
    mu, var = torch.randn(7).double(), torch.rand(7).double() + 0.1
    mean, variance = script.product_of_gaussians(mu[None, :, None], var[None, :, None])
    x = torch.linspace(-6, 6, 60_001, dtype=torch.float64)
    density = Normal(mu[:, None], var[:, None].sqrt()).log_prob(x).sum(0).softmax(0)
    assert_close(mean.squeeze(), (density * x).sum())
    assert_close(variance.squeeze(), (density * (x - mean.squeeze()).square()).sum())


def test_kl_target_q_loss_and_v_loss():
    """[PEARL KL], a sum over tasks; [PEARL J(Q)], of scaled rewards; [PEARL J(V)]."""
    agent = tiny_agent("pearl_pixels", "--gamma 0.9 --reward-scale 5")[1]
    mu, var = torch.randn(4, 2), torch.rand(4, 2)
    exact = kl_divergence(Normal(mu, var.sqrt()), Normal(0.0, 1.0)).sum()
    assert_close(agent.kl_loss(mu, var), exact)
    x, action, z, reward, log_prob = (torch.randn(4, n) for n in (8, 2, 2, 1, 1))
    discount = torch.tensor([[1.0], [0.0], [1.0], [0.0]])  # 0: the task ends for good
    v, inputs = agent.v(torch.cat([x, z], 1)), torch.cat([x, action, z], 1)
    agent.target_v[-1].bias.data += 1  # its values are V's plus 1
    target = 5 * reward + 0.9 * discount * (v + 1)
    assert_close(agent.target(reward, discount, x, z), target)
    errors = (agent.q1(inputs) - target) ** 2 + (agent.q2(inputs) - target) ** 2
    assert_close(agent.q_loss(x, action, z, target), errors.mean())
    assert_close(agent.v_loss(x, z, target, log_prob), ((v - (target - log_prob)) ** 2).mean())


def test_policy_actor_loss_and_alpha_loss():
    """[PEARL J(pi)] with its pull towards 0; [SAC J(alpha)]; log pi is torch.distributions'."""
    agent = tiny_agent("pearl_pixels", "--critic q")[1]
    agent.log_alpha.data.fill_(math.log(0.3))
    mean, log_std, q = torch.randn(4, 2) / 2, torch.randn(4, 2) / 2 - 1, torch.randn(4, 1)
    action, log_prob = script.tanh_gaussian(mean, log_std)
    policy = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    assert_close(log_prob, policy.log_prob(action).sum(1, keepdim=True), rtol=1e-3, atol=1e-3)
    pull = 1e-3 * (mean**2).mean() + 1e-3 * (log_std**2).mean()
    loss = agent.actor_loss(q, log_prob, mean, log_std)
    assert_close(loss, (0.3 * log_prob - q).mean() + pull)
    assert_close(agent.alpha_loss(log_prob), 0.3 * (2 - log_prob).mean())


@pytest.mark.parametrize("critic", ["v", "q"])
def test_who_trains_what(critic, monkeypatch):
    """The README's table: what each gradient step of an update moves, in their order."""
    _, agent, buffer, rng = tiny_agent("pearl_pixels", f"--critic {critic}")
    steps, minimize = [], script.minimize

    def spy(loss, *optimizers):
        before = {name: value.clone() for name, value in agent.state_dict().items()}
        minimize(loss, *optimizers)
        after = agent.state_dict().items()
        moved = {name for name, value in after if not torch.equal(value, before[name])}
        steps.append({name.split(".")[0] for name in moved})

    monkeypatch.setattr(script, "minimize", spy)
    agent.update(agent.sample(buffer, rng))
    rows = TRAINS["pearl_pixels"]
    last = rows["V"] if critic == "v" else {"log_alpha"}
    assert steps == [rows["Q"] | rows["KL"] | {"cnn"}, rows["actor"], last]


def test_design_2_keeps_the_td_error_out_of_the_cnn_and_design_3_lets_it_in():
    """With rl_weight 0 design 3 is design 2."""
    cnns = []
    for flags in ("--obs-mode cnn", "--obs-mode cnn-rl --rl-weight 0", "--obs-mode cnn-rl"):
        _, agent, buffer, rng = tiny_agent("pearl_pixels", flags)
        torch.manual_seed(0)
        agent.update(agent.sample(buffer, rng))
        cnns.append(torch.cat([p.detach().flatten() for p in agent.cnn.parameters()]))
    assert torch.equal(cnns[0], cnns[1]) and not torch.equal(cnns[0], cnns[2])


def test_transitions_are_of_one_task_and_stacks_repeat_the_first_image():
    """Rows by brute force. Context comes from a list of its own; theta is the task's."""
    _, agent, buffer, rng = tiny_agent("pearl_pixels", "--meta-batch 40")
    buffer.rl, buffer.enc = [[0, 52, 78], [26]], [[0, 78], [26]]
    buffer.files["reward"][:] = np.arange(200)[:, None]  # of the row that a transition leads to
    batch = agent.sample(buffer, rng)
    tasks = (batch["context"]["theta"][:, 0] > 0).long().tolist()
    for name, lists in (("transitions", buffer.rl), ("context", buffer.enc)):
        rows = batch[name]["reward"][:, :, 0].long() - 1
        starts = rows // 26 * 26
        for task in (0, 1):
            seen = starts[[t == task for t in tasks]]
            assert set(seen.flatten().tolist()) == set(lists[task])
        for prefix, row in (("", rows), ("next_", rows + 1)):
            stack = [buffer.columns["obs"][torch.maximum(row - k, starts)] for k in (2, 1, 0)]
            assert torch.equal(batch[name][f"{prefix}obs"], torch.cat(stack, 2))
            assert torch.equal(batch[name][f"{prefix}state"], buffer.columns["state"][row])
    assert set(buffer.pick([0, 78], rng, 2000)) == {*range(25), *range(78, 103)}


@pytest.mark.deep
@pytest.mark.parametrize("critic", ["v", "q"])
@pytest.mark.parametrize("mode", MODES)
def test_update_is_algorithm_1(mode, critic):
    """Lines 14 to 21 of the paper's, with what each mode sees written out: states in units of the
    initial trajectories, raw rewards in the context, and a target encoder's next features."""
    flags = f"--obs-mode {mode} --critic {critic} --tau 0.3 --encoder-tau 0.4"
    _, ours, buffer, rng = tiny_agent("pearl_pixels", flags)
    plain = tiny_agent("pearl_pixels", flags)[1]
    batch, pool = ours.sample(buffer, rng), buffer.columns["state"][:160]
    context, part = batch["context"], {k: v.flatten(0, 1) for k, v in batch["transitions"].items()}
    ours.prepare(buffer)
    torch.manual_seed(5)
    ours.update(batch)
    torch.manual_seed(5)
    states = [part["state"], part["next_state"], context["state"]]
    x, next_x, seen = ((state - pool.mean(0)) / pool.std(0) for state in states)
    state = x
    if mode not in ("state", "cnn-test"):
        target_cnn = plain.target_cnn if mode in ("ae", "critic") else plain.cnn
        x, next_x = plain.cnn(part["obs"] / 255), target_cnn(part["next_obs"] / 255)
        seen = plain.cnn(context["obs"].flatten(0, 1) / 255).unflatten(0, (2, 8)).detach()
    mu, var = plain.infer(seen, context["action"], context["reward"], None)
    z = (mu + var.sqrt() * torch.randn(2, 2)).repeat_interleave(4, 0)
    if critic == "v":
        value = plain.target_v(torch.cat([next_x, z], 1))
    else:
        action, log_prob = script.tanh_gaussian(*plain.policy(next_x, z))
        inputs = torch.cat([next_x, action, z], 1)
        value = torch.min(plain.target_q1(inputs), plain.target_q2(inputs)) - log_prob
    target = (5 * part["reward"] + 0.99 * part["discount"] * value).detach()
    x_for_q = {"cnn": x.detach(), "cnn-rl": 0.1 * x + 0.9 * x.detach()}.get(mode, x)
    loss = plain.q_loss(x_for_q, part["action"], z, target) + 0.1 * plain.kl_loss(mu, var)
    if mode.startswith("cnn"):
        loss = loss + (plain.cnn(part["obs"] / 255) - state).square().mean()
    if mode == "ae":
        loss = loss + plain.reconstruction_loss(x, part["obs"])
    opt = plain.optimizers
    trained = {"q1", "q2", "context_encoder", "cnn", "decoder"} & opt.keys()
    script.minimize(loss, *(opt[name] for name in trained))
    x, z = x.detach(), z.detach()
    mean, log_std = plain.policy(x, z)
    action, log_prob = script.tanh_gaussian(mean, log_std)
    inputs = torch.cat([x, action, z], 1)
    q = torch.min(plain.q1(inputs), plain.q2(inputs))
    script.minimize(plain.actor_loss(q, log_prob, mean, log_std), opt["actor"])
    if critic == "v":
        script.minimize(plain.v_loss(x, z, q.detach(), log_prob.detach()), opt["v"])
    else:
        script.minimize(plain.alpha_loss(log_prob), opt["alpha"])
    for name in plain.taus:
        tau = 0.4 if name == "cnn" else 0.3
        script.soft_update(getattr(plain, name), getattr(plain, f"target_{name}"), tau)
    expected = dict(plain.named_parameters())
    assert_close(dict(ours.named_parameters()), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.deep
def test_collecting_is_lines_4_to_8_of_algorithm_1(tmp_path):
    """Code: rl_algorithm.py. A visit begins with an empty context, from which alone z is inferred.
    The first trajectory after the prior's, and the first extra one, are the prior's still."""
    args = tiny_args(script, "--obs-mode state --posterior-steps 50 --extra-steps 50")
    env = script.PixelEnv(args)
    agent = script.Agent(args, env.spec)
    buffer = script.TaskBuffer(tmp_path, 1000, args, env.spec)
    visit = [(True, False, True), (False, False, True), (False, True, True)]
    visit += [(False, False, False), (False, True, False)]  # begins, z is inferred, for the context
    assert [job[1:] for job in script.plan(args, 1)] == 2 * visit  # two tasks
    contexts = []

    def posterior(context):
        contexts.append(set(context["reward"].flatten().tolist()))
        return torch.zeros(1, 2), torch.ones(1, 2)

    agent.posterior = posterior
    for job in visit + visit[:1]:
        script.collect(agent, env, buffer, (1, *job), np.random.default_rng(0))
        assert env.env.task.theta == script.split(args)[0][1]
    assert buffer.rl == [[], [0, 26, 52, 78, 104, 130]] and buffer.enc == [[], [130]]
    for context, rows in zip(contexts, (52, 78), strict=True):
        assert context <= set(buffer.files["reward"][:rows, 0].tolist())


@pytest.mark.deep
def test_evaluation_is_algorithm_2():
    """Trajectory k is played without exploration, by z from all before it; the first by a new z."""
    args = tiny_args(script, "--obs-mode state --eval-episodes 2")
    env = script.PixelEnv(args)
    agent = script.Agent(args, env.spec)
    totals, zs, act = [], [], agent.act

    def infer(x, action, reward, next_x):
        totals.append(reward.sum().item())
        assert torch.equal(x[:, 1], next_x[:, 0])
        return torch.full((1, 2), float(x.shape[1])), torch.zeros(1, 2)

    def spy(step, carry, explore):
        zs.append(carry["z"][0, 0].item())
        assert not explore
        return act(step, carry, explore)

    agent.infer, agent.act = infer, spy
    returns = script.evaluate(agent, env, [-1.5, 1.5], SimpleNamespace(signal=0))[0]
    np.testing.assert_allclose(totals, returns.cumsum(2).ravel(), rtol=1e-4)
    z = np.reshape(zs, (4, 3, 26))  # 25 steps, and what is seen at the end
    assert (z[:, 1] == 25).all() and (z[:, 2] == 50).all()
    assert (z[:, 0] == z[:, 0, :1]).all() and len(set(z[:, 0, 0])) == 4


@pytest.mark.deep
@pytest.mark.parametrize("env_id", script.FAMILIES)
def test_families_are_what_they_say_and_nothing_shows_theta(env_id):
    """Steps of a trajectory, no terminal, rewards from the simulator's positions before and after a
    step and its control. States and images depend on theta only where the dynamics do."""
    rewards = {
        "cheetah-vel": lambda a, b, u, th: -abs((b[0] - a[0]) / 0.05 - th) - 0.05 * (u @ u),
        "pendulum-goal": lambda a, b, u, th: math.cos(b[0] - math.pi - th),
        "point-goal": lambda a, b, u, th: -math.dist(b, (0.2 * math.cos(th), 0.2 * math.sin(th))),
    }
    args = script.Args(env_id=env_id, render="fast", device="cpu")
    family, (train, test), runs = script.FAMILIES[env_id], script.split(args), []
    assert train == test or (len(train), len(test)) == (20, 10)
    for theta in train[:2]:
        env, rng = script.PixelEnv(args), np.random.default_rng(0)
        env.env.task.theta = theta
        steps = [env.reset(3)]
        while not steps[-1].last:
            before = env.env.physics.data.qpos.copy()
            action = rng.uniform(-1, 1, env.spec.action_dim)
            env.pixels = len(steps) < 5
            steps.append(env.step(action))
            if env_id in rewards:
                control = env.low + (action + 1) / 2 * (env.high - env.low)
                reward = rewards[env_id](before, env.env.physics.data.qpos, control, theta)
                assert steps[-1].reward == pytest.approx(reward, abs=1e-5)
        assert len(steps) == family.steps + 1 and all(step.discount == 1 for step in steps)
        runs.append(np.concatenate([np.ravel(v) for step in steps for v in (step.obs, step.state)]))
    assert np.array_equal(*runs) == (family.reward is not script.suite_reward)


@pytest.mark.deep
def test_the_oracle_knows_the_task_and_design_1_acts_by_the_true_state_in_training():
    """--oracle: z is theta, without noise. Design 1: another CNN changes no action."""
    agent = tiny_agent("pearl_pixels", "--oracle")[1]
    assert_close(agent.prior(0.7), (torch.tensor([[0.7, 0.0]]), torch.zeros(1, 2)))
    assert_close(tiny_agent("pearl_pixels")[1].prior(0.7), (torch.zeros(1, 2), torch.ones(1, 2)))
    _, agent, buffer, rng = tiny_agent("pearl_pixels", "--obs-mode cnn-test")
    step = noise_step(script, agent.spec, rng, True)
    for true_state in (True, False):
        actions = []
        for scale in (1.0, 2.0):
            agent.cnn[0].weight.data *= scale
            carry = {"z": torch.zeros(1, 2), "true_state": true_state}
            actions.append(agent.act(step, carry, explore=False)[0])
        assert torch.equal(*actions) == true_state


@pytest.mark.deep
def test_score_has_bootstrap_intervals_and_the_gain_of_two_trajectories():
    """Intervals are 1.96 standard errors of normal returns. The gain's error is over tasks, as the
    same episode again tells nothing new; of two tasks, which are all there are, over episodes."""
    returns = np.random.default_rng(0).normal(3.0, 1.0, (400, 1, 3)) + np.array([0.0, 0.0, 5.0])
    mean, low, high = np.transpose(script.score(returns)["return_by_context"])
    np.testing.assert_allclose(mean, returns.mean((0, 1)))
    np.testing.assert_allclose(high - low, 2 * 1.96 / 20, rtol=0.2)
    gains = returns[:20, 0, 2] - returns[:20, 0, 0]
    expected = [gains.mean(), gains.std(ddof=1) / 20**0.5]
    for some in (returns[:20].reshape(2, 10, 3), np.repeat(returns[:20], 50, 1)):
        assert script.score(some)["gain"] == pytest.approx(expected)


@pytest.mark.deep
def test_acting_sees_the_stacks_of_training():
    """The images before a step, and the first one again where there are none."""
    _, agent, buffer, rng = tiny_agent("pearl_pixels")
    stacks = buffer.gather_transitions(np.arange(26, 36)[None], 3)["obs"][0]
    carry = {"z": torch.zeros(1, 2)}
    for t in range(10):
        step = noise_step(script, agent.spec, rng, t == 0)._replace(obs=buffer.files["obs"][26 + t])
        carry = agent.act(step, carry, explore=False)[1]
        assert torch.equal(carry["stack"][0], stacks[t])


@pytest.mark.deep
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_runs(mode, tmp_path):
    """And reports a CNN's error."""
    flags = f"{TINY['pearl_pixels']} --obs-mode {mode} --total-frames 150 --eval-every-frames 150 "
    flags += f"--cnn-pretrain-updates 3 --runs-dir {tmp_path}"
    row = metrics(run_here("pearl_pixels", flags)["run_dir"])[-1]
    assert ("eval/cnn_error" in row) == mode.startswith("cnn")
