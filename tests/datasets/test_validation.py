"""Each check finds an injected fault at its episode and step, and nothing in clean data."""

import itertools
import json
import re

import h5py
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from scd_robot.datasets.formats import ReadOptions
from scd_robot.datasets.lazy import LazyArray
from scd_robot.datasets.schema import EpisodeDataset
from scd_robot.datasets.validation import checks, frame_scan, motion
from scd_robot.datasets.validation.findings import at_rows, follows, runs
from scd_robot.datasets.validation.frame_scan import scan_frames
from scd_robot.datasets.validation.report import format_validation
from scd_robot.datasets.validation.run import check_dataset, validate
from scd_robot.errors import DatasetError, UnknownNameError
from scd_robot.types import ArraySpec, DatasetSpec

LENGTHS = (40, 60, 50, 45, 70, 55)
ENDS = np.cumsum(LENGTHS)
STEPS = int(ENDS[-1])


def row(episode, step):
    return int(ENDS[episode]) - LENGTHS[episode] + step


def rows_of(episode):
    return slice(row(episode, 0), int(ENDS[episode]))


def smooth(width, seed=0):
    """(N, width) noisy motion: random walks of usual step 0.1, from a new start in each episode."""
    rng = np.random.default_rng(seed)
    parts = [np.cumsum(rng.normal(scale=0.1, size=(n, width)), axis=0) + rng.normal(size=width) for n in LENGTHS]
    return np.concatenate(parts).astype(np.float32)


def first_places(found):
    return [finding.places[0] for finding in found]


def severities(found):
    return [finding.severity for finding in found]


class TestPlaces:
    def test_follows_is_false_in_first_steps_only(self):
        inside = follows(np.array([2, 2, 5]), 5)  # the second episode is empty
        assert inside.tolist() == [False, True, False, True, True]

    def test_runs_are_found_at_both_ends(self):
        assert runs(np.array([1, 1, 0, 1, 0, 0, 1], bool)).tolist() == [[0, 2], [3, 4], [6, 7]]
        assert runs(np.zeros(3, bool)).tolist() == []

    def test_ten_thousand_rows_are_one_finding_of_twenty_places(self):
        (finding,) = at_rows("x", "note", "k", np.arange(10_000), np.array([4, 10_000]), "m")
        assert finding.count == 10_000
        assert finding.places[:6] == ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1))
        assert len(finding.places) == 20
        assert (finding.episode, finding.step) == (0, 0)


class TestValues:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, bad):
        values = smooth(3)
        assert checks.not_finite("state", values, ENDS) == []
        values[row(2, 7), 1] = values[row(4, 0), 1] = bad
        (finding,) = checks.not_finite("state", values, ENDS)
        assert (finding.severity, finding.places, finding.dimensions) == ("error", ((2, 7), (4, 0)), (1,))

    @pytest.mark.parametrize(("key", "severity"), [("state", "note"), ("action", "warning")])
    def test_constant_dimensions(self, key, severity):
        values = smooth(4)
        assert checks.constant_dimensions(key, values) == []
        values[:, [1, 3]] = 2.5
        values[5, 3] = np.nan  # says nothing about the others
        (finding,) = checks.constant_dimensions(key, values)
        assert (finding.severity, finding.dimensions, finding.count) == (severity, (1, 3), 2)

    def test_a_dimension_of_nothing_but_nan_is_not_constant(self):
        assert checks.constant_dimensions("state", np.full((9, 1), np.nan)) == []

    def test_saturated_tells_the_share_at_both_ends(self):
        values = np.linspace(-1, 1, 100)[:, None].repeat(3, axis=1)
        values[:, 1] = np.clip(values[:, 1], -0.75, 0.8)  # 13 at the lower end, 10 at the upper
        values[:, 2] = np.where(values[:, 2] > 0, 1.0, -1.0)  # a gripper
        (finding,) = checks.saturated("action", values, np.array([60, 100]))
        assert (finding.dimensions, finding.count, finding.severity) == ((1,), 23, "warning")
        assert "23 % of the steps (13 % at -0.75, 10 % at 0.8)" in finding.message
        values[:, 1] = np.clip(np.linspace(-1, 1, 100), -0.85, 0.85)  # 16 %
        assert checks.saturated("action", values, np.array([60, 100])) == []

    def test_few_levels_are_a_choice_of_keys_not_a_clipped_command(self):
        values = np.random.default_rng(0).integers(-2, 3, (100, 1)).astype(np.float32)
        assert checks.saturated("action", values, np.array([60, 100])) == []

    def test_an_end_at_zero_is_rest(self):
        values = np.maximum(np.linspace(-1, 1, 100), 0)[:, None]
        assert checks.saturated("action", values, np.array([60, 100])) == []


