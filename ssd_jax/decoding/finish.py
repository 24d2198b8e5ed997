"""Why a row stopped, as the codes that `DecodeState.finish` holds."""

import enum


class Finish(enum.IntEnum):
    """RUNNING rows go on; the others are done and emit nothing more."""

    RUNNING = 0
    EOS = 1
    LENGTH = 2
    STOP = 3  # set by the host: a stop string, or a row that only pads the batch
    ERROR = 4  # the logits were NaN, infinite or all impossible: there is no next token
