"""A card that only pretends to be one: its graph calls its step, as a real one repeats it."""

import pytest
import torch

from flashddpm.execution.cuda_graphs import Graphs


class Graph:
    def __init__(self, card, step, count):
        self.card, self.step, self.count = card, step, count

    def __call__(self):
        self.card.replayed.append(self.count)
        for _ in range(self.count):
            self.out = self.step()
        return self.out


class _Card:
    """Remembers what it was asked; ``seconds`` of a step by how many a graph holds."""

    def __init__(self, free=1000, needs=100, seconds=None):
        self.free, self.needs = free, needs
        self.times = seconds or {1: 1e-3, 4: 0.9e-3, 16: 0.9e-3}
        self.log, self.replayed, self.held = [], [], 0
        self.full = False

    def free_bytes(self):
        return self.free

    def pool_bytes(self):
        return self.held

    def warm(self, step):
        self.log.append(("warm", len(step())))
        return self.needs

    def capture(self, step, count):
        if self.full:
            raise self.full if self.full is not True else torch.cuda.OutOfMemoryError("no room")
        self.log.append(("capture", len(step()), count))
        self.held = max(self.held, self.needs)
        return Graph(self, step, count)

    def seconds(self, graph):
        graph()
        return self.times[graph.count]

    def release(self):
        self.log.append("release")


@pytest.fixture(name="Card")
def _card():
    return _Card


@pytest.fixture
def captured(tiny_sampler):
    """A function that makes a sampler on the CPU whose steps are "captured", and its card."""

    def make(limit=None, **options):
        sampler, card = tiny_sampler(), _Card(**options)
        sampler.executor.capture = True
        sampler.executor.graphs = Graphs(card, limit)
        return sampler, card

    return make
