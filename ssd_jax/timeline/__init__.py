"""Rounds of speculative speculative decoding as they ran: recorded, summed up, drawn."""
