"""Normalisation: closed forms, inverses, constant dimensions, strict JSON."""

import json

import numpy as np
import pytest
import torch

from scd_robot.errors import CheckpointError, ConfigError, DatasetError, ShapeError, UnknownNameError
from scd_robot.normalization import MODES, FieldStatistics, Mode, Normalizer, compute_statistics

DATA = np.concatenate(
    [np.random.default_rng(0).normal((0, 100, -3), (1, 50, 1e-3), (1000, 3)), np.full((1000, 1), 7.25)], axis=1
).astype(np.float32)


def normalizer(mode: Mode, values: np.ndarray = DATA) -> Normalizer:
    return Normalizer({"x": compute_statistics(values, "x")}, {"x": mode})


def test_statistics_are_those_of_all_steps() -> None:
    statistics = compute_statistics(DATA.reshape(10, 100, 4), "x")
    wide = DATA.astype(np.float64)
    np.testing.assert_allclose(statistics.minimum, wide.min(0))
    np.testing.assert_allclose(statistics.maximum, wide.max(0))
    np.testing.assert_allclose(statistics.mean, wide.mean(0))
    np.testing.assert_allclose(statistics.std, wide.std(0), atol=1e-12)
    np.testing.assert_allclose(statistics.low, np.quantile(wide, 0.01, axis=0))
    np.testing.assert_allclose(statistics.high, np.quantile(wide, 0.99, axis=0))
    assert statistics.width == 4


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_max", [[-1, -1], [-0.5, 0], [0, 0], [1, 1]]),
        ("mean_std", [[-1.183216, -1.414214], [-0.507093, 0], [0.169031, 0], [1.521278, 1.414214]]),
        ("identity", [[0, 10], [1, 15], [2, 15], [4, 20]]),
    ],
)
def test_closed_forms(mode: Mode, expected: list) -> None:
    values = np.array([[0, 10], [1, 15], [2, 15], [4, 20]], np.float32)
    result = normalizer(mode, values).normalize("x", torch.from_numpy(values))
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)


def test_quantile_maps_the_central_98_percent_and_leaves_outliers_outside() -> None:
    values = np.concatenate([np.linspace(0, 1, 101), [1000.0]])[:, None].astype(np.float32)
    low, high = np.quantile(values.astype(np.float64), (0.01, 0.99))
    quantile = normalizer("quantile", values)
    ends = quantile.normalize("x", torch.tensor([[low], [(low + high) / 2], [high]], dtype=torch.float32))
    torch.testing.assert_close(ends, torch.tensor([[-1.0], [0.0], [1.0]]), atol=1e-5, rtol=0)
    assert quantile.normalize("x", torch.tensor([[1000.0]])) > 1000


@pytest.mark.parametrize("mode", MODES)
def test_inverse_gives_the_data_back(mode: Mode) -> None:
    both, data = normalizer(mode), torch.from_numpy(DATA)
    back = both.denormalize("x", both.normalize("x", data))
    torch.testing.assert_close(back, data, rtol=1e-6, atol=2e-5)
    moving = slice(0, 4 if mode == "identity" else 3)  # the last dimension is constant: held on the way out
    again = both.normalize("x", both.denormalize("x", data))
    torch.testing.assert_close(again[:, moving], data[:, moving], rtol=1e-4, atol=1e-3)
    assert back.dtype == torch.float32


@pytest.mark.parametrize("mode", ["min_max", "mean_std", "quantile"])
@pytest.mark.parametrize("constant", [0.0, 7.25, -1e-12, 1e6, 0.1])
def test_constant_dimension_maps_to_0_and_back(mode: Mode, constant: float) -> None:
    values = np.full((100, 1), constant, np.float32)
    both = normalizer(mode, values)
    normalised = both.normalize("x", torch.from_numpy(values))
    assert torch.isfinite(normalised).all()
    assert normalised.abs().max() < 1e-6
    np.testing.assert_allclose(both.denormalize("x", normalised).numpy(), values, rtol=1e-6, atol=1e-12)
    anything = both.denormalize("x", torch.full((3, 1), 0.7))
    np.testing.assert_allclose(anything.numpy(), values[:3], rtol=1e-6, atol=1e-9, err_msg="held on the way out")
    moved = both.normalize("x", torch.from_numpy(values) + 0.5)  # seen later, on the robot
    assert (moved == 0).all(), "nothing was learned of a dimension that never moved in the data"


