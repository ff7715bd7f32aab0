"""Clock, delay, chunk execution, planners and observations, one promise each."""

import threading

import numpy as np
import pytest

from scd_robot.control import DelayConfig, ExecutionConfig, Sample, VirtualClock, WatchdogConfig
from scd_robot.control.clock import MonotonicClock, Pacer
from scd_robot.control.delay import DelayEstimator, split_chunk
from scd_robot.control.executor import ChunkExecutor
from scd_robot.control.planner import PlanRequest, ThreadPlanner, make_plan
from scd_robot.control.rehearsal import SPEC
from scd_robot.control.watchdog import ObservationGate
from scd_robot.errors import ConfigError
from scd_robot.types import ArraySpec

CHUNK = np.arange(32, dtype=np.float32).reshape(16, 2)


class TestPacer:
    def test_lateness_does_not_add_up(self):
        clock = VirtualClock()
        pacer = Pacer(clock, 0.1)
        for tick in range(50):
            assert pacer.wait() == tick
            clock.advance(0.03)
        assert clock.now() == pytest.approx(49 * 0.1 + 0.03)
        assert pacer.missed == 0

    def test_missed_ticks_are_left_out_and_counted(self):
        clock = VirtualClock()
        pacer = Pacer(clock, 0.1)
        pacer.wait()
        clock.advance(0.57)  # 0.07 after tick 5
        assert pacer.wait() == 6
        clock.advance(0.13)  # 0.03 after tick 7
        assert pacer.wait() == 7
        assert pacer.lateness_s == pytest.approx(0.03)
        assert pacer.missed == 5

    def test_the_histogram_counts_every_tick(self):
        clock = VirtualClock()
        pacer = Pacer(clock, 0.1)
        for late_s in (0.0, 0.0003, 0.003, 0.03):
            clock.late_s = late_s
            pacer.wait()
        report = pacer.report()
        assert dict(zip([0, *report["late_ms_edges"]], report["late_counts"], strict=True)) == {
            0: 1, 0.1: 0, 0.2: 1, 0.5: 0, 1.0: 0, 2.0: 1, 5.0: 0, 10.0: 0, 20.0: 1, 50.0: 0, 100.0: 0,
        }  # fmt: skip
        assert report["worst_late_ms"] == pytest.approx(30)

    def test_the_monotonic_clock_sleeps_until_the_time(self):
        clock = MonotonicClock()
        until = clock.now() + 0.01
        clock.sleep_until(until)
        assert clock.now() >= until


class TestDelay:
    def test_warm_up_does_not_count_and_old_delays_are_forgotten(self):
        estimator = DelayEstimator(DelayConfig(window=5, warm_up=2, initial=3))
        for delay in (40, 40):
            estimator.add(delay)
        assert estimator.delay_steps == 3
        estimator.add(9)
        assert estimator.delay_steps == 9
        for _ in range(5):
            estimator.add(2)
        assert estimator.delay_steps == 2

    def test_it_is_the_quantile_of_the_window_rounded_up(self):
        estimator = DelayEstimator(DelayConfig(window=10, quantile=0.9, warm_up=0))
        for delay in (1, 1, 1, 1, 1, 1, 1, 1, 5, 8):
            estimator.add(delay)
        assert estimator.delay_steps == 8  # the next larger of those seen: 0.9 of the way is between the last two
        assert DelayEstimator(DelayConfig()).delay_steps == 1

    @pytest.mark.parametrize("length", [2, 3, 8, 16])
    def test_a_split_fits_the_chunk(self, length):
        for executed in range(1, length + 1):
            for delay in range(1, 2 * length):
                split = split_chunk(length, executed, delay)
                assert 1 <= split.delay_steps <= split.num_executed <= length - split.delay_steps
                assert split.fits == (2 * delay <= length)
                if split.fits:
                    assert split.delay_steps == delay
                    if delay <= executed <= length - delay:
                        assert split.num_executed == executed


