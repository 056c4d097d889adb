"""What a GPU needs of the scripts. On a CPU a stand-in for a CUDA graph records the kernels of an
update and launches them again, as CUDA does; the run must be that of eager code, bit by bit. The
last part needs a GPU and is left out without one.

    python -m pytest tests/test_gpu.py --script sac_mine.py

does so with a script of your own, which began as a copy of one of ours. Flags may follow its name:
--script "sac_mine.py --my-weight 0.5".
"""

import contextlib
import dataclasses
import functools
import gc
import importlib
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import DEEP, SCRIPTS, TINY, noise_step, run, run_here, summary, tiny_agent, tiny_args
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sac_ae

CASES = [  # script, its flags, how many recordings update() has; the first five are not deep
    ("sac_ae", "--pretrain-updates 0 --decoder-every-updates 3", 4),
    ("sac_gaara", "--pretrain-updates 0 --contrast-decay 0.05", 2),
    ("slac", "--pretrain-updates 5", 2),
    ("dreamerv2", "--model-every-updates 2 --target-every-updates 3 --shift 2", 4),
    ("pearl_pixels", "", 1),
    ("sac_ae", "--reconstruction vae --kl-weight 1e-3 --actor-trains-encoder", 2),
    ("sac_gaara", "--pretrain-updates 0 --contrast-decay 0.05 --anneal lr", 2),
    ("sac_gaara", "--contrast-step joint --contrast-decay 0.05 --obs-crop random", 2),
    ("slac", "--pretrain-updates 0 --z2 recurrent --critic-input history", 1),
    ("dreamerv2", "--reset all --reset-every-updates 5 --catch-up-updates 0 --discount-head "
                  "--infonce-weight 1 --spr-weight 1 --mask-ratio 0.5", 2),
    ("pearl_pixels", "--obs-mode state --critic q --next-obs-in-context", 1),
    ("pearl_pixels", "--obs-mode cnn-rl", 1),
    ("pearl_pixels", "--obs-mode cnn-test --oracle", 1),
    ("pearl_pixels", "--obs-mode ae", 1),
]  # fmt: skip


def pytest_generate_tests(metafunc):
    """The cases; or, with --script, that script alone."""
    if "case" in metafunc.fixturenames:
        name, _, flags = (metafunc.config.option.script or "").partition(" ")
        deep = [pytest.param(case, marks=pytest.mark.deep) for case in CASES[5:]]
        cases = [(name, flags, None)] if name else CASES[:5] + deep
        metafunc.parametrize("case", cases, ids=str)


@pytest.fixture(autouse=True)
def nothing_else(request):
    if request.config.option.script and "case" not in request.fixturenames:
        pytest.skip("--script")


def arguments(name):
    return {field.name for field in dataclasses.fields(importlib.import_module(name).Args)}


def small_agent(path, flags="", device="cpu"):
    """tiny_agent() of one of our scripts, or of a copy with the flags of that which it is like."""
    gc.collect()  # a graph that dies while another is recorded would spoil that
    path = Path(path)
    if path.suffix:
        sys.path.insert(0, str(path.resolve().parent))
    like = min(SCRIPTS, key=lambda name: len(arguments(name) ^ arguments(path.stem)))
    return tiny_agent(path.stem, flags, device, like)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


STANCES = "default", "fail_on_recompile"


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
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")
        if name in waits:
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


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


def history(name, flags, graph, device="cpu", updates=26, compiled=False):
    """All metrics, actions, moments and weights of updates and actions in turn. Where parts of the
    agent are compiled, nothing may be compiled again after 18 updates."""
    module, agent, buffer, rng = small_agent(name, flags, device)
    if compiled:
        module.compile_parts(agent)
        torch._dynamo.config.suppress_errors = False
    if graph:
        module.record(agent, "update", getattr(agent, "cadence", tuple))
        module.record(agent, "act")
    out, carry = [], None
    for agent.updates in range(updates):
        first = agent.updates % 9 == 0
        step = noise_step(module, agent.spec, rng, first)
        explore = agent.updates % 4 < 2
        action, carry = agent.act(step, None if first else carry, explore=explore)
        late = compiled and agent.updates >= 18
        with module.autocast(agent.args), torch.compiler.set_stance(STANCES[late]):
            metrics = agent.update(agent.sample(buffer, rng))
        out.append({**metrics, "action": action})
    for optimizer in agent.optimizers.values():
        for i, moments in enumerate(optimizer.state.values()):
            out.append({f"{i} {k}": v for k, v in moments.items()})
    recorded = [len(f.graphs) for f in (agent.update, agent.act)] if graph else None
    return [*out, agent.state_dict()], recorded


