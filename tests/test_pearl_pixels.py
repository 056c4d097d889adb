"""PEARL's posterior, losses, tasks, trajectories and modes, against closed forms, loops and
positions of the simulator. "Code" is https://github.com/katerakelly/oyster."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, TRAINS, metrics, noise_step, run_here, tiny_agent, tiny_args
from dm_control import suite
from torch.distributions import Normal, kl_divergence

import pearl_pixels as script

MODES = ["state", "cnn-test", "cnn", "cnn-rl", "ae", "critic"]
GO_ON = SimpleNamespace(signal=0)  # no signal came


def make_agent(flags=""):
    """A small agent, and a batch: two tasks, four transitions of each and eight of context. States
    have 4 numbers, features 8, z 2."""
    _, agent, buffer, rng = tiny_agent("pearl_pixels", flags)
    return agent, agent.sample(buffer, rng)


def deep_but(kept, values):
    """Parameters of which only some belong to the default tests."""
    return [v if v in kept else pytest.param(v, marks=pytest.mark.deep) for v in values]


def test_product_of_gaussians_by_pairwise_fusion_and_by_integration():
    """[PEARL product] The prior is not a factor: one factor stays what it is."""
    mu = torch.randn(2, 7, 3, dtype=torch.float64)
    var = torch.rand(2, 7, 3, dtype=torch.float64) + 0.1
    mean, variance = script.product_of_gaussians(mu, var)
    m, v = mu[:, 0], var[:, 0]
    torch.testing.assert_close(script.product_of_gaussians(mu[:, :1], var[:, :1]), (m, v))
    for n in range(1, 7):
        m, v = (m * var[:, n] + mu[:, n] * v) / (v + var[:, n]), v * var[:, n] / (v + var[:, n])
    torch.testing.assert_close((mean, variance), (m, v))
    x = torch.linspace(-6, 6, 60_001, dtype=torch.float64)
    density = torch.exp(sum(Normal(mu[0, n, 0], var[0, n, 0].sqrt()).log_prob(x) for n in range(7)))
    density /= density.sum()
    assert mean[0, 0].item() == pytest.approx((density * x).sum().item(), abs=1e-9)
    second = (density * (x - mean[0, 0]) ** 2).sum().item()
    assert variance[0, 0].item() == pytest.approx(second, abs=1e-9)


def test_the_posterior_does_not_depend_on_the_order_and_keeps_tasks_apart():
    """Twice the same context halves the variance; another task's context changes nothing. At first
    each factor's variance is softplus(0), as the last layer starts near zero."""
    agent, _ = make_agent("--obs-mode state")
    context = [torch.randn(3, 256, n) for n in (4, 2, 1, 4)]
    mu, var = agent.infer(*context)
    torch.testing.assert_close(var, torch.full_like(var, math.log(2) / 256), rtol=0.05, atol=0)
    assert agent.actor[-1].weight.abs().max() <= 1e-3 < agent.q1[-1].weight.abs().max() <= 3e-3
    order = torch.randperm(256)
    shuffled = agent.infer(*(c[:, order] for c in context))
    torch.testing.assert_close(shuffled, (mu, var), rtol=1e-5, atol=1e-6)
    twice = agent.infer(*(torch.cat([c, c], 1) for c in context))
    torch.testing.assert_close(twice, (mu, var / 2), rtol=1e-5, atol=1e-6)
    context[3] += 1  # the next observation, which only --next-obs-in-context sees
    assert torch.equal(agent.infer(*context)[0], mu)
    context[2][1] += 1
    other = agent.infer(*context)[0]
    assert torch.equal(other[[0, 2]], mu[[0, 2]]) and not torch.equal(other[1], mu[1])
    agent, _ = make_agent("--obs-mode state --next-obs-in-context")
    before = agent.infer(*context)[0]
    context[3] += 1
    assert not torch.equal(agent.infer(*context)[0], before)


