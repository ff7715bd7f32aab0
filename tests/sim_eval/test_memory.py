"""The memory suite: experts that remember succeed, those that cannot do not, and nothing tells the hidden cue."""

import collections
import itertools

import numpy as np
import pytest

from scd_robot.errors import ActionError, ConfigError, ShapeError, SimulatorError, UnknownNameError
from scd_robot.seeding import EVALUATION, derive_seed
from scd_robot.sim_eval import make_environment
from scd_robot.sim_eval.memory import MEMORY_TASKS, TASKS
from scd_robot.sim_eval.memory.environment import SENSOR_NOISE
from scd_robot.sim_eval.memory.hidden_friction import _RELEASE

MEMORY = sorted(MEMORY_TASKS)
DYNAMIC = [task for task in TASKS if task not in MEMORY_TASKS]


def make(task, options=""):
    return make_environment(f"scd_memory/{task}" + (f":{options}" if options else ""))


def play(environment, seed, late=0):
    """The last step of an expert's episode, whose actions are applied `late` control steps after they were chosen."""
    environment.reset(seed)
    waiting = collections.deque([environment.standstill()] * late)
    while True:
        waiting.append(environment.expert_action())
        result = environment.step(waiting.popleft())
        if result.success or result.terminated or result.truncated:
            return result


def successes(environment, episodes, late=0):
    return sum(play(environment, derive_seed(EVALUATION, i), late).success for i in range(episodes))


def play_ahead(real, model, seed, late):
    """Success of plans of `late` actions, each made of what was seen that long before it begins; kicks surprise it."""
    real.reset(seed)
    model.reset(0)
    planned = [real.standstill()] * late
    while True:
        for name in ("qpos", "qvel", "ctrl", "qacc_warmstart"):
            getattr(model.data, name)[:] = getattr(real.data, name)
        model.target, model._kicks[:] = real.target.copy(), 0.0
        running, planned = planned, []
        for ahead in range(2 * late):
            planned.append(running[ahead] if ahead < late else model.expert_action())
            model.steps, model._held, model._running = 0, 0, True
            model.step(planned[-1])
        planned = planned[late:]
        for action in running:
            result = real.step(action)
            if result.success or result.terminated or result.truncated:
                return result.success


