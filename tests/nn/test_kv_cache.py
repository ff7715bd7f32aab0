"""One test per promise of the ring cache. W window, P tokens per step."""

from typing import NamedTuple

import pytest
import torch

from scd_robot.nn import KVCache

W, P, LAYERS, BATCH, HEADS, WIDTH = 4, 2, 3, 2, 2, 8


def new_cache(dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache.create(
        num_layers=LAYERS,
        batch_size=BATCH,
        num_heads=HEADS,
        history_length=W,
        tokens_per_step=P,
        head_dim=WIDTH,
        dtype=dtype,
    )


Pair = tuple[torch.Tensor, torch.Tensor]


class Seen(NamedTuple):
    """Masks of a step, (B, 1, 1, W * P + P)."""

    there: torch.Tensor
    own: torch.Tensor


def group(value: float, layers: int = LAYERS, batch: int = BATCH, heads: int = HEADS) -> list[Pair]:
    """Keys that are `value` + 1000 * layer, and values that are their negative."""
    keys = [torch.full((batch, heads, P, WIDTH), value + 1000 * layer) for layer in range(layers)]
    return [(one, -one) for one in keys]


def take_step(
    cache: KVCache, value: float, active: torch.Tensor | None = None, token_valid: torch.Tensor | None = None
) -> tuple[Seen, list[Pair]]:
    """One control step of such keys and values; returns what each layer sees, its own group behind what is held."""
    seen, new = Seen(cache.seen_next(token_valid), cache.own_next()), group(value)
    results = [
        (torch.cat((keys, own_keys), 2), torch.cat((values, own_values), 2))
        for (keys, values), (own_keys, own_values) in zip(cache.held(), new, strict=True)
    ]
    cache.append(new, token_valid, active)
    return seen, results


def visible(seen: Seen, keys: torch.Tensor, row: int = 0) -> list[float]:
    """Values of the steps whose tokens the mask of a row lets through, ascending."""
    return sorted(keys[row, 0, seen.there[row, 0, 0], 0].tolist())


def twice(steps: range) -> list[float]:
    return [float(step) for step in steps for _ in range(P)]


def test_nothing_is_reallocated_and_shapes_are_static() -> None:
    cache = new_cache()
    tensors = (cache.keys_values, cache.slot_position, cache.token_valid, cache.position)
    pointers = [tensor.data_ptr() for tensor in tensors]
    shapes = set()
    for step in range(3 * W):
        if step == 5:
            cache.reset(torch.tensor([True, False]))
        seen, results = take_step(cache, step, torch.tensor([True, step % 3 != 0]))
        shapes.add((seen.there.shape, seen.own.shape, *(tensor.shape for pair in results for tensor in pair)))
    cache.reset()
    current = (cache.keys_values, cache.slot_position, cache.token_valid, cache.position)
    assert [tensor.data_ptr() for tensor in current] == pointers
    assert shapes == {((BATCH, 1, 1, W * P + P),) * 2 + ((BATCH, HEADS, W * P + P, WIDTH),) * (2 * LAYERS)}


def test_exactly_the_window_is_seen_at_every_step() -> None:
    cache = new_cache()
    for step in range(4 * W + 1):
        seen, results = take_step(cache, step)
        for row in range(BATCH):
            assert visible(seen, results[0][0], row) == twice(range(max(0, step - W + 1), step + 1))
    assert cache.position.tolist() == [4 * W + 1] * BATCH


def test_own_marks_the_group_of_the_step_itself() -> None:
    cache = new_cache()
    for step in range(2 * W):
        seen, results = take_step(cache, step)
        assert results[0][0][0, 0, seen.own[0, 0, 0], 0].tolist() == [step] * P
        assert (seen.own <= seen.there).all()


def test_layers_and_keys_and_values_are_kept_apart() -> None:
    cache = new_cache()
    for step in range(W + 1):
        seen, results = take_step(cache, step)
    for layer, (keys, values) in enumerate(results):
        assert visible(seen, keys) == [value + 1000 * layer for value in twice(range(1, W + 1))]
        assert torch.equal(values, -keys)


def test_a_reset_row_sees_nothing_old_and_the_others_all() -> None:
    cache = new_cache()
    for step in range(W + 1):
        take_step(cache, step)
    cache.reset(torch.tensor([True, False]))
    assert cache.position.tolist() == [0, W + 1]
    seen, results = take_step(cache, W + 1)
    assert visible(seen, results[0][0], 0) == twice(range(W + 1, W + 2))
    assert visible(seen, results[0][0], 1) == twice(range(2, W + 2))
    cache.reset()
    seen, results = take_step(cache, 50)
    assert all(visible(seen, results[0][0], row) == [50.0] * P for row in range(BATCH))


def test_rows_that_do_not_take_the_step_stay_bit_by_bit() -> None:
    cache = new_cache()
    for step in range(W + 2):
        take_step(cache, step)
    before = cache.clone()
    take_step(cache, 99, torch.tensor([False, True]))
    for name in ("slot_position", "token_valid", "position"):
        assert torch.equal(getattr(cache, name)[0], getattr(before, name)[0])
    assert torch.equal(cache.keys_values[:, 0], before.keys_values[:, 0])
    assert cache.position.tolist() == [W + 2, W + 3]
    seen, results = take_step(cache, 100)
    assert visible(seen, results[0][0], 0) == twice(range(3, W + 2)) + [100.0] * P


def test_steps_that_were_skipped_age_what_is_in_the_cache() -> None:
    """A row whose position jumps (dropped observations) no longer sees what has left the window by then."""
    for skipped in range(2 * W + 2):
        cache = new_cache()
        for step in range(W):
            take_step(cache, step)
        cache.position += torch.tensor([skipped, 0])
        seen, results = take_step(cache, W + skipped)
        kept = range(min(W, skipped + 1), W)
        assert visible(seen, results[0][0], 0) == twice(kept) + [float(W + skipped)] * P
        assert visible(seen, results[0][0], 1) == twice(range(1, W)) + [float(W + skipped)] * P


def test_absent_tokens_are_not_seen_until_their_slot_is_written_again() -> None:
    cache = new_cache()
    take_step(cache, 0, token_valid=torch.tensor([[True, False], [True, True]]))
    seen, results = take_step(cache, 1)
    assert visible(seen, results[0][0], 0) == [0.0, 1.0, 1.0]
    assert visible(seen, results[0][0], 1) == [0.0, 0.0, 1.0, 1.0]
    for step in range(2, W + 1):
        seen, results = take_step(cache, step)
    assert visible(seen, results[0][0], 0) == twice(range(1, W + 1))


def test_the_slot_that_is_written_next_has_left_the_window() -> None:
    """Whatever stands in it, be it of a row that did not take a step or after control steps without an observation."""
    for skipped in range(2 * W + 2):
        cache = new_cache()
        for step in range(2 * W + 1):
            take_step(cache, step)
        cache.position += skipped
        seen = cache.seen_from(cache.position).view(BATCH, W, P)
        assert not seen[torch.arange(BATCH), cache.position % W].any()


def test_a_step_that_fails_leaves_the_cache_as_it_was() -> None:
    cache = new_cache()
    for step in range(W + 2):
        take_step(cache, step)
    before = cache.clone()
    cache.seen_next(torch.zeros(BATCH, P, dtype=torch.bool))
    with pytest.raises(RuntimeError):
        cache.append([(keys[..., :3], values[..., :3]) for keys, values in group(99)])
    for name in ("keys_values", "slot_position", "token_valid", "position"):
        assert torch.equal(getattr(cache, name), getattr(before, name)), name


def test_num_bytes_is_what_the_tensors_hold() -> None:
    for dtype, size in ((torch.float32, 4), (torch.float16, 2)):
        numbers = LAYERS * BATCH * 2 * HEADS * W * P * WIDTH
        assert new_cache(dtype).num_bytes == numbers * size + BATCH * W * 8 + BATCH * W * P + BATCH * 8


def test_a_clone_shares_nothing() -> None:
    cache = new_cache()
    take_step(cache, 0)
    clone = cache.clone()
    take_step(cache, 1)
    assert clone.position.tolist() == [1, 1]
    assert clone.slot_position[0].tolist() == [0, -1, -1, -1]
    assert (clone.batch_size, clone.history_length) == (BATCH, W)


def test_window_of_one_holds_the_present_step_only() -> None:
    cache = KVCache.create(num_layers=1, batch_size=1, num_heads=1, history_length=1, tokens_per_step=P, head_dim=WIDTH)
    for step in range(3):
        assert torch.equal(cache.seen_next(), cache.own_next())
        cache.append(group(step, layers=1, batch=1, heads=1))
        assert cache.held()[0][0][0, 0, :, 0].tolist() == [step] * P