class TestExecutor:
    def test_a_new_chunk_goes_on_where_its_delay_left_it(self):
        executor = ChunkExecutor(ExecutionConfig("receding"), (None, None))
        assert executor.take() is None
        assert executor.accept(CHUNK, 0)
        for i in range(5):
            np.testing.assert_array_equal(executor.take(), CHUNK[i])
        asked = executor.consumed
        executor.take(), executor.take()
        assert executor.accept(CHUNK + 100, executor.consumed - asked)
        np.testing.assert_array_equal(executor.take(), CHUNK[2] + 100)

    def test_a_chunk_that_comes_after_its_end_is_refused(self):
        executor = ChunkExecutor(ExecutionConfig("receding"), (None, None))
        assert not executor.accept(CHUNK, 16)
        assert executor.take() is None

    def test_upcoming_is_what_is_taken_next(self):
        executor = ChunkExecutor(ExecutionConfig("prefix"), (None, None))
        executor.accept(CHUNK, 12)
        np.testing.assert_array_equal(executor.upcoming(3), CHUNK[12:15])
        np.testing.assert_array_equal(executor.upcoming(9), CHUNK[12:])
        assert executor.upcoming(0).shape == (0, 2)
        assert executor.consumed == 0

    def test_the_ensemble_is_the_weighted_mean_of_what_chunks_say_about_a_step(self):
        executor = ChunkExecutor(ExecutionConfig("ensemble", ensemble_decay=0.5), (None, None))
        executor.accept(CHUNK, 0)
        executor.take()
        executor.accept(CHUNK * 0 + 7, 0)
        weights = np.array([1, np.exp(-0.5)]) / (1 + np.exp(-0.5))
        np.testing.assert_allclose(executor.take(), weights[0] * CHUNK[1] + weights[1] * 7)

    def test_slowed_down_places_come_later_and_increments_are_shorter_with_the_same_sum(self):
        executor = ChunkExecutor(ExecutionConfig("receding"), (None, 0.0))
        executor.accept(CHUNK, 0)
        taken = np.array([executor.take(0.5) for _ in range(8)])
        np.testing.assert_allclose(taken[::2, 0], CHUNK[:4, 0])
        np.testing.assert_allclose(taken[1::2, 0], CHUNK[:4, 0] + 1)
        np.testing.assert_allclose(taken[::2, 1], 0.5 * CHUNK[:4, 1])
        assert executor.consumed == 4

    @pytest.mark.parametrize(
        "wrong", [{"strategy": "rtc"}, {"num_executed": 0}, {"ensemble_decay": -1.0}, {"max_gain": 0.0}]
    )
    def test_settings_are_checked(self, wrong):
        with pytest.raises(ConfigError):
            ExecutionConfig(**wrong)


class SlowPolicy:
    spec = SPEC

    def __init__(self, result=None):
        self.result, self.go, self.threads = result, threading.Event(), []

    def plan_from(self, given, prefix=None, running=None):
        self.threads.append(threading.current_thread())
        assert self.go.wait(20)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


REQUEST = PlanRequest(0, None, None, None, 0.0, 0, 1, 0.0, 0.0)


def test_the_thread_plans_beside_and_hands_over_once():
    policy = SlowPolicy(CHUNK[None])
    planner = ThreadPlanner(policy)
    planner.submit(REQUEST)
    assert planner.poll() is None
    assert planner.busy
    policy.go.set()
    while (result := planner.poll()) is None:
        pass
    assert result.chunk is not None
    np.testing.assert_array_equal(result.chunk, CHUNK)
    assert not planner.busy
    assert planner.poll() is None
    assert policy.threads[0] is not threading.current_thread()
    planner.close()
    policy.threads[0].join(20)
    assert not policy.threads[0].is_alive()


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (ValueError("no context"), "ValueError: no context"),
        (CHUNK[None, :3], r"\(1, 3, 2\)"),
        (CHUNK[None] * np.nan, "NaN"),
        (np.full((1, *CHUNK.shape), "left"), "TypeError"),
    ],
)
def test_a_plan_that_fails_tells_why(result, told):
    policy = SlowPolicy(result)
    policy.go.set()
    done = make_plan(policy, REQUEST)
    assert done.chunk is None
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(done.error)


def sample(stamp, state=(0.0, 0.0), frame=0):
    return Sample({"state": np.array(state, np.float32), "camera": np.full((4, 4), frame, np.uint8)}, stamp)