class TestContract:
    @pytest.mark.parametrize("task", TASKS)
    def test_an_episode_follows_from_its_seed(self, task):
        environment, other = make(task), make(task)
        for seed in (3, 4, 3):
            first, second = environment.reset(seed), other.reset(seed)
            assert environment.state_hash() == other.state_hash()
            for key, spec in environment.spec.observation.items():
                assert (first[key].shape, first[key].dtype) == (spec.shape, spec.dtype)
                np.testing.assert_array_equal(first[key], second[key])
        hashes = set()
        for seed in range(20):
            environment.reset(seed)
            hashes.add(environment.state_hash())
        assert len(hashes) == 20
        other.reset(5)
        environment.reset(5)
        for _ in range(30):
            one, two = (env.step(env.expert_action()) for env in (environment, other))
            for key in one.observation:
                np.testing.assert_array_equal(one.observation[key], two.observation[key])

    @pytest.mark.parametrize("task", TASKS)
    def test_limits_and_names(self, task):
        environment = make(task, "max_steps=3")
        assert environment.spec.name == f"scd_memory/{task}:max_steps=3"
        assert make(task).spec.name == f"scd_memory/{task}"
        with pytest.raises(SimulatorError, match=r"call reset\(seed\) first"):
            environment.step(np.zeros(3, np.float32))
        environment.reset(0)
        action, free = np.full(environment.spec.action_dim, 9, np.float32), environment._is_free()
        results = [environment.step(action) for _ in range(3)]
        assert [result.truncated for result in results] == [False, False, True]
        executed = np.ones_like(action) if free else environment.standstill()
        np.testing.assert_array_equal(results[0].executed_action, executed)
        with pytest.raises(SimulatorError, match="truncated after 3"):
            environment.step(action)
        environment.reset(0)
        with pytest.raises(ShapeError, match=rf"must be \({environment.spec.action_dim},\)"):
            environment.step(np.zeros(9, np.float32))
        with pytest.raises(ActionError, match="must be finite"):
            environment.step(action * np.nan)
        environment.close()
        environment.close()

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ("dealy=3", UnknownNameError, "did you mean 'delay'"),
            ("delay=-1", ConfigError, "delay must be a whole number of at least 0"),
            ("delay=many", ConfigError, "delay must be a whole number"),
            ("choices=9", ConfigError, "at most 8"),
            ("cue_visible=2", ConfigError, "0 or 1"),
            ("expert=memorless", UnknownNameError, "did you mean 'memoryless'"),
            ("observation=pixels", UnknownNameError, "'pixels'"),
        ],
    )
    def test_options_that_cannot_be(self, options, error, message):
        with pytest.raises(error, match=message):
            make("cue-reach", options)

    @pytest.mark.parametrize("task", DYNAMIC)
    @pytest.mark.parametrize("option", ["delay=3", "cue_visible=1", "expert=memoryless"])
    def test_dynamic_tasks_have_no_cue(self, task, option):
        with pytest.raises(ConfigError, match="has no cue"):
            make(task, option)

    @pytest.mark.parametrize("task", sorted(set(TASKS) - {"cue-reach", "count-press"}))
    def test_choices_are_for_tasks_that_have_some(self, task):
        with pytest.raises(ConfigError, match=f"{task} has no choices"):
            make(task, "choices=3")

    @pytest.mark.sim
    @pytest.mark.parametrize("task", MEMORY)
    def test_pictures_show_the_signal_and_what_is_in_view(self, task):
        for options in ("delay=3,observation=image", "delay=3,observation=image,cue_visible=1"):
            environment = make(task, options)
            environment.reset(0)
            signal = environment._signal
            environment._signal = lambda: False
            before = environment.render(64, 64)
            environment._signal = lambda: True
            assert (environment.render(64, 64) != before).any()
            environment._signal = signal
        hidden, visible = make(task, "delay=3"), make(task, "delay=3,cue_visible=1")
        for environment in (hidden, visible):
            environment.reset(0)
            while not environment._signal():
                environment.step(environment.expert_action())
        assert (hidden.render(64, 64) != visible.render(64, 64)).any()

    @pytest.mark.sim
    @pytest.mark.parametrize("task", TASKS)
    def test_pictures_show_the_scene(self, task):
        environment = make(task, "observation=image")
        first = environment.reset(0)
        assert set(first) == {"proprio", "image"}
        assert first["image"].std() > 10
        assert environment.render(48, 80).shape == (48, 80, 3)


def test_mixed_delays_are_drawn_for_each_episode():
    environment = make("cue-reach", "delay=mixed")
    assert environment.spec.name == "scd_memory/cue-reach:delay=mixed"
    assert environment.spec.max_steps == make("cue-reach", "delay=200").spec.max_steps
    drawn = []
    for seed in range(30):
        environment.reset(seed)
        drawn.append(environment.delay)
        environment.reset(seed)
        assert environment.delay == drawn[-1]
    assert set(drawn) == {10, 50, 200}


IN_VIEW = {
    "cue-reach": lambda seen, _: int(np.argmax(seen["cue"])),
    "place-back": lambda seen, _: seen["origin"][:2],
    # The expert compares its number with the presses so far: what remains decides, and that is seen.
    "count-press": lambda seen, now: now._presses + (int(np.argmax(seen["cue"])) + 1) % seen["cue"].size,
    "occluded-reach": lambda seen, _: seen["puck"][:2],
    "hidden-friction": lambda seen, _: float(seen["friction"][0]),
}


