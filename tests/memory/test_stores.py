"""Every tier against lists: appends, reads, choosing rows, growth without copies."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan

import pytest
import torch
from torch import Tensor

from drt.errors import DRTError
from drt.memory import DeviceStore, HostStore

SIZE, HEADS, DIM, WIDTH = 3, 2, 4, 5  # tokens, heads and width of a chunk; width of a landmark
Store = DeviceStore | HostStore
MakeStore = Callable[[int | None], Store]
TIERS: dict[str, MakeStore] = {
    "device": lambda page_size: DeviceStore(page_size=page_size),
    "host": lambda page_size: HostStore(page_size=page_size, dtype="float32"),
}


@pytest.fixture(params=TIERS)
def make_store(request: pytest.FixtureRequest) -> MakeStore:
    return TIERS[request.param]


class Lists:
    """What a store should hold: a list of (keys, values, landmark, length) for each row."""

    def __init__(self, rows: int) -> None:
        self.rows: list[list[tuple[Tensor, Tensor, Tensor, Tensor]]] = [[] for _ in range(rows)]

    def append(self, offer: tuple[Tensor, ...], new_counts: Tensor) -> None:
        for row, count in enumerate(new_counts.tolist()):
            self.rows[row] += [tuple(tensor[row, n].clone() for tensor in offer) for n in range(count)]

    def select_rows(self, rows: Tensor) -> None:
        self.rows = [list(self.rows[row]) for row in rows.tolist()]

    def assert_holds(self, store: Store) -> None:
        """The same counts, chunks, lengths and landmarks."""
        counts = [len(row) for row in self.rows]
        assert store.counts.tolist() == counts
        landmarks = torch.cat([torch.zeros(len(counts), 0, WIDTH), *store.landmark_blocks()], 1)
        assert landmarks.shape == (len(counts), max(counts), WIDTH)
        assert landmarks.isfinite().all()
        for row, chunks in enumerate(self.rows):
            if not chunks:
                continue
            indices = torch.full((len(counts), 1, len(chunks)), -1)
            indices[row, 0] = torch.arange(len(chunks))
            keys, values, lengths = store.gather(indices)
            for n, (key, value, landmark, length) in enumerate(chunks):
                assert torch.equal(keys[row, 0, n], key)
                assert torch.equal(values[row, 0, n], value)
                assert torch.equal(landmarks[row, n], landmark)
                assert lengths[row, 0, n] == length
            held = torch.arange(len(chunks)).flip(0).expand(len(counts), 1, -1)
            if min(counts) == max(counts):
                assert torch.equal(store.landmark_blocks().read(held), landmarks.flip(1).unsqueeze(1))


def offer(rows: int, chunks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, landmarks and lengths of new chunks; zeros past a length, where a store may hold anything."""
    lengths = torch.randint(1, SIZE + 1, (rows, chunks))
    outside = torch.arange(SIZE) >= lengths.unsqueeze(-1)
    keys, values = torch.randn(2, rows, chunks, SIZE, HEADS, DIM).masked_fill(outside[..., None, None], 0)
    return keys, values, torch.randn(rows, chunks, WIDTH), lengths


def filled(store: Store, *counts: int) -> Store:
    store.append(*offer(len(counts), max(counts)), torch.tensor(counts))
    return store