class TestGate:
    def gate(self):
        config = WatchdogConfig(max_age_s=0.2, frozen_keys=("camera",), max_frozen_s=0.5)
        return ObservationGate(dict(SPEC.observation), config, SPEC.action_dim)

    def test_bad_samples_do_not_become_the_newest(self):
        gate = self.gate()
        assert gate.admit(sample(1.0), 1.0) is None
        for wrong, told in [
            (sample(1.1, (0.0, np.nan)), "NaN"),
            (sample(1.1, (0.0,)), "must be"),
            (sample(9.0), "future"),
            (sample(np.nan), "future"),
            (Sample({}, 1.1), "missing"),
        ]:
            problem = gate.admit(wrong, 1.1)
            assert (problem is None) == (wrong.stamp_s != wrong.stamp_s) or told in str(problem)
            assert gate.newest is not None
            assert gate.newest.stamp_s == 1.0
        assert gate.age_s(1.3) == pytest.approx(0.3)

    def test_a_picture_of_nothing_is_as_bad_as_nan_and_none_is_fine_where_the_policy_does_without(self):
        spec = {"state": ArraySpec((2,)), "eye": ArraySpec((4, 6, 3), "uint8")}
        gate = ObservationGate(spec, WatchdogConfig(frozen_keys=("eye",), max_frozen_s=0.5), 2, optional=("eye",))
        picture = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)

        def seen(stamp, **changes):
            return Sample({"state": np.zeros(2), "eye": picture, **changes}, stamp)

        assert gate.admit(seen(1.0), 1.0) is None
        for eye, told in [
            (0 * picture, "'eye' is 0 everywhere: the camera gave no picture; mend it, or give None"),
            (0 * picture + 255, "'eye' is 255 everywhere"),
            ((picture > 9).astype(np.uint8), "nothing but 0 and 1"),
            (picture[None], "leave the batch axis out"),
            (np.moveaxis(picture, -1, 0), "channels come last; give np.moveaxis(picture, 0, -1)"),
        ]:
            assert told in str(gate.admit(seen(1.1, eye=eye), 1.1))
        assert "'eye' is missing; got ['state']; give None" in str(gate.admit(Sample({"state": np.zeros(2)}, 1.1), 1.1))
        assert "'state' is missing" in str(gate.admit(seen(1.1, state=None), 1.1))
        assert gate.newest is not None
        assert gate.newest.stamp_s == 1.0
        for stamp in np.arange(1.1, 2.5, 0.1):
            assert gate.admit(seen(float(stamp), eye=None), float(stamp)) is None
            assert gate.newest.stamp_s == stamp
            assert gate.frozen_key() is None, "it does not repeat itself, nothing comes"
        gate.admit(seen(2.5), 2.5)
        assert gate.frozen_key() == "eye"

    def test_a_sample_of_none_alone_is_none(self):
        gate = ObservationGate({"eye": ArraySpec((4, 6, 3), "uint8")}, WatchdogConfig(), 2, optional=("eye",))
        assert gate.admit(Sample({"eye": None}, 1.0), 1.0) == "every key is None: nothing was observed"

    def test_a_sample_that_was_overtaken_is_left_out(self):
        gate = self.gate()
        gate.admit(sample(1.0, (1.0, 1.0)), 1.0)
        assert gate.admit(sample(0.9), 1.0) is None
        assert gate.newest is not None
        assert gate.newest.stamp_s == 1.0

    def test_a_sample_of_the_same_time_with_newer_parts_is_taken_in(self):
        """Its stamp is that of its oldest part, a slow gripper's for one."""
        gate = self.gate()
        for frame in range(8):
            assert gate.admit(sample(1.0, (frame, 1.0), frame), 1.0 + 0.01 * frame) is None
            assert gate.newest is not None
            assert gate.newest.observation["state"][0] == frame
        assert gate.age_s(1.1) == pytest.approx(0.1)

    def test_a_sensor_that_repeats_itself_is_named_until_it_changes(self):
        gate = self.gate()
        for stamp in np.arange(1.0, 1.9, 0.1):
            gate.admit(sample(float(stamp)), float(stamp))
        assert gate.frozen_key() == "camera"
        gate.admit(sample(2.0, frame=1), 2.0)
        assert gate.frozen_key() is None