class TestJumps:
    def test_a_spike_is_found_where_it_goes_and_where_it_comes_back(self):
        values = smooth(3)
        assert checks.jumps("state", values, ENDS) == []
        values[row(4, 33), 2] += 30
        (finding,) = checks.jumps("state", values, ENDS)
        assert (finding.places, finding.dimensions, finding.severity) == (((4, 33), (4, 34)), (2,), "warning")

    def test_a_cut_is_found_once(self):
        values = smooth(2)
        values[row(1, 20) : ENDS[1]] += 25
        (finding,) = checks.jumps("state", values, ENDS)
        assert finding.places == ((1, 20),)

    def test_the_step_between_two_episodes_is_no_jump(self):
        values = smooth(2)
        values[rows_of(3)] += 100
        assert checks.jumps("state", values, ENDS) == []

    def test_an_episode_of_noise_is_not_full_of_jumps(self):
        values = smooth(2)
        values[rows_of(3)] += 20 * np.resize([-1.0, 1.0], LENGTHS[3])[:, None]
        assert checks.jumps("state", values, ENDS) == []

    def test_a_fast_motion_out_of_rest_is_no_jump(self):
        values = 1e-4 * smooth(1)
        values[row(1, 20) : ENDS[1], 0] += np.clip(np.arange(LENGTHS[1] - 20) / 3, 0, 1)
        assert checks.jumps("state", values, ENDS) == []

    @pytest.mark.parametrize("noise", [0.0, 1e-3])
    def test_starts_and_stops_are_no_jumps_but_spikes_out_of_rest_are(self, noise):
        """Commands of a hand: zero (with noise) most of the time, then something, then zero."""
        values = np.random.default_rng(1).normal(scale=noise, size=(STEPS, 1))
        for episode in range(len(LENGTHS)):
            values[row(episode, 10) : row(episode, 25)] = 1 + 0.001 * smooth(1)[:15]
        assert checks.jumps("action", values, ENDS) == []
        values[row(2, 35)] = 1
        (finding,) = checks.jumps("action", values, ENDS)
        assert finding.places == ((2, 35), (2, 36))

    def test_switches_do_not_jump(self):
        assert checks.jumps("action", np.resize(np.repeat([-1.0, 1.0], 17), STEPS)[:, None], ENDS) == []

    def test_jumps_right_after_the_first_step_are_no_habit(self):
        values = smooth(2)
        for episode in range(5):
            values[row(episode, 0), 1] += 25
        (finding,) = checks.jumps("state", values, ENDS)
        assert (finding.severity, finding.places) == ("warning", tuple((episode, 1) for episode in range(5)))
        assert "is the first observation a stale one" in finding.message

    def test_jumps_in_most_episodes_are_what_the_dimension_does(self):
        values = smooth(1)
        for episode in range(4):
            values[row(episode, 20) : ENDS[episode]] += 25
        (finding,) = checks.jumps("state", values, ENDS)
        assert (finding.severity, finding.count) == ("note", 4)

    @pytest.mark.parametrize("turn", [2 * np.pi, 360.0])
    def test_an_angle_that_wraps_is_told_as_such(self, turn):
        values = np.concatenate([np.linspace(0.1, 0.1 + 0.9 * turn, n) for n in LENGTHS])[:, None]
        values[row(2, 0) : row(2, 30), 0] = (
            0.9 * turn + np.arange(30) * 0.005 * turn
        ) % turn  # over the end at step 20
        values[row(2, 30) : ENDS[2], 0] = 0.05 * turn
        (finding,) = checks.jumps("state", values, ENDS)
        assert (finding.check, finding.places) == ("angle_wrap", ((2, 20),))

    def test_exempt_dimensions_are_not_looked_at(self):
        values = smooth(2)
        values[row(1, 20) : ENDS[1], 1] += 25
        assert checks.jumps("state", values, ENDS, frozenset({1})) == []


def reaches(width):
    """(N, width) motions of about the same size in each episode."""
    rng = np.random.default_rng(2)
    return np.concatenate([np.outer(np.sin(0.2 * np.arange(n)), rng.uniform(0.7, 1.4, width)) for n in LENGTHS])


class TestUnits:
    @pytest.mark.parametrize(("factor", "guess"), [(57.29578, "degrees for radians"), (1000, "millimetres for metres")])
    def test_an_episode_in_other_units_is_named_with_a_guess(self, factor, guess):
        values = reaches(3)
        assert checks.unit_changes("state", values, ENDS) == []
        values[rows_of(3)] *= factor
        (finding,) = checks.unit_changes("state", values, ENDS)
        assert (finding.severity, finding.places) == ("error", ((3, None),))
        assert guess in finding.message

    @pytest.mark.parametrize("others", [5, 8, 10, 12])
    def test_any_share_of_the_episodes_in_degrees_is_found(self, others):
        rng, ends = np.random.default_rng(3), 40 * np.arange(1, 21)
        sizes = np.repeat(rng.uniform(0.8, 1.2, (20, 3)), 40, axis=0)
        values = sizes * np.tile(np.sin(0.2 * np.arange(40)), 20)[:, None]
        assert checks.unit_changes("state", values, ends) == []
        values[: ends[others - 1]] *= 57.29578
        (finding,) = checks.unit_changes("state", values, ends)
        odd = range(others) if others <= 10 else range(others, 20)
        assert finding.places == tuple((episode, None) for episode in odd)
        assert ("degrees for radians" if others <= 10 else "radians for degrees") in finding.message

    def test_smaller_numbers_are_found_as_well(self):
        values = reaches(3)
        values[rows_of(5)] /= 1000
        (finding,) = checks.unit_changes("state", values, ENDS)
        assert finding.places == ((5, None),)
        assert "times smaller" in finding.message
        assert "metres for millimetres" in finding.message

    def test_episodes_of_one_kind_are_one_finding(self):
        values = reaches(2)
        for episode in (0, 4):
            values[rows_of(episode)] *= 1000
        (finding,) = checks.unit_changes("state", values, ENDS)
        assert finding.places == ((0, None), (4, None))

    def test_one_dimension_that_rests_and_a_spike_are_no_units(self):
        values = reaches(3)
        values[rows_of(1), 0] /= 100  # one of three: it may just rest
        values[row(2, 5)] *= 1000
        assert checks.unit_changes("state", values, ENDS) == []

    def test_a_robot_that_rests_and_one_that_works_elsewhere_have_no_other_units(self):
        values = reaches(3)
        values[rows_of(1)] /= 1e5
        values[:, 2] /= 100
        values[rows_of(2), 2] += 1
        assert checks.unit_changes("state", values, ENDS) == []

    def test_a_joint_that_rests_in_the_other_episodes_has_no_other_unit(self):
        values = np.random.default_rng(1).normal(scale=1e-3, size=(STEPS, 2))  # the noise of resting joints
        values[row(3, 20) : row(3, 32), 1] += 0.1 * np.sin(np.arange(12))
        assert checks.unit_changes("action", values, ENDS) == []

    def test_two_episodes_cannot_tell_which_is_wrong(self):
        values = reaches(2)[: ENDS[1]]
        values[rows_of(1)] *= 1000
        assert checks.unit_changes("state", values, ENDS[:2]) == []


