"""Signals become requests; whoever asks three times is obeyed at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from dtpipe.manifests.errors import StoppedError
from dtpipe.manifests.stopping import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_a_second_one_hurries_and_handlers_are_put_back(number: int) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.raise_if_requested("nothing was asked")
        os.kill(os.getpid(), number)
        assert (stop.requested, stop.urgent) == (True, False)
        os.kill(os.getpid(), number)
        assert stop.urgent
    assert signal.getsignal(number) is before
    with pytest.raises(StoppedError, match=f"features: stopped by {signal.Signals(number).name}") as caught:
        stop.raise_if_requested("features")
    assert caught.value.exit_code == 128 + number


@pytest.mark.parametrize("number", SIGNALS)
def test_a_third_signal_ends_a_process_that_hangs(number: int) -> None:
    code = (
        "import os, sys, time; from dtpipe.manifests.stopping import StopRequest\n"
        "with StopRequest():\n"
        "    for _ in range(3):\n"
        "        os.kill(os.getpid(), int(sys.argv[1]))\n"
        "        print('asked', flush=True)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(int(number))], capture_output=True, text=True, check=False, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (-number, "asked\nasked\n"), ended.stderr