def same(one, two):
    """Names of what differs between two histories, the first time that something does."""
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        differs = [k for k in a if not torch.equal(a[k], b[k])]
        if differs:
            return differs
    return []


def test_a_recorded_run_is_the_eager_run(stand_in, case):
    """So update() and act() have static shapes, wait for nothing, and read no number that changes
    but from tensors; updates are recorded once for each cadence()."""
    name, flags, recordings = case
    eager, _ = history(name, flags, graph=False)
    recorded, counts = history(name, flags, graph=True)
    assert same(eager, recorded) == [], "differs: a Python number that changes is frozen (update())"
    assert counts[0] == (recordings or counts[0]) >= 1 and counts[1] >= 1


def with_triton(name, find_spec=importlib.util.find_spec):
    return name == "triton" or find_spec(name)


@pytest.mark.deep
@pytest.mark.parametrize("graph", [False, True])
def test_compiled_parts_give_the_numbers_of_eager_code(stand_in, monkeypatch, case, graph):
    """In one graph each, and nothing is compiled late. Without a GPU all but the last stage of the
    compiler can be tested."""
    torch.compiler.reset()
    compiler = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(importlib.util, "find_spec", with_triton)
    eager, _ = history(*case[:2], graph=False)
    compiled, _ = history(*case[:2], graph=graph, compiled=True)
    for i, (a, b) in enumerate(zip(eager, compiled, strict=True)):
        for k in a:
            torch.testing.assert_close(b[k], a[k], rtol=1e-3, atol=1e-4, msg=f"{i} {k}")


def test_without_a_compiler_a_run_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", with_triton)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    sac_ae.compile_parts(MagicMock(compiled=("critic_loss",)))
    text = capsys.readouterr().err
    assert text.startswith("warning: --compile has no effect") and text.count("\n") == 1


@pytest.mark.parametrize("name", ["sac_ae", *DEEP])
def test_the_environment_steps_while_a_gpu_makes_the_updates(name, monkeypatch, tmp_path):
    """The loop asks for an action, starts to copy it, launches the updates, and waits for the copy
    alone."""
    module, order = importlib.import_module(name), []

    def logged(function, word):
        def call(*inputs, **options):
            order.append(word)
            return function(*inputs, **options)

        return call

    def to_host(tensor):
        order.append("copy")
        return logged(tensor.numpy, "wait")

    monkeypatch.setattr(module, "to_host", to_host)
    monkeypatch.setattr(module.Agent, "act", logged(module.Agent.act, "act"))
    monkeypatch.setattr(module.Agent, "update", logged(module.Agent.update, "update"))
    monkeypatch.setattr(module.PixelEnv, "step", logged(module.PixelEnv.step, "step"))
    run_here(name, f"{TINY[name]} --updates-per-step 1 --runs-dir {tmp_path}")
    assert " ".join(order).count("act copy update wait step") > 50


def test_a_small_gpu_gets_batches_and_the_host_keeps_the_rows(tmp_path):
    args = tiny_args(sac_ae, "--replay-device cpu", device="meta")
    spec = sac_ae.EnvSpec((3, 24, 24), 2, 4)
    buffer = sac_ae.ReplayBuffer(tmp_path, 20, args, spec)
    rng = np.random.default_rng(0)
    for t in range(10):
        buffer.add(noise_step(sac_ae, spec, rng, t == 0))
    assert all(column.is_cpu for column in buffer.columns.values())
    batch = buffer.gather("obs", np.arange(6).reshape(2, 3))
    assert batch.is_meta and batch.shape == (2, 3, 3, 24, 24)


