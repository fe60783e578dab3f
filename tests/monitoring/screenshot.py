"""`python -m tests.monitoring.screenshot`: docs/monitoring-overview.png, of the console page with an hour of data."""

import tempfile
import time
from pathlib import Path

from tests.helpers import ROOT
from tests.monitoring.browser import visit
from tests.monitoring.fake_run import FakeRun
from tests.monitoring.real_prometheus import prometheus

PICTURE = ROOT / "docs" / "monitoring-overview.png"


def main() -> None:
    now = time.time()
    run = FakeRun("in1k-swin-base-16gpu", start=now - 4100, ranks=16)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        with prometheus(home, [([run], [now - 3700 + 15 * n for n in range(247)])], [run]) as server:
            time.sleep(130)  # until the moments in which nobody scraped lie behind every rate's window
            page = f"{server.url}/consoles/mixmae.html"
            visit(page, home / "profile", f"--screenshot={PICTURE}", size=(1400, 1735))
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