class TestQuaternions:
    @staticmethod
    def quaternions():
        angle = 0.05 * np.arange(STEPS)
        zero = np.zeros(STEPS)
        return np.stack([np.cos(angle / 2), zero, np.sin(angle / 2), zero], axis=1).astype(np.float32)

    def test_sign_flips(self):
        values = self.quaternions()
        assert checks.quaternion_signs("eef_quat", values, ENDS, 0) == []
        values[row(1, 9) : row(1, 12)] *= -1
        values[rows_of(3)] *= -1  # between episodes the sign is free
        (finding,) = checks.quaternion_signs("eef_quat", values, ENDS, 0)
        assert (finding.places, finding.severity) == (((1, 9), (1, 12)), "warning")

    def test_norms(self):
        values = self.quaternions()
        assert checks.quaternion_norms("eef_quat", values, ENDS, 0) == []
        values[row(2, 3)] *= 1.1
        (finding,) = checks.quaternion_norms("eef_quat", values, ENDS, 0)
        assert finding.places == ((2, 3),)
        assert "(norm, 1.1 in the first)" in finding.message

    @pytest.mark.parametrize(
        ("key", "before", "expected"),
        [("eef_quat", 0, ([0], True)), ("pose", 0, ([0], False)), ("object", 3, ([3], False))],
    )
    def test_blocks_are_found_by_name_or_by_norm(self, key, before, expected):
        values = np.concatenate([smooth(before), self.quaternions()], axis=1)
        assert checks.quaternion_blocks(key, values, values.shape[1]) == expected

    def test_only_a_quat_is_believed_whatever_its_norms(self):
        values = smooth(4)
        assert checks.quaternion_blocks("eef_quat", values, 4) == ([0], True)
        assert checks.quaternion_blocks("horn_corners", values, 4) == ([], False)
        assert checks.quaternion_blocks("quats", smooth(8), 4) == ([0, 4], True)  # (N, 2, 4)


class TestClock:
    @staticmethod
    def times():
        return np.concatenate([0.05 * np.arange(n) for n in LENGTHS])

    def test_a_regular_clock_is_no_finding(self):
        assert motion.clock("timestamp", self.times(), ENDS, 0.05) == []

    @pytest.mark.parametrize("back", [0.0, 0.3])
    def test_time_that_stands_still_or_goes_back(self, back):
        times = self.times()
        times[row(1, 30) : ENDS[1]] += times[row(1, 29)] - times[row(1, 30)] - back
        (finding,) = motion.clock("timestamp", times, ENDS, 0.05)
        assert (finding.check, finding.severity, finding.places) == ("time_order", "error", ((1, 30),))

    def test_gaps(self):
        times = self.times()
        times[row(4, 12) : ENDS[4]] += 0.1
        (finding,) = motion.clock("timestamp", times, ENDS, 0.05)
        assert (finding.check, finding.severity, finding.places) == ("time_gap", "warning", ((4, 12),))
        assert "0.15 s (3.0 steps)" in finding.message

    def test_jitter(self):
        times = self.times()
        times[rows_of(3)] += np.resize([0, 0.01], LENGTHS[3])  # steps of 60 and 40 ms
        (finding,) = motion.clock("timestamp", times, ENDS, 0.05)
        assert (finding.check, finding.places) == ("time_jitter", ((3, None),))
        assert "varies by 10 ms" in finding.message

    def test_another_rate_than_the_specification(self):
        (finding,) = motion.clock("timestamp", self.times(), ENDS, 0.1)
        assert (finding.check, finding.severity) == ("time_rate", "warning")
        assert "0.05 s apart, but control_dt is 0.1 s" in finding.message


