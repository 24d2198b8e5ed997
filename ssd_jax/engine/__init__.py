"""Host-side work around the device programs: building batches, reading results."""
