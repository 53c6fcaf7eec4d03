"""Ranks agree on what the file system says, because the first one alone asks it."""

import os
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from trainables.errors import UserError
from trainables.training.ranks import from_first


def rank_main(rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    (folder / f"only-{rank}").touch()

    def damaged() -> str:
        raise UserError(f"rank {rank} cannot read it")

    assert from_first(lambda: (folder / "only-0").exists())
    assert from_first(lambda: rank) == 0
    with pytest.raises(UserError, match="rank 0 cannot read it"):
        from_first(damaged)
    (folder / f"done-{rank}").touch()
    dist.destroy_process_group()


def test_two_ranks_go_the_same_way(tmp_path: Path) -> None:
    mp.spawn(rank_main, (tmp_path,), nprocs=2)
    assert len(list(tmp_path.glob("done-*"))) == 2


def test_alone_it_is_asked_directly() -> None:
    assert from_first(lambda: 7) == 7