class TestFrozenSensors:
    def test_a_hanging_sensor_is_found_where_it_begins_to_hang(self):
        values, action = smooth(3), smooth(2, seed=1)
        assert motion.frozen("state", values, action, ENDS) == []
        values[row(1, 20) : row(1, 26)] = values[row(1, 20)]
        values[row(3, 41) : row(3, 45)] = values[row(3, 41)]  # four equal steps are not enough
        (finding,) = motion.frozen("state", values, action, ENDS)
        assert (finding.severity, finding.places) == ("warning", ((1, 20),))
        assert "(6 steps, the longest 6)" in finding.message

    def test_standing_still_with_the_actions_is_no_finding(self):
        values, action = smooth(3), smooth(2, seed=1)
        values[row(1, 20) : row(1, 30)] = values[row(1, 20)]
        action[row(1, 20) : row(1, 30)] = 0
        assert motion.frozen("state", values, action, ENDS) == []

    def test_goals_and_switches_are_no_sensors(self):
        goal = np.repeat(np.arange(len(LENGTHS), dtype=float), LENGTHS)[:, None]
        switch = (np.arange(STEPS) // 20 % 2)[:, None].astype(float)
        for values in (goal, switch):
            assert motion.frozen("state", values, smooth(2), ENDS) == []

    def test_what_stands_still_in_most_episodes_is_an_object(self):
        values = smooth(3)
        for episode in range(4):
            values[row(episode, 0) : row(episode, 9)] = values[row(episode, 0)]
        (finding,) = motion.frozen("cube", values, smooth(2, seed=1), ENDS)
        assert (finding.severity, finding.count) == ("note", 4)


class TestRepeatedFrames:
    @staticmethod
    def same(*parts):
        """Flags of frames that equal the one before, for stretches (episode, first step, length) of equal frames."""
        flags = np.zeros(STEPS, bool)
        for episode, step, length in parts:
            flags[row(episode, step) + 1 : row(episode, step) + length] = True
        return flags

    def test_different_frames_are_no_finding(self):
        assert motion.repeated_frames("camera", self.same(), smooth(2), ENDS) == []

    def test_a_hanging_camera_is_found_where_it_begins_to_hang(self):
        (finding,) = motion.repeated_frames("camera", self.same((2, 11, 6)), smooth(2), ENDS)
        assert (finding.check, finding.severity, finding.places) == ("frozen", "warning", ((2, 11),))

    def test_equal_frames_of_a_robot_at_rest_are_no_finding(self):
        state = smooth(2)
        state[row(2, 11) : row(2, 17)] = state[row(2, 11)]
        assert motion.repeated_frames("camera", self.same((2, 11, 6)), state, ENDS) == []

    def test_a_camera_that_hangs_all_episode_spoils_it(self):
        flags = self.same((1, 0, LENGTHS[1]), (4, 0, LENGTHS[4]))
        (finding,) = motion.repeated_frames("camera", flags, smooth(2), ENDS)
        assert (finding.check, finding.severity, finding.places) == ("frozen", "error", ((1, None), (4, None)))

    def test_a_camera_slower_than_the_control_steps_is_a_note(self):
        flags = follows(ENDS, STEPS) & (np.arange(STEPS) % 2 == 1)
        (finding,) = motion.repeated_frames("camera", flags, smooth(2), ENDS)
        assert (finding.check, finding.severity, finding.count) == ("repeated_frames", "note", int(flags.sum()))
        assert "longest run 2" in finding.message


class TestLag:
    @staticmethod
    def tracked(delay, gain=1.0):
        """Actions (N, 2), and a state whose steps follow those of the action `delay` control steps later."""
        rng = np.random.default_rng(3)
        action, state = np.zeros((STEPS, 2)), np.zeros((STEPS, 3))
        for episode, length in enumerate(LENGTHS):
            steps = rng.normal(size=(length + 40, 2))
            path = np.cumsum(steps, axis=0)
            action[rows_of(episode)] = path[20 : 20 + length]
            state[rows_of(episode), 1:] = gain * path[20 - delay : 20 - delay + length]
            state[rows_of(episode), 0] = rng.normal(size=length)
        return action, state

    @pytest.mark.parametrize("lag", range(-10, 11))
    def test_lag_is_counted_from_the_next_observation(self, lag):
        action, state = self.tracked(lag + 1)
        (finding,) = motion.action_lag(action, {"state": state}, ENDS, 0.05)
        assert finding.severity == ("note" if 0 <= lag <= 2 else "warning")
        assert "action[0] in state[1] (1.00), action[1] in state[2] (1.00)" in finding.message
        if lag == 0:
            assert "in the next observation" in finding.message
        else:
            assert f"{abs(lag)} control step" in finding.message
            assert f"({0.05 * abs(lag):.3g} s)" in finding.message
            assert ("earlier" if lag < 0 else "later") in finding.message

    @pytest.mark.parametrize("lag", [0, 2, 5])
    def test_differences_as_actions_are_followed_too(self, lag):
        rng = np.random.default_rng(3)
        action, state = np.zeros((STEPS, 1)), np.zeros((STEPS, 1))
        for episode, length in enumerate(LENGTHS):
            velocity = np.zeros(length + lag)
            for step in range(1, length + lag):  # so smooth that its own differences tell little
                velocity[step] = 0.9 * velocity[step - 1] + rng.normal()
            action[rows_of(episode), 0] = velocity[lag:]
            state[rows_of(episode), 0] = 0.3 * np.cumsum(velocity)[:length] - 0.3 * velocity[:length]
        (finding,) = motion.action_lag(action, {"state": state}, ENDS, 0.05)
        assert (f"{lag} control steps" in finding.message) == (lag > 0)
        assert "action[0] in state[0] (1.00)" in finding.message
        assert finding.severity == ("warning" if lag == 5 else "note")

    def test_a_lag_that_can_hardly_be_told_from_a_short_one_is_no_warning(self):
        rng = np.random.default_rng(4)
        phases = 2 * np.pi * np.arange(200) / 200 + rng.uniform(0, 6, (len(LENGTHS), 1))  # slow: 200 control steps
        action = np.concatenate([np.sin(p[10 : 10 + n]) for p, n in zip(phases, LENGTHS, strict=True)])[:, None]
        state = np.concatenate([np.sin(p[5 : 5 + n]) for p, n in zip(phases, LENGTHS, strict=True)])[:, None]
        (finding,) = motion.action_lag(action, {"state": state}, ENDS, 0.05)
        assert "4 control steps (0.2 s) later" in finding.message
        assert finding.severity == "note"

    def test_unrelated_states_and_switches_tell_nothing(self):
        action = smooth(2, seed=8)
        assert motion.action_lag(action, {"state": smooth(3, seed=9)}, ENDS, 0.05) == []
        switch = (np.arange(STEPS) // 20 % 2)[:, None].astype(float)
        assert motion.action_lag(switch, {"state": switch}, ENDS, 0.05) == []

    def test_nan_is_passed_over(self):
        action, state = self.tracked(4)
        state[row(1, 5), 1] = np.nan
        (finding,) = motion.action_lag(action, {"state": state}, ENDS, 0.05)
        assert "3 control steps" in finding.message


class TestEpisodes:
    def test_short_ones(self):
        ends = np.cumsum([20, 1, 7, 20])
        assert motion.short_episodes(ends[[0]], 16) == []
        useless, short = motion.short_episodes(ends, 16)
        assert (useless.severity, useless.places) == ("error", ((1, None),))
        assert (short.severity, short.places) == ("warning", ((2, None),))

    def test_duplicates_name_what_they_repeat(self):
        assert motion.duplicate_episodes([b"a", b"b", None, None]) == []
        (finding,) = motion.duplicate_episodes([b"a", b"b", b"a", b"c", b"b", b"a"])
        assert finding.places == ((2, None), (4, None), (5, None))
        assert "(2 = 0, 4 = 1, 5 = 0)" in finding.message

    def test_idle_begin_and_end_with_mean_length(self):
        action = 1.0 + np.abs(smooth(3))
        action[:, 2] = -1  # an open gripper
        assert motion.idle(action, ENDS) == []
        for episode, length in ((1, 10), (2, 6), (3, 4)):  # four steps are not enough
            action[row(episode, 0) : row(episode, length), :2] = 0
        action[ENDS[5] - 8 : ENDS[5], :2] = 0
        begin, end = motion.idle(action, ENDS)
        assert (begin.severity, begin.places) == ("note", ((1, None), (2, None)))
        assert "8.0 steps in the mean, 10 at most" in begin.message
        assert end.places == ((5, None),)


class Broken(LazyArray):
    """Images of which some rows cannot be read; remembers what was asked for."""

    def __init__(self, images, bad=()):
        super().__init__(images.shape, images.dtype)
        self.images, self.bad, self.reads = images, set(bad), []

    def read(self, start, stop):
        self.reads.append((start, stop))
        broken = sorted(self.bad & set(range(start, stop)))
        if broken:
            raise DatasetError(f"the video ends before frame {broken[0]}")
        return self.images[start:stop]


def random_images(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (STEPS, 6, 7, 3), np.uint8)


class TestFrameScan:
    @pytest.mark.parametrize("block_bytes", [1, 126 * 7, 126 * 1000])
    def test_equal_frames_are_found_whatever_the_blocks(self, monkeypatch, block_bytes):
        monkeypatch.setattr(frame_scan, "_BLOCK_BYTES", block_bytes)
        images = random_images()
        images[row(1, 20) : row(1, 28)] = images[row(1, 20)]
        images[row(2, 0)] = images[row(2, 0) - 1]  # another episode
        images[rows_of(5)][:40] = images[rows_of(0)]
        scan = scan_frames(images, ENDS)
        assert np.flatnonzero(scan.same).tolist() == [row(1, step) for step in range(21, 28)]
        assert (scan.lowest, scan.highest, scan.unreadable) == (0, 255, [])
        assert len(set(scan.digests)) == len(LENGTHS)
        images[rows_of(0)] = images[rows_of(1)][:40]
        assert (
            scan_frames(np.concatenate([images[:40], images[:40]]), np.array([40, 80])).digests[0]
            == (scan_frames(images[:40], np.array([40])).digests[0])
        )

    def test_each_frame_is_read_once(self, monkeypatch):
        monkeypatch.setattr(frame_scan, "_BLOCK_BYTES", 126 * 32)
        images, ticks = Broken(random_images()), []
        scan_frames(images, ENDS, ticks.append)
        assert images.reads == [(start, min(start + 32, STEPS)) for start in range(0, STEPS, 32)]
        assert sum(ticks) == STEPS

    @pytest.mark.parametrize("block_bytes", [126, 126 * 32, 126 * 1000])
    @pytest.mark.parametrize("bad", [[row(2, 17)], range(row(2, 17), ENDS[2]), range(row(2, 0), row(2, 30))])
    def test_the_first_row_that_cannot_be_read_is_told(self, monkeypatch, block_bytes, bad):
        monkeypatch.setattr(frame_scan, "_BLOCK_BYTES", block_bytes)
        scan = scan_frames(Broken(random_images(), [*bad, row(4, 3)]), ENDS)
        assert [place for place, _ in scan.unreadable] == [min(bad), row(4, 3)]
        assert "the video ends before frame" in scan.unreadable[0][1]
        assert [digest is None for digest in scan.digests] == [False, False, True, False, True, False]

    def test_nan_in_depth_images(self):
        images = random_images().astype(np.float32)
        images[row(3, 4), 2, 2] = np.nan
        assert np.flatnonzero(scan_frames(images, ENDS).not_finite).tolist() == [row(3, 4)]


SPEC = DatasetSpec({"state": ArraySpec((4,)), "camera": ArraySpec((6, 7, 3), "uint8")}, 2, 0.05, "a test")


def clean_dataset(**changes):
    """Absolute actions that the state follows in the next observation."""
    action = smooth(2, seed=5)
    state = np.concatenate([action, smooth(2, seed=6)], axis=1)
    state[1:, :2] = action[:-1]
    state[ENDS[:-1], :2] = action[ENDS[:-1]]
    times = np.concatenate([0.05 * np.arange(n) for n in LENGTHS])
    arrays = {"state": state, "camera": random_images(), "action": action, "timestamp": times, **changes}
    return EpisodeDataset(SPEC, ENDS.astype(np.int64), arrays)


def spoil(dataset, kind, at):
    """Puts one fault at a row (not the first or last few of an episode)."""
    arrays = dataset.arrays
    if kind == "not_finite":
        arrays["state"][at, 1] = np.nan
    elif kind == "jump":
        arrays["state"][at, 3] += 40
    elif kind == "time_order":
        arrays["timestamp"][at] -= 0.06
    elif kind == "frozen":
        arrays["state"][at : at + 6] = arrays["state"][at]
    else:
        arrays["camera"][at : at + 6] = arrays["camera"][at]


FAULTS = {"not_finite": "state", "jump": "state", "time_order": "timestamp", "frozen": "state", "hanging": "camera"}


class TestWhole:
    def test_clean_data_gives_no_error_and_no_warning(self):
        findings, keys = check_dataset(clean_dataset(), window=16)
        assert [(finding.check, finding.severity) for finding in findings] == [("action_lag", "note")]
        assert keys["camera"] == {"shape": [6, 7, 3], "dtype": "uint8", "min": 0, "max": 255}

    @settings(max_examples=40, deadline=None)
    @given(kind=st.sampled_from(sorted(FAULTS)), episode=st.integers(0, len(LENGTHS) - 1), data=st.data())
    def test_a_fault_anywhere_is_found_where_it_is(self, kind, episode, data):
        step = data.draw(st.integers(1, LENGTHS[episode] - 7))
        dataset = clean_dataset()
        spoil(dataset, kind, row(episode, step))
        findings, _ = check_dataset(dataset)
        check = "frozen" if kind == "hanging" else kind
        (finding,) = (f for f in findings if f.check == check)
        assert (finding.key, finding.places[0]) == (FAULTS[kind], (episode, step))

    @settings(max_examples=60, deadline=None)
    @given(
        lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5),
        numbers=st.lists(st.floats(width=32), min_size=1, max_size=9),
        width=st.sampled_from([1, 4, 7]),
        seed=st.integers(0, 9),
    )
    def test_any_numbers_are_checked_without_an_exception(self, lengths, numbers, width, seed):
        ends = np.cumsum(lengths)
        rng = np.random.default_rng(seed)
        arrays = {
            "eef_quat": rng.choice(np.asarray(numbers, np.float32), (ends[-1], width)),
            "depth": rng.choice(np.asarray(numbers, np.float32), (ends[-1], 5, 6, 1)),
            "action": rng.choice(np.asarray(numbers, np.float32), (ends[-1], 2)),
            "timestamp": rng.choice(np.asarray(numbers), ends[-1]),
            "done": rng.random(ends[-1]) < 0.5,
        }
        spec = DatasetSpec({"eef_quat": ArraySpec((width,)), "depth": ArraySpec((5, 6, 1))}, 2, 0.05)
        dataset = EpisodeDataset(spec, ends.astype(np.int64), arrays)
        with np.errstate(all="ignore"):
            found, keys = check_dataset(dataset, window=4)
        json.dumps([[finding.to_json() for finding in found], keys], allow_nan=False)
        bad = {key for key, array in arrays.items() if not np.isfinite(array).all()}
        assert {finding.key for finding in found if finding.check == "not_finite"} == bad

    def test_errors_come_first(self):
        dataset = clean_dataset()
        dataset.arrays["action"][:, 1] = 3
        dataset.arrays["camera"][rows_of(2)] = 0  # looked at last
        found, _ = check_dataset(dataset)
        assert severities(found) == ["error", "warning", "note"]
        assert [finding.key for finding in found] == ["camera", "action", "action"]

    def test_infinite_values_are_told_once(self):
        dataset = clean_dataset()
        dataset.arrays["state"][row(5, 3), 2] = np.inf
        found, _ = check_dataset(dataset)
        assert [finding.check for finding in found if finding.severity != "note"] == ["not_finite"]

    def test_a_damaged_video_is_found_and_the_rest_is_checked(self):
        dataset = clean_dataset(camera=Broken(random_images(), range(row(3, 10), ENDS[3])))
        dataset.arrays["camera"].images[row(5, 3) : row(5, 9)] = 7
        found, _ = check_dataset(dataset)
        by_check = {finding.check: finding for finding in found}
        assert (by_check["unreadable"].severity, by_check["unreadable"].places) == ("error", ((3, 10),))
        assert "the video ends before frame" in by_check["unreadable"].message
        assert by_check["frozen"].places == ((5, 3),)

    def test_duplicate_episodes_must_agree_in_images_too(self):
        part = clean_dataset().select([0, 1, 0])
        found, _ = check_dataset(part)
        assert [f.places for f in found if f.check == "duplicate_episode"] == [((2, None),)]
        part.arrays["camera"][-1] += 1
        found, _ = check_dataset(part)
        assert not [f for f in found if f.check == "duplicate_episode"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"state": np.zeros((STEPS, 3), np.float32)}, r"'state' must be \(320, 4\).*got \(320, 3\)"),
            ({"camera": np.zeros((STEPS - 1, 6, 7, 3), np.uint8)}, r"'camera' must be .*got \(319, 6, 7, 3\)"),
        ],
    )
    def test_arrays_that_contradict_the_specification(self, changes, message):
        found, _ = check_dataset(clean_dataset(**changes))
        (finding,) = (f for f in found if f.check == "structure")
        assert finding.severity == "error"
        assert re.search(message, finding.message)

    def test_missing_arrays_and_missing_episodes(self):
        dataset = clean_dataset()
        del dataset.arrays["action"]
        found, _ = check_dataset(dataset)
        assert [(f.check, f.key) for f in found if f.severity == "error"] == [("structure", "action")]
        empty = EpisodeDataset(SPEC, np.empty(0, np.int64), dataset.arrays)
        assert [(f.check, f.severity) for f in check_dataset(empty)[0]] == [("structure", "error")]

    def test_quaternions_are_not_reported_as_jumps_as_well(self):
        half = 0.02 * np.arange(STEPS)
        quaternion = np.stack([np.cos(half), np.sin(half), 0 * half, 0 * half], axis=1)
        quaternion[row(1, 20) : ENDS[1]] *= -1
        found, _ = check_dataset(clean_dataset(state=quaternion.astype(np.float32)))
        assert [(f.check, f.places) for f in found if f.severity != "note"] == [("quaternion_sign", ((1, 20),))]


