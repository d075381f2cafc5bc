"""The peak of a known graph, and a number of victims that stays within its share of the memory."""

import random
from pathlib import Path

import pytest
import torch
from torch.func import grad, vmap

from campaigns import memory
from campaigns.memory import LiveStorages, free_bytes, how_many, peak_bytes
from utils.errors import UserError

CPU = torch.device("cpu")
MB = 250_000  # numbers in float32


def test_the_peak_counts_what_is_alive_at_one_time():
    outside = torch.zeros(MB)

    def known() -> None:
        first = outside + 1  # 1 MB alive
        second = first * 2  # 2
        second.add_(outside)  # in place
        del first  # 1
        view = second.view(10, -1)[1:]  # of the same storage
        third = view.clone()  # 1.9
        del second, view  # the storage goes with the last view
        torch.cat([third, third])  # 0.9 + 1.8

    assert peak_bytes(known, CPU) == 2_700_000


@pytest.mark.parametrize("depth", [1, 5])
def test_what_autograd_keeps_counts_and_goes(depth):
    weight = torch.zeros(MB, requires_grad=True)
    with LiveStorages() as storages:
        value = weight
        for _ in range(depth):
            value = value.exp()  # keeps its result for the backward pass
        assert storages.live == depth * 10**6
        (gradient,) = torch.autograd.grad(value.sum(), weight, create_graph=True)
        gradient.square().sum().backward()
        weight.grad, value, gradient = None, None, None
        assert storages.live == 0 and storages.peak > depth * 10**6


def test_vectorised_problems_are_seen():
    peaks = [
        peak_bytes(lambda number=number: vmap(grad(lambda x: (x.sin() * x).sum()))(torch.zeros(number, MB)), CPU)
        for number in (1, 2, 4)
    ]
    assert peaks[1] == pytest.approx(2 * peaks[0], rel=1e-3) and peaks[2] == pytest.approx(4 * peaks[0], rel=1e-3)


@pytest.mark.parametrize("seed", range(20))
def test_the_number_fits_in_the_share_and_one_more_does_not(seed):
    rng = random.Random(seed)
    fixed, alone, each = rng.randrange(10**6), rng.randrange(1, 10**6), rng.randrange(1, 10**6)
    free, most = rng.randrange(2 * 10**7), rng.choice([1, 2, 3, 16, 1000])

    def iterate(number: int) -> None:  # one alone takes another way
        torch.empty(fixed + (alone if number == 1 else number * each), dtype=torch.uint8)

    number, sentence = how_many(iterate, CPU, most, free=free, share=0.5)
    assert 1 <= number <= most and f"{number} victim" in sentence and f"{free / 1e9:.1f} GB free" in sentence
    if number > 1:
        assert fixed + number * each <= 0.5 * free
        assert number == most or fixed + (number + 1) * each > 0.5 * free
    elif most > 1:
        assert fixed + 2 * each > 0.5 * free or 4 * (fixed + alone) > 0.5 * free


def test_free_memory_respects_the_limit_of_the_control_group(tmp_path, monkeypatch):
    whole = free_bytes(CPU)
    assert 0 < free_bytes(CPU, 4) <= whole / 3
    for name, text in {"limit": "3000000\n", "used": "1500000\n", "memory.stat": "anon 5\ncached 500000\n"}.items():
        (tmp_path / name).write_text(text)
    own = [line.split(":")[1] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    version = "" if "" in own else "memory"
    monkeypatch.setattr(memory, "CGROUPS", {version: (str(tmp_path), "limit", "used", "cached")})
    assert free_bytes(CPU) == 2_000_000 and free_bytes(CPU, 2) == 1_000_000
    (tmp_path / "limit").write_text("max\n")
    assert free_bytes(CPU) > 3_000_000


def test_systems_that_do_not_say_are_named(monkeypatch):
    monkeypatch.setattr(memory, "Path", lambda _: Path("/no/such/file"))
    with pytest.raises(UserError, match="--victims_at_once as a number"):
        free_bytes(CPU)
