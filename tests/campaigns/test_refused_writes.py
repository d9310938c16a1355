"""Commands to which the system refuses a file operation: a full disk, a failing one, a read-only one, a size limit."""

import csv
import errno
import random
from pathlib import Path

from campaigns.scenarios import ONCE, build, check_run, continue_run, normalise, select_scenarios
from faults import copy, list_hidden, read_folder, refuse, run_command, start, wait

TABLES = {"scores.csv", "scores.json", "results.json", "results.csv", "results.md"}  # name the images that failed
CODES = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES)


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", select_scenarios(metafunc.config, "prepare"))


def limit(size, setup):
    """Return a setup under which no file can grow beyond ``size`` bytes."""

    def limited():
        if setup is not None:
            setup()
        import resource  # which Windows lacks

        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return limited


def try_refusal(name, folder, scenario, points, former, whole, chance):
    """Refuse an operation or the size of a file, look at the folder, and run again; return what is wrong or None."""
    out, report = folder / "work" / "out", folder / "report"
    copy(scenario.former, out)
    if chance.random() < 0.3:
        kind = f"size limit {(size := int(10 ** chance.uniform(1, 6)))}"
        action = run_command(scenario.fill(out), setup=limit(size, scenario.setup))
    else:
        number, code = chance.randrange(1, points + 1), chance.choice(CODES)
        kind = f"{errno.errorcode[code]} at operation {number} of {points}"
        action = run_command(scenario.fill(out), out.parent, refuse(code), number, scenario.setup)
    result = wait(start(action, report), report)
    if result["code"] not in (0, 2) or "Traceback" in result["text"]:
        return f"{kind}: ended with {result['code']}: {result['text'][-800:]}"
    if result["code"] == 0 and read_folder(out, normalise) != whole:
        return f"{kind}: exit status 0 without all results"
    is_named = name in ("predict", "evaluate") and result["code"] == 2 and names_failures(out, whole)
    if out.exists() and not is_named and (wrong := check_run(name, out, former, whole)) is not None:
        return f"{kind}: {wrong}"
    result = wait(start(run_command(continue_run(name, scenario, out), setup=scenario.setup), report), report)
    content = read_folder(out, normalise)
    if result["code"] != 0 and not (name in ONCE and content == whole):
        return f"{kind}: the next run ended with {result['code']}: {result['text'][-300:]}"
    if content != whole:
        names = [path for path in {*content, *whole} if content.get(path) != whole.get(path)]
        return f"{kind}: the next run differs in {names}"
    return f"{kind}: the next run leaves {hidden}" if (hidden := list_hidden(out.parent)) else None


def names_failures(out, whole):
    """Return whether nothing is missing but maps and overlays, each with its error in scores.csv."""
    content = read_folder(out, normalise)
    if not content.keys() <= whole.keys() or "scores.csv" not in content:
        return False
    with (out / "scores.csv").open(newline="") as file:
        failed = [Path(row["path"]).stem for row in csv.DictReader(file) if row.get("error")]
    changed = {path for path in whole if content.get(path) != whole[path]} - TABLES
    return bool(failed) and all(path not in content and Path(path).stem in failed for path in changed)


def test_refused_file_operation(campaign, tmp_path, name):
    built = build(name, tmp_path)
    for seed in range(campaign.tries(2, 40)):
        folder, scenario, operations, former, whole = built[seed % 2]
        wrong = try_refusal(name, folder, scenario, len(operations), former, whole, random.Random(seed))
        if wrong is None:
            campaign.passed()
        else:
            campaign.failed(f"{name}, seed {seed}: {wrong}")
