"""The colours of the figures and of the explorer.  Nothing is needed to use them."""

Colour = tuple[float, float, float]  # red, green and blue, from 0 to 1

# The colours of Okabe and Ito, which readers with every kind of colour vision can tell apart.  Yellow is too pale here.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")  # fmt: skip
GREY, PALE = "0.45", "0.75"
INK = {ORANGE: "#9A6700", SKY: "#1F78A8", PURPLE: "#A14F7C"}  # darker, where one of them is the colour of a text


def shades(first: Colour, last: Colour, n: int = 256) -> list[Colour]:
    """n colours from the first to the last."""
    parts = [i / (n - 1) for i in range(n)]
    return [(mix[0], mix[1], mix[2]) for x in parts
            for mix in [[a + (b - a) * x for a, b in zip(first, last, strict=True)]]]  # fmt: skip


# Dark to bright blue, by the iteration, and the grounds of contours, paler than every line on them.
COURSE = shades((0.00, 0.10, 0.30), (0.00, 0.70, 0.95))
GROUND = shades((0.72, 0.72, 0.72), (0.98, 0.98, 0.98))
