"""What a GPU needs of the scripts. The first part shows it on a CPU: there a stand-in for a CUDA
graph records the kernels of an update and launches them again, as CUDA does, and the run must be
that of eager code bit by bit. The second part needs a GPU and is left out without one."""

import contextlib
import functools
import gc
import importlib
import math
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import tyro
from conftest import SCRIPTS, TINY, run, summary
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class StandIn(TorchDispatchMode):
    """In place of torch.cuda.CUDAGraph. While recording nothing stays changed; replay() launches
    the recorded kernels on the same memory. What would wait for the GPU is an error, as there."""

    def __init__(self):
        super().__init__()
        self.tape, self.made, self.before = [], set(), {}

    def __enter__(self):
        self.random = torch.get_rng_state()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, schema = func.__name__.split(".")[0], func._schema
        if name in WAITS:
            raise RuntimeError(f"{name} waits for the GPU")
        for tensor in tensors((args, kwargs)) if schema.is_mutable else ():
            if self.memory(tensor) not in self.made:
                self.before.setdefault(self.memory(tensor), (tensor, tensor.clone()))
        out = func(*args, **(kwargs or {}))
        view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if func.namespace == "aten" and not view:
            fresh = [] if schema.is_mutable else tensors(out)
            self.made.update(self.memory(t) for t in fresh)
            self.tape.append((func, args, kwargs or {}, fresh))
        return out

    @staticmethod
    def memory(tensor):
        return tensor.untyped_storage().data_ptr()

    def __exit__(self, *error):
        super().__exit__(*error)
        with torch.no_grad():
            for tensor, was in self.before.values():
                tensor.copy_(was)
        torch.set_rng_state(self.random)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, places in self.tape:
            out = func(*args, **kwargs)
            for place, value in zip(places, tensors(out) if places else (), strict=True):
                place.copy_(value)


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def stand_in(monkeypatch):
    for name, value in {"CUDAGraph": StandIn, "graph": lambda graph: graph, "Stream": Stream,
                        "current_stream": Stream,
                        "stream": contextlib.nullcontext}.items():
        monkeypatch.setattr(torch.cuda, name, value)


def tiny_agent(name, flags=(), device="cpu"):
    """The module, and an agent, a replay buffer of noise and a rng at the size of a tiny run."""
    gc.collect()  # a graph that dies while another is recorded would spoil that
    module = importlib.import_module(name)
    args = tyro.cli(module.Args, args=[*TINY[name].split(), "--device", device, *flags])
    args.action_repeat = args.action_repeat or 2
    module.check_algorithm(args)
    torch.manual_seed(0)
    rng, states = np.random.default_rng(0), getattr(args, "obs_mode", "") == "state"
    shape = (4,) if states else (3, args.image_size, args.image_size)
    spec = module.EnvSpec(shape, torch.float32 if states else torch.uint8, 2, 4)
    agent = module.Agent(args, spec)
    if name == "pearl_pixels":
        module.check_run(args, None)
        horizon, (thetas, _) = args.trajectory_steps, module.split(args)
        buffer = module.TaskBuffer(200, spec, device, horizon)
        starts = [[0, 2 * (horizon + 1)], [horizon + 1]]
        buffer.watch(thetas, starts, starts, args.latent_dim)
        length = horizon + 1
    else:
        buffer, length = module.ReplayBuffer(200, spec, device), 40
    for t in range(160):
        buffer.add(noise_step(module, spec, rng, t % length == 0))
    return module, agent, buffer, rng


def noise_step(module, spec, rng, first):
    state = np.float32(rng.standard_normal(4))
    obs = state if len(spec.obs_shape) == 1 else rng.integers(
        0, 256, spec.obs_shape, dtype=np.uint8)
    action = np.float32((not first) * rng.uniform(-1, 1, 2))
    return module.Step(obs, state, action, rng.random(), 1.0, first, False)


def spec_of(module, buffer):
    obs = buffer.columns["obs"]
    return module.EnvSpec(obs.shape[1:], obs.dtype, 2, 4)


def first_carry(module, agent):
    """What acting starts from: PEARL's has a z."""
    if module.__name__ != "pearl_pixels":
        return None
    return {"z": torch.zeros(1, agent.args.latent_dim, device=agent.args.device),
            "true_state": False}


