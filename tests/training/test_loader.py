"""The loader: batches are a function of the step alone, and nobody waits for ever."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashddpm.data import ImageData, to_float
from flashddpm.training import loader as module
from flashddpm.training.loader import Loader, TrainBatch

N, B = 7, 4
IMAGES = torch.randint(256, (N, 3, 4, 6), generator=torch.Generator().manual_seed(0)).byte()
DATA = ImageData(IMAGES, torch.arange(N) % 3, 3)
LIMIT = 60.0  # seconds after which a test that waits has failed


class Drawn:
    """Draws of a step that are known before; the keys name the step."""

    def __init__(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        self.index = torch.randint(N, (B,), generator=generator)
        self.flip = torch.rand(B, generator=generator) < 0.5
        self.drop = torch.rand(B, generator=generator) < 0.5
        self.t, self.seeds = self.index + 100 * step, self.index - step


class Draws:
    """What `training.draws.Draws` is to a loader."""

    def keys(self, step: int) -> torch.Tensor:
        return step * B + torch.arange(B)

    def of(self, keys: torch.Tensor) -> Drawn:
        return Drawn(int(keys[0]) // B)

    def index(self, keys: torch.Tensor) -> torch.Tensor:
        return self.of(keys).index

    def flips(self, keys: torch.Tensor) -> torch.Tensor:
        return self.of(keys).flip

    def label_drops(self, keys: torch.Tensor) -> torch.Tensor:
        return self.of(keys).drop

    def timesteps(self, keys: torch.Tensor) -> torch.Tensor:
        return self.of(keys).t

    def seeds(self, keys: torch.Tensor) -> torch.Tensor:
        return self.of(keys).seeds


DRAWS = Draws()


class Always(Draws):
    """The same images at every step, all of them mirrored or none, and no label dropped."""

    def __init__(self, index: list[int], flip: bool) -> None:
        self.drawn = Drawn(0)
        self.drawn.index = torch.tensor(index)
        self.drawn.flip = torch.full((len(index),), flip)

    def keys(self, step: int) -> torch.Tensor:
        return torch.arange(len(self.drawn.index))

    def of(self, keys: torch.Tensor) -> Drawn:
        return self.drawn


class Source:
    """Images that can be held back, and that count what is fetched."""

    def __init__(self, held: bool = False) -> None:
        self.shape, self.num_classes, self.class_names = DATA.shape, 3, None
        self.go, self.began = threading.Event(), threading.Semaphore(0)
        self.fetched: list[list[int]] = []
        self.threads: set[str] = set()
        if not held:
            self.go.set()

    def __len__(self) -> int:
        return N

    def fetch(self, index):
        self.fetched.append(index.tolist())
        self.threads.add(threading.current_thread().name)
        self.began.release()
        assert self.go.wait(LIMIT)
        return DATA.fetch(index)

    def fingerprint(self) -> str:
        return DATA.fingerprint()


def check(batch: TrainBatch, step: int) -> None:
    wanted = Drawn(step)
    assert batch.x0.dtype is torch.float32 and batch.x0.shape == (B, 3, 4, 6)
    assert batch.x0.is_contiguous(memory_format=torch.channels_last)
    for row in range(B):
        pixels = IMAGES[wanted.index[row]].numpy()
        pixels = pixels[:, :, ::-1] if wanted.flip[row] else pixels
        assert np.array_equal(((batch.x0[row].cpu().numpy() + 1) * 127.5).round(), pixels)
    assert -1 <= batch.x0.min() and batch.x0.max() <= 1
    assert torch.equal(batch.labels.cpu(), torch.where(wanted.drop, 3, wanted.index % 3))
    assert torch.equal(batch.keys.cpu(), step * B + torch.arange(B))
    assert torch.equal(batch.t.cpu(), wanted.t) and torch.equal(batch.seeds.cpu(), wanted.seeds)
    assert all(value.dtype is torch.int64 for value in batch[1:])


def same(a: TrainBatch, b: TrainBatch) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, y) and x.stride() == y.stride() for x, y in pairs)


@settings(max_examples=25)
@given(st.integers(0, 2**40), st.sampled_from((1, 2, 3, 9)), st.integers(1, 5), st.integers(0, 5))
def test_a_batch_is_a_function_of_its_step(start: int, ahead: int, count: int, cut: int) -> None:
    with (
        Loader(DATA, DRAWS, start, "cpu", ahead) as one,
        Loader(DATA, DRAWS, start, "cpu", 0) as two,
    ):
        batches = [one.next() for _ in range(count)]
        assert all(same(batch, two.next()) for batch in batches)
    for i, batch in enumerate(batches):
        check(batch, start + i)
    assert one.step == two.step == start + count
    cut = min(cut, count)  # a loader that starts later goes on with the same
    with Loader(DATA, DRAWS, start + cut, "cpu", ahead) as later:
        assert all(same(batch, later.next()) for batch in batches[cut:])


def test_floats_are_those_of_to_float() -> None:
    all_values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    data = ImageData(all_values, None, None)
    with Loader(data, Always([0], flip=False), 0, "cpu") as loader:
        batch = loader.next()
    assert torch.equal(batch.x0, to_float(all_values)) and batch.labels is None
    assert len(batch.tensors()) == 4


def test_a_dropped_label_is_the_null_class_and_no_other_is_changed() -> None:
    """Decided by the draws, applied to a copy, whatever the labels are."""
    labels = torch.arange(N) % 3
    with Loader(DATA, DRAWS, 0, "cpu", ahead=0) as loader:
        for step in range(6):
            found, wanted = loader.next().labels, Drawn(step)
            assert (found == 3).tolist() == wanted.drop.tolist()
            assert torch.equal(found[~wanted.drop], labels[wanted.index][~wanted.drop])
    assert torch.equal(DATA.labels, labels)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_a_batch_are_views_that_make_it_up(labelled: bool, parts: int) -> None:
    data = DATA if labelled else ImageData(IMAGES, None, None)
    with Loader(data, DRAWS, 2, "cpu", ahead=0) as loader:
        batch = loader.next()
    chunks = batch.chunk(parts)
    assert len(chunks) == parts
    for name, whole in batch._asdict().items():
        found = [getattr(chunk, name) for chunk in chunks]
        if name == "labels" and not labelled:
            assert whole is None and found == [None] * parts
            continue
        assert torch.equal(torch.cat(found), whole)
        assert [len(value) for value in found] == [B // parts] * parts
        storages = {value.untyped_storage().data_ptr() for value in (whole, *found)}
        assert len(storages) == 1


@pytest.mark.parametrize("ahead", [1, 3])
def test_so_many_are_fetched_ahead_by_one_thread(ahead: int) -> None:
    source = Source()
    with Loader(source, DRAWS, 5, "cpu", ahead) as loader:
        for taken in range(3):
            for _ in range(ahead if taken == 0 else 1):
                assert source.began.acquire(timeout=LIMIT)
            assert len(source.fetched) == ahead + taken
            check(loader.next(), 5 + taken)
    assert source.fetched[:3] == [Drawn(step).index.tolist() for step in (5, 6, 7)]
    [name] = source.threads
    assert name.startswith("flashddpm-loader")


def test_without_ahead_there_is_no_thread() -> None:
    source = Source()
    with Loader(source, DRAWS, 5, "cpu", ahead=0) as loader:
        for taken in range(3):
            assert len(source.fetched) == taken
            check(loader.next(), 5 + taken)
    assert source.threads == {threading.current_thread().name}


def test_no_global_random_numbers_are_used() -> None:
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for ahead in (0, 2):
        with Loader(DATA, DRAWS, 0, "cpu", ahead) as loader:
            for _ in range(3):
                loader.next()
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numpy_state


def test_the_sources_memory_is_not_touched_by_a_flip() -> None:
    class Views(Source):
        def fetch(self, index):
            return IMAGES[:B], None

    kept = IMAGES.clone()
    with Loader(Views(), Always([*range(B)], flip=True), 0, "cpu") as loader:
        assert torch.equal(loader.next().x0, to_float(kept[:B].flip(-1)))
    assert torch.equal(IMAGES, kept)


# The wait


class Clock:
    """A clock that moves only when told to; ``looked`` is called when somebody reads it."""

    def __init__(self) -> None:
        self.now, self.looked = 0.0, lambda: None

    def __call__(self) -> float:
        self.looked()
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    result = Clock()
    monkeypatch.setattr(module, "perf_counter", result)
    return result


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_the_wait_for_a_slow_source_is_counted(clock: Clock, ahead: int) -> None:
    class Slow(Source):
        def fetch(self, index):
            result = super().fetch(index)
            if len(self.fetched) <= 1:
                clock.now += 5.0  # the first batch takes 5 s, all after next() began to wait
            return result

    source = Slow(held=True)
    clock.looked = source.go.set  # next() has looked at the clock: now the source may go on
    with Loader(source, DRAWS, 0, "cpu", ahead) as loader:
        assert loader.wait_seconds == 0.0
        loader.next()
        assert loader.wait_seconds == 5.0
        loader.next()  # takes no time
        assert loader.wait_seconds == 5.0


def test_time_between_batches_is_no_wait(clock: Clock) -> None:
    source = Source()
    with Loader(source, DRAWS, 0, "cpu", ahead=1) as loader:
        for _ in range(3):
            assert source.began.acquire(timeout=LIMIT)
            clock.now += 7.0  # the step; the batch is fetched meanwhile
            loader.next()
        assert loader.wait_seconds == 0.0


def test_the_wait_counts_when_the_source_fails(clock: Clock) -> None:
    class Failing(Draws):
        def keys(self, step: int) -> torch.Tensor:
            clock.now += 2.0
            raise OSError("the disk is gone")

    loader = Loader(DATA, Failing(), 0, "cpu", ahead=0)
    with pytest.raises(OSError):
        loader.next()
    assert loader.wait_seconds == 2.0


# Failures and ends


class Gone(Exception):
    pass


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("culprit", ["draw", "fetch"])
def test_an_error_comes_out_of_its_own_step_and_no_step_is_left_out(
    ahead: int, culprit: str
) -> None:
    error = Gone("of step 2")

    class Failing(Source):
        def fetch(self, index):
            if culprit == "fetch" and index.tolist() == Drawn(2).index.tolist():
                raise error
            return super().fetch(index)

    class Drawing(Draws):
        def keys(self, step: int) -> torch.Tensor:
            if culprit == "draw" and step == 2:
                raise error
            return super().keys(step)

    with Loader(Failing(), Drawing(), 0, "cpu", ahead) as loader:
        check(loader.next(), 0)
        check(loader.next(), 1)
        for _ in range(3):
            with pytest.raises(Gone) as caught:
                loader.next()
            assert caught.value is error and loader.step == 2


def test_close_does_not_wait_for_a_fetch_and_is_safe_twice() -> None:
    source = Source(held=True)
    loader = Loader(source, DRAWS, 0, "cpu", ahead=3)
    assert source.began.acquire(timeout=LIMIT)
    fetch = loader._fetching[0]
    loader.close()
    loader.close()
    assert fetch.running()  # still held by the source
    with pytest.raises(RuntimeError, match="closed"):
        loader.next()
    source.go.set()
    for thread in threading.enumerate():
        if thread.name.startswith("flashddpm-loader"):
            thread.join(LIMIT)
            assert not thread.is_alive()
    assert len(source.fetched) == 1  # what waited was dropped


def test_close_by_another_thread_frees_a_next_that_waits() -> None:
    source = Source(held=True)
    loader = Loader(source, DRAWS, 0, "cpu", ahead=2)
    caught: list[str] = []

    def consume() -> None:
        with pytest.raises(RuntimeError) as error:
            loader.next()
        caught.append(str(error.value))

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert source.began.acquire(timeout=LIMIT)
    loader.close()
    source.go.set()
    consumer.join(LIMIT)
    assert not consumer.is_alive() and caught == ["loader: is closed; make another"]


def test_close_inside_of_a_next_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "perf_counter", clock)
    loader = Loader(DATA, DRAWS, 0, "cpu")
    clock.looked = loader.close  # next() is past its first look at whether it is closed
    with pytest.raises(RuntimeError, match="^loader: is closed; make another"):
        loader.next()


def test_a_next_whose_fetch_is_cancelled_says_that_the_loader_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = Source(held=True)
    loader = Loader(source, DRAWS, 0, "cpu", ahead=2)
    assert source.began.acquire(timeout=LIMIT)
    loader._fetching.popleft()  # keeps the thread busy; what next() waits for has not begun
    waited = loader._fetching[0]
    result = waited.result
    monkeypatch.setattr(waited, "result", lambda: (loader.close(), result())[1])
    with pytest.raises(RuntimeError, match="^loader: is closed; make another"):
        loader.next()
    source.go.set()


def test_the_context_closes_when_the_consumer_fails() -> None:
    source = Source()
    with pytest.raises(Gone), Loader(source, DRAWS, 0, "cpu") as loader:
        loader.next()
        raise Gone
    with pytest.raises(RuntimeError, match="closed"):
        loader.next()


@pytest.mark.parametrize("name, value", [("start", -1), ("start", 0.5), ("ahead", -1)])
def test_arguments_are_checked(name: str, value) -> None:
    arguments = {"start": 0, "ahead": 1, name: value}
    with pytest.raises(ValueError, match=f"^{name}={value}"):
        Loader(DATA, DRAWS, device="cpu", **arguments)


@pytest.mark.parametrize("flip", [torch.zeros(B), torch.zeros(1, dtype=torch.bool)])
def test_a_draw_that_does_not_fit_is_refused(flip: torch.Tensor) -> None:
    draws = Always([*range(B)], flip=False)
    draws.drawn.flip = flip
    with Loader(DATA, draws, 0, "cpu") as loader:
        with pytest.raises(ValueError, match=r"^flip: .*; must be bool \[4\]"):
            loader.next()


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [0, 2])
def test_batches_on_a_gpu_are_those_of_the_cpu(ahead: int) -> None:
    with Loader(DATA, DRAWS, 3, "cuda", ahead) as gpu, Loader(DATA, DRAWS, 3, "cpu", 0) as cpu:
        for step in range(3, 8):
            batch, wanted = gpu.next(), cpu.next()
            assert batch.x0.is_cuda and batch.labels.is_cuda and batch.t.is_cuda
            check(batch, step)
            assert torch.equal(batch.x0.cpu(), wanted.x0)


@pytest.mark.gpu
def test_a_graph_can_be_captured_while_the_loader_fetches() -> None:
    source = Source()
    x = torch.ones(8, device="cuda")
    with Loader(source, DRAWS, 0, "cuda", ahead=4) as loader:
        loader.next()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x.mul_(2)
            for _ in range(3):
                assert source.began.acquire(timeout=LIMIT)
        check(loader.next(), 1)
