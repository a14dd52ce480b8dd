"""Seeds: the same in another process and by an independent computation, different wherever a part differs."""

import os
import subprocess
import sys
from hashlib import blake2b

import lightning as L
import pytest

from finetune.randomness import global_seed, seed_of


def test_a_seed_is_the_digest_of_its_parts_written_out():
    little = int.from_bytes(blake2b(b"7\x00step\x003", digest_size=8).digest(), "little")
    assert seed_of(7, "step", 3) == little // 2
    assert 0 <= seed_of() < 2**63


def test_a_seed_does_not_depend_on_the_process():
    code = "from finetune.randomness import seed_of; print(seed_of(1, 'cat/\\udcff.png', 2))"
    for hash_seed in ("1", "2"):  # Python's own hash of a string differs between these
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(done.stdout) == seed_of(1, "cat/\udcff.png", 2)


def test_neighbours_do_not_share_a_seed():
    seeds = [seed_of(seed, epoch, name) for seed in range(10) for epoch in range(20) for name in ("a", "b", "ab")]
    assert len(set(seeds)) == len(seeds)
    assert seed_of(1, 23) != seed_of(12, 3)
    assert sum(seed % 2 for seed in seeds) == pytest.approx(len(seeds) / 2, rel=0.15)


def test_the_seed_of_the_run_is_that_of_lightning(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert global_seed() == 0
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # so that it is restored afterwards
    L.seed_everything(41, verbose=False)
    assert global_seed() == 41