def write_replay_buffer(path, **arrays):
    """By zarr alone: our writer refuses what is to be found."""
    group = zarr.open_group(path, mode="w", zarr_format=2)
    for key, values in arrays.items():
        group.create_array(f"data/{key}", data=values)
    group.create_array("meta/episode_ends", data=ENDS.astype(np.int64))
    return path


class TestValidate:
    def test_a_recording_with_nan_is_opened_and_the_nan_found(self, tmp_path):
        state = smooth(4)
        state[row(2, 7), 0] = np.nan
        write_replay_buffer(tmp_path / "a.zarr", state=state, action=smooth(2, seed=1))
        validation = validate(tmp_path / "a.zarr", ReadOptions(control_dt=0.05), window=16, progress=False)
        assert validation.spoils_training
        assert (validation.findings[0].check, validation.findings[0].places) == ("not_finite", ((2, 7),))
        document = json.loads(json.dumps(validation.to_json(), allow_nan=False))
        assert document["findings"][0] == {
            "check": "not_finite", "severity": "error", "key": "state", "episode": 2, "step": 7, "count": 1,
            "message": validation.findings[0].message, "places": [[2, 7]], "dimensions": [0],
        }  # fmt: skip
        assert (document["spoils_training"], document["counts"]["error"]) == (True, 1)
        assert (document["episodes"], document["steps"], document["control_dt"]) == (len(LENGTHS), STEPS, 0.05)

    def test_places_are_those_of_the_recording_where_episodes_are_left_out(self, tmp_path):
        state = smooth(4)
        state[row(2, 7), 0] = np.nan
        write_replay_buffer(tmp_path / "a.zarr", state=state, action=smooth(2, seed=1))
        validation = validate(tmp_path / "a.zarr", ReadOptions(drop=["0"]), progress=False)
        assert "episode 2 step 7" in format_validation(validation)
        (told,) = (found for found in validation.to_json()["findings"] if found["check"] == "not_finite")
        assert (told["episode"], told["step"], told["places"]) == (2, 7, [[2, 7]])

    def test_twins_are_told_by_the_numbers_of_the_recording(self):
        (finding,) = motion.duplicate_episodes([b"a", b"b", b"a"], number=lambda episode: episode + 5)
        assert "(7 = 5)" in finding.message
        assert finding.places == ((2, None),)

    def test_pictures_of_fractions_are_told(self, tmp_path):
        camera = np.random.default_rng(0).random((STEPS, 12, 16, 3))
        write_replay_buffer(tmp_path / "a.zarr", camera=camera, state=smooth(4), action=smooth(2, seed=1))
        (finding,) = validate(tmp_path / "a.zarr", ReadOptions(control_dt=0.1), progress=False).findings
        assert (finding.check, finding.severity, finding.key) == ("pictures", "warning", "camera")
        assert "float32 pictures (12, 16, 3)" in finding.message

    def test_clean_data_is_fit_for_training(self, tmp_path):
        write_replay_buffer(tmp_path / "a.zarr", state=smooth(4), action=smooth(2, seed=1))
        validation = validate(tmp_path / "a.zarr", ReadOptions(control_dt=0.1), progress=False)
        assert not validation.spoils_training
        assert validation.counts == {"error": 0, "warning": 0, "note": 0}

    def test_a_rate_that_is_assumed_is_a_warning(self, tmp_path):
        write_replay_buffer(tmp_path / "a.zarr", state=smooth(4), action=smooth(2, seed=1))
        (finding,) = validate(tmp_path / "a.zarr", progress=False).findings
        assert (finding.check, finding.severity) == ("reading", "warning")
        assert "0.1 s per control step assumed (--control-dt)" in finding.message

    def test_what_cannot_be_opened_is_a_finding(self, tmp_path):
        path = write_replay_buffer(tmp_path / "a.zarr", state=smooth(4)[:-3], action=smooth(2))
        validation = validate(path, progress=False)
        (finding,) = validation.findings
        assert (finding.check, finding.severity, finding.episode, finding.step) == ("open", "error", None, None)
        assert "data/state" in finding.message
        assert validation.spoils_training
        assert json.loads(json.dumps(validation.to_json()))["episodes"] is None

    def test_nothing_there_and_unknown_keys_are_errors_of_the_caller(self, tmp_path):
        with pytest.raises(DatasetError, match="no dataset at"):
            validate(tmp_path / "a.zarr", progress=False)
        write_replay_buffer(tmp_path / "b.zarr", state=smooth(4), action=smooth(2))
        with pytest.raises(UnknownNameError, match="did you mean 'state'"):
            validate(tmp_path / "b.zarr", ReadOptions(keys=["stat"]), progress=False)


