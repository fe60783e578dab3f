from mixmae.trainer.telemetry.throughput import Throughput


def test_rate_is_images_over_seconds_since_the_restart() -> None:
    now = 10.0
    meter = Throughput(lambda: now)
    assert meter.rate() == 0
    meter.count(64)
    meter.count(64)
    now = 14.0
    assert meter.rate() == 32
    meter.restart()
    meter.count(10)
    now = 15.0
    assert meter.rate() == 10