def history(name, flags, graph, updates=26, device="cpu"):
    """All metrics, actions and weights of updates and actions in turn."""
    module, agent, buffer, rng = tiny_agent(name, flags, device)
    if graph:
        module.CudaGraph(agent, "update", getattr(agent, "cadence", tuple))
        module.CudaGraph(agent, "act", tuple)
    out, carry = [], first_carry(module, agent)
    spec = spec_of(module, buffer)
    for i in range(updates):
        first = i % 9 == 0
        step = noise_step(module, spec, rng, first)
        carry = first_carry(module, agent) if first else carry
        action, carry = agent.act(step, carry, explore=i % 4 < 2)
        with module.autocast(agent.args):
            metrics = agent.update(agent.sample(buffer, rng))
        out.append({**metrics, "action": action})
    for optimizer in agent.optimizers.values():
        for i, moments in enumerate(optimizer.state.values()):
            out.append({f"{i} {k}": v for k, v in moments.items()})
    assert agent.updates == updates
    graphs = [len(f.graphs) for f in (agent.update, agent.act)] if graph else None
    return [*out, agent.state_dict()], graphs


CASES = [  # the script, its flags, how many forms of updates and actions there are
    ("sac_ae", "--pretrain-updates 0 --decoder-every-updates 3", 4),
    ("sac_ae", "--reconstruction vae --kl-weight 1e-3 --actor-trains-encoder", 2),
    ("sac_gaara", "--pretrain-updates 0 --contrast-decay 0.05", 2),
    ("sac_gaara", "--pretrain-updates 0 --contrast-decay 0.05 --anneal lr", 2),
    ("sac_gaara", "--contrast-step joint --contrast-decay 0.05 --obs-crop random", 2),
    ("slac", "--pretrain-updates 5", 2),
    ("slac", "--pretrain-updates 0 --z2 recurrent --critic-input history", 1),
    ("dreamerv2", "", 1),
    ("dreamerv2", "--model-every-updates 2 --target-every-updates 3 --shift 2", 4),
    ("dreamerv2", "--reset all --reset-every-updates 5 --catch-up-updates 0 --discount-head "
                  "--infonce-weight 1 --spr-weight 1 --mask-ratio 0.5", 2),
    ("pearl_pixels", "", 1),
    ("pearl_pixels", "--obs-mode state --critic q --next-obs-in-context", 1),
    ("pearl_pixels", "--obs-mode cnn-rl", 1),
    ("pearl_pixels", "--obs-mode cnn-test --oracle", 1),
    ("pearl_pixels", "--obs-mode ae", 1),
]


def same(one, two):
    """Names of what differs between two histories, the first time that something does."""
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        differs = [k for k in a if not torch.equal(a[k], b[k])]
        if differs:
            return differs
    return []


@pytest.mark.parametrize(("name", "flags", "forms"), CASES)
def test_a_recorded_run_is_the_eager_run(stand_in, name, flags, forms):
    """So update() and act() have static shapes, wait for nothing, and read no number but from
    tensors; the forms of the updates are those that cadence() tells."""
    eager, _ = history(name, flags.split(), graph=False)
    recorded, graphs = history(name, flags.split(), graph=True)
    assert same(eager, recorded) == []
    assert graphs[0] == forms and graphs[1] >= 1


def toy(module, update):
    """What 12 updates of a toy agent leave, eagerly and recorded; x is another one each time."""
    out = []
    for graph in (False, True):
        agent = SimpleNamespace(args=SimpleNamespace(device="cpu"), updates=0, optimizers={})
        agent.w, agent.update = torch.zeros(3), functools.partial(update, agent)
        if graph:
            module.CudaGraph(agent, "update", tuple)
        torch.manual_seed(0)
        out.append([{"w": agent.update({"x": torch.full((3,), float(i))})} for i in range(12)])
        assert agent.updates == 12
    return out


def counted(change):
    """An update that changes the weights and counts itself."""
    def update(agent, batch):
        change(agent, batch["x"])
        agent.updates += 1
        return agent.w.clone()
    return update