@pytest.mark.parametrize("page_size", [1, 2, 3, 100, None])
@pytest.mark.parametrize("seed", range(3))
def test_any_appends_and_choices_of_rows(make_store: MakeStore, page_size: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def number(least: int, most: int, *shape: int) -> Tensor:
        return torch.randint(least, most + 1, shape, generator=generator)

    store, lists, rows = make_store(page_size), Lists(2), 2
    for step in range(12):
        if step and number(0, 2) == 0:
            chosen = number(0, rows - 1, int(number(1, 4)))
            store.select_rows(chosen)
            lists.select_rows(chosen)
            rows = len(chosen)
        else:
            new = offer(rows, int(number(1, 4)))
            counts = number(0, new[0].shape[1], rows)
            store.append(*new, counts)
            lists.append(new, counts)
        lists.assert_holds(store)


def test_slots_are_read_in_any_order_and_empty_ones_are_zeros(make_store: MakeStore) -> None:
    store = make_store(2)
    new = offer(2, 5)
    store.append(*new, torch.tensor([5, 5]))
    indices = torch.tensor([[[4, 0, -1], [3, 3, 1]], [[-1, -1, -1], [-1, 2, 0]]])
    keys, values, lengths = store.gather(indices)
    assert keys.shape == values.shape == (2, 2, 3, SIZE, HEADS, DIM)
    assert lengths.shape == indices.shape
    for at in indices.ge(0).nonzero().tolist():
        chunk = (at[0], int(indices[tuple(at)]))
        assert torch.equal(keys[tuple(at)], new[0][chunk])
        assert torch.equal(values[tuple(at)], new[1][chunk])
        assert lengths[tuple(at)] == new[3][chunk]
    for read in (keys, values, lengths):
        assert read[indices < 0].count_nonzero() == 0


def test_ragged_counts_take_the_first_of_what_is_offered(make_store: MakeStore) -> None:
    store, lists = make_store(2), Lists(3)
    for counts in ([0, 3, 1], [2, 0, 1], [0, 0, 0], [3, 3, 3]):
        new = offer(3, 3)
        store.append(*new, torch.tensor(counts))
        lists.append(new, torch.tensor(counts))
        lists.assert_holds(store)


@pytest.mark.parametrize("tier", ["device", "host"])
def test_growth_copies_nothing_that_is_held(tier: str) -> None:
    store = filled(TIERS[tier](2), 3, 3)
    held = list(store._pages)

    def addresses() -> list[int]:
        pages = [placed.page for placed in held]
        return [tensor.data_ptr() for page in pages for tensor in (*page.fields, page.stored_landmarks)]

    before = addresses()
    for _ in range(20):
        store.append(*offer(2, 2), torch.tensor([2, 1]))
    assert len(store._pages) == 22  # 43 chunks in the longer row
    assert all(old.page is new.page for old, new in zip(held, store._pages, strict=False))
    assert addresses() == before


def test_choosing_rows_copies_a_page_only_when_it_is_written_to(make_store: MakeStore) -> None:
    store = filled(make_store(2), 5, 5)
    held = [placed.page for placed in store._pages]
    store.select_rows(torch.tensor([0, 0, 1]))
    assert [placed.page for placed in store._pages] == held
    store.append(*offer(3, 1), torch.ones(3, dtype=torch.long))
    now = [placed.page for placed in store._pages]
    assert now[:2] == held[:2], "full pages stay where they are"
    assert now[2] is not held[2]


def test_rows_that_stay_what_they_are_copy_nothing(make_store: MakeStore) -> None:
    store = filled(make_store(4), 1, 1)
    held = store._pages[0].page
    store.select_rows(torch.tensor([0, 1]))
    store.append(*offer(2, 1), torch.ones(2, dtype=torch.long))
    assert store._pages[0].page is held


def test_rows_that_were_one_go_their_own_ways(make_store: MakeStore) -> None:
    store, lists = make_store(4), Lists(1)
    for rows in (1, 3):
        new, counts = offer(rows, 2), torch.full((rows,), 2)
        store.append(*new, counts)
        lists.append(new, counts)
        store.select_rows(torch.zeros(3, dtype=torch.long))
        lists.select_rows(torch.zeros(3, dtype=torch.long))
    new = offer(3, 1)
    store.append(*new, torch.tensor([1, 0, 1]))
    lists.append(new, torch.tensor([1, 0, 1]))
    lists.assert_holds(store)
    keys = store.gather(torch.tensor([[[4]], [[-1]], [[4]]])).keys
    assert not torch.equal(keys[0], keys[2])


def test_what_is_held_is_not_what_was_offered(make_store: MakeStore) -> None:
    """A later change of the offered tensors, or a gradient through them, does not reach the store."""
    keys, values, landmarks, lengths = offer(1, 2)
    before = keys.clone()
    store = make_store(2)
    store.append(keys.requires_grad_(), values, landmarks, lengths, torch.tensor([2]))
    with torch.no_grad():
        keys.zero_()
    read = store.gather(torch.tensor([[[0, 1]]])).keys[0, 0]
    assert torch.equal(read, before[0])
    assert not read.requires_grad


def test_a_store_without_chunks(make_store: MakeStore) -> None:
    store = make_store(None)
    store.select_rows(torch.tensor([0, 0, 0]))  # rows of nothing
    assert store.counts.tolist() == []
    assert list(store.landmark_blocks()) == []
    filled_later = offer(3, 1)
    store.append(*filled_later, torch.ones(3, dtype=torch.long))
    assert store.counts.tolist() == [1, 1, 1]


def test_clear_forgets_chunks_and_keeps_the_page_size(make_store: MakeStore) -> None:
    store = filled(make_store(2), 3, 1)
    store.clear()
    assert store.counts.tolist() == []
    assert list(store.landmark_blocks()) == []
    lists, new = Lists(1), offer(1, 3)
    store.append(*new, torch.tensor([3]))
    lists.append(new, torch.tensor([3]))
    lists.assert_holds(store)
    assert len(store._pages) == 2


def test_page_size() -> None:
    with pytest.raises(ValueError, match="page_size must be at least 1, got 0"):
        DeviceStore(page_size=0)
    store = filled(DeviceStore(), 1)
    page = store._pages[0].page
    held = sum(field.numel() * field.element_size() for field in page.fields)
    assert held <= 32 * 2**20 < held + held // page.capacity
    large = page.capacity + 1
    store = DeviceStore()
    store.append(*offer(2, large), torch.tensor([large, 1]))
    assert len(store._pages) == 1, "a pass's chunks lie in one page"


@pytest.mark.parametrize("store_type", [DeviceStore, HostStore])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_what_is_rounded(store_type: type[Store], dtype: str) -> None:
    """bfloat16 is the nearest; int8 is off by at most half a step of 1/127 of a head's largest in that chunk."""
    keys, values, landmarks, lengths = offer(2, 6)
    lengths[1, 2] = SIZE
    keys[0, 3], values[1, 2] = 0, 1e-30  # no scale to divide by; a tiny one
    keys[1, 5] *= 1000
    store = store_type(dtype=dtype, page_size=4)
    store.append(keys, values, landmarks, lengths, torch.tensor([6, 6]))
    read = store.gather(torch.arange(6).expand(2, 1, 6))
    for got, given in ((read.keys[:, 0], keys), (read.values[:, 0], values)):
        if dtype == "int8":
            step = given.abs().amax((2, 4), keepdim=True) / 127
            assert ((got - given).abs() <= 0.5001 * step).all()
            assert got.unique().numel() < given.unique().numel()
        else:
            assert torch.equal(got, given.to(getattr(torch, dtype)))
    assert torch.equal(read.lengths[:, 0], lengths)


@pytest.mark.parametrize("store_type", [DeviceStore, HostStore])
@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("float16", 7e4, "in the range of float16, up to 65504, got 70000"),
        ("float16", -7e4, "in the range of float16"),
        ("bfloat16", 3.4e38, "in the range of bfloat16"),
        ("float32", 1e39, "in the range of float32"),
        ("int8", -1e39, "in the range of float32"),
        *(
            (dtype, value, "NaN or infinity")
            for dtype in ("float16", "bfloat16", "float32", "int8")
            for value in (inf, nan)
        ),
    ],
)
def test_what_a_dtype_cannot_hold_is_refused(
    store_type: type[Store], dtype: str, value: float, message: str
) -> None:
    """It would be infinite, and NaN once it is attended to."""
    for number, name in enumerate(("keys", "values")):
        new = [tensor.double() if tensor.is_floating_point() else tensor for tensor in offer(2, 3)]
        new[3][:] = SIZE - 1
        store = store_type(dtype=dtype, page_size=4)
        new[number][1, 2, SIZE - 1] = value  # past the end of a chunk anything may lie
        store.append(*new, torch.tensor([3, 3]))
        new[number][1, 2, 0, 1, 2] = value
        with pytest.raises(DRTError, match=f"expected {name} .*{message}"):
            store.append(*new, torch.tensor([3, 3]))
        assert store.counts.tolist() == [3, 3]


def test_the_smallest_numbers_fit_int8() -> None:
    """Their scale is a denormal number, rounded by up to half of itself."""
    keys, values, landmarks, lengths = offer(1, 1)
    keys[:], lengths[:] = 180 * 1.4e-45, SIZE
    store = DeviceStore(dtype="int8")
    store.append(keys, values, landmarks, lengths, torch.tensor([1]))
    assert (store.gather(torch.zeros(1, 1, 1, dtype=torch.long)).keys > 0).all()


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(ValueError, match=r"chunks can be held as .*int8, got 'int4'"):
        HostStore(dtype="int4")
