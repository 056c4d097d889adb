"""What a GPU needs of the scripts. On a CPU a stand-in for a CUDA graph records the kernels of an
update and launches them again, as CUDA does; the run must be that of eager code, bit by bit. The
last part needs a GPU and is left out without one.

    python -m pytest tests/test_gpu.py --script "sac_mine.py --my-weight 0.5"

does so with a script of your own, which began as a copy of one of ours, and flags of its own.
"""

import functools
import gc
import importlib.util
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from conftest import SCRIPTS, TINY, noise_step, run, run_here, summary, tiny_agent
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.deep
CASES = {  # script and flags: how many recordings update() has, one for each cadence()
    "sac_ae --pretrain-updates 0 --decoder-every-updates 3": 4,
    "sac_ae --reconstruction vae --actor-trains-encoder": 2,
    "sac_gaara --pretrain-updates 0 --contrast-decay 0.05 --anneal lr": 2,
    "sac_gaara --contrast-step joint --obs-crop random": 2,
    "slac --pretrain-updates 5": 2,
    "slac --pretrain-updates 0 --z2 recurrent --critic-input history": 1,
    "dreamerv2 --model-every-updates 2 --target-every-updates 3 --shift 2": 4,
    "dreamerv2 --reset all --reset-every-updates 5 --catch-up-updates 0 --spr-weight 1": 2,
    "pearl_pixels": 1,
    "pearl_pixels --obs-mode state --critic q --next-obs-in-context": 1,
    "pearl_pixels --obs-mode ae": 1,
}


def pytest_generate_tests(metafunc):
    """The cases. With --script it is that script alone, in two tests and without -m deep."""
    option = metafunc.config.option
    if option.script:
        option.markexpr, option.keyword = "deep", "recorded_run or bfloat16"
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", [option.script] if option.script else CASES)


def small_agent(case, device="cpu"):
    """tiny_agent() of a case. A copy has the tiny flags of the script whose arguments it has."""
    gc.collect()  # a graph that dies while another is recorded would spoil that
    path, _, flags = case.partition(" ")
    sys.path.insert(0, str(Path(path).resolve().parent))

    def arguments(name):
        return vars(importlib.import_module(name).Args()).keys()

    own = Path(path).stem
    like = min(SCRIPTS, key=lambda name: len(arguments(name) ^ arguments(own)))
    return tiny_agent(own, flags, device, like)


class StandIn(TorchDispatchMode):
    """In place of torch.cuda.CUDAGraph: notes each kernel that runs, and launches it again on the
    same memory. What would wait for the GPU is an error, as there. CUDA does not run what it
    records; this does, and leaves out the first replay() instead."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __init__(self):
        super().__init__()
        self.kernels = []
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in self.waits:
            raise RuntimeError(f"{func} waits for the GPU")
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            self.kernels.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        if self.replays == 1:
            return
        for func, args, kwargs, places in self.kernels:
            out = func(*args, **kwargs)
            for place, value in zip(tensors(places), tensors(out), strict=True):
                if place.data_ptr() != value.data_ptr():  # neither a view nor in place
                    place.copy_(value)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())


def history(case, device="cpu", graph=False, compiled=False):
    """Metrics and actions of 26 updates and actions in turn, weights, optimizers; and the agent."""
    module, agent, buffer, rng = small_agent(case, device)
    if compiled:
        module.compile_parts(agent)
        torch._dynamo.config.suppress_errors = False
    if graph:
        module.record(agent, "update", getattr(agent, "cadence", tuple))
        module.record(agent, "act")
    out, carry = [], None
    for agent.updates in range(26):
        first = agent.updates % 9 == 0
        step = noise_step(module, agent.spec, rng, first)
        action, carry = agent.act(step, None if first else carry, explore=agent.updates % 4 < 2)
        with module.autocast(agent.args):
            metrics = agent.update(agent.sample(buffer, rng))
        out.append({**metrics, "action": action})
    optimizers = [optimizer.state_dict() for optimizer in agent.optimizers.values()]
    return [out, agent.state_dict(), optimizers], agent


def test_a_recorded_run_is_the_eager_run(stand_in, case):
    """So update() and act() have static shapes, wait for nothing, and read no number that changes
    but from tensors; updates are recorded once for each cadence()."""
    eager, _ = history(case)
    recorded, agent = history(case, graph=True)
    hint = "a Python number that changes is frozen (update()): {}".format
    torch.testing.assert_close(recorded, eager, rtol=0, atol=0, msg=hint)
    recordings = len(agent.update.graphs)
    assert recordings == CASES.get(case, recordings) >= 1 and len(agent.act.graphs) >= 1


def test_compiled_parts_give_the_numbers_of_eager_code(stand_in, monkeypatch, case):
    """In one graph each. Without a GPU all but the last stage of the compiler can be tested."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton" or find(name))
    torch.compiler.reset()
    compiler = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiler)
    eager, _ = history(case)
    compiled, _ = history(case, graph=True, compiled=True)
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", ["meta", "cpu"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_adding_and_sampling_read_nothing_from_the_device(name, rows):
    """On the device "meta" nothing can be read. A small GPU gets batches; the host has the rows."""
    module, agent, buffer, rng = tiny_agent(name)
    agent.args.device = buffer.device = "meta"
    buffer.rows_device = rows
    buffer.columns = {key: column.to(rows) for key, column in buffer.columns.items()}
    buffer.add(noise_step(module, agent.spec, rng, True))
    batch = tensors(agent.sample(buffer, rng))
    assert len(batch) >= 5 and all(tensor.is_meta for tensor in batch)