def test_the_comparison_sees_what_a_recording_must_not_do(stand_in, script):
    def good(agent, x):
        agent.w.add_(x * torch.randn(3))

    def schedule(agent, x):
        agent.w.add_(x * agent.updates)

    def fresh(agent, x):
        agent.w = agent.w + x

    def branch(agent, x):
        agent.w.add_(x if x[0] > 5 else -x)

    assert same(*toy(script, counted(good))) == []
    assert same(*toy(script, counted(schedule))) == ["w"]
    assert same(*toy(script, counted(fresh))) == ["w"]
    with pytest.raises(RuntimeError, match="waits for the GPU"):
        toy(script, counted(branch))


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("device, flag, graphs", [
    ("cuda", [], {"update", "act"}), ("cuda", ["--no-cuda-graph"], set()), ("cpu", [], set())])
def test_training_records_on_cuda_alone(name, device, flag, graphs, monkeypatch, tmp_path):
    """Everything that training needs is a mock, up to where the log begins."""
    module, recorded = importlib.import_module(name), set()
    args = tyro.cli(module.Args, args=[*TINY[name].split(), "--device", device, *flag])
    for needed in ("Agent", "ReplayBuffer", "TaskBuffer", "make_env", "evaluate", "replay_rows"):
        if hasattr(module, needed):
            monkeypatch.setattr(module, needed, MagicMock())
    module.evaluate.return_value = np.zeros(10), None
    monkeypatch.setattr(module, "CudaGraph", lambda agent, method, cadence: recorded.add(method))
    monkeypatch.setattr(module, "Logger", MagicMock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        module.train(args, tmp_path, SimpleNamespace(signal=0))
    assert recorded == graphs


@pytest.mark.parametrize("name", SCRIPTS)
def test_adding_and_sampling_wait_for_nothing(name, monkeypatch):
    """Tensors move to another device in upload() alone, whose copies are queued on CUDA."""
    module, agent, buffer, rng = tiny_agent(name)
    real, inside = module.upload, []

    def upload(values, device):
        inside.append(1)
        tensor = real(values, device)
        inside.pop()
        return tensor

    def guard(method):
        def guarded(self, *args, **kwargs):
            moves = any(isinstance(a, (str, torch.device)) for a in args) or "device" in kwargs
            assert inside or method is not to or not moves, "moved outside upload()"
            assert method is to, "waits for the GPU"
            return method(self, *args, **kwargs)
        return guarded

    to = torch.Tensor.to
    monkeypatch.setattr(module, "upload", upload)
    for method in ("to", "cpu", "cuda", "item", "tolist", "numpy", "nonzero", "__bool__"):
        monkeypatch.setattr(torch.Tensor, method, guard(getattr(torch.Tensor, method)))
    buffer.add(noise_step(module, spec_of(module, buffer), rng, False))
    agent.sample(buffer, rng)
    queued, pinned = [], SimpleNamespace(
        to=lambda device, non_blocking: queued.append(("pinned", device, non_blocking)))
    monkeypatch.setattr(torch, "as_tensor", lambda values: SimpleNamespace(
        is_cpu=True, pin_memory=lambda: pinned,
        to=lambda device, non_blocking: queued.append((device, non_blocking))))
    real(np.zeros(3), "cuda:1")
    real(np.zeros(3), "mps")  # whose copies would read memory that is gone
    assert queued == [("pinned", "cuda:1", True), ("mps", False)]


# ---- precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "flags"), [
    *((name, "") for name in SCRIPTS), ("slac", "--z2 recurrent"),
    ("dreamerv2", "--infonce-weight 1 --spr-weight 1 --mask-ratio 0.5"),
    ("pearl_pixels", "--obs-mode cnn"), ("pearl_pixels", "--obs-mode ae")])
def test_bfloat16_changes_the_losses_little_and_no_parameters_type(name, flags):
    first = ["--pretrain-updates", "0"] if "--pretrain-updates" in TINY[name] else []
    out = []
    for precision in ("fp32", "bf16"):
        module, agent, buffer, rng = tiny_agent(
            name, [*flags.split(), *first, "--precision", precision])
        torch.manual_seed(1)
        with module.autocast(agent.args):
            assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
            out.append(agent.update(agent.sample(buffer, rng)))
        state = [*agent.state_dict().values(), *out[-1].values()]
        assert not any(v.dtype == torch.bfloat16 for v in state)
    fp32, bf16 = out
    assert fp32.keys() == bf16.keys()
    assert any(fp32[k] != bf16[k] for k in fp32)
    for k in fp32:
        torch.testing.assert_close(bf16[k], fp32[k], rtol=0.05, atol=0.02, msg=k)


