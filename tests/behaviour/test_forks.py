"""What becomes of samplers and engines in pools of processes and in forked children.

Forked children have one thread of torch's: after a parallel operation torch itself hangs in a
forked child of more.
"""

import asyncio
import copy
import multiprocessing
import operator
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch

import flashddpm as fd
from flashddpm.execution import modes
from flashddpm.integrations.diffusers_pipelines import DDIMPipeline

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 30
"""Seconds after which a child is killed and its test fails; it takes less than one."""
CLOSE = 1e-5
"""Largest difference of images that were drawn among other numbers of lanes; measured: 3e-7."""
SEEDS = [1, 2]
DRAW = operator.methodcaller("sample", SEEDS, num_steps=2)
"""Of the standard library, so that a child need not import this file."""


def forked(function: Callable[[], Any]) -> Any:
    """Return what the function returns in a child forked here."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def run() -> None:
        try:
            answer = function()
        except BaseException:
            answer = AssertionError(traceback.format_exc())
        there.send_bytes(pickle.dumps(answer))

    child = context.Process(target=run, daemon=True)
    child.start()
    try:
        assert here.poll(LIMIT), "the forked child hangs"
        answer = pickle.loads(here.recv_bytes())
        child.join(LIMIT)
        assert child.exitcode == 0, "the forked child does not end"
    finally:
        child.kill()
    if isinstance(answer, BaseException):
        raise answer
    return answer


class TestPools:
    """The same bits from a child that was spawned, or forked, as from here."""

    @contextmanager
    def executor(self, method: str) -> Iterator[ProcessPoolExecutor]:
        pool = ProcessPoolExecutor(
            1,
            multiprocessing.get_context(method),
            initializer=torch.set_num_threads,
            initargs=(1,),
        )
        try:
            yield pool
        finally:
            for child in list(pool._processes.values()):
                child.kill()
            pool.shutdown()

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_executor(self, method, tiny_sampler):
        sampler = tiny_sampler()
        pipe = DDIMPipeline(tiny_sampler())
        broken = copy.deepcopy(sampler)
        broken.network.conv_out.bias.fill_(torch.nan)
        picture = operator.methodcaller("__call__", seeds=[4], output_type="np")
        with self.executor(method) as pool:
            drawn = pool.submit(DRAW, sampler)
            pictured = pool.submit(picture, pipe)
            failed = pool.submit(DRAW, broken)
            engine = pool.submit(fd.Engine, sampler, threaded=False)
            assert torch.equal(drawn.result(LIMIT), DRAW(sampler))
            assert (pictured.result(LIMIT).images == picture(pipe).images).all()
            with pytest.raises(fd.NonFiniteError) as error:
                failed.result(LIMIT)
            assert (error.value.seed, error.value.step) == (1, 0)
            with pytest.raises(TypeError, match="send its sampler"):
                engine.result(LIMIT)

    def test_pool(self, tiny_sampler):
        sampler = tiny_sampler()
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert torch.equal(pool.apply_async(DRAW, [sampler]).get(LIMIT), DRAW(sampler))


class Gate:
    """A hook of a network in which this process waits, and its children do not."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.reached, self.open, self.process = threading.Event(), threading.Event(), os.getpid()
        network.conv_in.register_forward_pre_hook(self.wait)

    def wait(self, *_: Any) -> None:
        if os.getpid() == self.process:
            self.reached.set()
            assert self.open.wait(LIMIT)


@pytest.fixture
def gate(tiny_sampler):
    """A sampler, its network in training mode, and the gate in it; opened at the end."""
    sampler = tiny_sampler(compile=False)
    sampler.network.train()
    gate = Gate(sampler.network)
    yield sampler, gate
    gate.open.set()


@contextmanager
def held(lock: Any) -> Iterator[None]:
    """Have another thread hold a lock."""
    taken, over = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            over.wait(LIMIT)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(LIMIT)
    try:
        yield
    finally:
        over.set()
        thread.join(LIMIT)


def ask(seed: int) -> fd.Request:
    return fd.Request(seed=seed, label=1, num_steps=2)


def ending(future: Future[Any]) -> Any:
    """Return how a future ends, as something that can be sent."""
    try:
        return future.result(LIMIT).image
    except (CancelledError, fd.EngineClosed) as error:
        return type(error)


