"""How long the explorer takes from a movement of a slider until its figures are drawn, in a browser without a window.

    pip install '.[test]'                # Bokeh and Selenium; and Chromium with its driver
    python -P benchmarks/explorer.py     # half a minute; --moves N for more than 20

Three optimizers make 500 iterations each, and the learning rate of the first is moved.  The time ends with the
animation frame after the last drawing.  The time until the new data has come is the server's part of it.  The
processor's time is that of the page's main thread; it says more on a machine that does other work too.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.support.ui import WebDriverWait

QUERY = "?steps=500&A=RMSprop,lr=0.05&B=SGD,lr=0.001&C=Adam,lr=0.1"
VALUES = ("0.06", "0.08", "0.1", "0.05")
ARGUMENTS = ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-dev-shm-usage",
             "disable-background-networking", "disable-component-update", "disable-sync", "window-size=1280,1100",
             "force-device-scale-factor=1")  # fmt: skip
# Move a slider, and give the milliseconds until the data came and until each frame after a drawing, once all is quiet.
MOVE = """
const [value, done] = arguments
const page = Bokeh.documents[0], slider = page.get_model_by_name("lr A")
const source = page.get_model_by_name("course A")
const seen = {data: [], frames: [], drawn: 0}
let start, quiet
const wait = () => { clearTimeout(quiet); quiet = setTimeout(() => { window.noted = null; done(seen) }, 500) }
if (window.noted === undefined) {
  source.connect(source.properties.data.change, () => window.noted?.("data"))
  for (const name of ["surface", "error", "state", "first updates"]) {
    Bokeh.index.find_one(page.get_model_by_name(name)).repainted.connect(() => window.noted?.("drawn"))
  }
}
window.noted = what => {
  wait()
  if (what == "data") seen.data.push(performance.now() - start)
  else {
    seen.drawn += 1
    requestAnimationFrame(() => { seen.frames.push(performance.now() - start); wait() })
  }
}
requestAnimationFrame(() => setTimeout(() => { start = performance.now(); slider.value = value; wait() }, 3))
"""


def processor(browser: Chrome) -> float:
    """The milliseconds that the page's main thread has run."""
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return 1e3 * next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


def measure(browser: Chrome, moves: int) -> tuple[list[dict], float]:
    """What `MOVE` gives for so many movements, and the processor's time of one, after some that are not counted."""
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    seen = []
    for i in range(moves + 4):
        if i == 4:
            before = processor(browser)
        seen.append(browser.execute_async_script(MOVE, VALUES[i % len(VALUES)]))
    return seen[4:], (processor(browser) - before) / moves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=20)
    moves = parser.parse_args().moves
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", "adaptive_c", "explore", "--no-browser", "--port", "0"],
        stdout=subprocess.PIPE, text=True, cwd="/",
    )  # fmt: skip
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())[0]
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            options = ChromeOptions()
            options.binary_location = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))))
            for argument in (*ARGUMENTS, f"user-data-dir={profile}"):
                options.add_argument(f"--{argument}")
            with Chrome(options=options, service=ChromeService(shutil.which("chromedriver"))) as browser:
                browser.set_script_timeout(60)
                browser.get(address + QUERY)
                WebDriverWait(browser, 60).until(
                    lambda _: browser.execute_script("return window.Bokeh?.documents[0]?.is_idle")
                )
                seen, busy = measure(browser, moves)
    finally:
        server.terminate()
        server.communicate()
    for title, numbers in (("data has come", [x["data"][-1] for x in seen]),
                           ("all is drawn", [x["frames"][-1] for x in seen])):  # fmt: skip
        print(f"{title}: median {statistics.median(numbers):.0f} ms, {min(numbers):.0f} to {max(numbers):.0f} ms")
    print(f"processor's time in the page: {busy:.0f} ms per movement")
    print(f"drawings of a figure: {statistics.mean(x['drawn'] for x in seen):.1f} per movement")


if __name__ == "__main__":
    main()
