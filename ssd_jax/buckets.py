"""The one owner of padded sizes: every array shape that a request decides comes from here.

A new size means a new compilation, so there are few of them, and both models, all methods and the
warm-up take theirs from these functions.
"""

PREFILL_CHUNK = 512
_SMALLEST_CHUNK = 16
_SMALLEST_SLOTS = 128
_SLOT_STEP = 4096  # past this, slots grow by multiples instead of doubling: at most 4095 unused


def bucket_batch(num_rows: int) -> int:
    """Rows that a batch of `num_rows` is padded to: the next power of two."""
    return _next_power_of_two(num_rows)


def bucket_slots(num_tokens: int) -> int:
    """Cache slots for a text of up to `num_tokens` tokens."""
    if num_tokens > _SLOT_STEP:
        return -(-num_tokens // _SLOT_STEP) * _SLOT_STEP
    return max(_SMALLEST_SLOTS, _next_power_of_two(num_tokens))


def prefill_chunks(num_tokens: int) -> list[tuple[int, int]]:
    """How a prompt of `num_tokens` tokens is fed: (first token, padded size) of each chunk."""
    chunks = [(start, PREFILL_CHUNK) for start in range(0, num_tokens, PREFILL_CHUNK)]
    if chunks:
        start = chunks[-1][0]
        chunks[-1] = (start, max(_SMALLEST_CHUNK, _next_power_of_two(num_tokens - start)))
    return chunks


def bucket_count(count: int) -> int:
    """Length of a short list of ids (EOS ids, top logprobs): 0, or a power of two from 4 on."""
    return 0 if count == 0 else max(4, _next_power_of_two(count))


def _next_power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
