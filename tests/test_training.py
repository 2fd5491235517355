"""The loop: what it computes, that an interrupted run ends as one that was not, what stops it."""
import shutil
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import equal, files_of_at_most, logged
from ucdr_ref import training
from ucdr_ref.cli import load_state
from ucdr_ref.distributed import derive_seed
from ucdr_ref.training import PhaseData, Run, train

CPU = torch.device("cpu")
EPOCHS = {"first": 1, "second": 3}


class Toy(nn.Module):
    """Two phases of noisy regression beside a frozen tower."""

    PHASES = ("first", "second")

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.clip = nn.Linear(width, width)
        self.first, self.second = nn.Linear(width, 2), nn.Linear(width, 2)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.linspace(-i, 1, parameter.numel()).view_as(parameter) / 9)
        self.calls, self.act = 0, {}  # {number of a call: what happens in it}

    def trainable(self, phase: str) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.named_parameters() if name.startswith(phase)}

    def start(self, phase: str) -> None:
        self.train()

    def optimizer(self, phase: str) -> torch.optim.Optimizer:
        weight, bias = self.trainable(phase).values()
        return torch.optim.Adam([{"params": [weight]}, {"params": [bias], "factor": 5.0}], lr=1.0)

    def learning_rate(self, phase: str, epoch: int, step: int) -> float:
        return 0.1 / (1 + epoch + step)

    def step(self, batch: Tensor, phase: str) -> dict[str, Tensor]:
        self.calls += 1
        noise = torch.rand(2)
        loss = ((getattr(self, phase)(self.clip(batch)) - noise) ** 2).mean()
        change = self.act.get(self.calls, lambda loss: loss)(loss)
        return {"loss": loss if change is None else change, "noise": noise.sum()}


def phases(parts: int = 1) -> dict[str, PhaseData]:
    """Five batches of four rows an epoch."""
    def rows(phase: str, epoch: int, i: int) -> Tensor:
        return torch.arange(12.).view(4, 3).sin() * (1 + i) + epoch + len(phase)

    return {phase: PhaseData(
        EPOCHS[phase], lambda epoch: range(5),
        lambda epoch, left, phase=phase: ((rows(phase, epoch, i), 4) for i in left),
        lambda batch: [(part, 1 / parts) for part in batch.chunk(parts)], batch_size=4) for phase in EPOCHS}


def run_of(folder: Path, **config: object) -> Run:
    folder.mkdir(exist_ok=True)
    return Run(folder, 7, "fp32", CPU, {"config": config}, 9)


def score_of(method: Toy) -> float:
    return -method.second.weight.abs().sum().item()


def go(folder: Path, method: Toy | None = None, **more: object) -> Toy:
    method = method or Toy()
    train(method, phases(), lambda: score_of(method), run_of(folder, **more))
    return method


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    go(folder)
    return folder


def same(a: Path, b: Path) -> None:
    assert all(equal(load_state(a / name), load_state(b / name)) for name in ("last.pt", "best.pt"))
    assert (a / "log.jsonl").read_bytes() == (b / "log.jsonl").read_bytes()


def test_the_loop_is_the_plain_one(whole):
    """The same steps without checkpoints, micro-batches, log or processes."""
    method, lines, best = Toy(), [], (-9.0, {})

    def own() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in method.state_dict().items() if "clip" not in name}

    for phase, epochs in EPOCHS.items():
        optimizers = [torch.optim.Adam([parameter]) for parameter in method.trainable(phase).values()]
        for epoch in range(epochs):
            for step, (batch, _) in enumerate(phases()[phase].load(epoch, range(5))):
                torch.manual_seed(derive_seed(7, phase, epoch, step))
                terms = method.step(batch, phase)
                method.zero_grad()
                terms["loss"].backward()
                for optimizer, factor in zip(optimizers, (1, 5)):
                    optimizer.param_groups[0]["lr"] = 0.1 / (1 + epoch + step) * factor
                    optimizer.step()
                lines.append({"phase": phase, "epoch": epoch, "step": step + 1, **{name: value.item() for name, value in terms.items()}})
            if phase == "second":
                lines.append({"phase": phase, "epoch": epoch + 1, "score": score_of(method)})
                best = max(best, (score_of(method), own()), key=lambda pair: pair[0])
    assert equal(load_state(whole / "last.pt")["method"], own())
    assert equal(load_state(whole / "best.pt"), {"method": best[1], "config": {}}) and logged(whole) == lines


def test_seeds_are_those_of_every_run_so_far():
    assert derive_seed(0, "source", 1, 2) == 8906978294031623505


