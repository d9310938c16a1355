"""The number of threads is chosen by measurement; the clock and the processors are simulated."""

import pytest
import torch

from recontrast.data.system import ProcessorUse, count_cpus, read_cpu_quota
from recontrast.runtime import threads
from recontrast.runtime.threads import FIRST_LOOK, LONGEST_WAIT, ThreadTuner, choose_threads

CPU = torch.device("cpu")


class Machine:
    """Processors of which some are busy: a thread more than there are free ones makes all wait."""

    def __init__(self, processors, busy=0):
        self.processors, self.busy = processors, busy
        self.now, self.threads, self.probes, self.lines = 0.0, processors, 0, []
        self.tuner = ThreadTuner(processors, self.lines.append, self.set_threads, probe=self.probe, clock=self.clock)

    def clock(self):
        return self.now

    def set_threads(self, count):
        self.threads = count

    @property
    def seconds(self):
        """Duration of a step that takes one thread one second."""
        waits = 5 if self.threads > self.processors - self.busy else 1
        return waits / self.threads

    def probe(self):
        self.probes += 1
        self.now += 0.012 * self.seconds

    def work(self, steps):
        for _ in range(steps):
            self.now += self.seconds
            self.tuner.after_step()
        return self.threads


@pytest.mark.parametrize(
    ("processors", "busy", "expected"), [(2, 1, 1), (4, 1, 3), (4, 2, 2), (16, 9, 7), (64, 40, 24)]
)
def test_busy_processors_are_left_alone(processors, busy, expected):
    machine = Machine(processors, busy)
    count = machine.work(400)
    assert count == machine.tuner.threads
    assert expected - expected // 3 <= count <= expected  # steps of less than a tenth are not made
    assert machine.lines[0].startswith("threads: ") and f" instead of {processors}, " in machine.lines[0]


@pytest.mark.parametrize("processors", [1, 2, 3, 8])
def test_free_processors_are_all_used(processors):
    machine = Machine(processors)
    assert machine.work(300) == processors
    assert not machine.lines
    assert (machine.probes > 0) == (processors > 1)


def test_processors_that_become_free_are_used_again():
    machine = Machine(4, busy=2)
    assert machine.work(50) == 2
    machine.busy = 0
    assert machine.work(500) == 4
    assert machine.lines[-1].startswith("threads: 4 instead of 2, 2.0 times as fast")


def test_steps_that_become_slow_are_followed_by_a_measurement():
    machine = Machine(2)
    machine.work(1000)  # the waits have become long
    machine.busy = 1
    before = machine.now
    assert machine.work(4) == 1
    assert machine.now - before < LONGEST_WAIT / 4


def test_measurements_take_a_small_share_of_the_time():
    machine = Machine(2)
    machine.work(20)
    early = machine.probes
    machine.work(2000)  # 1000 s
    assert machine.probes - early <= 2 * threads.ROUNDS * (1000 / LONGEST_WAIT + 6)


def test_short_work_is_not_measured():
    machine = Machine(8)
    machine.work(int(FIRST_LOOK * 8) - 1)
    assert machine.probes == 0


def test_waiting_is_no_part_of_a_step():
    """A program that waits for images between its steps, more each time, has no slower steps."""
    machine = Machine(2)
    machine.work(1000)
    probes = machine.probes
    for pause in (1.0, 2.0, 4.0, 8.0):
        machine.now += pause
        machine.tuner.begin_step()
        machine.work(1)
    assert machine.probes == probes


def test_given_durations_and_patience():
    machine = Machine(2)
    machine.now += 1.5 * FIRST_LOOK
    machine.tuner.after_step(0.5, patience=2.0)
    assert machine.probes == 0
    machine.now += FIRST_LOOK
    machine.tuner.after_step(0.5, patience=2.0)
    first = machine.probes
    assert first > 0
    for _ in range(threads.STEPS):
        machine.tuner.after_step(0.5, patience=2.0)
    machine.now += FIRST_LOOK
    for _ in range(threads.STEPS):
        machine.tuner.after_step(2.0, patience=2.0)
    assert machine.probes > first  # steps that became slow are not waited for