def test_kl_is_a_sum_over_tasks():
    """[PEARL KL] torch.distributions' KL to N(0, I). The prior of z; the oracle's."""
    agent, _ = make_agent()
    mu, var = torch.randn(4, 3), torch.rand(4, 3) + 0.1
    exact = kl_divergence(Normal(mu, var.sqrt()), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(agent.kl_loss(mu, var), exact)
    assert agent.kl_loss(*agent.prior(0.7)).item() == 0
    agent, batch = make_agent("--oracle")
    mu, var = agent.prior((0.7, -0.2))
    torch.testing.assert_close(mu, torch.tensor([[0.7, -0.2]]))
    assert (var == 0).all() and "loss/kl" not in agent.update(batch)
    mu, _ = agent.posterior(batch["context"])
    assert set(mu.flatten().tolist()) <= {np.float32(-math.pi / 2), np.float32(math.pi / 2), 0.0}


def column(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None]


def test_the_target():
    """[PEARL J(Q)] reward_scale r + gamma discount V(s'); with two Qs min Q - alpha log pi. A time
    limit bootstraps, a terminal does not."""
    reward, discount = column(1, 2), column(1, 0)
    x, z = torch.zeros(2, 4), torch.zeros(2, 2)
    agent, _ = make_agent("--obs-mode state --gamma 0.9 --reward-scale 5")
    agent.target_v.forward = lambda inputs: column(10, 20)
    torch.testing.assert_close(agent.target(reward, discount, x, z), column(5 + 9, 10))
    agent, _ = make_agent("--obs-mode state --gamma 0.9 --reward-scale 5 --critic q")
    agent.log_alpha.data.fill_(math.log(0.5))
    agent.target_q1.forward = lambda inputs: column(7, 7)
    agent.target_q2.forward = lambda inputs: column(6, 6)
    torch.manual_seed(0)
    target = agent.target(reward, discount, x, z)
    torch.manual_seed(0)
    log_prob = script.tanh_gaussian(*agent.policy(x, z))[1]
    expected = 5 * reward + 0.9 * discount * (6 - 0.5 * log_prob)
    torch.testing.assert_close(target, expected)


def test_losses_by_hand():
    """[PEARL J(Q)], [PEARL J(V)], [PEARL J(pi)] with its pull, [SAC J(alpha)], [SAC+AE J(RAE)]."""
    agent, _ = make_agent("--obs-mode ae --critic q --latent-weight 0.1")
    q1, q2, y, log_prob = (torch.randn(4, 1) for _ in range(4))
    agent.q1.forward = lambda inputs: q1
    agent.q2.forward = lambda inputs: q2
    x, a, z = torch.randn(4, 8), torch.zeros(4, 2), torch.zeros(4, 2)
    expected = ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()
    torch.testing.assert_close(agent.q_loss(x, a, z, y), expected)
    mean, log_std = torch.randn(4, 2), torch.randn(4, 2)
    agent.log_alpha.data.fill_(math.log(0.3))
    pull = 1e-3 * (mean**2).mean() + 1e-3 * (log_std**2).mean()
    loss = agent.actor_loss(y, log_prob, mean, log_std)
    torch.testing.assert_close(loss, (0.3 * log_prob - y).mean() + pull)
    torch.testing.assert_close(agent.alpha_loss(log_prob), 0.3 * (2 - log_prob).mean())
    images, level = torch.full((4, 9, 24, 24), 80, dtype=torch.uint8), 10 / 32 - 0.5
    agent.decoder.forward = lambda _: torch.full(images.shape, level + 1 / 64)
    expected = 1 / (12 * 32**2) + 0.1 * 0.5 * (x**2).sum(1).mean()  # the noise's variance
    torch.testing.assert_close(agent.reconstruction_loss(x, images), expected, rtol=1e-3, atol=0)
    agent, _ = make_agent()
    agent.v.forward = lambda inputs: q1
    expected = ((q1 - (y - log_prob)) ** 2).mean()
    torch.testing.assert_close(agent.v_loss(x, z, y, log_prob), expected)
    loss = agent.actor_loss(y, log_prob, mean, log_std)  # the temperature is 1
    torch.testing.assert_close(loss, (log_prob - y).mean() + pull)
    agent.actor[-1].bias.data = torch.tensor([0.0, 0.0, 50.0, -50.0])
    assert agent.policy(torch.zeros(1, 8), z[:1])[1].tolist() == [[2, -20]]


@pytest.mark.parametrize("critic", ["v", "q"])
@pytest.mark.parametrize("mode", deep_but(["critic", "cnn"], MODES))
def test_who_trains_what(mode, critic, monkeypatch):
    """The README's table: what each gradient step of an update moves, in their order."""
    agent, batch = make_agent(f"--obs-mode {mode} --critic {critic}")
    steps, minimize = [], script.minimize

    def spy(loss, *optimizers):
        before = {name: value.clone() for name, value in agent.state_dict().items()}
        minimize(loss, *optimizers)
        after = agent.state_dict().items()
        steps.append({n.split(".")[0] for n, value in after if not torch.equal(value, before[n])})

    monkeypatch.setattr(script, "minimize", spy)
    agent.update(batch)
    rows = TRAINS["pearl_pixels"]
    images = {"state": set(), "ae": {"cnn", "decoder"}}.get(mode, {"cnn"})
    last = rows["V"] if critic == "v" else {"log_alpha"}
    assert steps == [rows["Q"] | rows["KL"] | images, rows["actor"], last]


@pytest.mark.parametrize("critic", ["v", "q"])
@pytest.mark.parametrize("mode", deep_but(["critic", "cnn-rl"], MODES))
def test_update_is_algorithm_1(mode, critic):
    """Lines 14 to 21 of the paper's, with what each mode sees written out. z of task t is that of
    all its rows; the next x comes from the target encoder where x is features; states are in units
    of the initial trajectories."""
    flags = f"--obs-mode {mode} --critic {critic} --tau 0.3 --encoder-tau 0.4"
    _, ours, buffer, rng = tiny_agent("pearl_pixels", flags)
    plain, _ = make_agent(flags)
    ours.prepare(buffer)
    plain.prepare(buffer)
    batch = ours.sample(buffer, rng)
    torch.manual_seed(5)
    ours.update(batch)

    torch.manual_seed(5)
    opt, pool = plain.optimizers, buffer.columns["state"][:160]
    features, states = mode in ("ae", "critic"), mode in ("state", "cnn-test")
    mu, var = plain.posterior(batch["context"])
    z = (mu + var.sqrt() * torch.randn(2, 2))[[0, 0, 0, 0, 1, 1, 1, 1]]
    part = {name: values.flatten(0, 1) for name, values in batch["transitions"].items()}
    state = (part["state"] - pool.mean(0)) / pool.std(0)
    next_state = (part["next_state"] - pool.mean(0)) / pool.std(0)
    x = state if states else plain.cnn(part["obs"] / 255)
    with torch.no_grad():
        encoder = plain.target_cnn if features else None if states else plain.cnn
        next_x = next_state if states else encoder(part["next_obs"] / 255)
        target = plain.target(part["reward"], part["discount"], next_x, z)
    for_q = x.detach() if mode == "cnn" else x
    if mode == "cnn-rl":
        for_q = x.clone()
        for_q.register_hook(lambda gradient: 0.1 * gradient)  # rl_weight
    loss = plain.q_loss(for_q, part["action"], z, target) + 0.1 * plain.kl_loss(mu, var)
    names = ["q1", "q2", "context_encoder", *([] if mode == "state" else ["cnn"])]
    if mode.startswith("cnn"):
        loss = loss + (plain.cnn(part["obs"] / 255) - state).square().mean()
    if mode == "ae":
        loss = loss + plain.reconstruction_loss(x, part["obs"])
        names.append("decoder")
    script.minimize(loss, *(opt[name] for name in names))
    x, z = x.detach(), z.detach()
    mean, log_std = plain.policy(x, z)
    action, log_prob = script.tanh_gaussian(mean, log_std)
    q = torch.min(*(net(torch.cat([x, action, z], 1)) for net in (plain.q1, plain.q2)))
    script.minimize(plain.actor_loss(q, log_prob, mean, log_std), opt["actor"])
    if critic == "v":
        script.minimize(plain.v_loss(x, z, q.detach(), log_prob.detach()), opt["v"])
    else:
        script.minimize(plain.alpha_loss(log_prob), opt["alpha"])
    taus = {"v": 0.3} if critic == "v" else {"q1": 0.3, "q2": 0.3}
    for name, tau in (taus | ({"cnn": 0.4} if features else {})).items():
        script.soft_update(getattr(plain, name), getattr(plain, f"target_{name}"), tau)
    for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("mode", deep_but(["cnn", "critic"], MODES))
def test_context_is_what_the_mode_sees(mode):
    """And raw rewards: only targets have the reward's scale."""
    agent, batch = make_agent(f"--obs-mode {mode} --next-obs-in-context")
    context, asked = batch["context"], []
    agent.infer = lambda *inputs: asked.extend(inputs)
    agent.posterior(context)
    x, action, reward, next_x = asked
    for ours, prefix in ((x, ""), (next_x, "next_")):
        wanted = context[f"{prefix}state"]
        if mode not in ("state", "cnn-test"):
            wanted = agent.cnn(context[f"{prefix}obs"].flatten(0, 1) / 255).unflatten(0, (2, 8))
        torch.testing.assert_close(ours, wanted.detach())
    assert torch.equal(action, context["action"]) and torch.equal(reward, context["reward"])


@pytest.mark.parametrize("mode", deep_but(["critic"], ["state", "critic"]))
def test_transitions_are_of_one_task_and_stacks_repeat_the_first_image(mode):
    """Context comes from a list of its own; theta is the task's."""
    _, agent, buffer, rng = tiny_agent("pearl_pixels", f"--obs-mode {mode} --meta-batch 40")
    buffer.rl, buffer.enc = [[0, 52, 78], [26]], [[0, 78], [26]]
    buffer.files["reward"][:] = np.arange(200)[:, None]  # of the row that a transition leads to
    batch = agent.sample(buffer, rng)
    tasks = (batch["context"]["theta"][:, 0] > 0).long()
    assert set(tasks.tolist()) == {0, 1}
    for name, lists in (("transitions", buffer.rl), ("context", buffer.enc)):
        part = {key: values.flatten(0, 1) for key, values in batch[name].items() if key != "theta"}
        rows = part["reward"][:, 0].long().numpy() - 1
        starts = rows // 26 * 26
        owners = tasks.repeat_interleave(len(rows) // 40).tolist()
        assert all(start in lists[task] for start, task in zip(starts, owners, strict=True))
        for shift, prefix in ((0, ""), (1, "next_")):
            assert torch.equal(part[f"{prefix}state"], buffer.columns["state"][rows + shift])
            stack = [np.maximum(rows + shift - k, starts) for k in (2, 1, 0)]
            images = [buffer.columns["obs"][i] for i in (stack if mode == "critic" else stack[2:])]
            assert torch.equal(part[f"{prefix}obs"], torch.cat(images, 1))
    assert set(buffer.pick([0, 78], rng, 2000)) == {*range(25), *range(78, 103)}


def test_acting_sees_what_training_sees():
    """The stack of a Step's image, as the replay buffer makes it."""
    _, agent, buffer, rng = tiny_agent("pearl_pixels")
    obs = buffer.gather_transitions(np.arange(26, 36)[None], 3)["obs"][0]
    carry = {"z": torch.zeros(1, 2)}
    for t in range(10):
        step = noise_step(script, agent.spec, rng, t == 0)
        step = step._replace(obs=buffer.files["obs"][26 + t])
        _, carry = agent.act(step, carry, explore=False)
        assert torch.equal(carry["stack"][0], obs[t])


def losses_of(flags, noise=False):
    """Metrics of two updates, with the CNN as noise or not."""
    _, agent, buffer, rng = tiny_agent("pearl_pixels", flags)
    for p in agent.cnn.parameters() if noise else ():
        p.data.normal_()
    torch.manual_seed(0)
    return [agent.update(agent.sample(buffer, rng)) for _ in range(2)], agent


def test_design_1_trains_on_the_true_state_alone():
    """A CNN of noise changes nothing but its own loss; without `true_state` acting does use it."""
    (one, a), (two, b) = (losses_of("--obs-mode cnn-test", noise) for noise in (False, True))
    for m, n in zip(one, two, strict=True):
        assert {name for name in m if not torch.equal(m[name], n[name])} == {"loss/cnn"}
    step = noise_step(script, a.spec, np.random.default_rng(0), True)
    for true_state in (True, False):
        carry = {"z": torch.zeros(1, 2), "true_state": true_state}
        x, y = (agent.act(step, carry, False)[1]["x"] for agent in (a, b))
        assert torch.equal(x, y) == true_state


def test_design_2_keeps_the_td_error_out_of_the_cnn_and_design_3_lets_it_in():
    """With rl_weight 0 design 3 is design 2. The logged norms are those of the two gradients."""

    def cnn(flags):
        metrics, agent = losses_of(flags)
        return torch.cat([p.detach().flatten() for p in agent.cnn.parameters()]), metrics

    two, _ = cnn("--obs-mode cnn")
    none, _ = cnn("--obs-mode cnn-rl --rl-weight 0")
    half, metrics = cnn("--obs-mode cnn-rl --rl-weight 0.5")
    assert torch.equal(two, none) and not torch.equal(two, half)
    assert all(m["stat/x_grad_q"] > 0 and m["stat/x_grad_cnn"] > 0 for m in metrics)


@pytest.mark.parametrize("mode", ["ae", "critic"])
def test_end_to_end_modes_never_see_the_state(mode):
    """It may be NaN."""
    _, agent, buffer, rng = tiny_agent("pearl_pixels", f"--obs-mode {mode}")
    buffer.columns["state"].fill_(math.nan)
    metrics = agent.update(agent.sample(buffer, rng))
    assert all(value.isfinite() for value in metrics.values())
    step = noise_step(script, agent.spec, rng, True)
    step = step._replace(state=np.full(4, np.nan, np.float32))
    assert agent.act(step, {"z": torch.zeros(1, 2)}, explore=True)[0].isfinite().all()


def ready(folder, flags=""):
    """An environment, an agent from states, and an empty buffer."""
    args = tiny_args(script, f"--obs-mode state {flags}")
    env = script.PixelEnv(args)
    buffer = script.TaskBuffer(folder, 1000, args, env.spec)
    return env, script.Agent(args, env.spec), buffer


def test_the_trajectories_of_an_iteration():
    """Code: rl_algorithm.py. Per visit the prior's; the posterior's, for the context, too; and
    extra ones, for RL alone. The first of either kind is the prior's still."""
    flags = "--initial-steps 70 --prior-steps 50 --posterior-steps 50 --extra-steps 75"
    args = tiny_args(script, f"{flags} --tasks-per-iteration 3")
    initial = [(task, False, False, True) for task in (0, 0, 0, 1, 1, 1)]
    assert script.plan(args, 0) == initial
    kinds = [(False, True)] * 2 + [(False, True), (True, True)] + [(False, False)]
    kinds += [(True, False)] * 2
    chosen = []
    for iteration in range(1, 40):
        jobs = script.plan(args, iteration)
        chosen += [jobs[i][0] for i in (0, 7, 14)]
        expected = [(task, i == 0, *kind) for task in chosen[-3:] for i, kind in enumerate(kinds)]
        assert jobs == expected
    assert 30 < sum(chosen) < 90  # of 117, with replacement


def test_collecting_is_lines_4_to_8_of_algorithm_1(tmp_path):
    """The task's theta and lists; z from the prior, or from the posterior of the context's list
    alone, and one for the whole trajectory; a visit begins with an empty context."""
    env, agent, buffer = ready(tmp_path)
    thetas, rng = script.split(agent.args)[0], np.random.default_rng(0)
    jobs = [(0, 1, 0, 1), (0, 0, 0, 1), (0, 0, 0, 0), (1, 1, 0, 1)]
    for task, begins, inferred, for_context in jobs:
        total = script.collect(agent, env, buffer, (task, begins, inferred, for_context), rng)
        assert env.env.task.theta == thetas[task]
        reward = buffer.files["reward"][buffer.row - 26 : buffer.row]
        assert total == pytest.approx(reward.sum(), rel=1e-5)
    assert (buffer.rl, buffer.enc) == ([[0, 26, 52], [78]], [[0, 26], [78]])

    buffer.columns["reward"][52:78] = 99.0  # of the trajectory that is not for the context
    asked, zs, act = [], [], agent.act

    def posterior(context):
        asked.append(context["reward"])
        return torch.full((1, 2), 7.0), torch.zeros(1, 2)

    def spy(step, carry, explore):
        zs.append((carry["z"][0, 0].item(), explore))
        return act(step, carry, explore)

    agent.posterior, agent.act = posterior, spy
    script.collect(agent, env, buffer, (0, False, True, False), rng)
    assert asked[0].shape == (1, 8, 1) and asked[0].max() < 99
    assert zs == [(7.0, True)] * 25 + [(7.0, False)]  # the last one sees the last x
    script.collect(agent, env, buffer, (0, True, False, True), rng)
    assert len(asked) == 1 and buffer.enc == [[130], [78]] and len({z for z, _ in zs[26:]}) == 1


def test_evaluation_is_algorithm_2(tmp_path):
    """Trajectory k is played without exploration by z from all trajectories before, and each
    adaptation starts with the prior anew."""
    env, agent, _ = ready(tmp_path, "--eval-episodes 2")
    sizes, total, zs, act = [], [], [], agent.act

    def infer(x, a, r, n):
        sizes.append(x.shape[1])
        total.append(r.sum().item())
        inside = [i for i in range(x.shape[1] - 1) if (i + 1) % 25]
        assert torch.equal(n[:, inside], x[:, [i + 1 for i in inside]])  # the next step's x
        return torch.full((1, 2), float(x.shape[1])), torch.zeros(1, 2)

    def spy(step, carry, explore):
        assert not explore
        zs.append(carry["z"][0, 0].item())
        return act(step, carry, explore)

    agent.infer, agent.act = infer, spy
    returns, means, errors, film = script.evaluate(agent, env, [-1.5, 1.5], GO_ON)
    assert returns.shape == (2, 2, 3) and means.shape == (2, 2, 2) and errors == film == []
    assert sizes == [25, 50, 75] * 4
    np.testing.assert_allclose(np.reshape(total, (2, 2, 3)), returns.cumsum(2), rtol=1e-4)
    z = np.reshape(zs, (4, 3, 26))  # and what is seen at the end
    assert (z[:, 1] == 25).all() and (z[:, 2] == 50).all()
    assert (z[:, 0] == z[:, 0, :1]).all() and len(set(z[:, 0, 0])) == 4  # one each
    assert np.array_equal(returns, script.evaluate(agent, env, [-1.5, 1.5], GO_ON)[0])


@pytest.mark.deep
def test_score_has_bootstrap_intervals_and_the_gain_of_two_trajectories():
    """Intervals are 1.96 standard errors of normal returns. Errors are over tasks, as the same
    episode again tells nothing new; of two tasks, which are all there are, over episodes."""
    returns = np.random.default_rng(0).normal(3.0, 1.0, (400, 1, 3)) + np.array([0.0, 0.0, 5.0])
    mean, low, high = np.transpose(script.score(returns)["return_by_context"])
    np.testing.assert_allclose(mean, returns.mean((0, 1)))
    np.testing.assert_allclose(high - low, 2 * 1.96 / 20, rtol=0.2)
    assert script.score(returns)["eval_return"] == pytest.approx(mean[2])
    two, repeated = returns[:20].reshape(2, 10, 3), np.repeat(returns[:20], 50, 1)
    gains = (returns[:20, 0, 2] - returns[:20, 0, 0]).tolist()
    expected = [np.mean(gains), np.std(gains, ddof=1) / 20**0.5]
    for some in (two, repeated, returns[:20]):
        assert script.score(some)["gain"] == pytest.approx(expected)


def family_env(env_id, theta, render="fast", size=32):
    args = script.Args(env_id=env_id, image_size=size, render=render, device="cpu")
    env = script.PixelEnv(args)
    env.env.task.theta = theta
    return env


def walker(p, a, b, u, th):
    low = max(0.0, (1.2 - p.torso_height()) / 0.6)
    standing = math.exp(-0.5 * (low * math.sqrt(-2 * math.log(0.1))) ** 2)  # tolerance's margin
    stand = (3 * standing + (1 + p.torso_upright()) / 2) / 4
    speed = (p.named.data.qpos["rootx"] - a[1]) / 0.05
    return stand * (1 + 5 * max(0.0, 1 - abs(speed - th))) / 6


def cheetah(a, b, u):
    return (b[0] - a[0]) / 0.05, 0.05 * (u**2).sum()  # velocity, effort


REWARDS = {  # from physics, qpos before and after a step, control, and theta
    "walker-vel": walker,
    "reacher-goal": lambda p, a, b, u, th: (
        -math.dist(
            p.named.data.geom_xpos["finger", ["x", "y"]],
            (th[0] * math.cos(th[1]), th[0] * math.sin(th[1])),
        )
    ),
    "cheetah-vel": lambda p, a, b, u, th: -abs(cheetah(a, b, u)[0] - th) - cheetah(a, b, u)[1],
    "cheetah-dir": lambda p, a, b, u, th: th * cheetah(a, b, u)[0] - cheetah(a, b, u)[1],
    "pendulum-goal2": lambda p, a, b, u, th: math.cos(b[0] - math.pi - th),
    "pendulum-goal": lambda p, a, b, u, th: math.cos(b[0] - math.pi - th),
    "cartpole-goal": lambda p, a, b, u, th: (
        (math.cos(b[1]) + 1) / 2 * math.exp(-2 * abs(b[0] - th)) - 0.05 * (u**2).sum()
    ),
    "point-goal": lambda p, a, b, u, th: -math.dist(b, (0.2 * math.cos(th), 0.2 * math.sin(th))),
}


@pytest.mark.parametrize("env_id", deep_but(["cheetah-vel"], script.FAMILIES))
def test_families_are_what_they_say_and_nothing_shows_theta(env_id):
    """Steps of a trajectory, no terminal, rewards from the simulator's positions; states and images
    do not depend on theta, but for what moves otherwise where the dynamics differ."""
    family = script.FAMILIES[env_id]
    tape = np.random.default_rng(0).uniform(-1, 1, (family.steps, 10))
    theta = script.split(script.Args(env_id=env_id))[0][0]
    another = tuple(t + 0.3 for t in theta) if isinstance(theta, tuple) else theta / -2 - 0.3
    another = 2 * theta if env_id == "pendulum-mass" else another
    runs, rewards = [], []
    for th in (theta, another):
        env = family_env(env_id, th)
        steps = [env.reset(seed=3)]
        while not steps[-1].last:
            before = env.env.physics.data.qpos.copy()
            action = tape[len(steps) - 1, : env.spec.action_dim]
            steps.append(env.step(action))
            env.pixels = len(steps) < 15  # fifteen images are enough
            if env_id in REWARDS:
                control = env.low + (np.float32(action) + 1) / 2 * (env.high - env.low)
                after = env.env.physics.data.qpos
                reward = REWARDS[env_id](env.env.physics, before, after, control, th)
                assert steps[-1].reward == pytest.approx(reward, abs=1e-5)
        assert len(steps) == family.steps + 1 and all(step.discount == 1 for step in steps)
        runs.append(np.concatenate([np.ravel(v) for s in steps for v in (s.obs, s.state)]))
        rewards.append([step.reward for step in steps])
        shown = steps[0].obs
    assert np.array_equal(shown, family_env(env_id, theta).reset(seed=3).obs)
    dynamics = env_id not in REWARDS
    assert np.array_equal(*runs) == (not dynamics) and (dynamics or rewards[0] != rewards[1])


@pytest.mark.deep
@pytest.mark.parametrize("env_id", ["reacher-goal", "point-goal"])
@pytest.mark.parametrize("render", ["fast", "exact"])
def test_targets_are_hidden_in_both_renders(env_id, render):
    """And it is hiding that makes the images equal."""
    images = []
    for theta in script.split(script.Args(env_id=env_id))[0][:2]:
        env = family_env(env_id, theta, render, 64)
        images.append(env.reset(seed=0).obs)
        env.env.physics.named.model.geom_rgba["target", 3] = 1
        images.append(env.render(64))
    assert np.array_equal(images[0], images[2]) and not np.array_equal(images[1], images[3])


@pytest.mark.deep
@pytest.mark.parametrize("env_id", ["cheetah-vel", "walker-vel"])
def test_the_floor_is_drawn_far_behind_the_start(env_id):
    """The suite's ends two metres back, which would tell a direction."""
    env, images = family_env(env_id, 1.0), []
    suites = suite.load(*script.FAMILIES[env_id].base.split("-")).physics
    suites_floor = suites.named.model.geom_pos[0, "x"].item()
    for x, floor in ((0.0, 0.0), (-30.0, 0.0), (-30.0, suites_floor)):  # periods of the checker
        physics = env.env.physics
        assert images or physics.named.model.geom_pos[0, "x"] == floor
        physics.named.data.qpos["rootx"] = x
        physics.named.model.geom_pos[0, "x"] = floor
        physics.forward()
        images.append(env.render(32)[20:].astype(float))  # the lower part
    right, wrong = (np.abs(images[0] - image).mean() for image in images[1:])
    assert right < 1 and wrong > 2 * right + 1


def test_splits_are_disjoint_and_do_not_depend_on_the_seed():
    train, test = script.split(script.Args(seed=1))
    assert (train, test) == script.split(script.Args(seed=2))
    assert len(train) == 20 and len(test) == 10 and not set(train) & set(test)
    assert script.split(script.Args(task_seed=1))[0] != train
    assert all(0 <= theta <= 3 for theta in train + test)
    assert script.split(script.Args(env_id="cheetah-dir")) == ([-1.0, 1.0], [-1.0, 1.0])


@pytest.mark.deep
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_runs(mode, tmp_path):
    """With what it reports: of a CNN its error, and the return by the true state."""
    flags = f"{TINY['pearl_pixels']} --obs-mode {mode} --total-frames 150 --eval-every-frames 150 "
    flags += f"--cnn-pretrain-updates 3 --runs-dir {tmp_path}"
    row = metrics(run_here("pearl_pixels", flags)["run_dir"])[-1]
    assert all(math.isfinite(float(value)) for value in row.values())
    for name in ("eval/cnn_error", "eval/true_state_return_2"):
        assert (name in row) == mode.startswith("cnn")
