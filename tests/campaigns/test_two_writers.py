"""Two processes with one command and one folder at the same time: one writes, the other is told who does."""

import random
import re
import time

from campaigns.scenarios import SCENARIOS, normalise, select_scenarios
from command_line import works
from faults import copy, list_hidden, read_folder, run_command, start, wait

# What the second process changes, so that its results differ. The others do the same twice.
CHANGES = {
    "train": ("2", "3"),
    "predict": ("after", "before"),
    "evaluate": ("after", "before"),
    "calibrate": ("0.2", "0.5"),
    "report": ("after", "before"),
    "demo": ("1", "2"),
    "compare": ("2", "3"),
}
IN_USE = re.compile(r"no other process writes to, got one in use since [-\d]+ [:\d]+ by process \d+ on \S+ \(")
TOO_LATE = re.compile(  # the first has finished
    "exists already|wanted a new or an empty folder|detector was not trained on|wanted a run of this comparison"
)


def change(arguments, name):
    """Return the arguments of the second process."""
    first, second = CHANGES.get(name, ("", ""))
    *others, last = arguments
    if name == "evaluate":
        return [a.replace(f"/{first}", f"/{second}") for a in arguments]
    if name == "predict":
        return [a.replace(f"/{first}", f"/{second}") for a in arguments]
    return [*others, last.replace(first, second)] if first else arguments


def is_of_one(content, results):
    """Return whether a folder holds the results of one run; caches of images are kept beside those of others."""

    def divide(files):
        cached = {name: value for name, value in files.items() if name.startswith("cache/")}
        return cached, {name: value for name, value in files.items() if name not in cached}

    caches = {name: value for result in results for name, value in divide(result)[0].items()}
    cached, others = divide(content)
    return others in [divide(result)[1] for result in results] and cached.items() <= caches.items()


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", select_scenarios(metafunc.config, "prepare"))


def test_two_processes_in_one_folder(campaign, tmp_path, name):
    scenario = SCENARIOS[name](tmp_path, is_new=name not in ("predict", "evaluate", "report", "export"))
    out, reports = tmp_path / "work" / "out", [tmp_path / "first", tmp_path / "second"]
    if scenario.setup is None:  # imports everything once, before processes are forked
        copy(scenario.former, tmp_path / "warm")
        works(*scenario.fill(tmp_path / "warm"))
    out.parent.mkdir()
    commands = [scenario.fill(out), change(scenario.fill(out), name)]
    whole, seconds = [], 0.0
    for command in commands:
        copy(scenario.former, out)
        started = time.monotonic()
        assert wait(start(run_command(command, setup=scenario.setup), reports[0]), reports[0])["code"] == 0
        seconds = time.monotonic() - started
        whole.append(read_folder(out, normalise))
    for seed in range(campaign.tries(1, 12)):
        chance = random.Random(seed)
        copy(scenario.former, out)
        children = []
        for command, report in zip(commands, reports, strict=True):
            children.append(start(run_command(command, setup=scenario.setup), report))
            time.sleep(chance.uniform(0, seconds / 3))
        results = [wait(child, report) for child, report in zip(children, reports, strict=True)]
        winners = [number for number, result in enumerate(results) if result["code"] == 0]
        wrong = None
        if not winners:
            wrong = f"none finished: {results}"
        elif any(
            result["code"] != 0 and not (result["code"] == 2 and (IN_USE.search(text) or TOO_LATE.search(text)))
            for result in results
            for text in [" ".join(result["text"].split())]
        ):
            wrong = f"ended otherwise: {[(result['code'], result['text'][-300:]) for result in results]}"
        elif not is_of_one(read_folder(out, normalise), [whole[number] for number in winners]):
            wrong = f"mixed results of {winners}: {sorted(read_folder(out, normalise))}"
        elif hidden := list_hidden(out.parent):
            wrong = f"left {hidden}"
        if wrong is None:
            campaign.passed()
        else:
            campaign.failed(f"{name}, seed {seed}: {wrong}")