def test_small_gains_change_nothing():
    """Noise: one thread fewer is up to a tenth faster now and then."""
    machine = Machine(2)
    machine.probe = machine.tuner._probe = lambda: setattr(
        machine, "now", machine.now + (0.012 if machine.threads == 2 else 0.0113)
    )
    assert machine.work(200) == 2
    assert not machine.lines


def test_numbers_that_are_much_slower_are_measured_once():
    machine = Machine(2, busy=1)
    machine.tuner.before_steps()
    assert machine.tuner.threads == 1
    assert machine.lines == ["threads: 1 instead of 2, 2.5 times as fast (other programs use this machine)"]
    assert machine.probes == 4  # two measurements: with 1 and 2 threads, then with 1 and 2 again


@pytest.mark.parametrize("looks", [range(1), range(1, 2)], ids=["first-look", "second-look"])
@pytest.mark.parametrize("factor", [3, 40])
def test_chance_does_not_bring_a_busy_processor_back(looks, factor):
    """One look finds the thread in use slow, because it shared a processor with the other program all the while."""
    machine = Machine(2, busy=1)
    machine.tuner.before_steps()
    assert machine.tuner.threads == 1
    machine.lines.clear()
    steady, measure, count = machine.probe, machine.tuner._measure, [0]

    def probe():
        steady()
        if machine.threads == 1 and count[0] - 1 in looks:
            machine.now += factor * 0.012

    def measure_once(candidates, least):
        count[0] += 1
        return measure(candidates, least)

    machine.tuner._probe, machine.tuner._measure = probe, measure_once
    assert machine.work(400) == 1
    assert not machine.lines
    assert count[0] > 3


def test_the_number_in_use_is_measured_to_the_end():
    """A few slow computations with one thread, which shared a processor, do not decide."""
    machine = Machine(2, busy=1)
    machine.tuner.before_steps()
    machine.lines.clear()
    slow = iter([0.1] * 3)
    steady = machine.probe

    def probe():
        steady()
        if machine.threads == 1:
            machine.now += next(slow, 0.0)

    machine.tuner._probe = probe
    assert machine.work(20) == 1
    assert not machine.lines


def test_a_measurement_before_the_first_step_delays_the_next():
    machine = Machine(4)
    machine.tuner.before_steps()
    probes = machine.probes
    assert machine.work(int(FIRST_LOOK * 4) - 1) == 4
    assert machine.probes == probes > 0
    machine = Machine(1)
    machine.tuner.before_steps()
    assert machine.probes == 0


class Use:
    """Processors that other programs have used, once something was loaded."""

    def __init__(self, others):
        self.values = [None, others, others]

    def measure_others(self):
        return self.values.pop(0)


@pytest.fixture
def _no_variables(monkeypatch):
    for name in (*threads.ENVIRONMENT, "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_no_variables")
def test_a_given_number_is_kept():
    before = torch.get_num_threads()
    with choose_threads(3, pytest.fail):
        threads.start_threads()
        assert torch.get_num_threads() == threads.requested_threads() == 3
        threads.after_step(CPU)
        assert threads.measured_threads() is None
    assert torch.get_num_threads() == before
    assert threads.requested_threads() is None
    with pytest.raises(ValueError, match="threads: wanted at least 1, got 0"), choose_threads(0, pytest.fail):
        pass


