"""Which 8-bit code?  The errors of several codes, on the moments that Adam has after some training of a model.

    pip install . scikit-learn rich
    python benchmarks/codes.py

Blocks of 256 elements share a scale.  "e5m3" is a floating-point code with 5 bits of exponent and 3 of fraction, whose
scale is a power of two; "linear" has 255 equal steps; "dynamic" is the table of Dettmers et al. (arXiv:2110.02861), and
its scale is the block's largest number.  First moments have a sign bit instead of one bit of the exponent.  All codes
round to nearest here.
"""

import numpy as np

import adaptive_c as ac
from adaptive_c import demo


def floating(exponent, fraction):
    e, f = np.divmod(np.arange(1 << (exponent + fraction)), 1 << fraction)
    return np.ldexp(1 + f / (1 << fraction), e)


def dynamic(signed):
    positive = []
    for i in range(7):
        edges = np.linspace(0.1, 1, (1 << i if signed else 1 << (i + 1)) + 1)
        positive.append(10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2)
    return np.concatenate([[0.0], *positive, [1.0]])


def encoded(x, grid, power_of_two, zero):
    """x, which is not negative, rounded to the numbers of the grid times the scale of the block."""
    blocks = np.pad(x, (0, -x.size % 256)).reshape(-1, 256).astype("float64")
    scale = np.maximum(blocks.max(1, keepdims=True), 1e-300) / grid[-1]
    if power_of_two:
        scale = 2.0 ** np.ceil(np.log2(scale))
    grid = np.concatenate([[0.0], grid]) if zero and grid[0] > 0 else grid
    edges = (grid[1:] + grid[:-1]) / 2
    return (grid[np.searchsorted(edges, blocks / scale)] * scale).ravel()[: x.size]


CODES = {
    "e5m3 / e4m3 (used)": (floating(5, 3), floating(4, 3), True),
    "e4m4 / e3m4": (floating(4, 4), floating(3, 4), True),
    "e6m2 / e5m2": (floating(6, 2), floating(5, 2), True),
    "linear": (np.arange(256.0), np.arange(128.0), False),
    "dynamic": (dynamic(False), dynamic(True), False),
}


def moments():
    """First and second moments of a perceptron on digits, and of a table whose rows were seen 1 to 1,000 times each."""
    x, y, _, _ = demo.digits(0)
    flat, p = ac.flatten(demo.initial(256))
    grad, g = ac.flatten(p, like=flat)
    opt = ac.Adam(flat, lr=2e-3)
    rng = np.random.default_rng(0)
    for _ in range(200):
        part = rng.integers(0, len(x), 64)
        demo.gradient(p, g, x[part], y[part])
        opt.step(grad)
    yield "perceptron", opt.state["exp_avg"], opt.state["exp_avg_sq"]
    table = np.zeros((4000, 16), "float32")
    opt = ac.Adam(table)
    often = np.sort(10.0 ** rng.uniform(-3, 0, 4000))[::-1]
    for _ in range(1000):
        opt.step(rng.standard_normal(table.shape, "float32") * (rng.random(4000) < often)[:, None])
    yield "embedding", opt.state["exp_avg"].ravel(), opt.state["exp_avg_sq"].ravel()


def main():
    print(
        f"{'model':12}{'code of v / of m':22}{'error of v':>12}{'of m':>10}{'of m / sqrt(v)':>16}{'largest step':>14}"
    )
    for model, m, v in moments():
        live = v > 0
        step = np.where(live, m / np.sqrt(np.where(live, v, 1)), 0)
        for name, (unsigned, signed, power_of_two) in CODES.items():
            v8 = encoded(v, unsigned, power_of_two, zero=not power_of_two)
            m8 = np.sign(m) * encoded(abs(m), signed, power_of_two, zero=True)
            with np.errstate(divide="ignore", invalid="ignore"):
                step8 = np.where(m8 == 0, 0, m8 / (np.sqrt(v8) + 1e-8))
            of_v = np.sqrt(np.mean((v8[live] / v[live] - 1) ** 2))
            of_m, of_step = (np.sqrt(((a - b) ** 2).sum() / (b**2).sum()) for a, b in ((m8, m), (step8, step)))
            print(f"{model:12}{name:22}{of_v:12.2%}{of_m:10.2%}{of_step:16.2%}{abs(step8).max():14.1f}")


if __name__ == "__main__":
    main()