class TestExperts:
    @pytest.mark.parametrize("task", MEMORY)
    @pytest.mark.parametrize("delay", [0, 10, 50])
    def test_remember(self, task, delay):
        assert successes(make(task, f"delay={delay}"), 50) >= 49

    @pytest.mark.parametrize("task", MEMORY)
    def test_do_the_same_where_nothing_is_hidden(self, task):
        assert successes(make(task, "delay=10,cue_visible=1,expert=memoryless"), 50) >= 49

    @pytest.mark.parametrize("task", MEMORY)
    def test_need_no_memory_where_the_cue_stays_in_view(self, task):
        """What they believe is read anew from every observation, so all that they need is in it."""
        environment, succeeded = make(task, "delay=10,cue_visible=1"), 0
        for episode in range(50):
            observation = environment.reset(derive_seed(EVALUATION, episode))
            while True:
                environment._believed = IN_VIEW[task](observation, environment)
                result = environment.step(environment.expert_action())
                observation = result.observation
                if result.success or result.terminated or result.truncated:
                    break
            succeeded += result.success
        assert succeeded >= 49

    @pytest.mark.parametrize("task", MEMORY)
    def test_without_memory_only_guess(self, task):
        assert successes(make(task, "delay=10,expert=memoryless"), 100) <= 45

    @pytest.mark.parametrize("choices", [2, 8])
    def test_chance_follows_the_number_of_choices(self, choices):
        found = successes(make("cue-reach", f"delay=0,choices={choices},expert=memoryless"), 100)
        assert abs(found - 100 / choices) < 15

    @pytest.mark.parametrize("task", DYNAMIC)
    def test_fail_when_they_act_late(self, task):
        environment = make(task)
        assert successes(environment, 30) == 30
        late = round(0.2 / environment.spec.control_dt)
        assert successes(environment, 30, late) <= 3

    def test_a_ball_on_a_tray_is_kept_by_whoever_plans_as_far_ahead_without_an_error(self):
        late = 8
        real, model = make("tray-balance"), make("tray-balance")
        assert sum(play_ahead(real, model, derive_seed(EVALUATION, i), late) for i in range(20)) >= 19


def waiting_observations(task, episodes):
    """By "state" and "image" (3, E, D) flat observations of noisy expert episodes; (E, n) what is hidden in them.

    They are of the first control step in which all is hidden, of the middle and of the end of the wait. Pictures are
    reduced to 16x16 pixels.
    """
    environment = make(task, "delay=20")
    rng = np.random.default_rng(0)
    before_signal = steps_before_signal(environment)  # of every episode
    chosen = [before_signal + i for i in (-19, -10, -1)]
    seen, hidden = {"state": [], "image": []}, []
    for episode in range(episodes):
        environment.reset(derive_seed(EVALUATION, episode))
        rows = {kind: [] for kind in seen}
        for step in itertools.count():
            noise = 0.015 * rng.standard_normal(environment.spec.action_dim)  # as in the benchmark's recordings
            result = environment.step((environment.expert_action() + noise).astype(np.float32))
            over = result.terminated or result.truncated
            assert not over, "the episode ended before the wait did"
            if environment._signal():
                break
            if step in chosen:
                assert not environment._is_free()
                rows["state"].append(np.concatenate([np.ravel(value) for value in result.observation.values()]))
                rows["image"].append(np.ravel(small(environment.render(64, 64))))
        assert step == before_signal
        for kind, found in rows.items():
            seen[kind].append(found)
        hidden.append(environment._hidden())
    return {kind: np.array(found).swapaxes(0, 1) for kind, found in seen.items()}, np.array(hidden)


def steps_before_signal(environment):
    """Control steps of an expert's episode after which there is no signal to act yet."""
    environment.reset(0)
    for step in itertools.count():
        environment.step(environment.expert_action())
        if environment._signal():
            return step


def small(picture):
    """(16, 16, 3) of a picture of 64x64 pixels."""
    return picture.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))


@pytest.mark.sim
@pytest.mark.parametrize("task", MEMORY)
def test_nothing_that_is_seen_in_the_wait_tells_what_is_hidden(task):
    seen, hidden = waiting_observations(task, 400)
    if task == "hidden-friction":
        hidden = hidden[:, :1]  # the goal is in view
    if task in ("cue-reach", "count-press"):
        hidden = (hidden == np.unique(hidden)).astype(float)
    hidden = hidden - hidden.mean(axis=0)
    leak = hidden + 0.5 * hidden.std() * np.random.default_rng(1).standard_normal(hidden.shape)
    assert explained_by_neighbours(leak, hidden) > 0.5  # the probes would have found one
    for kind, parts in seen.items():
        for rows in parts:
            features = rows if kind == "image" else np.concatenate([rows, rows**2], axis=1)
            assert explained(features, hidden) < 0.08, kind
            assert explained_by_neighbours(rows, hidden) < 0.08, kind
        assert explained(np.concatenate([rows, leak], axis=1), hidden) > 0.5, kind


