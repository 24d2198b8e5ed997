"""Measured figures of others, tokens a second, for one row and greedy decoding unless said.

Target on four H100 with divided weights, SSD's draft on a fifth, bfloat16, 512 tokens an answer.
"""

import dataclasses

DATASETS = ("HumanEval", "UltraFeedback", "Alpaca", "GSM8K")
PAPER = "Kumar, Dao, May, arXiv 2603.03251, main table"
REPRODUCTION = "github.com/Weili-0234/ssd-wl, REPRODUCE.md"
REFERENCE_LOG = "github.com/tanishqkumar/ssd, tests/reference_test_outputs.md"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PublishedTable:
    """One pair of models; `by_dataset` in the order of `DATASETS`, their mean as it was printed.

    Attributes:
        draft_len: tokens of a synchronous draft.
        draft: speeds of synchronous speculation.
        ssd: of SSD with fan-out 3, by its draft length; None where that was not told.
    """

    source: str
    target: str
    draft_model: str
    ar: float
    draft_len: int
    draft: tuple[float, ...]
    draft_mean: float
    ssd: dict[int | None, tuple[float, ...]]
    ssd_mean: dict[int | None, float]

    @property
    def pair(self) -> str:
        """Both models."""
        return f"{self.target} / {self.draft_model}"


TABLES = (
    PublishedTable(
        source=PAPER,
        target="llama-3.1-70b",
        draft_model="llama-3.2-1b",
        ar=54.7,
        draft_len=5,
        draft=(176, 138, 145, 188),
        draft_mean=161.8,
        ssd={None: (283, 215, 224, 301)},
        ssd_mean={None: 255.8},
    ),
    PublishedTable(
        source=PAPER,
        target="qwen3-32b",
        draft_model="qwen3-0.6b",
        ar=88.8,
        draft_len=5,
        draft=(146, 122, 127, 152),
        draft_mean=136.8,
        ssd={None: (222, 174, 185, 234)},
        ssd_mean={None: 203.8},
    ),
    PublishedTable(
        source=REPRODUCTION,
        target="qwen3-32b",
        draft_model="qwen3-0.6b",
        ar=97.4,
        draft_len=6,
        draft=(152.7, 121.7, 127.2, 164.1),
        draft_mean=141.4,
        ssd={
            4: (224.5, 182.0, 192.4, 244.8),
            5: (210.1, 162.7, 174.1, 227.5),
            6: (193.9, 146.0, 156.9, 204.4),
            7: (169.0, 131.4, 141.1, 192.7),
        },
        ssd_mean={4: 210.9, 5: 193.6, 6: 175.3, 7: 158.6},
    ),
)

# The parts of a round that the reproduction profiled: draft_len 4, fan-out 3, Qwen3-32B and 0.6B.
PROFILED_DRAFT_LEN = 4
PROFILED_GUESSES = 3
VERIFY_S = 11.45e-3
LOOKUP_S = 0.71e-3
GLUE_S = 2.88e-3  # reading the trunk anew and forking 2.83, storing 0.05
TREE_STEP_S = 2.54e-3

# Share of outcomes prepared with fan-out 3 at temperature 0: "80 to 90 %" in talks, 88 % elsewhere.
HIT_RATE = 0.88

# Reference log: Llama-3.1-70B / 3.2-1B, draft_len 6, fan-out 3, 8 to 32 prompts of GSM8K, by batch.
BATCH_DRAFT_LEN = 6
BATCH_SPEEDS = {1: 238.0, 2: 409.0, 4: 681.0, 8: 1166.0, 16: 1900.0}
BATCH_ANSWERS = {1: 8, 2: 4, 4: 4, 8: 4, 16: 4}  # of each row; the last is not told

# The rest of that log: target, draft model, plain, draft_len, its speed, fan-out, SSD's speed.
LOG_SPEEDS = (
    ("llama-3.1-70b", "llama-3.2-1b", 54.0, 6, 172.0, 3, 270.0),
    ("qwen3-32b", "qwen3-0.6b", 89.0, 4, 156.0, 2, 195.0),
)