@pytest.mark.usefixtures("_no_variables")
def test_limits_of_the_machine_are_honoured(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(threads, "count_cpus", lambda: 6)
    with choose_threads(None, pytest.fail):
        threads.start_threads()
        assert threads.measured_threads() == 6
    assert chosen == [6, 64]


@pytest.mark.parametrize("variable", [("OMP_NUM_THREADS", "4"), ("WORLD_SIZE", "2")], ids=str)
@pytest.mark.usefixtures("_no_variables")
def test_a_number_of_the_environment_is_kept(monkeypatch, variable):
    monkeypatch.setenv(*variable)
    before = torch.get_num_threads()
    with choose_threads(None, pytest.fail):
        threads.start_threads()
        assert threads.measured_threads() is None
        assert torch.get_num_threads() == before


GROUPS = {
    "none": ({}, None),
    "version 2": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
    "no limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    "parent": (
        {
            "proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "800000 100000\n",
        },
        2.0,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/docker/1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        0.5,
    ),
    "version 1, no limit": (
        {
            "proc/self/cgroup": "4:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    "broken": ({"proc/self/cgroup": "x\n::\n", "sys/fs/cgroup/cpu.max": "many\n"}, None),
}  # fmt: skip


@pytest.mark.parametrize(("files", "expected"), GROUPS.values(), ids=GROUPS)
def test_quota_of_a_container(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_cpu_quota(tmp_path) == expected


def test_quota_limits_the_processors(monkeypatch):
    monkeypatch.setattr("recontrast.data.system.read_cpu_quota", lambda: 0.5)
    assert count_cpus() == 1
    monkeypatch.setattr("recontrast.data.system.read_cpu_quota", lambda: 10_000.0)
    assert count_cpus() >= 1


def test_probe_computes():
    threads.run_probe()


@pytest.mark.usefixtures("_no_variables")
@pytest.mark.parametrize(("others", "looks"), [(None, 0), (0.1, 0), (0.9, 1)])
def test_a_busy_machine_is_measured_before_the_first_step(monkeypatch, others, looks):
    found = []
    monkeypatch.setattr(threads, "ProcessorUse", lambda: Use(others))
    monkeypatch.setattr(ThreadTuner, "before_steps", lambda tuner: found.append(tuner.threads))
    with choose_threads(None, pytest.fail):
        threads.start_threads()  # before the model is built
        threads.start_threads(CPU)
        assert not found
        threads.start_threads(CPU)
        threads.start_threads(CPU)  # once
        assert len(found) == looks
    with choose_threads(None, pytest.fail):
        threads.start_threads(torch.device("cuda"))
        threads.start_threads(torch.device("cuda"))
    assert len(found) == looks


def write_stat(root, user, idle):
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "stat").write_text(f"cpu  {user} 3 5 {idle} 70 0 1 2 0 0\ncpu0 1 2 3\n")


def test_the_processors_of_other_programs(tmp_path, monkeypatch):
    import os
    import time

    if not hasattr(os, "sysconf"):
        pytest.skip("the counters of Linux")
    now, own = [10.0], [1.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: own[0])
    ticks = os.sysconf("SC_CLK_TCK")
    write_stat(tmp_path, 100, 1000)
    use = ProcessorUse(tmp_path)
    assert use.measure_others() is None  # too early
    now[0], own[0] = 12.0, 1.5
    write_stat(tmp_path, 100 + int(2.5 * ticks), 99999)
    assert use.measure_others() == pytest.approx(1.0)  # 2.5 s used in 2 s, 0.5 s of them by this process
    (tmp_path / "proc" / "stat").write_text("cpu  x\n")
    assert use.measure_others() is None
    assert ProcessorUse(tmp_path / "missing").measure_others() is None


def test_interrupted_first_measurements_decide_nothing():
    """On a fast processor the probe is shorter than a turn of another program, which can fall on any measurement."""
    machine = Machine(2, busy=1)
    turn = 0.004

    def probe():
        machine.probes += 1
        interrupted = machine.probes <= 4 if machine.threads == 1 else machine.probes % 3 == 0
        machine.now += 0.0012 / machine.threads + interrupted * turn

    machine.tuner._probe = probe
    machine.tuner.before_steps()
    assert machine.tuner.threads == 1
