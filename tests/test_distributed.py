"""What a process knows of those beside it, what it does of the work, and which GPU it takes."""

import pytest
import torch

from flashddpm import distributed
from flashddpm.distributed import World


def test_the_environment_says_who_this_is():
    four = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert World.from_environment({}) == World(0, 1, 0, 1)
    assert World.from_environment(four) == World(0, 1, 0, 1)  # a container's, not torchrun's
    launched = {distributed.LAUNCHED: "none", **four}
    assert World.from_environment(launched) == World(5, 8, 1, 4)
    for name, bad in (("RANK", "8"), ("RANK", "x"), ("WORLD_SIZE", ""), ("LOCAL_RANK", "-1")):
        with pytest.raises(ValueError, match=f"{name}="):
            World.from_environment({**launched, name: bad})
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE=''"):
        World.from_environment({k: v for k, v in launched.items() if k != "LOCAL_WORLD_SIZE"})


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_item_is_dealt_once_and_evenly(size, count):
    shares = [World(rank, size).mine(range(count)) for rank in range(size)]
    assert sorted(i for share in shares for i in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_each_process_takes_its_own_gpu(monkeypatch):
    world = World(5, 8, 1, 4)
    for there, chosen in ((False, "auto"), (True, "cuda:1")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert world.device("auto") == chosen
    assert (world.device("cpu"), world.device("cuda")) == ("cpu", "cuda:1")
    assert World().device("cuda:3") == "cuda:3"
    with pytest.raises(ValueError, match="device='cuda:3': must be auto, cpu or cuda"):
        world.device("cuda:3")
