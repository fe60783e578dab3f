"""What a run says of itself: events, curves, metrics, pictures, the samples it used."""