class TestWhatReadersTell:
    def test_wrong_counts_are_findings(self, tmp_path):
        path = tmp_path / "a.hdf5"
        with h5py.File(path, "w") as file:
            for name in ("demo_0", "demo_1"):
                file[f"data/{name}/obs/state"] = np.random.default_rng(0).normal(size=(30, 3))
                file[f"data/{name}/actions"] = np.random.default_rng(1).normal(size=(30, 2))
            file["data"].attrs["total"] = 999
        findings = validate(path, ReadOptions(control_dt=0.1), progress=False).findings
        told = [finding for finding in findings if finding.check == "reading"]
        assert [finding.severity for finding in told] == ["warning"]
        assert "notes 999 steps in all, but holds 60" in told[0].message


class TestSensorsAndSwitches:
    def test_a_sensor_that_was_off_in_an_episode(self):
        values = smooth(3)
        assert checks.silent("state", values, ENDS) == []
        values[slice(row(2, 0), row(3, 0)), 1] = 0
        (finding,) = checks.silent("state", values, ENDS)
        assert (finding.severity, finding.dimensions, finding.places) == ("warning", (1,), ((2, None),))
        assert "state[1] is 0 in all steps of 1 episode, and hardly ever in the others" in finding.message

    def test_what_is_0_in_other_episodes_too_is_no_sensor_that_was_off(self):
        values = smooth(3)
        values[slice(row(2, 0), row(3, 0)), 1] = 0
        values[row(1, 0) : row(1, 5), 1] = 0  # a gripper that rests, say
        values[:, 2] = 0
        assert checks.silent("state", values, ENDS) == []

    def test_two_conventions_of_one_switch(self):
        values = np.where(np.arange(sum(LENGTHS)) % 5 < 2, 1.0, -1.0)[:, None].astype(np.float32)
        assert checks.switch_values("action", values, ENDS) == []
        some = slice(row(1, 0), row(3, 0))
        values[some] = np.maximum(values[some], 0)
        (finding,) = checks.switch_values("action", values, ENDS)
        assert finding.places == ((1, None), (2, None))
        assert "-1 or 1 in" in finding.message
        assert "0 or 1 in 2 episodes: two conventions" in finding.message

    def test_a_switch_with_three_places_is_none(self):
        values = (np.arange(sum(LENGTHS)) % 3 - 1.0)[:, None]
        assert checks.switch_values("action", values, ENDS) == []

    def test_a_jump_is_told_with_its_size(self):
        values = smooth(3)
        values[row(2, 7), 1] += 500
        (finding,) = checks.jumps("state", values, ENDS)
        assert re.search(r"up to 500 in \[1\], where 0\.0\d+ is usual", finding.message)


