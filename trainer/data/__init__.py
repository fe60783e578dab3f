"""Image data: order of samples, index, decoding, streaming."""
