from hypothesis import given
from hypothesis import strategies as st

from ssd_jax.buckets import (
    PREFILL_CHUNK,
    bucket_batch,
    bucket_count,
    bucket_slots,
    prefill_chunks,
)

sizes = st.integers(1, 200_000)


@given(sizes)
def test_slots_hold_the_text_without_much_waste(num_tokens):
    slots = bucket_slots(num_tokens)
    assert num_tokens <= slots
    assert slots <= max(128, 2 * num_tokens)
    assert slots - num_tokens < 4096
    assert bucket_slots(slots) == slots


def test_there_are_few_sizes():
    assert len({bucket_slots(n) for n in range(1, 8193)}) == 7
    assert {bucket_batch(n) for n in range(1, 65)} == {1, 2, 4, 8, 16, 32, 64}
    assert {bucket_count(n) for n in range(65)} == {0, 4, 8, 16, 32, 64}
    assert {size for n in range(1, 2000) for _, size in prefill_chunks(n)} == {
        16,
        32,
        64,
        128,
        256,
        512,
    }


@given(st.integers(0, 10_000))
def test_chunks_cover_a_prompt_once(num_tokens):
    chunks = prefill_chunks(num_tokens)
    covered = [token for start, size in chunks for token in range(start, start + size)]
    assert covered[:num_tokens] == list(range(num_tokens))
    assert covered == list(range(len(covered)))
    assert all(size == PREFILL_CHUNK for _, size in chunks[:-1])
    assert len(covered) - num_tokens < max(16, PREFILL_CHUNK // 2)


def test_chunks_at_the_borders():
    assert prefill_chunks(0) == []
    assert prefill_chunks(1) == prefill_chunks(16) == [(0, 16)]
    assert prefill_chunks(17) == [(0, 32)]
    assert prefill_chunks(512) == [(0, 512)]
    assert prefill_chunks(513) == [(0, 512), (512, 16)]


@given(st.integers(1, 1000))
def test_batches_and_counts_are_padded_up(number):
    assert number <= bucket_batch(number) < 2 * number
    assert number <= bucket_count(number) < max(5, 2 * number)