def test_bfloat16_changes_the_losses_little_and_no_parameters_type(case):
    """And backward() runs outside autocast: gradients have digits that bfloat16 lacks."""
    out = []
    for precision in ("fp32", "bf16"):
        module, agent, buffer, rng = small_agent(f"{case} --precision {precision}")
        agent.updates = 12  # SAC's actor and SLAC's actor and critic move, too
        torch.manual_seed(1)
        with module.autocast(agent.args):
            out.append(agent.update(agent.sample(buffer, rng)))
    state = [*agent.state_dict().values(), *out[1].values()]
    assert not any(tensor.dtype == torch.bfloat16 for tensor in state)
    layers = [layer for layer in agent.modules() if isinstance(layer, module.Float32Linear)]
    grads = [layer.weight.grad for layer in layers if layer.weight.grad is not None]
    assert len(grads) >= 2 and all((g != g.bfloat16()).any() or not g.any() for g in grads)
    assert any(out[0][k] != out[1][k] for k in out[0])
    torch.testing.assert_close(out[1], out[0], rtol=0.05, atol=0.02)


def test_the_environment_steps_while_a_gpu_makes_the_updates(monkeypatch, tmp_path):
    """The loop asks for an action, starts to copy it, launches the updates, and waits for the copy
    alone."""
    import sac_ae

    order = []

    def noted(word, function):
        return lambda *inputs, **options: order.append(word) or function(*inputs, **options)

    def to_host(tensor):
        order.append("copy")
        return noted("wait", tensor.numpy)

    monkeypatch.setattr(sac_ae, "to_host", to_host)
    for owner, name in ((sac_ae.Agent, "act"), (sac_ae.Agent, "update"), (sac_ae.PixelEnv, "step")):
        monkeypatch.setattr(owner, name, noted(name, getattr(owner, name)))
    run_here("sac_ae", f"{TINY['sac_ae']} --updates-per-step 1 --runs-dir {tmp_path}")
    assert " ".join(order).count("act copy update wait step") > 50


def test_without_a_compiler_a_run_goes_on(monkeypatch, capsys):
    import sac_ae

    monkeypatch.setattr("shutil.which", lambda name: None)
    sac_ae.compile_parts(MagicMock(compiled=["critic_loss"]))
    text = capsys.readouterr().err
    assert text.startswith("warning: --compile has no effect") and text.count("\n") == 1


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_are_eager_code_on_a_gpu(case, compiled, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.fallback_random", True)  # noise as in eager code
    torch.compiler.reset()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    eager, _ = history(case, "cuda")
    recorded, _ = history(case, "cuda", graph=True, compiled=compiled)
    torch.testing.assert_close(recorded, eager, rtol=1e-4, atol=1e-4)


@gpu
def test_the_noise_of_an_action_depends_on_its_key_alone():
    module, agent, _, rng = small_agent("sac_ae", "cuda")
    module.record(agent, "act")
    step = noise_step(module, agent.spec, rng, True)

    def action(number):
        module.stream(1, "act", number)
        return agent.act(step, None, explore=True)[0]

    *_, one, two, three = [action(number) for number in (1, 2, 3, 4, 7, 7, 8)]  # 4 is recorded
    assert torch.equal(one, two) and not torch.equal(two, three)


@gpu
def test_updates_wait_for_nothing_and_memory_does_not_grow_on_a_gpu(case):
    module, agent, buffer, rng = small_agent(case, "cuda")
    agent.update(agent.sample(buffer, rng))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        agent.update(agent.sample(buffer, rng))
        buffer.add(noise_step(module, agent.spec, rng, False))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    module.record(agent, "update", getattr(agent, "cadence", tuple))
    sizes = []
    for agent.updates in range(300):
        agent.update(agent.sample(buffer, rng))
        sizes.append(torch.cuda.memory_allocated())
    assert max(sizes[100:]) == max(sizes[100:200])


@gpu
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("flags", ["", "--precision bf16", "--replay-device cpu --no-cuda-graph"])
def test_a_whole_run_on_a_gpu(name, flags, tmp_path):
    """To the end, on from a stop in the middle to the same end, and played."""
    flags = f"{TINY[name]} --device cuda {flags} --runs-dir {tmp_path}"
    whole = summary(run(name, flags))
    half = summary(run(name, f"{flags} --total-frames {whole['frames'] // 2}"))
    longer = summary(run(name, f"--resume {half['run_dir']} --total-frames {whole['frames']}"))
    assert whole["device"] == longer["device"] == "cuda"
    assert whole["updates"] == longer["updates"] > half["updates"]
    summary(run(name, f"--evaluate {half['run_dir']}"))
