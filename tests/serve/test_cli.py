"""`scd serve` from its start to SIGTERM, as a user runs it."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from scd_robot.control.recorder import find_record, read_record
from scd_robot.serve import PolicyClient, ServerUnreachableError

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_examples_drive_a_served_checkpoint_until_sigterm(tiny_run, tmp_path):
    key = tmp_path / "key"
    key.write_text("secret\n")
    options = ["--port", "0", "--api-key-file", str(key), "--keys", "position=robot/xy"]
    server = subprocess.Popen(
        [sys.executable, "-m", "scd_robot.cli.main", "serve", str(tiny_run), *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = iter(server.stderr.readline, "")
        address = next(found[0] for line in lines if (found := re.search(r"ws://[\d.:]+", line)))
        assert address.startswith("ws://127.0.0.1:")
        with pytest.raises(ServerUnreachableError, match="401"):
            PolicyClient(address)
        done = subprocess.run(
            [sys.executable, EXAMPLES / "client.py", address, "--steps", "6", "--api-key", "secret"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "robot/xy" in done.stdout
        assert done.stdout.count("planned in") == 3
        remote = [sys.executable, EXAMPLES / "remote_loop.py", address, "--steps", "100", "--api-key", "secret"]
        done = subprocess.run([*remote, "--flights", tmp_path / "flights"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert int(re.search(r"'followed': (\d+)", done.stdout)[1]) > 0
        assert_a_terminated_loop_holds([*remote[:3], "--api-key", "secret", "--steps", "1000000"], address, tmp_path)
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait(timeout=30) == 0
    finally:
        server.kill()
        server.stderr.close()


def assert_a_terminated_loop_holds(command, address, folder):
    def requests():
        metrics = urllib.request.Request(address.replace("ws", "http", 1) + "/metrics")
        metrics.add_header("Authorization", "Api-Key secret")
        with urllib.request.urlopen(metrics, timeout=30) as answer:
            return sum(map(int, re.findall(r"^scd_requests_total\{.*\} (\d+)", answer.read().decode(), re.MULTILINE)))

    before, deadline = requests(), time.monotonic() + 60
    with subprocess.Popen([*command, "--flights", folder / "terminated"], stderr=subprocess.PIPE, text=True) as loop:
        while requests() == before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert requests() > before, "the loop asks for something"
        loop.terminate()
        assert "KeyboardInterrupt" in loop.communicate(timeout=60)[1]
    _, document = read_record(find_record(folder / "terminated"))
    assert (document["state"], document["faults"]["loop_error"]) == ("stopped", 1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--keys", "position"], "OURS=THEIRS"),
        (["--keys", "position=x", "position=y"], "OURS=THEIRS"),
        (["--keys", "positon=x"], "did you mean 'position'"),
        (["--tls-key", "key.pem"], "a TLS key without a certificate"),
        (["--max-history-mb", "0.0001"], "one history takes"),
        (["--api-key-file", "missing"], "no such file"),
        (["--port", "70000"], "port must be from 0 to 65535"),
        (["--http-port", "-1"], "http_port must be from 0 to 65535"),
    ],
)
def test_options_that_cannot_work_are_refused(tiny_run, refused, options, told):
    refused(["serve", tiny_run, *options], told)