def test_a_rare_event_is_not_blown_up_by_quantiles() -> None:
    gripper = np.zeros((1000, 1), np.float32)
    gripper[:5] = 255.0
    assert normalizer("quantile", gripper).normalize("x", torch.tensor([[0.0], [255.0]])).flatten().tolist() == [-1, 1]


def test_small_units_are_scaled_and_rounding_is_not() -> None:
    tiny = np.linspace(-3e-7, 3e-7, 100, dtype=np.float32)[:, None]
    assert normalizer("min_max", tiny).normalize("x", torch.from_numpy(tiny)).abs().max() == pytest.approx(1.0)
    rounding = np.float32(1000.0) * (1 + np.float32(1.2e-7) * np.arange(3, dtype=np.float32)[:, None])
    assert normalizer("min_max", rounding).normalize("x", torch.from_numpy(rounding)).abs().max() < 1e-3


def test_json_round_trip_is_exact() -> None:
    statistics = {"x": compute_statistics(DATA, "x"), "action": compute_statistics(DATA[:, :2] * np.pi, "action")}
    before = Normalizer(statistics, {"x": "quantile", "action": "mean_std"})
    after = Normalizer.from_json(json.loads(json.dumps(before.to_json())))
    assert (after.statistics, after.modes) == (before.statistics, before.modes)
    for key, values in (("x", DATA), ("action", DATA[:, :2])):
        assert torch.equal(
            after.normalize(key, torch.from_numpy(values)), before.normalize(key, torch.from_numpy(values))
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_moves_and_adds_no_weights(dtype: torch.dtype) -> None:
    moved = normalizer("min_max").to(dtype)
    assert moved.normalize("x", torch.zeros(1, 4, dtype=dtype)).dtype == dtype
    assert moved.state_dict() == {}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_statistics_of_bad_values_are_refused(bad: float) -> None:
    values = DATA.copy()
    values[17, 2] = bad
    with pytest.raises(DatasetError, match="'x' holds a NaN or infinite value at step 17, dimension 2"):
        compute_statistics(values, "x")
    with pytest.raises(DatasetError, match="'x': it holds no steps"):
        compute_statistics(DATA[:0], "x")


def test_misuse_is_refused() -> None:
    statistics = {"x": compute_statistics(DATA, "x")}
    with pytest.raises(UnknownNameError, match="did you mean 'min_max'"):
        Normalizer(statistics, {"x": "minmax"})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"statistics are for \['x'\] but modes for \['y'\]"):
        Normalizer(statistics, {"y": "min_max"})
    made = Normalizer(statistics, {"x": "min_max"})
    with pytest.raises(UnknownNameError, match="unknown normalised key 'z'"):
        made.normalize("z", torch.zeros(1, 4))
    for call in (made.normalize, made.denormalize):
        with pytest.raises(ShapeError, match=r"'x' must be \(\.\.\., 4\), got \(2, 3\)"):
            call("x", torch.zeros(2, 3))


@pytest.mark.parametrize("change", [{"mean": [0.0]}, {"std": [float("nan")] * 4}, {"extra": 1}, {"mode": "guess"}])
def test_damaged_json_is_refused(change: dict) -> None:
    data = normalizer("min_max").to_json()
    data["x"].update(change)
    with pytest.raises((CheckpointError, UnknownNameError)):
        Normalizer.from_json(data)


def test_identity_keeps_even_constant_dimensions() -> None:
    statistics = FieldStatistics(*((7.0,),) * 6)
    assert Normalizer({"x": statistics}, {"x": "identity"}).normalize("x", torch.tensor([[7.0]])) == 7.0
