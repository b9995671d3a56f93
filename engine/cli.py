"""cli."""
import typer
from pathlib import Path
app = typer.Typer()

@app.callback()
def _root() -> None: ...

@app.command()
def train(data: Path, out: Path = typer.Option(...), steps: int = typer.Option(...), batch_size: int = 64, lr_schedule: str = "constant", learning_rate: float = 5e-4, precision: str = "float32", prediction_type: str = "epsilon", beta_schedule: str = "linear", seed: int = 0, resume: bool = False, loss_weighting: str = "constant", save_every: int = 500) -> None:
    from flashddpm.trainer import Trainer, TrainConfig
    from flashddpm.data import load_idx
    c = TrainConfig(steps=steps, batch_size=batch_size, lr_schedule=lr_schedule, learning_rate=learning_rate, precision=precision, prediction_type=prediction_type, beta_schedule=beta_schedule, seed=seed, loss_weighting=loss_weighting, save_every=save_every)
    t = Trainer(c, load_idx(data, 4), out)
    if resume: t.resume()
    t.run()

def main() -> None: app()