@pytest.mark.parametrize("dies_at", (1, 3, 6, 8, 16, 20))
def test_resumed_equals_uninterrupted(tmp_path, whole, dies_at, capsys):
    """The process dies, without any chance to save, in step `dies_at`; the same command goes on."""
    def die(loss: Tensor) -> None:
        raise SystemError("killed")

    method = Toy()
    method.act[dies_at] = die
    with pytest.raises(SystemError):
        go(tmp_path / "cut", method)
    go(tmp_path / "cut")
    same(tmp_path / "cut", whole)
    printed = capsys.readouterr().out
    if steps := (dies_at - 1) % 5 // 2 * 2:
        phase, epoch = ("first", 1) if dies_at < 6 else ("second", (dies_at - 1) // 5)
        assert f"resumed from phase {phase}, epoch {epoch}, step {steps}\n" in printed
    assert ("resumed" in printed) == (dies_at > 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_step_which_is_saved(tmp_path, whole, number):
    method, before = Toy(), signal.getsignal(number)
    method.act[8] = lambda loss: signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt, match=f"stopped by {number.name} in phase second, epoch 1, step 3; the same command"):
        go(tmp_path / "cut", method)
    assert method.calls == 8 == len(logged(tmp_path / "cut")) and signal.getsignal(number) == before
    assert go(tmp_path / "cut").calls == 12
    same(tmp_path / "cut", whole)


def test_a_signal_while_the_last_step_is_saved_is_not_lost(tmp_path, monkeypatch):
    def save(state: dict, path: Path) -> None:
        if path.name == "last.pt" and state["progress"]["epoch"] == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training, "save_atomic", save)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path)


def test_a_batch_in_parts_is_the_same_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n: torch.ones(n))  # the parts of a batch draw one after the other
    one, two = Toy(), Toy()
    for parts, method in ((1, one), (2, two)):
        train(method, phases(parts), None, run_of(tmp_path / str(parts)))
    assert two.calls == 2 * one.calls
    torch.testing.assert_close(one.state_dict(), two.state_dict())
    losses = [[line["loss"] for line in logged(tmp_path / parts) if "loss" in line] for parts in "12"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # of float32, on any processor
    assert equal(*(load_state(tmp_path / "1" / name)["method"] for name in ("last.pt", "best.pt")))  # without a score


@pytest.mark.parametrize(("what", "act"), [
    ("loss, gradient", lambda loss: loss * float("inf")), ("gradient", lambda loss: loss.register_hook(lambda g: g * float("nan")) and None)])
def test_what_is_not_finite_stops_before_it_reaches_the_weights(tmp_path, what, act):
    method = Toy()
    method.act[8] = act
    with pytest.raises(ValueError, match=f"^{what} not finite after phase second, epoch 1, step 2; take"):
        go(tmp_path / "bad", method)
    assert all(value.isfinite().all() for value in method.state_dict().values())
    assert load_state(tmp_path / "bad" / "last.pt")["progress"]["step"] == 2


def test_the_best_epoch_is_kept_and_patience_ends(tmp_path):
    scores, states, method, data = iter([0.3, 0.5, 0.4]), [], Toy(), phases()
    run = Run(tmp_path, 7, "fp32", CPU, {"config": {}}, patience=1)

    def validate() -> float:
        states.append(method.second.weight.clone())
        return next(scores)

    data["second"].epochs = 9
    train(method, data, validate, run)
    assert [line["score"] for line in logged(tmp_path) if "score" in line] == [0.3, 0.5, 0.4]
    assert torch.equal(load_state(tmp_path / "best.pt")["method"]["second.weight"], states[1])
    train(Toy(), data, validate, run)  # finished: asks for no more scores


def test_checkpoints_of_something_else_are_refused(tmp_path, whole):
    whole = Path(shutil.copytree(whole, tmp_path / "whole"))
    with pytest.raises(ValueError, match=r"last.pt is of a run with another config \(seed: 0 -> 3\)"):
        go(whole, seed=3)
    go(whole, device="cpu", data_root="moved")
    with pytest.raises(ValueError, match=r"first.weight is \[2, 3\] there, \[2, 4\] here"):
        go(whole, Toy(4))
    content = (whole / "last.pt").read_bytes()
    for broken in (content[:-300], b"", b"{}", content.replace(b"log_bytes", b"log_bites")):
        (whole / "last.pt").write_bytes(broken)
        with pytest.raises(ValueError, match="last.pt is no checkpoint of"):
            go(whole)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, whole):
    method = Toy()
    with ExitStack() as stack, pytest.raises(OSError, match="could not write .*last.pt|too large"):
        method.act[8] = lambda loss: stack.enter_context(files_of_at_most(1000))
        go(tmp_path / "full", method)
    assert load_state(tmp_path / "full" / "last.pt")["progress"]["phase"] == 1
    go(tmp_path / "full")
    same(tmp_path / "full", whole)


def test_progress_grows_where_the_last_epoch_is_shorter(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr("ucdr_ref.cli.ProgressLine.update", lambda line, count, extra="": done.append((count, line.total)))
    both = phases()
    both["second"].order = lambda epoch: range(5 if epoch < EPOCHS["second"] - 1 else 2)
    train(Toy(), both, None, run_of(tmp_path))
    second = [count for count, total in done if total == 4 * 5 * EPOCHS["second"]]
    assert second == sorted(second) and second[-1] == 4 * (5 * (EPOCHS["second"] - 1) + 2)
