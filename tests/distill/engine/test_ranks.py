"""One process is the case of one rank; several find each other, or say why not."""

from __future__ import annotations

import pytest
import torch

from dtpipe.distill.engine.ranks import Ranks, error_of_another, join_ranks
from dtpipe.manifests.errors import ConfigError, DivergedError, DtpipeError, InputError
from parts.ranks import fork_ranks


def test_a_process_of_a_rank_that_cannot_meet_the_others_says_so(monkeypatch):
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "no.such.host.invalid",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.distributed.init_process_group", _no_such_host)
    with (
        pytest.raises(ConfigError, match=r"cannot meet at no\.such\.host\.invalid:29500 .*; start them with torchrun"),
        join_ranks("cpu"),
    ):
        pass


def _no_such_host(*_args: object, **_kwargs: object) -> None:
    raise ValueError("getaddrinfo failed")


def test_one_rank_does_everything_alone():
    ranks, value = Ranks(), torch.ones(2)
    assert ranks.sum(value) is value
    assert (ranks.most(3, 1), ranks.gather("a"), ranks.first(lambda: 7)) == ([3, 1], ["a"], 7)
    with pytest.raises(InputError, match="kept as it is"):
        ranks.first(_fail)


def _fail() -> None:
    raise InputError("kept as it is")


@pytest.mark.parametrize(("num", "size"), [(7, 3), (3, 2), (4, 4), (256, 8)])
def test_shares_cover_a_batch_and_differ_by_at_most_one(num, size):
    shares = [Ranks(rank, size).share(num) for rank in range(size)]
    assert [place for share in shares for place in share] == list(range(num))
    assert {len(share) for share in shares} <= {num // size, num // size + 1}


def test_what_cannot_be_sent_stays_on_the_first_rank(tmp_path):
    def call(rank: int) -> list[object]:
        with join_ranks("cpu") as ranks:
            here = ranks.only_first(lambda: lambda: None)  # no pickle takes a function of a function
            order = ranks.in_turn(lambda: len(list(tmp_path.glob("*.made"))) or (tmp_path / "1.made").touch())
            return [callable(here), order]

    assert fork_ranks(call, tmp_path, 2) == [[True, None], [False, 1]]


def test_a_process_without_a_gpu_of_its_own_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setenv("LOCAL_RANK", "63")
    with pytest.raises(ConfigError, match="process 63 of this machine has no GPU, torch sees 8"), join_ranks("cuda"):
        pass


def test_an_error_of_another_process_is_of_its_class_so_that_who_expects_it_finds_it() -> None:
    """A rate that is too high is passed over also where Ray's workers train; what is not dtpipe's is said plainly."""
    with pytest.raises(DivergedError, match=r"^too high$") as raised:
        raise error_of_another("DivergedError", "too high", 9)
    assert raised.value.exit_code == 9
    plain = error_of_another("RuntimeError", "odd", 1)
    assert (type(plain), str(plain), plain.exit_code) == (DtpipeError, "odd", 1)