class TestRealRecordings:
    def test_pusht_has_an_angle_that_wraps_and_no_fault(self, recordings):
        path = recordings / "pusht_cchi_v7_zarr" / "pusht_cchi_v7_replay.zarr"
        validation = validate(path, ReadOptions(keys=["state"], control_dt=0.1), window=16, progress=False)
        (wrap,) = (finding for finding in validation.findings if finding.severity != "note")
        assert (wrap.check, wrap.dimensions) == ("angle_wrap", (4,))
        assert validation.dataset is not None
        angles = [validation.dataset.episode(i, ["state"])["state"][:, 4] for i in range(206)]
        assert wrap.count == sum(int((np.abs(np.diff(angle)) > 5).sum()) for angle in angles)

    def test_cr5_episodes_begin_with_the_last_observation_of_the_one_before(self, recordings):
        keys = ["observation.state"]
        validation = validate(recordings / "cr5_5ep_lerobot_v21", ReadOptions(keys=keys), progress=False)
        assert not validation.spoils_training
        (finding,) = (f for f in validation.findings if f.check == "jump" and f.key == keys[0])
        assert validation.dataset is not None
        states = [validation.dataset.episode(index, keys)[keys[0]] for index in range(5)]
        assert all(np.abs(state[0] - before[-1]).max() < 1e-3 for before, state in itertools.pairwise(states))
        assert {step for _, step in finding.places} == {1}
        assert finding.severity == "warning"

    def test_isaac_quaternions_change_their_sign(self, recordings):
        path = recordings / "isaaclab_stack_cube_franka_human" / "dataset.hdf5"
        validation = validate(path, ReadOptions(keys=["eef_quat", "joint_pos"]), progress=False)
        assert not validation.spoils_training
        assert validation.dataset is not None
        expected = []
        for index in range(validation.dataset.num_episodes):
            quaternion = validation.dataset.episode(index, ["eef_quat"])["eef_quat"]
            steps = 1 + np.flatnonzero((quaternion[1:] * quaternion[:-1]).sum(axis=1) < 0)
            expected += [(index, int(step)) for step in steps]
        (finding,) = (f for f in validation.findings if f.check == "quaternion_sign" and f.key == "eef_quat")
        assert list(finding.places) == expected