@pytest.mark.parametrize("name", SCRIPTS)
def test_gradients_of_last_layers_are_float32(name, monkeypatch):
    """backward() runs outside autocast: not all of them are numbers that bfloat16 has."""
    flags = ["--pretrain-updates", "0"] if "--pretrain-updates" in TINY[name] else []
    module, agent, buffer, rng = tiny_agent(name, [*flags, "--precision", "bf16"])
    layers = [m for m in agent.modules() if isinstance(m, module.Linear32)]
    with module.autocast(agent.args):
        agent.update(agent.sample(buffer, rng))
    grads = [m.weight.grad for m in layers if m.weight.grad is not None]
    assert len(grads) >= 2
    for grad in grads:
        assert not torch.equal(grad, grad.bfloat16().float()) or not grad.any()


def test_values_keep_the_digits_that_bfloat16_lacks(script):
    """What comes out of a network is not rounded to eight bits: 300 and 300.2 stay apart."""
    net = script.mlp(*{"dreamerv2": (3, 8, 2, 1)}.get(script.__name__, (3, 8, 1)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        net[-1].weight.zero_()
        net[-1].bias.fill_(300.2)
        out = net(torch.zeros(2, 3))
    assert out.dtype == torch.float32 and (out - 300.2).abs().max() < 1e-3


def test_weights_that_change_in_an_update_are_converted_anew(script):
    layer, x = torch.nn.Linear(3, 3), torch.randn(2, 3)
    with script.autocast(SimpleNamespace(device="cpu", precision="bf16")):
        before = layer(x)
        with torch.no_grad():
            layer.weight.add_(1.0)
        assert not torch.equal(layer(x), before)


# ---- on a GPU ----------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

@gpu
@pytest.mark.parametrize(("name", "flags", "forms"), CASES)
def test_graphs_are_eager_code_on_a_gpu(name, flags, forms):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    (eager, _), (recorded, graphs) = (
        history(name, flags.split(), graph, 26, "cuda") for graph in (False, True))
    for i, (a, b) in enumerate(zip(eager, recorded, strict=True)):
        for k in a:
            torch.testing.assert_close(b[k], a[k], rtol=1e-4, atol=1e-4,
                                       msg=lambda why, i=i, k=k: f"{i} {k}: {why}")
    assert graphs[0] == forms


@gpu
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_update_waits_for_nothing_on_a_gpu(name):
    module, agent, buffer, rng = tiny_agent(name, device="cuda")
    agent.update(agent.sample(buffer, rng))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        agent.update(agent.sample(buffer, rng))
        buffer.add(noise_step(module, spec_of(module, buffer), rng, False))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_does_not_grow_on_a_gpu(name, precision):
    module, agent, buffer, rng = tiny_agent(name, ["--precision", precision], "cuda")
    module.CudaGraph(agent, "update", getattr(agent, "cadence", tuple))
    sizes = []
    for i in range(300):
        with module.autocast(agent.args):
            metrics = agent.update(agent.sample(buffer, rng))
        if i >= 100:
            sizes.append(torch.cuda.memory_allocated())
    assert max(sizes) == max(sizes[:100])
    assert all(math.isfinite(value) for value in metrics.values())


@gpu
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("flags", ["", "--precision bf16", "--no-cuda-graph"])
def test_a_whole_run_on_a_gpu(name, flags, tmp_path):
    """To the end, on from a stop in the middle to the same end, and played."""
    flags = f"{TINY[name]} --device cuda {flags} --runs-dir {tmp_path}"
    whole = summary(run(name, flags))
    half = summary(run(name, f"{flags} --total-frames {whole['frames'] // 2}"))
    longer = summary(run(name, f"--resume {half['run_dir']} --total-frames {whole['frames']}"))
    assert whole["device"] == longer["device"] == "cuda"
    assert whole["updates"] == longer["updates"] > half["updates"]
    summary(run(name, f"--evaluate {half['run_dir']}"))
