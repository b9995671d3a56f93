"""The helpers that keep the settings of the program around us out of our tensors."""

import asyncio
import inspect
import subprocess
import sys
import threading
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from flashddpm.host import floats, ints, isolated, plain_factories


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def strange(request):
    """A default device and a default dtype that no tensor of ours may have."""
    torch.set_default_device("meta")
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def kinds(*tensors: Tensor) -> set[tuple[str, torch.dtype]]:
    return {(x.device.type, x.dtype) for x in tensors}


def modes() -> tuple[bool, bool, bool]:
    """Whether gradients are recorded, and inference mode and autocast are on."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
    )


@isolated
def modes_inside() -> tuple[bool, bool, bool]:
    return modes()


@pytest.mark.usefixtures("strange")
def test_numbers_of_the_host_are_what_they_are_called():
    assert kinds(ints([[1, 2], [3, 4]]), ints([]), ints(7)) == {("cpu", torch.int64)}
    assert kinds(floats([0.5, 1]), floats([]), floats(1)) == {("cpu", torch.float32)}
    assert floats([0.1]).item() == pytest.approx(0.1, rel=1e-7)


@pytest.mark.usefixtures("strange")
def test_factories_are_those_of_a_plain_process():
    with plain_factories():
        made = [
            torch.empty(2), torch.zeros(2), torch.ones(2), torch.rand(2), torch.randn(2),
            torch.eye(2), torch.linspace(0, 1, 2), torch.tensor([[1, 2.5]]), torch.tensor(0.5),
            torch.full((2,), 0.5), torch.full((2,), fill_value=0.5), torch.arange(0, 1, 0.5),
        ]  # fmt: skip
        whole = [
            torch.tensor([1, 2]), torch.full((2,), 1), torch.arange(3), torch.randperm(3),
            torch.randint(3, (2,)),
        ]  # fmt: skip
        layers = [nn.Linear(2, 3), nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2), nn.Embedding(2, 2)]
        told = torch.zeros(2, dtype=torch.float16, device="meta")
        truth = torch.tensor([True])
        with plain_factories("meta"):
            nowhere = nn.Linear(2, 3)
    assert kinds(*made, *(p for layer in layers for p in layer.parameters())) == {
        ("cpu", torch.float32)
    }
    assert kinds(*whole) == {("cpu", torch.int64)}
    assert kinds(truth) == {("cpu", torch.bool)}
    assert kinds(told) == {("meta", torch.float16)}
    assert kinds(*nowhere.parameters()) == {("meta", torch.float32)}
    assert made[7].tolist() == [[1, 2.5]]


def test_a_network_is_drawn_with_the_bits_of_a_plain_process():
    def drawn() -> Tensor:
        torch.manual_seed(0)
        with plain_factories():
            return nn.Linear(50, 3).weight.detach()

    torch.manual_seed(0)
    expected = nn.Linear(50, 3).weight
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(drawn(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_factories_of_another_thread_are_left_alone():
    found = []
    with plain_factories("meta"):
        thread = threading.Thread(target=lambda: found.append(torch.zeros(1)))
        thread.start()
        thread.join()
    assert kinds(*found) == {("cpu", torch.float32)}


def test_the_callers_modes_are_left_at_the_door_and_found_again():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert modes_inside() == (False, False, False)
        assert modes() == (False, True, True)
    assert modes_inside() == (True, False, False)
    with torch.no_grad():
        assert modes_inside() == (False, False, False)


@pytest.mark.parametrize("grad", [True, False])
def test_gradients_are_recorded_as_told(grad):
    @isolated(grad=grad)
    def inside() -> bool:
        return torch.is_grad_enabled()

    for around in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with around():
            before = modes()
            assert inside() is grad
            assert modes() == before


def test_modes_come_back_after_an_error():
    @isolated(grad=True)
    def fail() -> None:
        raise KeyError

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        before = modes()
        with pytest.raises(KeyError):
            fail()
        assert modes() == before


def test_a_function_stays_what_it_is_called():
    def area(width: int, *, height: int = 2) -> int:
        """Return the area."""
        return width * height

    wrapped = isolated(grad=False)(area)
    assert inspect.signature(wrapped) == inspect.signature(area)
    assert (wrapped.__name__, wrapped.__doc__) == ("area", "Return the area.")
    assert wrapped(3) == 6 and wrapped(3, height=1) == 3


def test_a_compiled_program_breaks_here_and_sees_nothing_of_it():
    seen = []

    def deeper(x: Tensor) -> Tensor:
        seen.append(torch.compiler.is_compiling())
        return x.add(1)

    class Ours:
        @isolated
        def __init__(self, x: Tensor) -> None:
            self.x = deeper(x)

        @isolated(grad=False)
        def method(self, x: Tensor, factor: int) -> Tensor:
            return deeper(self.x) * factor + x

    graphs = Counter()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.update(node.target for node in graph.graph.nodes if node.op == "call_method")
        return graph.forward

    @torch.compile(backend=backend)
    def program(x: Tensor, factor: int) -> Tensor:
        return Ours(x.sin()).method(x.cos(), factor).tan()

    torch.compiler.reset()
    x = torch.ones(3)
    for factor in range(2, 12):  # beyond the limit of recompilations, which would be refused
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            found = program(x, factor)
        assert torch.equal(found, ((x.sin() + 2) * factor + x.cos()).tan())
    assert set(graphs) == {"sin", "cos", "tan"}
    assert set(seen) == {False}


def test_what_we_compile_ourselves_is_compiled_inside():
    calls = Counter()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        calls["compiled"] += 1
        return graph.forward

    ours = torch.compile(lambda x: x.add(1), backend=backend, fullgraph=True)
    entry = isolated(lambda x: ours(x))
    torch.compiler.reset()
    program = torch.compile(lambda x: entry(x).mul(2), backend="eager")
    assert torch.equal(program(torch.ones(2)), torch.full((2,), 4.0))
    assert calls["compiled"] == 1


def test_the_compiler_is_not_imported():
    code = (
        "import sys, torch, flashddpm; from flashddpm.host import isolated;"
        "isolated(lambda: 0)(); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_it_runs_in_an_event_loop():
    async def program() -> tuple[bool, bool, bool]:
        return modes_inside()

    assert asyncio.run(program()) == (True, False, False)


def test_a_graph_breaks_at_the_door_and_not_at_what_it_cannot_trace():
    entry = isolated(lambda x: x.add(1))
    found = torch._dynamo.explain(lambda x: entry(x.sin()).cos())(torch.ones(2))
    assert found.graph_count == 2
    assert "disable" in found.break_reasons[0].reason.splitlines()[0]
