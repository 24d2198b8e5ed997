"""A simulator of plain, synchronous speculative and speculative speculative decoding.

    ssd-jax bench simulate check     own and published speeds beside simulated ones
    ssd-jax bench simulate run ...   one setting, with times and outcomes of your own
    ssd-jax bench simulate scale     larger placements, with what they assume

`costs` says what the parts of a round last: worked out for chips (`chips`) or measured
(`records`). `outcomes` says how verifications come out: by parameters, or by a trace (`traces`).
`rounds` plays them, event by event and in closed form. `calibrate` fits what is fitted, to
`published` figures.
"""