def explained(features, hidden):
    """Share of the variance of the last 100 rows that ridge regression on all others explains."""
    features = features[:, features.std(axis=0) > 0]
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    train, test = features[:-100], features[-100:]
    weights = np.linalg.solve(train.T @ train + 10 * np.eye(train.shape[1]), train.T @ hidden[:-100])
    return 1 - ((hidden[-100:] - test @ weights) ** 2).sum() / (hidden[-100:] ** 2).sum()


def explained_by_neighbours(features, hidden, count=15):
    """The same of the mean of the nearest neighbours among all others."""
    features = features[:, features.std(axis=0) > 0]
    if not features.shape[1]:
        return 0.0
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    distance = ((features[-100:, None] - features[None, :-100]) ** 2).sum(axis=2)
    guess = hidden[:-100][np.argsort(distance, axis=1)[:, :count]].mean(axis=1)
    return 1 - ((hidden[-100:] - guess) ** 2).sum() / (hidden[-100:] ** 2).sum()


class TestJudgement:
    @pytest.mark.parametrize("task", MEMORY)
    def test_the_robot_holds_still_in_the_wait(self, task):
        environment = make(task, "delay=30")
        environment.reset(0)
        held = 0
        rng = np.random.default_rng(0)
        while not environment._signal():
            free = environment._is_free()
            before = environment.target.copy()
            action = environment.expert_action() if free else rng.uniform(-1, 1, environment.spec.action_dim)
            result = environment.step(action.astype(np.float32))
            assert not result.terminated
            if not free:
                held += 1
                np.testing.assert_array_equal(environment.target, before)
                # What was executed would have moved nothing either, had the robot been free.
                environment._is_free = lambda: True
                environment._move(result.executed_action)
                np.testing.assert_allclose(environment.target, before, atol=1e-6)
                environment.target = before
                del environment._is_free
        assert held >= 29

    @pytest.mark.parametrize("task", ["place-back", "hidden-friction"])
    def test_no_pose_is_carried_into_the_wait(self, task):
        """Where the robot moves before the wait: hand and object begin it alike, wherever a policy has put them."""
        environment, poses = make(task, "delay=10"), []
        for episode in range(20):
            environment.reset(derive_seed(EVALUATION, episode))
            shift = 0.02 * np.sin([episode, 2 * episode, 3 * episode])
            while environment._is_free():
                expert = environment.expert_action()
                expert[:3] += shift
                result = environment.step(expert)
                assert not result.truncated
            poses.append(np.concatenate([environment.data.qpos, environment.target]))
        assert np.ptp(poses, axis=0).max() < 1e-9

    def test_how_far_the_way_was_does_not_tell_when_the_wait_begins(self):
        environment, begins = make("place-back", "delay=10"), []
        for episode in range(20):
            environment.reset(derive_seed(EVALUATION, episode))
            while environment._is_free():
                environment.step(environment.expert_action())
            begins.append(environment.steps)
        assert set(begins) == {48}

    @pytest.mark.parametrize("options", ["delay=5", "delay=5,cue_visible=1"])
    def test_where_the_hand_is_tells_whether_it_presses_or_lifts(self, options):
        """The expert of count-press needs no memory of its own, beside that of the number."""
        environment, rises = make("count-press", options), collections.defaultdict(list)
        rng, low, high = np.random.default_rng(0), environment.target_low[2], environment.target_high[2]
        for episode in range(40):
            environment.reset(derive_seed(EVALUATION, episode))
            while True:
                action = environment.expert_action()
                if environment._is_free():
                    place = (*np.floor(environment.hand / 0.01).astype(int), environment._presses < environment._count)
                    rises[place].append(low + (high - low) * (action[2] + 1) / 2 > environment.hand[2])
                noise = 0.015 * rng.standard_normal(3)
                result = environment.step((action + noise).astype(np.float32))
                if result.success or result.terminated or result.truncated:
                    break
            assert result.success
        often = [np.array(found) for found in rises.values() if len(found) >= 8]
        others = sum(min(found.sum(), (~found).sum()) for found in often)
        assert sum(map(len, often)) > 500
        assert others < 0.1 * sum(map(len, often))

    def test_targets_move_together_to_the_place_that_is_asked_for(self):
        environment = make("cue-reach", "delay=0")
        environment.reset(0)
        while not environment._signal():
            environment.step(environment.expert_action())
        start, goal = environment.target.copy(), np.array([0.1, -0.2, 0.3])
        low, high = np.array(environment.target_low), np.array(environment.target_high)
        action = (2 * (goal - low) / (high - low) - 1).astype(np.float32)
        for step in range(1, 8):
            np.testing.assert_allclose(  # the expert asks for where that takes the target next
                low + (high - low) * (environment.towards(goal) + 1) / 2,
                environment.target + (goal - environment.target) * 0.025 / np.linalg.norm(goal - environment.target),
            )
            environment.step(action)
            offset = goal - start
            np.testing.assert_allclose(environment.target, start + offset * step * 0.025 / np.linalg.norm(offset))
        for _ in range(20):
            environment.step(action)
        np.testing.assert_allclose(low + (high - low) * (environment.towards(goal) + 1) / 2, goal, atol=1e-6)
        np.testing.assert_allclose(environment.target, goal, atol=1e-6)
        np.testing.assert_allclose(environment.hand, goal, atol=0.002)

    @pytest.mark.parametrize("speed", [0.2, 1.0])
    def test_the_puck_cannot_be_carried_to_the_goal(self, speed):
        environment = make("hidden-friction", "delay=0")
        environment.reset(0)
        farthest = []
        for _ in range(60):
            farthest.append(environment.hand[0])
            environment.step(np.array([speed, 0, 0], np.float32))
        assert max(farthest) == pytest.approx(_RELEASE, abs=0.003)

    def test_another_pad_ends_the_episode(self):
        environment = make("cue-reach", "delay=10")
        for seed in range(5):
            observation = environment.reset(seed)
            shown = int(np.argmax(observation["cue"]))
            environment._believed = (shown + 1) % 4
            while not (result := environment.step(environment.expert_action())).terminated:
                assert not result.success
            assert result.info["completed"]

    @pytest.mark.parametrize("change", [-1, 1])
    def test_one_press_too_few_or_too_many(self, change):
        environment = make("count-press", "delay=0")
        played = 0
        for seed in range(12):
            environment.reset(seed)
            environment._believed += change
            if environment._believed < 1:
                continue
            while not ((result := environment.step(environment.expert_action())).terminated or result.truncated):
                assert not result.success
            played += 1
        assert played > 5

    def test_cues_are_shown_and_hidden(self):
        environment, twin = make("cue-reach", "delay=10"), make("cue-reach", "delay=10,cue_visible=1")
        cue, _ = environment.reset(1)["cue"], twin.reset(1)
        hidden = [environment.step(np.zeros(3, np.float32)).observation for _ in range(25)]
        assert cue.sum() == 1
        assert [bool(o["cue"].any()) for o in hidden] == [True] * 9 + [False] * 16
        assert [bool(o["signal"][0]) for o in hidden] == [False] * 19 + [True] * 6
        for _ in range(25):
            np.testing.assert_array_equal(twin.step(np.zeros(3, np.float32)).observation["cue"], cue)

    def test_sensors_are_noisy_but_unbiased(self):
        environment = make("cue-reach", "delay=200")
        environment.reset(0)
        error = []
        for _ in range(200):
            observed = environment.step(np.zeros(3, np.float32)).observation["proprio"]
            error.append(observed - environment.hand)
        assert np.std(error) == pytest.approx(SENSOR_NOISE, rel=0.15)
        assert abs(np.mean(error)) < 3 * SENSOR_NOISE / np.sqrt(600)
