"""What keeps Ray from starting, or a cluster from being joined, is one sentence that says what to do.

Texts of Ray are those of Ray 2.60, taken from failures that were provoked.
"""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest

from dtpipe.extract.cluster.obstacles import check_answers, check_local, local_token, refusal
from dtpipe.manifests.errors import ConfigError, IncompleteError
from dtpipe.pipeline.doctor import examine
from parts.faulty_server import faulty_server

HOW = (
    "Ensure that the token for the cluster is available in a local file (e.g., ~/.ray/auth_token or via "
    "RAY_AUTH_TOKEN_PATH) or as the `RAY_AUTH_TOKEN` environment variable."
)


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process may write nowhere, as one of another user; root always may."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "geteuid", lambda: 65534)


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize("made", [True, False])
def test_a_temporary_folder_of_another_user_is_named_with_both_users(made):
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # pytest's own are too long for sockets
        folder = Path(short) / "ray"
        if made:
            folder.mkdir()
        place = folder if made else folder.parent
        said = rf"Ray keeps its files in {folder}, and {place} belongs to {place.owner()}: .* of (nobody|user 65534),"
        with pytest.raises(ConfigError, match=said):
            check_local({"RAY_TMPDIR": short, "TMPDIR": "/somewhere/else"})


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_temporary_folder_whose_path_is_too_long_for_sockets_is_refused(variable, tmp_path, monkeypatch):
    """Where Ray's own check begins: 107 bytes for the longest of its sockets."""
    rest = len(f"/ray/session_2026-11-28_11-25-00_861217_{os.getpid()}/sockets/plasma_store")
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/")
    fits = "/" + "x" * (107 - rest - 1)
    check_local({variable: fits})
    with pytest.raises(ConfigError, match=r"1 characters too long.*set RAY_TMPDIR to a folder with a shorter path"):
        check_local({variable: f"{fits}x"})
    assert not examine_ray(monkeypatch, {variable: f"{fits}x"}).startswith("no address")


def examine_ray(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> str:
    """What the doctor finds of Ray."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    for other in ("_packages", "_disk", "_devices"):
        monkeypatch.setattr(f"dtpipe.pipeline.doctor.{other}", lambda: iter(()))
    return next(finding.found for finding in examine() if finding.check == "ray cluster")


def test_a_token_file_that_is_not_there_is_named(tmp_path):
    (tmp_path / "empty").write_text("\n")
    for file in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(ConfigError, match=f"RAY_AUTH_TOKEN_PATH names {file}"):
            check_local({"RAY_AUTH_TOKEN_PATH": str(file)})
        check_local({"RAY_AUTH_TOKEN_PATH": str(file), "RAY_AUTH_MODE": "disabled"})
        check_local({"RAY_AUTH_TOKEN_PATH": str(file), "RAY_AUTH_TOKEN": "abc"})


def test_without_a_home_ray_gets_a_token_of_this_process(monkeypatch, tmp_path):
    """Ray would keep one in ~/.ray and fail; a container's user often has no home to write to."""
    monkeypatch.setenv("HOME", "/proc/nowhere")
    tokens = {local_token({}), local_token({"RAY_AUTH_MODE": "token"})}
    assert {len(str(token)) for token in tokens} == {64}
    for environ in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "abc"}, {"RAY_AUTH_TOKEN_PATH": "/a/file"}):
        assert local_token(environ) is None
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray can keep its own
    assert local_token({}) is None


def test_what_listens_and_is_no_ray_cluster_is_said_at_once(tmp_path):
    """Ray tries for more than two minutes."""
    with (
        faulty_server(tmp_path) as server,
        pytest.raises(IncompleteError, match="is no Ray cluster; check the address"),
    ):
        check_answers(server.url.removeprefix("http://"))


def test_a_listener_that_never_speaks_is_given_up(monkeypatch):
    monkeypatch.setattr("dtpipe.extract.cluster.obstacles.CONNECT_S", 0.2)
    said = pytest.raises(IncompleteError, match=r"does not answer \(timed out\)")
    with socket.create_server(("127.0.0.1", 0)) as silent, said:
        check_answers(f"127.0.0.1:{silent.getsockname()[1]}")


def failure(*texts: str) -> Exception:
    """An error with causes, outermost first."""
    error: Exception = RuntimeError(texts[-1])
    for text in reversed(texts[:-1]):
        outer = ConnectionError(text)
        outer.__cause__ = error
        error = outer
    return error


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (
            (
                "Failed to connect to Ray cluster at 192.0.2.2:6399",
                "Failed to connect to GCS. Last connection error: Traceback (most recent call last):\n  File ..\n"
                "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: Authentication token is missing or "
                f"incorrect. Note: RAY_AUTH_MODE is currently 'disabled' (not 'token'). {HOW}\n",
            ),
            "it wants a token that this process does not have; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN",
        ),
        (
            (f"Token authentication is enabled but no authentication token was found. {HOW}",),
            "it wants a token that this process does not have",
        ),
        (
            (f"RAY_AUTH_TOKEN_PATH is set but file cannot be opened or is empty: /some/token. {HOW}",),
            "RAY_AUTH_TOKEN_PATH names /some/token, which cannot be read or is empty",
        ),
        (
            ("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /long/ray/session_2026",),
            "its temporary folder has too long a path; set RAY_TMPDIR",
        ),
        (
            ("Version mismatch: The cluster was started with:\n    Ray: 2.50.0\n    Python: 3.10.1\nThis process",),
            r"its versions differ \(The cluster was started with: Ray: 2\.50\.0 Python: 3\.10\.1 .*install the same",
        ),
    ],
)
def test_rays_own_words_become_one_sentence(texts, said):
    error = refusal(failure(*texts), "host:6379")
    assert isinstance(error, ConfigError)
    with pytest.raises(ConfigError, match=f"the Ray cluster at host:6379 cannot be joined: {said}"):
        raise error
    assert "\n" not in str(error)


def test_what_may_not_be_written_is_named_and_the_unknown_asks_to_be_run_again():
    denied = PermissionError(13, "Permission denied", "/tmp/ray/session_2026")
    with pytest.raises(ConfigError, match="Ray does not start here: /tmp/ray/session_2026 may not be written"):
        raise refusal(denied, "local")
    with pytest.raises(IncompleteError, match=r"\(something new\); run again, or work without Ray: --inline"):
        raise refusal(RuntimeError("something new\nover lines"), "local")
