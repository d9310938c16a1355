"""`recontrast serve` in a process of its own: SIGTERM under load, and the address it prints."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from client import Client

ROOT = Path(__file__).parents[2]


def start(*arguments, **environment):
    command = [sys.executable, "-m", "recontrast", "serve", *arguments, "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    line = process.stdout.readline()
    address = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
    if address is None:
        process.kill()
        pytest.fail(line + process.communicate()[1])
    return process, Client(int(address[1]))


def test_sigterm_under_load_loses_no_accepted_image(calibrated, images):
    token = "a-token-of-the-tests"
    process, client = start(calibrated, RECONTRAST_TOKEN=token)
    try:
        client.token = token
        content = [path.read_bytes() for path in images]
        wanted = [client.predict(one) for one in content]
        answers, failures, many = [], [], threading.Event()

        def work(first):
            for index in range(first, 10_000):
                try:
                    answer = client.predict(content[index % len(content)])
                except OSError as error:  # refused or closed: the service has stopped
                    failures.append(error)
                    return
                answers.append(answer == wanted[index % len(content)])
                if len(answers) > 30:
                    many.set()

        threads = [threading.Thread(target=work, args=[first]) for first in range(4)]
        for thread in threads:
            thread.start()
        assert many.wait(60)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0 and len(failures) == 4 and all(answers)
    counts = re.search(r"(\d+) images accepted, (\d+) answered", errors)
    assert int(counts[1]) == int(counts[2]) == len(answers) + len(content)  # and each answer has arrived
    assert errors.count("\n") == 1
