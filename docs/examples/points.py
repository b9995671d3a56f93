"""A diffusion model of points in the plane: a training loop with nothing but flashddpm's kernels.

    python docs/examples/points.py --out points.png

A small MLP learns two moons and draws them again from noise (half a minute on one core). A point
(x, y) is an image of two channels and one pixel, [B, 2, 1, 1]. The kernels draw all the noise, add
it, compute the loss and take the steps; the network, the optimiser and the loop are PyTorch's.
"""

import argparse
import math

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from flashddpm import NoiseSchedule, kernels, make_plan, noising_rows, target_rows

SCHEDULE, PREDICTION = NoiseSchedule.create("squaredcos_cap_v2"), "v_prediction"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def moons(n: int, seed: int = 0) -> Tensor:
    """Return n points of two crescents that reach into each other, [n, 2, 1, 1]."""
    draws = torch.Generator().manual_seed(seed)
    angle = torch.rand(n, generator=draws) * math.pi
    side = torch.arange(n) % 2 * 2 - 1  # one moon is the other, turned by half a turn
    points = 1.2 * side * torch.stack([angle.cos() + 0.5, angle.sin() - 0.25])
    points = points.T + 0.06 * torch.randn(n, 2, generator=draws)
    return points.reshape(n, 2, 1, 1).to(DEVICE)


class Network(nn.Module):
    """(x_t [B, 2, 1, 1], timestep [B]) -> out [B, 2, 1, 1]; the timestep as 16 waves."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        sizes = [2 + 32, width, width, width]
        hidden = [(nn.Linear(a, b), nn.GELU()) for a, b in zip(sizes, sizes[1:], strict=False)]
        self.layers = nn.Sequential(*sum(hidden, ()), nn.Linear(width, 2))
        self.register_buffer("waves", torch.logspace(-1, -3, 16))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # noqa: D102
        angle = t[:, None].float() * self.waves
        return self.layers(torch.cat([x.flatten(1), angle.cos(), angle.sin()], 1)).view_as(x)


def train(network: nn.Module, data: Tensor, steps: int, batch: int = 512) -> None:
    """Train the network to tell the data from the noise."""
    noising = torch.tensor(noising_rows(SCHEDULE), dtype=torch.float32, device=DEVICE)
    targets = torch.tensor(target_rows(SCHEDULE, PREDICTION), dtype=torch.float32, device=DEVICE)
    optimizer = torch.optim.Adam(network.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    draws = torch.Generator().manual_seed(1)
    seeds = torch.arange(batch, device=DEVICE)
    for step in range(steps):
        x0 = data[torch.randint(len(data), (batch,), generator=draws).to(DEVICE)]
        t = torch.randint(len(SCHEDULE), (batch,), generator=draws).to(DEVICE)
        keys = torch.full_like(seeds, step)  # no (seed, key) comes twice, so no noise does
        x_t = kernels.add_noise(x0, t, seeds, keys, noising)
        loss = kernels.diffusion_loss(network(x_t, t), x0, t, seeds, keys, targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()


@torch.no_grad()
def sample(network: nn.Module, n: int, num_steps: int = 100) -> Tensor:
    """Return n points drawn by ancestral sampling, [n, 2, 1, 1]; point i has seed i."""
    plan = make_plan(SCHEDULE, "ddpm", num_steps, prediction_type=PREDICTION, clip=0)
    # Row 0 leads to itself: the end. Row i leads to i + 1, the last to row 0.
    rows = torch.zeros(num_steps + 1, len(kernels.Column), device=DEVICE)
    rows[1:] = torch.tensor(plan.rows)
    keys, follow = torch.zeros(2, num_steps + 1, dtype=torch.int64, device=DEVICE)
    keys[1:] = torch.tensor(plan.noise_keys)
    follow[1:-1] = torch.arange(2, num_steps + 1)
    table = kernels.StepTable(rows, keys, follow)

    seeds = torch.arange(n, device=DEVICE)
    x = kernels.philox(seeds, torch.zeros_like(seeds), (2, 1, 1))
    lanes = torch.arange(n, dtype=torch.int32, device=DEVICE)
    ones = torch.ones(n, device=DEVICE)
    state = kernels.StepState(
        x=x,
        hist=torch.zeros_like(x),  # the previous x0, which this solver does not read
        net_in=x.clone(),
        nonfinite=torch.zeros_like(lanes),
    )
    slots = kernels.StepSlots(
        idx=torch.ones_like(seeds),
        seeds=seeds,
        guidance=ones,
        lane_cond=lanes,
        lane_uncond=torch.full_like(lanes, -1),  # no guidance
    )
    statistics = kernels.StepStatistics(ones, ones)  # read where a row asks; none does
    for _ in range(num_steps):
        out = network(state.net_in, rows[slots.idx, kernels.Column.TIMESTEP])
        kernels.denoise_step(state, out, slots, statistics, table)
        kernels.advance(slots, table)
    return x


def draw(path: str, *clouds: Tensor, side: int = 400) -> None:
    """Write the clouds beside one another, each in [-3, 3]^2."""
    image = Image.new("RGB", (side * len(clouds), side), "white")
    canvas = ImageDraw.Draw(image)
    for i, cloud in enumerate(clouds):
        for x, y in ((cloud.flatten(1).cpu() / 6 + 0.5).clamp(0.01, 0.99) * side).tolist():
            x, y = x + i * side, side - y
            canvas.ellipse((x - 1, y - 1, x + 1, y + 1), "navy")
    image.save(path)


def main(arguments: list[str] | None = None) -> None:
    """Train, draw and write the picture; arguments are those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="points.png", help="the picture to write")
    parser.add_argument("--steps", type=int, default=4000, help="of training")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)  # the network's first weights
    network, data = Network().to(DEVICE), moons(2000)
    train(network, data, options.steps)
    draw(options.out, data, sample(network, 2000))


if __name__ == "__main__":
    main()