class TestForked:
    def test_everything_of_an_engine_returns_or_raises(self, gate, tiny_sampler):
        sampler, gate = gate
        want = DRAW(tiny_sampler())
        gate.open.set()
        with fd.Engine(sampler, 2, queue_size=8) as engine:
            done = engine.submit(ask(0))
            first = done.result(LIMIT).image
            gate.open.clear()
            gate.reached.clear()
            flying = [engine.submit(ask(1)), engine.submit(ask(2))]
            assert gate.reached.wait(LIMIT)  # the engine's thread has the sampler's lock
            waiting = [engine.submit(ask(seed)) for seed in (3, 4)]
            waiting[1].cancel()
            flying[1].cancel()

            def child() -> dict[str, Any]:
                said = {}
                for name, call in {
                    "submit": lambda: engine.submit(ask(5)),
                    "generate": lambda: asyncio.run(engine.generate(ask(5))),
                    "stream": lambda: asyncio.run(anext(engine.stream(ask(5)))),
                    "drain": engine.drain,
                    "metrics": engine.metrics,
                    "warm": engine.warm,
                    "turn": engine.turn,
                    "update_weights": lambda: engine.update_weights(sampler.network.state_dict()),
                    "shutdown": engine.shutdown,
                    "cancel": lambda: engine.shutdown(cancel=True),
                    "exit": lambda: engine.__exit__(None, None, None),
                }.items():
                    try:
                        said[name] = call()
                    except fd.EngineClosed as error:
                        said[name] = str(error)
                said["futures"] = [ending(future) for future in (done, *flying, *waiting)]
                said["training"] = sampler.network.training
                said["bits"] = DRAW(sampler)
                with fd.Engine(sampler, 2) as another:
                    said["another"] = another.submit(ask(1)).result(LIMIT).image
                return said

            said = forked(child)
            gate.open.set()
            landed = flying[0].result(LIMIT).image
            assert ending(flying[1]) is CancelledError and ending(waiting[0]) is not None
        closed = "the engine is in the process that this one was forked from; make one here"
        for name in ("submit", "generate", "stream"):
            assert said[name] == closed, name
        assert said["drain"] is True and said["turn"] is False
        for name in ("warm", "update_weights", "shutdown", "cancel", "exit"):
            assert said[name] is None, name
        counts = said["metrics"]
        assert counts["queue_depth"] == counts["active"] == 0
        ended = ("completed", "failed", "cancelled", "expired")
        assert counts["submitted"] == sum(counts[name] for name in ended) == 5
        kept, *others = said["futures"]
        assert torch.equal(kept, first)
        lost, cancelled = fd.EngineClosed, CancelledError
        assert others == [lost, cancelled, lost, cancelled]
        assert said["training"] and sampler.network.training
        assert torch.equal(said["bits"], want)
        assert (said["another"] - landed).abs().max() <= CLOSE

    def test_an_engine_without_a_thread_is_closed_too(self, tiny_sampler):
        engine = fd.Engine(tiny_sampler(), 2, threaded=False)
        futures = [engine.submit(ask(seed)) for seed in range(3)]
        engine.turn()

        def child() -> list[Any]:
            with pytest.raises(fd.EngineClosed):
                engine.submit(ask(5))
            assert engine.turn() is False and engine.metrics()["steps"] == 1  # nobody's images
            return [ending(future) for future in futures]

        assert forked(child) == [fd.EngineClosed] * 3
        engine.drain()
        assert all(future.done() for future in futures)

    @pytest.mark.parametrize("name", ["sampler", "scheduler", "modes", "future"])
    def test_locks_that_a_thread_holds_hinder_no_child(self, name, tiny_sampler):
        sampler = tiny_sampler()
        want = DRAW(sampler)
        with fd.Engine(sampler, 2) as engine:
            done = engine.submit(ask(0))
            done.result(LIMIT)
            lock = {
                "sampler": sampler.executor._turns._lock,
                "scheduler": engine._scheduler._changed,
                "modes": modes._EVALUATIONS._lock,
                "future": done._condition,
            }[name]

            def child() -> Any:
                with pytest.raises(fd.EngineClosed):
                    engine.submit(ask(1))
                assert engine.drain() and engine.metrics()["completed"] == 1
                done.result(LIMIT)
                return DRAW(sampler), sampler.trajectory(SEEDS, num_steps=2).run()

            with held(lock):
                drawn, stepped = forked(child)
            assert torch.equal(drawn, want) and torch.equal(stepped, want)
            assert torch.equal(DRAW(sampler), want)

    def test_a_request_that_was_just_entering_hinders_no_child(self, tiny_sampler):
        class Slow(dict):
            def __setitem__(self, image: Any, nothing: None) -> None:
                reached.set()
                assert go.wait(LIMIT)
                super().__setitem__(image, nothing)

        reached, go = threading.Event(), threading.Event()
        with fd.Engine(tiny_sampler(), 2, threaded=False) as engine:
            engine._scheduler._waiting = Slow()
            thread = threading.Thread(target=engine.submit, args=[ask(0)])
            thread.start()
            assert reached.wait(LIMIT)

            def child() -> Any:
                engine.update_weights(engine.sampler.network.state_dict())
                engine.shutdown()
                return engine.metrics()

            counts = forked(child)
            go.set()
            thread.join(LIMIT)
        assert counts["queue_depth"] == counts["active"] == 0

    def test_a_future_that_was_just_ending_is_failed(self, tiny_sampler):
        reached, go = threading.Event(), threading.Event()
        with fd.Engine(tiny_sampler(), 2) as engine:
            future = engine.submit(ask(0))
            resolve = future.set_result

            def slowly(result: Any) -> None:
                reached.set()
                assert go.wait(LIMIT)
                resolve(result)

            future.set_result = slowly
            assert reached.wait(LIMIT)
            try:
                assert forked(lambda: ending(future)) is fd.EngineClosed
            finally:
                go.set()
            assert future.result(LIMIT).request.seed == 0

    def test_a_child_forked_in_a_callback_unwinds(self, tiny_sampler):
        sampler = tiny_sampler()
        sampler.network.train()
        children = []

        def fork(i: int, x0: Any) -> None:
            children.append(os.fork())
            if not children[-1]:
                assert not sampler.network.training
                raise KeyboardInterrupt

        want = DRAW(sampler)
        try:
            drawn = sampler.sample(SEEDS, num_steps=2, on_step=fork)
        except BaseException as error:
            right = type(error) is KeyboardInterrupt and sampler.network.training
            os._exit(0 if right else 1)
        assert torch.equal(drawn, want) and len(children) == 2
        for child in children:
            assert waited(child) == 0


