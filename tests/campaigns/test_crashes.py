"""Commands that are killed at any of their file operations: old or new results, and the next run works."""

import json
import os
import random
import time

from campaigns.scenarios import ONCE, build, check_run, continue_run, normalise, select_scenarios
from faults import copy, kill, list_hidden, read_folder, run_command, start, wait


def try_crash(name, folder, scenario, number, former, whole):
    """Kill a command at an operation, look at the folder, and run the command again; return what is wrong or None."""
    out, report = folder / "work" / "out", folder / "report"
    copy(scenario.former, out)
    action = run_command(scenario.fill(out), out.parent, kill, number, scenario.setup)
    result = wait(start(action, report), report)
    if result["code"] == 0:
        return None  # fewer operations than in the whole run
    if result["code"] != -9:
        return f"ended with {result['code']}: {result['text'][-300:]}"
    if out.exists() and (wrong := check_run(name, out, former, whole)) is not None:
        return wrong
    action = run_command(continue_run(name, scenario, out), setup=scenario.setup)
    result = wait(start(action, report), report)
    content = read_folder(out, normalise)
    if result["code"] != 0 and not (name in ONCE and content == whole):
        return f"the next run ended with {result['code']}: {result['text'][-300:]}"
    if content != whole:
        names = [path for path in {*content, *whole} if content.get(path) != whole.get(path)]
        return f"the next run differs in {names}"
    if hidden := list_hidden(out.parent):
        return f"the next run leaves {hidden}"
    return None


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", select_scenarios(metafunc.config, "predict"))


def test_killed_at_a_file_operation(campaign, tmp_path, name):
    tries = campaign.tries(2, 100)
    built = build(name, tmp_path)
    for trial in range(tries):
        folder, scenario, operations, former, whole = built[trial % 2]
        points = len(operations)
        number = 1 + (trial // 2 * max(points // (tries // 2), 1) + trial // 2 // points) % points
        wrong = try_crash(name, folder, scenario, number, former, whole)
        if wrong is None:
            campaign.passed()
        else:
            where = f"{'again' if trial % 2 else 'new'}, operation {number} of {points} ({operations[number - 1]})"
            campaign.failed(f"{name}, {where}: {wrong}")


def test_training_killed_at_random_moments(campaign, tmp_path):
    """SIGKILL at a random moment or at a file operation, once or twice; the resumed run ends bit-identically."""
    tries = campaign.tries(2, 200)
    ((folder, scenario, operations, former, whole),) = build("train_only", tmp_path, variants=[True])
    out, report = folder / "work" / "out", folder / "report"
    started = time.monotonic()
    copy(None, out)
    wait(start(run_command(scenario.fill(out)), report), report)
    duration = time.monotonic() - started
    for seed in range(tries):
        chance = random.Random(seed)
        copy(None, out)
        wrong = None
        for _ in range(chance.choice([1, 1, 2])):
            number = chance.randrange(1, len(operations) + 1) if chance.random() < 0.5 else 0
            child = start(run_command(continue_run("train", scenario, out), out.parent, kill, number), report)
            if not number:
                time.sleep(chance.uniform(0, duration))
                os.kill(child, 9)
            result = wait(child, report)
            if result["code"] not in (-9, 0):
                wrong = f"ended with {result['code']}: {json.dumps(result)[-300:]}"
            elif out.exists():
                wrong = wrong or check_run("train", out, former, whole)
        result = wait(start(run_command(continue_run("train", scenario, out)), report), report)
        if wrong is None and result["code"] != 0:
            wrong = f"the resumed run ended with {result['code']}: {result['text'][-300:]}"
        if wrong is None and read_folder(out, normalise) != whole:
            wrong = "the resumed run ends otherwise"
        if wrong is None:
            campaign.passed()
        else:
            campaign.failed(f"seed {seed}: {wrong}")