def test_a_copy_is_told_what_a_recording_must_not_do(stand_in, tmp_path):
    """A loss weight that depends on a counter; a branch on a tensor."""
    text, loss = Path(sac_ae.__file__).read_text(), "(alpha * log_prob - q).mean()"
    copies = {
        "sac_mine": (loss, None),
        "sac_weight": (f"{loss} / (1 + self.updates)", "a Python number that changes is frozen"),
        "sac_branch": (f"{loss} if q.mean() > 0 else q.mean()", "waits for the GPU"),
    }
    for name, (code, complaint) in copies.items():
        path = tmp_path / f"{name}.py"
        path.write_text(text.replace(loss, code))
        bad = pytest.raises((AssertionError, RuntimeError), match=complaint)
        with bad if complaint else contextlib.nullcontext():
            test_a_recorded_run_is_the_eager_run(None, (path, "", 2))


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    "device, flag, recorded",
    [("cuda", "", ["update", "act"]), ("cuda", "--no-cuda-graph", []), ("cpu", "", [])],
)
def test_training_records_on_cuda_alone(name, device, flag, recorded, monkeypatch, tmp_path):
    """Everything that training needs is a mock, up to where the log begins."""
    module, calls = importlib.import_module(name), []
    args = tiny_args(module, f"--device {device} {flag}")
    for needed in ("Agent", "ReplayBuffer", "TaskBuffer", "PixelEnv", "save_checkpoint"):
        if hasattr(module, needed):
            monkeypatch.setattr(module, needed, MagicMock())
    monkeypatch.setattr(module, "evaluate", lambda *_: (np.zeros(10), []))
    monkeypatch.setattr(module, "record", lambda agent, method, *_: calls.append(method))
    monkeypatch.setattr(module, "Logger", MagicMock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        module.train(args, tmp_path, SimpleNamespace(signal=0))
    assert calls == recorded


@pytest.mark.parametrize("name", SCRIPTS)
def test_adding_and_sampling_read_nothing_from_the_device(name):
    """On the device "meta" nothing can be read; what is uploaded to CUDA is queued."""
    module, agent, buffer, rng = small_agent(name)
    agent.args.device = buffer.device = "meta"
    buffer.columns = {key: column.to("meta") for key, column in buffer.columns.items()}
    buffer.add(noise_step(module, agent.spec, rng, True))
    buffer.add(noise_step(module, agent.spec, rng, False))
    batch = tensors(agent.sample(buffer, rng))
    assert len(batch) >= 5 and all(tensor.is_meta for tensor in batch)


def test_uploads_are_queued_on_cuda_alone(monkeypatch):
    """From pinned memory. Elsewhere, as on mps, they would read memory that is gone."""
    tensor = MagicMock(is_cpu=True)
    monkeypatch.setattr(torch, "as_tensor", lambda values: tensor)
    sac_ae.upload(np.zeros(3), "cuda:1")
    tensor.pin_memory.return_value.to.assert_called_once_with("cuda:1", non_blocking=True)
    sac_ae.upload(np.zeros(3), "mps")
    tensor.to.assert_called_once_with("mps", non_blocking=False)


def test_bfloat16_changes_the_losses_little_and_no_parameters_type(case):
    """And backward() runs outside autocast: gradients have digits that bfloat16 lacks."""
    out = []
    for precision in ("fp32", "bf16"):
        module, agent, buffer, rng = small_agent(case[0], f"{case[1]} --precision {precision}")
        agent.updates = 12  # SAC's actor and SLAC's actor and critic move, too
        torch.manual_seed(1)
        with module.autocast(agent.args):
            assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
            out.append(agent.update(agent.sample(buffer, rng)))
        state = [*agent.state_dict().values(), *out[-1].values()]
        assert not any(v.dtype == torch.bfloat16 for v in state)
    layers = [m for m in agent.modules() if isinstance(m, module.Float32Linear)]
    grads = [m.weight.grad for m in layers if m.weight.grad is not None]
    assert len(grads) >= 2
    assert all((g != g.bfloat16()).any() or not g.any() for g in grads)
    fp32, bf16 = out
    assert fp32.keys() == bf16.keys() and any(fp32[k] != bf16[k] for k in fp32)
    for k in fp32:
        torch.testing.assert_close(bf16[k], fp32[k], rtol=0.05, atol=0.02, msg=k)


def test_weights_that_change_in_an_update_are_converted_anew():
    """Autocast's cache of bfloat16 weights is off."""
    layer, x = torch.nn.Linear(3, 3), torch.randn(2, 3)
    with torch.no_grad(), sac_ae.autocast(SimpleNamespace(device="cpu", precision="bf16")):
        before = layer(x)
        layer.weight.add_(1.0)
        assert not torch.equal(layer(x), before)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_are_eager_code_on_a_gpu(case, compiled, monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config, "fallback_random", True)  # compiled code draws eager code's noise
    torch.compiler.reset()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    eager, _ = history(*case[:2], graph=False, device="cuda")
    recorded, _ = history(*case[:2], graph=True, device="cuda", compiled=compiled)
    for i, (a, b) in enumerate(zip(eager, recorded, strict=True)):
        for k in a:
            torch.testing.assert_close(b[k], a[k], rtol=1e-4, atol=1e-4, msg=f"{i} {k}")


@gpu
def test_the_noise_of_a_recorded_action_depends_on_its_key_alone():
    module, agent, _, rng = small_agent("sac_ae", device="cuda")
    module.record(agent, "act")
    step = noise_step(module, agent.spec, rng, True)

    def action(number):
        module.stream(1, "act", number)
        return agent.act(step, None, explore=True)[0]

    for number in range(5):  # from the fourth on it is recorded
        action(number)
    assert torch.equal(action(7), action(7)) and not torch.equal(action(7), action(8))


@gpu
def test_updates_wait_for_nothing_and_memory_does_not_grow_on_a_gpu(case):
    module, agent, buffer, rng = small_agent(*case[:2], "cuda")
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