def waited(child: int) -> int:
    """Return the exit code of a child; kill it after the time limit."""
    timer = threading.Timer(LIMIT, os.kill, [child, 9])
    timer.start()
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        timer.cancel()


EXITS = """
import os, sys, threading
import torch
import flashddpm as fd
torch.set_num_threads(1)

def double(x_t, t):
    if os.getpid() == parent:
        reached.set()
        go.wait()
    return 2 * x_t

def fork_on_thread(x0):
    global forked
    if forked is None:
        forked = os.fork()
        if not forked:  # with this thread alone, which is the engine's
            engine.shutdown()
            future.exception()
            sampler.sample([1], num_steps=1)
            os._exit(0)

def said(name, child):
    timer = threading.Timer(30, os.kill, [child, 9])
    timer.start()
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    timer.cancel()

parent, forked = os.getpid(), None
reached, go = threading.Event(), threading.Event()
sampler = fd.Sampler(double, fd.NoiseSchedule.create(), shape=(1, 2, 2), device="cpu")
engine = fd.Engine(sampler, 2)
future = engine.submit(fd.Request(seed=0, num_steps=2), on_step=fork_on_thread)
reached.wait()  # the engine's thread has the sampler's lock
child = os.fork()
if not child:
    sampler.sample([1], num_steps=1)
    sys.exit(3 if type(future.exception()) is fd.EngineClosed else 4)
said("exit", child)
go.set()
future.result()
said("thread", forked)
engine.submit(fd.Request(seed=1, num_steps=50))
print("parent", flush=True)
"""


def test_a_child_ends_as_any_interpreter_does():
    run = subprocess.Popen(
        [sys.executable, "-P", "-c", EXITS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = run.communicate(timeout=3 * LIMIT)
    finally:
        with suppress(ProcessLookupError):  # it has ended, and its children too
            os.killpg(run.pid, signal.SIGKILL)
    assert out.splitlines() == ["exit 3", "thread 0", "parent"]
    assert run.returncode == 0 and not err
